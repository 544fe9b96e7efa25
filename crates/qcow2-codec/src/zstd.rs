//! Zstandard, compression type 1: one frame per cluster, with its content size and without a checksum.
//!
//! Expanding reads frames until the cluster is full and ignores what follows: the sectors may hold other
//! streams. Frames are expanded directly into the cluster, so the window size in a frame costs no memory.
//! Spec: "Compressed Clusters".

use crate::pool::Pool;
use qcow2_core::{ClusterCodec, CodecError};
use zstd::zstd_safe::{
    CCtx, CParameter, DCtx, ErrorCode, ResetDirective, find_frame_compressed_size, get_error_name,
    max_c_level, min_c_level,
};

/// The default level of the zstd library, which QEMU uses too.
pub const DEFAULT_LEVEL: i32 = 3;

/// `ZSTD_error_dstSize_tooSmall`. The library guarantees stable error numbers.
const TOO_SMALL: usize = 70;

/// The zstd codec.
pub struct Zstd {
    level: i32,
    writers: Pool<CCtx<'static>>,
    readers: Pool<DCtx<'static>>,
}

impl Zstd {
    /// A codec for `level`: 1 (fast) to 22 (small), or below 1 for even faster. Errors: a level that the
    /// library does not have.
    pub fn new(level: i32) -> Result<Self, CodecError> {
        let (min, max) = (min_c_level(), max_c_level());
        if level < min || level > max {
            return Err(CodecError::new(format!("zstd level is {level}, allowed are {min} to {max}")));
        }
        Ok(Self::with_checked(level))
    }

    fn with_checked(level: i32) -> Self {
        Self { level, writers: Pool::new(), readers: Pool::new() }
    }

    fn writer(&self) -> Result<CCtx<'static>, CodecError> {
        let mut writer = CCtx::try_create().ok_or_else(|| CodecError::new("no memory for a zstd context"))?;
        writer.set_parameter(CParameter::CompressionLevel(self.level)).map_err(failed)?;
        writer.set_parameter(CParameter::ContentSizeFlag(true)).map_err(failed)?;
        writer.set_parameter(CParameter::ChecksumFlag(false)).map_err(failed)?;
        Ok(writer)
    }
}

impl Default for Zstd {
    fn default() -> Self {
        Self::with_checked(DEFAULT_LEVEL)
    }
}

impl ClusterCodec for Zstd {
    fn compress(&self, plain: &[u8], out: &mut [u8]) -> Result<Option<usize>, CodecError> {
        self.writers.with(
            || self.writer(),
            |writer| match writer.compress2(out, plain) {
                Ok(len) => Ok(Some(len)),
                Err(code) => {
                    writer.reset(ResetDirective::SessionOnly).map_err(failed)?;
                    if is_too_small(code) { Ok(None) } else { Err(failed(code)) }
                }
            },
        )
    }

    fn expand(&self, stream: &[u8], out: &mut [u8]) -> Result<(), CodecError> {
        let make = || DCtx::try_create().ok_or_else(|| CodecError::new("no memory for a zstd context"));
        self.readers.with(make, |reader| expand_frames(reader, stream, out))
    }
}

fn failed(code: ErrorCode) -> CodecError {
    CodecError::new(format!("zstd failed: {}", get_error_name(code)))
}

fn is_too_small(code: ErrorCode) -> bool {
    code == TOO_SMALL.wrapping_neg()
}

