use super::*;
use flate2::{Decompress, FlushDecompress, Status};

const EFFORTS: [Effort; 4] = [
    Effort { depth: 2, nice: 8, lazy: 0 },
    Effort { depth: 8, nice: 32, lazy: 1 },
    Effort { depth: 32, nice: 128, lazy: 2 },
    Effort { depth: 1000, nice: 258, lazy: 2 },
];

fn inflate(stream: &[u8], len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    let mut reader = Decompress::new(false);
    let status = reader.decompress(stream, &mut out, FlushDecompress::Finish).unwrap();
    assert_eq!((status, reader.total_out() as usize), (Status::StreamEnd, len));
    assert_eq!(reader.total_in() as usize, stream.len());
    out
}

#[track_caller]
fn check(plain: &[u8]) -> usize {
    let mut best = usize::MAX;
    for effort in EFFORTS {
        let mut squeezer = Squeezer::new(effort);
        let mut out = vec![0; plain.len() + plain.len() / 8 + 64];
        let len = squeezer.compress(plain, &mut out).unwrap();
        assert!(inflate(&out[..len], plain.len()) == plain, "{effort:?}");
        let again = squeezer.compress(plain, &mut out[..len]);
        assert_eq!(again, Some(len), "exactly enough room, and the same stream again");
        assert_eq!(squeezer.compress(plain, &mut out[..len - 1]), None);
        best = best.min(len);
    }
    best
}

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

#[test]
fn small_and_constant_inputs_round_trip() {
    for len in [1, 2, 3, 4, 5, 7, 8, 255, 257, 258, 259, 511, 512] {
        check(&vec![7; len]);
        check(&(0..len).map(|i| i as u8).collect::<Vec<_>>());
    }
    assert!(check(&[0; 65536]) < 120);
    assert!(check(&vec![0; 2 << 20]) < 3000);
}

#[test]
fn noise_is_stored() {
    let mut rng = Rng(77);
    let noise: Vec<u8> = (0..70_000).map(|_| rng.next() as u8).collect();
    assert!(check(&noise) <= noise.len() + 64);
}

/// A block may hold more noise than one stored block can. Only the last stored block has the final flag.
#[test]
fn stored_blocks_above_65535_bytes_set_the_final_flag_once() {
    for (len, seed) in [(100_000, 3), (200_000, 5), (300_000, 7)] {
        let mut rng = Rng(seed);
        let mut noise: Vec<u8> = (0..len).map(|_| rng.next() as u8).collect();
        // Short matches far apart: the block continues past them, and they save too little to pay for dynamic
        // codes.
        for at in (20_000..len - 6).step_by(20_000) {
            noise.copy_within(at - 1000..at - 994, at);
        }
        assert!(check(&noise) <= noise.len() + 64, "{len} bytes of noise are stored");
    }
}

#[test]
fn text_compresses() {
    let mut rng = Rng(5);
    let words =
        ["cluster ", "table ", "refcount ", "backing ", "file ", "offset ", "guest ", "host ", "the ", "of "];
    let mut text = Vec::new();
    while text.len() < 65536 {
        text.extend_from_slice(words[(rng.next() % 10) as usize].as_bytes());
    }
    text.truncate(65536);
    assert!(check(&text) < 65536 / 6);
}

#[test]
fn random_structures_round_trip() {
    for seed in 1..60 {
        let mut rng = Rng(seed * 0x1234_5677);
        let mut plain: Vec<u8> = vec![rng.next() as u8];
        let target = 1 + (rng.next() % 150_000) as usize;
        while plain.len() < target {
            match rng.next() % 4 {
                0 => plain.extend((0..rng.next() % 300).map(|_| rng.0 as u8).collect::<Vec<_>>()),
                1 => {
                    let byte = rng.next() as u8;
                    plain.extend(std::iter::repeat_n(byte, (rng.next() % 700) as usize));
                }
                2 => plain.extend((0..rng.next() % 200).map(|i| (i % 7) as u8).collect::<Vec<_>>()),
                _ => {
                    let back = 1 + (rng.next() as usize) % plain.len().min(9000);
                    for _ in 0..rng.next() % 400 {
                        plain.push(plain[plain.len() - back]);
                    }
                }
            }
        }
        check(&plain);
    }
}
