//! See `qcow2_testkit::fuzz::parse_tables`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| qcow2_testkit::fuzz::parse_tables(data));
