//! Deflate, compression type 0: one raw stream (RFC 1951, no zlib or gzip wrapper) per cluster.
//!
//! Like QEMU, this codec compresses with a 4 KiB window by default; every known reader accepts such streams.
//! Streams with the full 32 KiB window can be expanded as well. Spec: "Compressed Clusters".
//!
//! The reader, and the writer for the default window, are this crate's own. They work on whole clusters in
//! memory and are about one and a half times as fast as zlib-rs. Other windows are compressed with flate2.
//!
//! Memory per thread that compresses: about 150 KiB, whatever the cluster size; with another window about 300
//! KiB and 1.25 clusters. Per thread that expands: about 20 KiB.

use crate::inflate::{Fault, Inflater};
use crate::pool::Pool;
use crate::squeeze::{Effort, Squeezer};
use flate2::{Compress, Compression, FlushCompress, Status};
use qcow2_core::{ClusterCodec, CodecError};

/// The highest compression level; gives the smallest streams.
pub const MAX_LEVEL: u32 = 9;
/// The lowest and fastest compression level. There is no level 0: it only stores, and a cluster that does not
/// shrink is better stored uncompressed.
pub const MIN_LEVEL: u32 = 1;
/// The window that every reader accepts: matches reach back at most 4 KiB.
pub const DEFAULT_WINDOW_BITS: u32 = 12;
/// The largest window, 32 KiB. Readers that inflate a cluster in pieces with a 4 KiB window reject such
/// streams.
pub const MAX_WINDOW_BITS: u32 = 15;
/// The smallest window, 512 bytes.
pub const MIN_WINDOW_BITS: u32 = 9;
/// Options for compressing; expanding does not depend on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeflateOptions {
    /// 1 (fastest) to 9 (smallest); default 6.
    pub level: u32,
    /// log2 of the largest match distance, 9..=15; default 12.
    pub window_bits: u32,
}

impl Default for DeflateOptions {
    fn default() -> Self {
        Self { level: 6, window_bits: DEFAULT_WINDOW_BITS }
    }
}

impl DeflateOptions {
    /// Sets the level.
    pub fn level(self, level: u32) -> Self {
        Self { level, ..self }
    }

    /// Sets the window.
    pub fn window_bits(self, window_bits: u32) -> Self {
        Self { window_bits, ..self }
    }
}

/// Search effort of levels 1 to 9.
const EFFORTS: [Effort; MAX_LEVEL as usize] = [
    Effort { depth: 1, nice: 8, lazy: 0 },
    Effort { depth: 2, nice: 12, lazy: 0 },
    Effort { depth: 2, nice: 16, lazy: 1 },
    Effort { depth: 4, nice: 24, lazy: 1 },
    Effort { depth: 6, nice: 32, lazy: 1 },
    Effort { depth: 8, nice: 32, lazy: 1 },
    Effort { depth: 16, nice: 64, lazy: 1 },
    Effort { depth: 48, nice: 128, lazy: 2 },
    Effort { depth: 200, nice: 258, lazy: 2 },
];

/// A flate2 compressor with a scratch buffer large enough for any stream. zlib-rs 0.6 panics at some levels
/// when its output runs full, so the stream goes to the scratch buffer first and is copied if it fits.
struct WideWriter {
    deflate: Compress,
    room: Vec<u8>,
}

/// The compressor for the chosen window.
enum Writer {
    /// Window of 4 KiB: this crate's own writer.
    Own(Box<Squeezer>),
    /// Any other window: flate2.
    Wide(WideWriter),
}

/// The deflate codec.
pub struct Deflate {
    options: DeflateOptions,
    writers: Pool<Writer>,
    readers: Pool<Inflater>,
}

impl Deflate {
    /// A codec with these options. Errors: a level or window out of range.
    pub fn new(options: DeflateOptions) -> Result<Self, CodecError> {
        let DeflateOptions { level, window_bits } = options;
        if !(MIN_LEVEL..=MAX_LEVEL).contains(&level) {
            let allowed = format!("allowed are {MIN_LEVEL} to {MAX_LEVEL}");
            return Err(CodecError::new(format!("deflate level is {level}, {allowed}")));
        }
        if !(MIN_WINDOW_BITS..=MAX_WINDOW_BITS).contains(&window_bits) {
            return Err(CodecError::new(format!(
                "deflate window bits are {window_bits}, allowed are {MIN_WINDOW_BITS} to {MAX_WINDOW_BITS}"
            )));
        }
        Ok(Self::with_checked(options))
    }

    fn with_checked(options: DeflateOptions) -> Self {
        Self { options, writers: Pool::new(), readers: Pool::new() }
    }
}

