//! See `qcow2_tests::fuzz::check_then_read`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| qcow2_tests::fuzz::check_then_read(data));
