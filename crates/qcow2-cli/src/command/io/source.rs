//! What is written: one byte all over, or a file again and again.

use qcow2_io::{OsError, os_error_text};
use std::fs::File;
use std::io::Read;

/// What writes take their bytes from: a run of bytes, again and again.
pub(super) struct Source {
    period: Vec<u8>,
    /// Bytes given so far, modulo the period.
    phase: usize,
    piece: Vec<u8>,
}

impl Source {
    /// One byte all over.
    pub(super) fn byte(byte: u8) -> Self {
        Self { period: vec![byte], phase: 0, piece: Vec::new() }
    }

    /// At most `len` bytes of the file. Errors: the line for standard error.
    pub(super) fn file(name: &str, len: u64) -> Result<Self, String> {
        let mut period = Vec::new();
        let read = File::open(name).and_then(|file| file.take(len).read_to_end(&mut period));
        match read {
            Ok(0) => Err(format!("{name}: file is empty")),
            Ok(_) => Ok(Self { period, phase: 0, piece: Vec::new() }),
            Err(error) => Err(format!("{name}: {}", OsError::new(error))),
        }
    }

    /// The next `len` bytes. Errors: the system's text where memory is short.
    pub(super) fn next(&mut self, len: u64) -> Result<&[u8], String> {
        let len = len as usize;
        if self.period.len() == 1 && self.piece.len() >= len {
            return Ok(&self.piece[..len]);
        }
        self.piece.clear();
        self.piece.try_reserve_exact(len).map_err(|_| out_of_memory())?;
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

/// The system's text for memory that is not there.
pub(super) fn out_of_memory() -> String {
    const NO_MEMORY: i32 = 12;
    os_error_text(NO_MEMORY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_period_goes_on_where_it_stopped() {
        let mut source = Source { period: b"abc".to_vec(), phase: 0, piece: Vec::new() };
        assert_eq!(source.next(2).unwrap(), b"ab");
        assert_eq!(source.next(5).unwrap(), b"cabca");
        assert_eq!(source.next(0).unwrap(), b"");
        assert_eq!(source.next(4).unwrap(), b"bcab");
        let mut source = Source::byte(7);
        assert_eq!(source.next(3).unwrap(), [7; 3]);
        assert_eq!(source.next(2).unwrap(), [7; 2]);
        assert_eq!(source.next(4).unwrap(), [7; 4]);
    }
}
