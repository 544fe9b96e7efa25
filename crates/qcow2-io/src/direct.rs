//! Input and output around the page cache: aligned buffers, and whole blocks where the caller asks for parts.
//!
//! The system takes only offsets, lengths and memory that are multiples of its block. Whatever is not goes
//! through a buffer here: a read takes the blocks around the wanted bytes; a write reads the blocks at its
//! edges, changes them and writes them whole. The latter must not meet another change of the same file (the
//! caller holds the file's lock exclusively), or that change would be undone.

use crate::sys;
use std::fs::File;
use std::io;
use std::sync::{Mutex, PoisonError};

/// Bytes of a bounce buffer; longer calls go in pieces.
const BUFFER_LEN: usize = 1024 * 1024;
/// How many idle buffers are kept.
const MAX_IDLE_BUFFERS: usize = 8;

/// What the system wants: offsets and lengths that are multiples of `block`, memory that is one of `memory`.
/// Powers of two, at most `BUFFER_LEN`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Alignment {
    pub(crate) block: usize,
    pub(crate) memory: usize,
}

/// How a file around the page cache is read and written.
#[derive(Debug)]
pub(crate) struct DirectIo {
    alignment: Alignment,
    idle: Mutex<Vec<AlignedBuffer>>,
}

impl DirectIo {
    pub(crate) fn new(alignment: Alignment) -> Self {
        Self { alignment, idle: Mutex::new(Vec::new()) }
    }

    pub(crate) fn block(&self) -> usize {
        self.alignment.block
    }

    /// Whether `offset` and `len` are whole blocks: such writes need no exclusive lock.
    pub(crate) fn is_whole_blocks(&self, offset: u64, len: usize) -> bool {
        offset.is_multiple_of(self.block() as u64) && len.is_multiple_of(self.block())
    }

    /// Reads until `buf` is full or the file ends; any offset, length and memory.
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
            let count = self.read_blocks(file, at - skip as u64, &mut bounce.bytes_mut()[..window])?;
            let useful = count.saturating_sub(skip).min(buf.len() - done);
            buf[done..done + useful].copy_from_slice(&bounce.bytes()[skip..skip + useful]);
            done += useful;
            if count < window {
                break;
            }
        }
        self.give_back(bounce);
        Ok(done)
    }

    /// Writes all of `buf`. Where it is not whole blocks, the file may become longer than the end of the
    /// write, and the caller must hold off every other change meanwhile.
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
            self.load_edges(file, first, skip..skip + count, &mut bounce.bytes_mut()[..window])?;
            bounce.bytes_mut()[skip..skip + count].copy_from_slice(&buf[done..done + count]);
            sys::write_full(file, first, &bounce.bytes()[..window])?;
            done += count;
        }
        self.give_back(bounce);
        Ok(())
    }

    /// Fills the first and the last block of `window` (which lies at `first` in the file) where `wanted` does
    /// not cover them.
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

    /// Reads whole blocks into aligned memory until it is full or the file ends (perhaps inside a block).
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

    fn is_aligned(&self, buf: &[u8]) -> bool {
        buf.as_ptr().addr().is_multiple_of(self.alignment.memory)
    }

    fn take_buffer(&self) -> AlignedBuffer {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        idle.unwrap_or_else(|| {
            AlignedBuffer::new(BUFFER_LEN, self.alignment.memory.max(self.alignment.block))
        })
    }

    fn give_back(&self, buffer: AlignedBuffer) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < MAX_IDLE_BUFFERS {
            idle.push(buffer);
        }
    }
}

/// Bytes whose first address is a multiple of some power of two: a longer allocation, used from the right
/// place on.
#[derive(Debug)]
pub(crate) struct AlignedBuffer {
    memory: Box<[u8]>,
    start: usize,
    len: usize,
}

impl AlignedBuffer {
    pub(crate) fn new(len: usize, alignment: usize) -> Self {
        let memory = vec![0; len + alignment].into_boxed_slice();
        let start = memory.as_ptr().addr().next_multiple_of(alignment) - memory.as_ptr().addr();
        Self { memory, start, len }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Works on any file: one that is not opened around the cache takes everything, aligned or not.
    fn direct(block: usize) -> (DirectIo, File) {
        (DirectIo::new(Alignment { block, memory: block }), tempfile::tempfile().unwrap())
    }

    #[test]
    fn buffers_are_aligned_and_stay_so() {
        let buffer = AlignedBuffer::new(10_000, 4096);
        assert!(buffer.bytes().as_ptr().addr().is_multiple_of(4096));
        let moved = Box::new(buffer);
        assert!(moved.bytes().as_ptr().addr().is_multiple_of(4096));
        assert_eq!(moved.bytes().len(), 10_000);
    }

    #[test]
    fn partial_blocks_keep_their_neighbours() {
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
    fn long_unaligned_calls_go_in_pieces() {
        let (io, file) = direct(512);
        let data: Vec<u8> = (0..3 * BUFFER_LEN + 77).map(|i| (i % 251) as u8).collect();
        io.write(&file, 100, &data).unwrap();
        let mut back = vec![0; data.len()];
        assert_eq!(io.read(&file, 100, &mut back).unwrap(), data.len());
        assert!(back == data);
    }

    #[test]
    fn reads_stop_at_the_end() {
        let (io, file) = direct(512);
        sys::write_full(&file, 0, &[9; 700]).unwrap();
        let mut buf = [0; 1000];
        assert_eq!(io.read(&file, 3, &mut buf).unwrap(), 697);
        assert_eq!(io.read(&file, 700, &mut buf).unwrap(), 0);
        assert_eq!(io.read(&file, 5000, &mut buf).unwrap(), 0);
    }
}
