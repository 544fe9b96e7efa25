//! See `qcow2_tests::fuzz::open_read`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| qcow2_tests::fuzz::open_read(data));
