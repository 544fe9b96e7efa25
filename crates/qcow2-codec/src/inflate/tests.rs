use super::*;
use crate::deflate::DeflateOptions;
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};
use qcow2_core::ClusterCodec;

struct Rng(u64);

impl Rng {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % limit
    }
}

/// Noise, runs and copies over short and long distances.
fn mixed(len: usize, rng: &mut Rng) -> Vec<u8> {
    let mut out: Vec<u8> = vec![1];
    while out.len() < len {
        let count = 1 + rng.below(300);
        match rng.below(4) {
            0 => out.extend((0..count).map(|_| rng.below(256) as u8)),
            1 => out.extend((0..count).map(|_| b"etaoin shrdlu..."[rng.below(16)])),
            2 => out.extend(std::iter::repeat_n(rng.below(256) as u8, count)),
            _ => {
                let reach = 1 << (1 + rng.below(15));
                let back = 1 + rng.below(out.len().min(reach));
                (0..count).for_each(|_| out.push(out[out.len() - back]));
            }
        }
    }
    out.truncate(len);
    out
}

fn by_zlib(plain: &[u8], level: u32) -> Vec<u8> {
    let mut out = vec![0; plain.len() * 2 + 200];
    let mut writer = Compress::new(Compression::new(level), false);
    assert_eq!(writer.compress(plain, &mut out, FlushCompress::Finish).unwrap(), Status::StreamEnd);
    out.truncate(writer.total_out() as usize);
    out
}

/// zlib-rs's result for a stream with `room` bytes of output. `None` if it fails or is truncated; otherwise
/// the bytes.
fn zlib_reads(stream: &[u8], room: usize) -> Option<Vec<u8>> {
    let mut out = vec![0; room + 1];
    let mut reader = Decompress::new(false);
    let status = reader.decompress(stream, &mut out, FlushDecompress::Finish).ok()?;
    let len = reader.total_out() as usize;
    out.truncate(len);
    (status == Status::StreamEnd || len > room).then_some(out)
}

fn we_read(reader: &mut Inflater, stream: &[u8], room: usize) -> Option<Vec<u8>> {
    let mut out = vec![0xee; room];
    let len = reader.inflate(stream, &mut out).ok()?;
    out.truncate(len);
    Some(out)
}

#[track_caller]
fn check_same(reader: &mut Inflater, stream: &[u8], room: usize) -> bool {
    let (ours, theirs) = (we_read(reader, stream, room), zlib_reads(stream, room));
    let theirs = theirs.map(|mut bytes| {
        bytes.truncate(room);
        bytes
    });
    assert!(ours == theirs, "{:?} and {:?}", ours.map(|b| b.len()), theirs.map(|b| b.len()));
    ours.is_some()
}

#[test]
fn streams_of_zlib_and_our_writer_round_trip() {
    let (mut reader, mut rng) = (Inflater::new(), Rng(3));
    for round in 0..200 {
        let len = 1 + rng.below([40, 600, 70_000][round % 3]);
        let plain = mixed(len, &mut rng);
        let mut streams: Vec<Vec<u8>> = [0, 1, 6, 9].iter().map(|&level| by_zlib(&plain, level)).collect();
        let own = crate::Deflate::new(DeflateOptions::default().level(1 + round as u32 % 9)).unwrap();
        let mut out = vec![0; len * 2 + 200];
        let own_len = own.compress(&plain, &mut out).unwrap().unwrap();
        streams.push(out[..own_len].to_vec());
        for mut stream in streams {
            assert!(we_read(&mut reader, &stream, len).as_deref() == Some(&plain), "{round}");
            // With more room the stream ends early, with less the output is full. Bytes after the stream are
            // ignored.
            stream.extend([0x5a; 3]);
            for room in [len + 500, len, len - 1, len / 2, 0] {
                assert!(check_same(&mut reader, &stream, room), "{round}");
            }
        }
    }
}

#[test]
fn truncated_streams_are_refused() {
    let (mut reader, mut rng) = (Inflater::new(), Rng(9));
    for (len, level) in [(50, 6), (3000, 6), (3000, 1), (700, 0)] {
        let plain = mixed(len, &mut rng);
        let stream = by_zlib(&plain, level);
        for cut in 0..stream.len() {
            check_same(&mut reader, &stream[..cut], len);
            assert!(we_read(&mut reader, &stream[..cut], len).is_none(), "{cut} of {}", stream.len());
        }
    }
}

