//! A cheap run-length codec for simulations; it compresses content with long runs of equal words.

use qcow2_core::{ClusterCodec, CodecError};

/// Stores each run of equal 8-byte words as the word and its count.
#[derive(Clone, Copy, Debug, Default)]
pub struct RunCodec;

const RECORD: usize = 10;

impl ClusterCodec for RunCodec {
    fn compress(&self, plain: &[u8], out: &mut [u8]) -> Result<Option<usize>, CodecError> {
        let mut len = 0;
        let mut words = plain.as_chunks::<8>().0.iter().peekable();
        while let Some(word) = words.next() {
            let mut count = 1u16;
            while count < u16::MAX && words.next_if(|next| *next == word).is_some() {
                count += 1;
            }
            let Some(record) = out.get_mut(len..len + RECORD) else { return Ok(None) };
            record[..8].copy_from_slice(word);
            record[8..].copy_from_slice(&count.to_be_bytes());
            len += RECORD;
        }
        Ok(Some(len))
    }

    fn expand(&self, stream: &[u8], out: &mut [u8]) -> Result<(), CodecError> {
        let mut rest = out;
        let mut records = stream.chunks_exact(RECORD);
        while !rest.is_empty() {
            let Some(record) = records.next() else { return Err(CodecError::new("stream ends early")) };
            let count = usize::from(u16::from_be_bytes([record[8], record[9]]));
            if count == 0 || count * 8 > rest.len() {
                return Err(CodecError::new(format!("run of {count} words, {} bytes are left", rest.len())));
            }
            let (run, after) = rest.split_at_mut(count * 8);
            run.as_chunks_mut::<8>().0.iter_mut().for_each(|word| word.copy_from_slice(&record[..8]));
            rest = after;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pattern;

    #[test]
    fn expanding_restores_the_input() {
        for (seed, fits) in [(0, true), (4, true), (8, true), (5, false)] {
            let plain = pattern::bytes(seed, 4096, 4096);
            let mut out = vec![0; 4095];
            let len = RunCodec.compress(&plain, &mut out).unwrap();
            assert_eq!(len.is_some(), fits, "{seed}");
            if let Some(len) = len {
                let mut back = vec![9; 4096];
                // The bytes after a stream in its last sector belong to another stream.
                RunCodec.expand(&out[..len.next_multiple_of(512).min(4095)], &mut back).unwrap();
                assert!(back == plain);
                assert!(RunCodec.expand(&out[..len - 1], &mut back).is_err());
            }
        }
        assert!(RunCodec.expand(&[0; 512], &mut [0; 512]).is_err());
    }
}