impl Default for Deflate {
    fn default() -> Self {
        Self::with_checked(DeflateOptions::default())
    }
}

impl ClusterCodec for Deflate {
    fn compress(&self, plain: &[u8], out: &mut [u8]) -> Result<Option<usize>, CodecError> {
        self.writers.with(
            || Ok(Writer::new(self.options)),
            |writer| match writer {
                Writer::Own(squeezer) => Ok(squeezer.compress(plain, out)),
                Writer::Wide(writer) => writer.compress(plain, out),
            },
        )
    }

    fn expand(&self, stream: &[u8], out: &mut [u8]) -> Result<(), CodecError> {
        self.readers.with(|| Ok(Inflater::new()), |reader| inflate(reader, stream, out))
    }
}

impl Writer {
    /// A writer for options that have been checked.
    fn new(options: DeflateOptions) -> Self {
        let effort = EFFORTS.get(options.level as usize - 1);
        if let (DEFAULT_WINDOW_BITS, Some(&effort)) = (options.window_bits, effort) {
            return Self::Own(Box::new(Squeezer::new(effort)));
        }
        let level = Compression::new(options.level);
        let deflate = Compress::new_with_window_bits(level, false, options.window_bits as u8);
        Self::Wide(WideWriter { deflate, room: Vec::new() })
    }
}

impl WideWriter {
    fn compress(&mut self, plain: &[u8], out: &mut [u8]) -> Result<Option<usize>, CodecError> {
        // Upper bound of the output: the fastest level codes a literal in at most nine bits, the others fall
        // back to stored blocks.
        self.room.resize(plain.len() + plain.len() / 4 + 64, 0);
        self.deflate.reset();
        let status = self
            .deflate
            .compress(plain, &mut self.room, FlushCompress::Finish)
            .map_err(|e| CodecError::new(format!("deflate failed: {e}")))?;
        let len = self.deflate.total_out() as usize;
        if status != Status::StreamEnd || len > out.len() {
            return Ok(None);
        }
        out[..len].copy_from_slice(&self.room[..len]);
        Ok(Some(len))
    }
}

