//! See `qcow2_tests::fuzz::open_write`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| qcow2_tests::fuzz::open_write(data));
