//! By default matches reach back at most 4 KiB, so that readers which inflate a cluster in pieces accept the
//! streams.

use crate::inflater::inflate;
use crate::{mixed, random};
use qcow2_codec::{Deflate, DeflateOptions};
use qcow2_core::ClusterCodec;

fn packed(codec: &Deflate, plain: &[u8]) -> Vec<u8> {
    let mut out = vec![0; plain.len() * 2 + 64];
    let len = codec.compress(plain, &mut out).unwrap().unwrap();
    out.truncate(len);
    out
}

#[test]
fn every_level_keeps_the_4k_window() {
    for level in 1..=9 {
        let codec = Deflate::new(DeflateOptions::default().level(level)).unwrap();
        for (seed, len) in [512, 4096, 4097, 65536, 300_000].into_iter().enumerate() {
            let plain = mixed(len, seed as u64 + 1);
            let stream = packed(&codec, &plain);
            let strict = inflate(&stream, 4096).unwrap();
            assert!(strict.plain == plain, "level {level} len {len}");
            assert_eq!(strict.read, stream.len(), "level {level} len {len}");
        }
    }
}

#[test]
fn window_above_4k_breaks_chunked_readers() {
    let codec = Deflate::new(DeflateOptions::default().window_bits(15)).unwrap();
    let plain = mixed(65536, 1);
    let stream = packed(&codec, &plain);
    let strict = inflate(&stream, 32768).unwrap();
    assert!(strict.plain == plain);
    assert!(strict.max_distance > 16384, "{}", strict.max_distance);
    assert!(inflate(&stream, 4096).unwrap_err().contains("too far back"));
    assert!(stream.len() < packed(&Deflate::default(), &plain).len());
    // Our own reader accepts it.
    let mut back = vec![0; plain.len()];
    Deflate::default().expand(&stream, &mut back).unwrap();
    assert!(back == plain);
}

#[test]
fn damaged_streams_match_the_strict_inflater() {
    let (codec, plain) = (Deflate::default(), mixed(2048, 5));
    let good = packed(&codec, &plain);
    let mut next = random(17);
    let (mut both, mut neither) = (0, 0);
    for round in 0..3000 {
        let mut bad = good.clone();
        for _ in 0..1 + next() % 3 {
            let at = next() as usize % bad.len();
            bad[at] ^= 1 << (next() % 8);
        }
        let mut out = vec![0; plain.len()];
        let ours = codec.expand(&bad, &mut out);
        match inflate(&bad, 32768) {
            Ok(strict) if strict.plain.len() >= out.len() => {
                // Ours refuses incomplete codes up front; the strict one fails only when it meets a missing
                // code.
                if ours.is_ok() {
                    assert!(out == strict.plain[..out.len()], "round {round}");
                    both += 1;
                }
            }
            Ok(_) => assert!(ours.is_err(), "round {round}: a short stream was taken"),
            Err(_) => neither += u32::from(ours.is_err()),
        }
    }
    assert!(both > 50 && neither > 50, "{both} streams read by both, {neither} by neither");
}
