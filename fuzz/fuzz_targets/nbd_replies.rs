//! See `qcow2_tests::fuzz::nbd_replies`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| qcow2_tests::fuzz::nbd_replies(data));
