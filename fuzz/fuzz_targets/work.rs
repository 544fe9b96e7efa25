//! See `qcow2_tests::fuzz::work`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| qcow2_tests::fuzz::work(data));
