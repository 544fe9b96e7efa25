//! See `qcow2_testkit::fuzz::parse_header`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| qcow2_testkit::fuzz::parse_header(data));
