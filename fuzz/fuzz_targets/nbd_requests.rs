//! See `qcow2_tests::fuzz::nbd_requests`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| qcow2_tests::fuzz::nbd_requests(data));