/// A stored block longer than the output: only the next byte shows whether the stream continues.
#[test]
fn stored_block_truncated_at_the_end_of_the_output_is_refused() {
    let (mut reader, mut rng) = (Inflater::new(), Rng(11));
    let stream = by_zlib(&mixed(700, &mut rng), 0);
    let header = 5;
    for room in [0, 1, 300, 699] {
        assert!(!check_same(&mut reader, &stream[..header + room], room), "cut after {room} bytes");
        assert!(check_same(&mut reader, &stream[..header + room + 1], room), "one byte more than {room}");
    }
}

#[test]
fn damaged_streams_match_zlib() {
    let (mut reader, mut rng) = (Inflater::new(), Rng(21));
    let (mut taken, mut refused) = (0, 0);
    for round in 0..6000 {
        let len = 1 + rng.below(900);
        let mut stream = by_zlib(&mixed(len, &mut rng), [0, 1, 6, 6][round % 4]);
        // Favour the header, where most faults have an effect.
        let place = if rng.below(2) == 0 { stream.len().min(90) } else { stream.len() };
        for _ in 0..1 + rng.below(3) {
            stream[rng.below(place)] ^= 1 << rng.below(8);
        }
        match check_same(&mut reader, &stream, len) {
            true => taken += 1,
            false => refused += 1,
        }
    }
    assert!(taken > 500 && refused > 500, "{taken} taken, {refused} refused");
}

/// A dynamic block header with these code lengths for literals from 0, for end-of-block and for distances,
/// and some symbols.
fn header(literals: &[u8], end: u8, distances: &[u8]) -> Vec<u8> {
    let mut bits: Vec<bool> = Vec::new();
    let mut put = |value: usize, count: usize| bits.extend((0..count).map(|bit| value >> bit & 1 == 1));
    put(1 | 2 << 1, 3);
    put(0, 5);
    put(distances.len() - 1, 5);
    put(19 - 4, 4);
    // Code lengths are sent with four bits each: sixteen of the nineteen have codes, in the order of RFC
    // 1951.
    for symbol in [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15] {
        put(if symbol < 16 { 4 } else { 0 }, 3);
    }
    let mut lengths = literals.to_vec();
    lengths.resize(256, 0);
    lengths.push(end);
    lengths.extend(distances);
    for length in lengths {
        put(usize::from(length.reverse_bits() >> 4), 4);
    }
    put(0b0110_1001_0110, 12);
    bits.resize(bits.len().next_multiple_of(8) + 64, false);
    bits.chunks(8).map(|byte| byte.iter().rev().fold(0, |sum, &bit| sum << 1 | u8::from(bit))).collect()
}

#[test]
fn block_headers_match_zlib() {
    let mut reader = Inflater::new();
    let cases: [(&[u8], u8, &[u8]); 12] = [
        (&[1], 1, &[1]),
        (&[1], 1, &[0]),
        (&[1], 1, &[1, 1]),
        (&[2, 2], 1, &[0, 0, 1]),
        (&[1, 2, 3], 3, &[1, 2, 2]),
        (&[], 1, &[0]),
        // No end of block; too few codes; too many; the same for distances.
        (&[1, 1], 0, &[1]),
        (&[2], 1, &[1]),
        (&[1, 1], 1, &[1]),
        (&[1], 1, &[2]),
        (&[1], 1, &[1, 1, 1]),
        (&[1], 1, &[2, 2, 2]),
    ];
    for (number, (literals, end, distances)) in cases.into_iter().enumerate() {
        let stream = header(literals, end, distances);
        for room in [0, 1, 2, 300] {
            let taken = check_same(&mut reader, &stream, room);
            assert!(!taken || number < 6, "header {number}");
        }
    }
    let stream = header(&[1], 1, &[1]);
    assert!(check_same(&mut reader, &stream, 1), "the first header is valid");
}

#[test]
fn random_streams_match_zlib() {
    let (mut reader, mut rng) = (Inflater::new(), Rng(77));
    for _ in 0..20_000 {
        let stream: Vec<u8> = (0..1 + rng.below(120)).map(|_| rng.below(256) as u8).collect();
        check_same(&mut reader, &stream, 300);
    }
}
