//! Direct I/O (`O_DIRECT`): aligned buffers, and read-modify-write where a call covers a block in part.
//!
//! With direct I/O the kernel takes only offsets, lengths and buffer addresses that are multiples of a block.
//! Calls that are not aligned go through a bounce buffer: a read fetches the blocks around the range; a write
//! reads the blocks at its two edges, changes them, and writes them back whole. An unaligned write must not
//! run beside another change of the same file, or the write-back would undo that change; the caller holds the
//! file's lock exclusively.

use crate::buffer::IoBuffer;
use crate::sys;
use std::fs::File;
use std::io;
use std::sync::{Mutex, PoisonError};

/// Size of a bounce buffer; longer calls are split.
const BUFFER_LEN: usize = 1024 * 1024;
/// How many idle bounce buffers are kept for reuse.
const MAX_IDLE_BUFFERS: usize = 8;

/// Alignment that the kernel requires: offsets and lengths are multiples of `block`, buffer addresses
/// multiples of `memory`. Both are powers of two, at most `BUFFER_LEN`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Alignment {
    pub(crate) block: usize,
    pub(crate) memory: usize,
}

/// Reads and writes of one file that was opened with direct I/O.
#[derive(Debug)]
pub(crate) struct DirectIo {
    alignment: Alignment,
    idle: Mutex<Vec<IoBuffer>>,
}

impl DirectIo {
    pub(crate) fn new(alignment: Alignment) -> Self {
        Self { alignment, idle: Mutex::new(Vec::new()) }
    }

    pub(crate) fn block(&self) -> usize {
        self.alignment.block
    }

    /// True if `offset` and `len` are multiples of the block: such writes need no exclusive lock.
    pub(crate) fn is_whole_blocks(&self, offset: u64, len: usize) -> bool {
        offset.is_multiple_of(self.block() as u64) && len.is_multiple_of(self.block())
    }

    /// Reads until `buf` is full or the file ends. Takes any offset, length and buffer address.
    pub(crate) fn read(&self, file: &File, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        if self.is_whole_blocks(offset, buf.len()) && self.is_aligned(buf) {
            return self.read_blocks(file, offset, buf);
        }
        let mut bounce = self.take_buffer();
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let skip = (at % self.block() as u64) as usize;
            let window = (skip + buf.len() - done).next_multiple_of(self.block()).min(BUFFER_LEN);
            let count = self.read_blocks(file, at - skip as u64, &mut bounce[..window])?;
            let useful = count.saturating_sub(skip).min(buf.len() - done);
            buf[done..done + useful].copy_from_slice(&bounce[skip..skip + useful]);
            done += useful;
            // The end of the file.
            if count < window {
                break;
            }
        }
        self.give_back(bounce);
        Ok(done)
    }

    /// Writes all of `buf`. An unaligned write may leave the file longer than the end of the write, and the
    /// caller must keep every other change out meanwhile.
    pub(crate) fn write(&self, file: &File, offset: u64, buf: &[u8]) -> io::Result<()> {
        if self.is_whole_blocks(offset, buf.len()) && self.is_aligned(buf) {
            return sys::write_full(file, offset, buf);
        }
        let mut bounce = self.take_buffer();
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let skip = (at % self.block() as u64) as usize;
            let window = (skip + buf.len() - done).next_multiple_of(self.block()).min(BUFFER_LEN);
            let count = (window - skip).min(buf.len() - done);
            let first = at - skip as u64;
            self.load_edges(file, first, skip..skip + count, &mut bounce[..window])?;
            bounce[skip..skip + count].copy_from_slice(&buf[done..done + count]);
            sys::write_full(file, first, &bounce[..window])?;
            done += count;
        }
        self.give_back(bounce);
        Ok(())
    }

    /// Reads the first and the last block of `window` (file offset `first`) where `wanted` does not cover
    /// them.
    fn load_edges(
        &self,
        file: &File,
        first: u64,
        wanted: std::ops::Range<usize>,
        window: &mut [u8],
    ) -> io::Result<()> {
        let block = self.block();
        let last = window.len() - block;
        let head = wanted.start > 0 || (last == 0 && wanted.end < window.len());
        let mut load = |at: usize| {
            let edge = &mut window[at..at + block];
            let count = self.read_blocks(file, first + at as u64, edge)?;
            // The file ends in this block. The block is written whole, so its rest must be zeroes.
            edge[count..].fill(0);
            Ok::<(), io::Error>(())
        };
        if head {
            load(0)?;
        }
        if last > 0 && wanted.end < last + block {
            load(last)?;
        }
        Ok(())
    }

    /// Reads whole blocks into aligned memory until it is full or the file ends, possibly inside a block.
    fn read_blocks(&self, file: &File, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let mut done = 0;
        while done < buf.len() {
            match sys::read_some(file, offset + done as u64, &mut buf[done..]) {
                Ok(0) => break,
                Ok(count) => {
                    done += count;
                    if !count.is_multiple_of(self.block()) {
                        break;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    pub(crate) fn is_aligned(&self, buf: &[u8]) -> bool {
        buf.as_ptr().addr().is_multiple_of(self.alignment.memory)
    }

    fn take_buffer(&self) -> IoBuffer {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        idle.unwrap_or_else(|| IoBuffer::aligned(BUFFER_LEN, self.alignment.memory.max(self.alignment.block)))
    }

    fn give_back(&self, buffer: IoBuffer) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < MAX_IDLE_BUFFERS {
            idle.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A direct reader on an ordinary file: without O_DIRECT the kernel takes any alignment.
    fn direct(block: usize) -> (DirectIo, File) {
        (DirectIo::new(Alignment { block, memory: block }), tempfile::tempfile().unwrap())
    }

    #[test]
    fn unaligned_writes_keep_the_rest_of_their_blocks() {
        let (io, file) = direct(4096);
        sys::write_full(&file, 0, &[1; 3 * 4096]).unwrap();
        io.write(&file, 4000, &[2; 200]).unwrap();
        io.write(&file, 5000, &[3; 10]).unwrap();
        io.write(&file, 8192, &[4; 4095]).unwrap();
        let mut back = vec![0; 3 * 4096];
        assert_eq!(io.read(&file, 0, &mut back).unwrap(), 3 * 4096);
        let mut expected = vec![1; 3 * 4096];
        expected[4000..4200].fill(2);
        expected[5000..5010].fill(3);
        expected[8192..8192 + 4095].fill(4);
        assert!(back == expected);
    }

    #[test]
    fn unaligned_calls_longer_than_the_buffer_are_split() {
        let (io, file) = direct(512);
        let data: Vec<u8> = (0..3 * BUFFER_LEN + 77).map(|i| (i % 251) as u8).collect();
        io.write(&file, 100, &data).unwrap();
        let mut back = vec![0; data.len()];
        assert_eq!(io.read(&file, 100, &mut back).unwrap(), data.len());
        assert!(back == data);
    }

    #[test]
    fn reads_stop_at_the_end_of_the_file() {
        let (io, file) = direct(512);
        sys::write_full(&file, 0, &[9; 700]).unwrap();
        let mut buf = [0; 1000];
        assert_eq!(io.read(&file, 3, &mut buf).unwrap(), 697);
        assert_eq!(io.read(&file, 700, &mut buf).unwrap(), 0);
        assert_eq!(io.read(&file, 5000, &mut buf).unwrap(), 0);
    }
}
