//! See `qcow2_tests::fuzz::damaged_work`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| qcow2_tests::fuzz::damaged_work(data));