fn expand_frames(reader: &mut DCtx<'_>, stream: &[u8], out: &mut [u8]) -> Result<(), CodecError> {
    let (mut read, mut filled) = (0, 0);
    while filled < out.len() {
        let rest = &stream[read..];
        if rest.is_empty() {
            return Err(CodecError::new(format!(
                "zstd frames end after {filled} bytes, a cluster has {}",
                out.len()
            )));
        }
        let damaged = |code| {
            CodecError::new(format!(
                "zstd frame at byte {read} of at most {}: {}",
                stream.len(),
                get_error_name(code)
            ))
        };
        let frame = find_frame_compressed_size(rest).map_err(damaged)?;
        filled += reader.decompress(&mut out[filled..], &rest[..frame]).map_err(damaged)?;
        read += frame;
    }
    Ok(())
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

    fn packed(codec: &Zstd, plain: &[u8]) -> Vec<u8> {
        let mut out = vec![0; plain.len() + 64];
        let len = codec.compress(plain, &mut out).unwrap().unwrap();
        out.truncate(len);
        out
    }

    #[track_caller]
    fn check_error(stream: &[u8], cluster: usize, says: &str) {
        let error = Zstd::default().expand(stream, &mut vec![0; cluster]).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }

    #[test]
    fn negative_and_positive_levels_round_trip() {
        let mut plain = noise(9000, 2);
        plain.extend_from_within(..);
        plain.resize(65536, 0);
        for level in [-5, 0, 1, 3, 9, 19, 22] {
            let codec = Zstd::new(level).unwrap();
            let mut back = vec![1; plain.len()];
            codec.expand(&packed(&codec, &plain), &mut back).unwrap();
            assert!(back == plain, "level {level}");
        }
        assert!(Zstd::new(23).is_err());
        assert!(Zstd::new(i32::MIN).is_err());
    }

    #[test]
    fn frame_headers_match_qemu() {
        // Magic, single segment without checksum, content size in two or four bytes.
        let codec = Zstd::default();
        assert_eq!(packed(&codec, &[1; 65536])[..7], [0x28, 0xb5, 0x2f, 0xfd, 0x60, 0x00, 0xff]);
        assert_eq!(packed(&codec, &[1; 512])[4..7], [0x60, 0x00, 0x01]);
        assert_eq!(packed(&codec, &vec![1; 2 << 20])[4..9], [0xa0, 0, 0, 0x20, 0]);
    }

    #[test]
    fn output_that_does_not_fit_gives_none() {
        let (codec, plain) = (Zstd::default(), noise(65536, 3));
        for room in [0, 1, 9, 100, 65535] {
            assert_eq!(codec.compress(&plain, &mut vec![0; room]), Ok(None), "room {room}");
            assert!(codec.compress(&[0; 4096], &mut [0; 100]).unwrap().is_some());
        }
    }

    #[test]
    fn multiple_frames_fill_a_cluster_and_the_tail_is_ignored() {
        let (codec, plain) = (Zstd::default(), noise(1024, 6));
        let mut stream = packed(&codec, &plain[..300]);
        stream.extend([0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3]); // a skippable frame
        stream.extend(packed(&codec, &[]));
        stream.extend(packed(&codec, &plain[300..]));
        for tail in [&[][..], &[0; 100], &noise(100, 1)] {
            let mut whole = stream.clone();
            whole.extend_from_slice(tail);
            let mut back = [0; 1024];
            codec.expand(&whole, &mut back).unwrap();
            assert_eq!(back[..], plain);
        }
    }

    #[test]
    fn short_long_and_truncated_frames_are_refused() {
        let codec = Zstd::default();
        check_error(&packed(&codec, &[4; 511]), 512, "end after 511 bytes, a cluster has 512");
        check_error(&packed(&codec, &[4; 513]), 512, "too small");
        check_error(&[], 512, "end after 0 bytes");
        let whole = packed(&codec, &noise(4096, 5));
        for cut in 0..whole.len() {
            assert!(codec.expand(&whole[..cut], &mut [0; 4096]).is_err(), "cut at {cut}");
        }
    }

    #[test]
    fn damaged_frames_never_write_outside_the_cluster() {
        let (codec, plain) = (Zstd::default(), b"cluster ".repeat(64));
        check_error(&noise(100, 1), 512, "zstd frame at byte 0 of at most 100");
        check_error(&[0x78, 0x9c, 0, 0], 512, "zstd frame at byte 0");
        let good = packed(&codec, &plain);
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                let _ = codec.expand(&bad, &mut [0; 512]);
            }
        }
        let mut back = [0; 512];
        codec.expand(&good, &mut back).unwrap();
        assert_eq!(back[..], plain);
    }

    #[test]
    fn huge_frame_window_costs_no_memory() {
        // Not single-segment, a window descriptor of about 2 TiB, one raw block: a valid, small frame.
        let mut stream = vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa8, 0x01 | (4 << 3), 0, 0];
        stream.extend(b"disk");
        let mut back = [0; 4];
        Zstd::default().expand(&stream, &mut back).unwrap();
        assert_eq!(&back, b"disk");
    }

    #[test]
    fn reused_context_gives_the_same_stream() {
        for level in [1, 3, 5, 7, 12, 16] {
            let (used, plain) = (Zstd::new(level).unwrap(), noise(3000, 8).repeat(20));
            for seed in 1..20 {
                let _ = used.compress(&noise(60000, seed), &mut [0; 700]);
                let _ = used.compress(&noise(1000, seed).repeat(30), &mut [0; 4000]);
            }
            assert!(packed(&used, &plain) == packed(&Zstd::new(level).unwrap(), &plain), "level {level}");
        }
    }
}
