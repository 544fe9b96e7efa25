//! See `qcow2_tests::fuzz::luks_header`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| qcow2_tests::fuzz::luks_header(data));