/// Fills `out` from `stream`. The stream must end exactly there or have more output to give. A truncated
/// stream is refused even if the cluster is already complete.
fn inflate(reader: &mut Inflater, stream: &[u8], out: &mut [u8]) -> Result<(), CodecError> {
    match reader.inflate(stream, out) {
        Ok(filled) | Err(Fault::Cut(filled)) if filled < out.len() => Err(CodecError::new(format!(
            "deflate stream ends after {filled} bytes, a cluster has {}",
            out.len()
        ))),
        Ok(_) => Ok(()),
        Err(Fault::Cut(_)) => {
            Err(CodecError::new(format!("deflate stream has no end within its {} bytes", stream.len())))
        }
        Err(fault) => {
            Err(CodecError::new(format!("deflate stream of at most {} bytes: {fault}", stream.len())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(len: usize, seed: u64) -> Vec<u8> {
        let mut x = seed | 1;
        let mut step = move || {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x as u8
        };
        (0..len).map(|_| step()).collect()
    }

    fn packed(codec: &Deflate, plain: &[u8]) -> Vec<u8> {
        let mut out = vec![0; plain.len() * 2 + 64];
        let len = codec.compress(plain, &mut out).unwrap().unwrap();
        out.truncate(len);
        out
    }

    #[track_caller]
    fn check_error(stream: &[u8], cluster: usize, says: &str) {
        let error = Deflate::default().expand(stream, &mut vec![0; cluster]).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }

    #[test]
    fn every_level_and_window_round_trips() {
        let mut plain = noise(3000, 9);
        plain.extend_from_within(..);
        plain.extend(vec![0; 2192]);
        for level in 1..=9 {
            for window_bits in 9..=15 {
                let codec =
                    Deflate::new(DeflateOptions::default().level(level).window_bits(window_bits)).unwrap();
                let mut back = vec![1; plain.len()];
                codec.expand(&packed(&codec, &plain), &mut back).unwrap();
                assert_eq!(back, plain, "level {level} window {window_bits}");
            }
        }
    }

    #[test]
    fn expands_a_hand_made_stream() {
        // Fixed codes: the literal 'a' and a match of distance 1, encoded by hand from RFC 1951.
        let mut out = [0; 4];
        Deflate::default().expand(&[0x4b, 0x04, 0x02, 0x00], &mut out).unwrap();
        assert_eq!(&out, b"aaaa");
        // A stored block.
        Deflate::default().expand(&[1, 4, 0, 0xfb, 0xff, b'd', b'i', b's', b'k'], &mut out).unwrap();
        assert_eq!(&out, b"disk");
    }

    #[test]
    fn output_that_does_not_fit_gives_none() {
        let plain = noise(65536, 3);
        for len in [1, 511, 512, 65535, 2 << 20] {
            let noise = noise(len, 7);
            for level in 1..=9 {
                // `packed` offers room for any stream, so even incompressible input gives one.
                let codec = Deflate::new(DeflateOptions::default().level(level)).unwrap();
                assert!(packed(&codec, &noise).len() > len, "level {level} len {len}");
            }
        }
        for level in 1..=9 {
            let codec = Deflate::new(DeflateOptions::default().level(level)).unwrap();
            for room in [0, 1, 2, 100, 65535] {
                assert_eq!(codec.compress(&plain, &mut vec![0; room]), Ok(None), "level {level} room {room}");
            }
            let mixed = [&plain[..1500], &[0; 1000], &plain[..1500]].concat();
            let len = packed(&codec, &mixed).len();
            for room in (0..len).step_by(3).chain([len - 1]) {
                assert_eq!(codec.compress(&mixed, &mut vec![0; room]), Ok(None), "level {level} room {room}");
            }
            assert_eq!(codec.compress(&mixed, &mut vec![0; len]), Ok(Some(len)), "level {level}");
            // The context still works after an overflow.
            let mut back = vec![0; plain.len()];
            codec.expand(&packed(&codec, &plain), &mut back).unwrap();
            assert!(back == plain);
        }
    }

    #[test]
    fn bytes_after_the_end_are_ignored() {
        let codec = Deflate::default();
        let plain = [5; 4096];
        for tail in [&[0u8; 512][..], &[0xff; 512], &noise(512, 1)] {
            let mut stream = packed(&codec, &plain);
            stream.extend_from_slice(tail);
            let mut back = [0; 4096];
            codec.expand(&stream, &mut back).unwrap();
            assert_eq!(back, plain);
        }
    }

    #[test]
    fn output_after_a_full_cluster_is_ignored() {
        let codec = Deflate::default();
        let plain = noise(1000, 4);
        let mut back = vec![0; 512];
        codec.expand(&packed(&codec, &plain), &mut back).unwrap();
        assert_eq!(back, plain[..512]);
    }

    #[test]
    fn short_streams_are_refused() {
        let codec = Deflate::default();
        let stream = packed(&codec, &[9; 4095]);
        check_error(&stream, 4096, "ends after 4095 bytes, a cluster has 4096");
        check_error(&[], 512, "ends after 0 bytes");
        let whole = packed(&codec, &noise(4096, 5));
        for cut in 0..whole.len() {
            assert!(codec.expand(&whole[..cut], &mut [0; 4096]).is_err(), "cut at {cut}");
        }
    }

    #[test]
    fn unterminated_stream_is_refused() {
        // A non-final stored block holds the whole cluster; nothing, or only zeroes, follow.
        let mut stream = vec![0, 0, 2, 0xff, 0xfd];
        stream.extend([7; 512]);
        check_error(&stream, 512, "no end");
        stream.extend([0; 64]);
        assert!(Deflate::default().expand(&stream, &mut [0; 512]).is_err());
    }

    #[test]
    fn damaged_and_wrapped_streams_are_refused() {
        check_error(&[0x78, 0x9c, 0x4b, 0x04, 0x02, 0x00], 4, "deflate stream");
        check_error(&[0x06, 0, 0, 0], 4, "deflate stream");
        let codec = Deflate::default();
        for seed in 0..2000 {
            // Any result is fine, as long as there is no panic and no write outside the cluster.
            let _ = codec.expand(&noise(600, seed * 77 + 1), &mut [0; 512]);
        }
    }

    #[test]
    fn options_are_checked() {
        assert!(Deflate::new(DeflateOptions::default().level(0)).is_err());
        assert!(Deflate::new(DeflateOptions::default().level(10)).is_err());
        assert!(Deflate::new(DeflateOptions::default().window_bits(8)).is_err());
        assert!(Deflate::new(DeflateOptions::default().window_bits(16)).is_err());
    }

    #[test]
    fn reused_context_gives_the_same_stream() {
        for level in 1..=9 {
            let options = DeflateOptions::default().level(level);
            let (used, plain) = (Deflate::new(options).unwrap(), noise(2048, 8).repeat(4));
            for seed in 1..20 {
                let _ = used.compress(&noise(8192, seed), &mut [0; 700]);
            }
            assert!(packed(&used, &plain) == packed(&Deflate::new(options).unwrap(), &plain));
        }
    }
}
