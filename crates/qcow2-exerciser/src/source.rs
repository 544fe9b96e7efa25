//! Data of writes: one byte everywhere, or the content of a file, repeated.

use crate::reason::{OUT_OF_MEMORY, Reason};

/// Endless data: a run of bytes, repeated.
pub(crate) struct Source {
    /// The repeated run, not empty.
    period: Vec<u8>,
    /// Number of bytes returned so far, modulo the length of `period`.
    phase: usize,
    piece: Vec<u8>,
}

impl Source {
    /// The same byte everywhere.
    pub(crate) fn byte(byte: u8) -> Self {
        Self { period: vec![byte], phase: 0, piece: Vec::new() }
    }

    /// Repeats `period`; `None` if it is empty.
    pub(crate) fn repeated(period: Vec<u8>) -> Option<Self> {
        (!period.is_empty()).then_some(Self { period, phase: 0, piece: Vec::new() })
    }

    /// The next `len` bytes. Errors: `OUT_OF_MEMORY` if the buffer cannot be allocated.
    pub(crate) fn next(&mut self, len: u64) -> Result<&[u8], Reason> {
        let len = len as usize;
        // One byte repeated looks the same at every phase, so the last buffer can be used again.
        if self.period.len() == 1 && self.piece.len() >= len {
            return Ok(&self.piece[..len]);
        }
        self.piece.clear();
        self.piece.try_reserve_exact(len).map_err(|_| Reason::System(OUT_OF_MEMORY))?;
        let first = &self.period[self.phase..];
        self.piece.extend_from_slice(&first[..first.len().min(len)]);
        while self.piece.len() < len {
            let rest = (len - self.piece.len()).min(self.period.len());
            self.piece.extend_from_slice(&self.period[..rest]);
        }
        self.phase = (self.phase + len) % self.period.len();
        Ok(&self.piece)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeated_data_continues_across_calls() {
        let mut source = Source::repeated(b"abc".to_vec()).unwrap();
        assert_eq!(source.next(2).unwrap(), b"ab");
        assert_eq!(source.next(5).unwrap(), b"cabca");
        assert_eq!(source.next(0).unwrap(), b"");
        assert_eq!(source.next(4).unwrap(), b"bcab");
        let mut source = Source::byte(7);
        assert_eq!(source.next(3).unwrap(), [7; 3]);
        assert_eq!(source.next(2).unwrap(), [7; 2]);
        assert_eq!(source.next(4).unwrap(), [7; 4]);
        assert!(Source::repeated(Vec::new()).is_none());
    }
}
