//! Collects the tables of a new image, which follow each other, so that they go out in one write.

use crate::error::Result;
use crate::port::storage::Storage;
use ::alloc::vec::Vec;
use core::ops::Range;
use qcow2_format::HostOffset;
use qcow2_format::bytes::push_words;
use qcow2_format::header::SECTOR_LEN;

/// Bytes that are collected at most: the tables of an empty image with the largest clusters, and an L1 table.
const MAX_COLLECTED: u64 = 8 << 20;
/// Bytes of words that are in memory at most. What follows them are zeroes, which take none.
const MAX_WORDS: usize = 1 << 20;

static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Bytes on their way to a storage, in ascending order of their offsets.
pub(super) struct Sink<'a> {
    storage: &'a dyn Storage,
    /// Host offset of the first byte that is not written yet.
    start: u64,
    len: u64,
    /// The bytes of `pieces` that are no zeroes.
    words: Vec<u8>,
    /// What follows each other from `start` on: a range of `words`, and a number of zeroes behind it.
    pieces: Vec<(Range<usize>, u64)>,
}

impl<'a> Sink<'a> {
    pub(super) fn new(storage: &'a dyn Storage) -> Self {
        Self { storage, start: 0, len: 0, words: Vec::new(), pieces: Vec::new() }
    }

    /// Takes `count` big-endian words for `at`, of which the `i`-th is `word(i)`, and those from `used` on
    /// are zero. Disk: writes what was taken before, if this does not follow it or is much.
    pub(super) fn words(
        &mut self,
        at: HostOffset,
        (used, count): (u64, u64),
        word: impl Fn(u64) -> u64,
    ) -> Result<()> {
        debug_assert!(used <= count, "{used} words of {count}");
        self.seek(at)?;
        let mut from = self.words.len();
        for i in 0..used {
            push_words(&mut self.words, [word(i)]);
            if self.words.len() == MAX_WORDS {
                self.take(from, 0)?;
                from = self.words.len();
            }
        }
        self.take(from, 0)?;
        self.zeroes((count - used) * 8)
    }

    /// Takes `bytes` for `at`. Disk: as [`words`](Self::words).
    pub(super) fn bytes(&mut self, at: HostOffset, bytes: &[u8]) -> Result<()> {
        self.seek(at)?;
        // Sector by sector: byte by byte takes longer than everything else that is done for an empty image.
        let zeroes =
            bytes.rchunks(SECTOR_LEN).take_while(|sector| sector.iter().fold(0, |all, b| all | b) == 0);
        let used = bytes.len() - zeroes.map(<[u8]>::len).sum::<usize>();
        let from = self.words.len();
        self.words.extend_from_slice(&bytes[..used]);
        self.take(from, 0)?;
        self.zeroes((bytes.len() - used) as u64)
    }

    /// Writes what was taken before if the next byte is for another offset than the one that follows it.
    fn seek(&mut self, at: HostOffset) -> Result<()> {
        if at.value() != self.start + self.len {
            self.finish()?;
            self.start = at.value();
        }
        Ok(())
    }

    fn zeroes(&mut self, mut zeroes: u64) -> Result<()> {
        while zeroes > 0 {
            let piece = zeroes.min(ZEROES.len() as u64);
            self.take(self.words.len(), piece)?;
            zeroes -= piece;
        }
        Ok(())
    }

    /// Adds `words[from..]` and `zeroes`, at most [`ZEROES`], and writes everything if it is much.
    fn take(&mut self, from: usize, zeroes: u64) -> Result<()> {
        let words = from..self.words.len();
        self.len += words.len() as u64 + zeroes;
        self.pieces.push((words, zeroes));
        if self.words.len() >= MAX_WORDS || self.len >= MAX_COLLECTED { self.finish() } else { Ok(()) }
    }

    /// Writes what is left, in one vectored write.
    pub(super) fn finish(&mut self) -> Result<()> {
        let mut bufs: Vec<&[u8]> = Vec::with_capacity(self.pieces.len() * 2);
        for (words, zeroes) in &self.pieces {
            bufs.extend([&self.words[words.clone()], &ZEROES[..*zeroes as usize]]);
        }
        bufs.retain(|buf| !buf.is_empty());
        if !bufs.is_empty() {
            self.storage.write_vectored_at(HostOffset::new(self.start), &bufs)?;
        }
        self.start += self.len;
        self.len = 0;
        self.words.clear();
        self.pieces.clear();
        Ok(())
    }
}
