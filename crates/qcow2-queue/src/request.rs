//! What is asked for, and what comes of it.

use qcow2_core::{GuestDisk, GuestOffset, GuestRange, Result, ZeroMode};
use qcow2_io::IoBuffer;

/// A request. Ranges must lie inside the disk; any alignment is allowed.
#[derive(Debug)]
pub enum Request {
    /// Fills the buffer with the bytes at `offset`.
    Read {
        /// The first byte.
        offset: GuestOffset,
        /// What to fill.
        buffer: IoBuffer,
    },
    /// Writes the buffer at `offset`.
    Write {
        /// The first byte.
        offset: GuestOffset,
        /// What to write.
        buffer: IoBuffer,
    },
    /// Makes the range read as zeroes.
    Zeroes {
        /// The range.
        range: GuestRange,
        /// What may become of its space.
        mode: ZeroMode,
    },
    /// Discards the range.
    Discard {
        /// The range.
        range: GuestRange,
    },
    /// Makes durable what had finished when this was submitted.
    Flush,
}

/// A request that has finished.
#[derive(Debug)]
pub struct Completion {
    /// The number that it was submitted with.
    pub token: u64,
    /// The buffer of a read or a write: of a read that went well the bytes. `None` if the disk panicked.
    pub buffer: Option<IoBuffer>,
    /// How it went: errors as those of [`GuestDisk`]'s methods.
    pub result: Result<()>,
}

impl Request {
    /// Does it, and waits for all that it needs.
    pub(crate) fn run(self, token: u64, disk: &dyn GuestDisk) -> Completion {
        match self {
            Self::Read { offset, mut buffer } => {
                let result = disk.read_at(offset, &mut buffer);
                Completion { token, buffer: Some(buffer), result }
            }
            Self::Write { offset, buffer } => {
                let result = disk.write_at(offset, &buffer);
                Completion { token, buffer: Some(buffer), result }
            }
            Self::Zeroes { range, mode } => {
                Completion { token, buffer: None, result: disk.write_zeroes(range, mode) }
            }
            Self::Discard { range } => Completion { token, buffer: None, result: disk.discard(range) },
            Self::Flush => Completion { token, buffer: None, result: disk.flush() },
        }
    }
}
