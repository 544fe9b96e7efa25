//! Requests to a `blkdebug` node within its limits: widened to whole blocks, and cut into pieces.

use super::blkdebug::{BlkdebugStorage, DebugCall};
use super::debug_limits::Padding;
use crate::error::Call;
use qcow2_core::{Event, Events, HostOffset, StorageError, StorageErrorKind, ZeroMode};
use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// The ranges that are changed now. To widen a write is to write what was read before, which nobody may
/// change in between.
#[derive(Default)]
pub(super) struct Changing {
    ranges: Mutex<Vec<Range<u64>>>,
    released: Condvar,
}

/// The right to change a range; dropping it gives it back.
pub(super) struct Change<'a> {
    changing: &'a Changing,
    range: Range<u64>,
}

impl Changing {
    /// Waits until nobody changes any byte of `range`.
    fn enter(&self, range: Range<u64>) -> Change<'_> {
        let meets = |ranges: &mut Vec<Range<u64>>| {
            ranges.iter().any(|other| other.start < range.end && range.start < other.end)
        };
        let ranges = self.released.wait_while(self.ranges(), meets);
        ranges.unwrap_or_else(PoisonError::into_inner).push(range.clone());
        Change { changing: self, range }
    }

    fn ranges(&self) -> MutexGuard<'_, Vec<Range<u64>>> {
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        let mut ranges = self.changing.ranges();
        if let Some(index) = ranges.iter().position(|range| *range == self.range) {
            ranges.swap_remove(index);
        }
        drop(ranges);
        self.changing.released.notify_all();
    }
}

impl BlkdebugStorage {
    /// Reads whole blocks, in pieces; bytes read are fewer than asked for only at the end.
    pub(super) fn read_within(&self, offset: HostOffset, buf: &mut [u8]) -> Result<usize, StorageError> {
        let end = Call::new("read", offset, buf.len() as u64).end()?.min(self.inner.len()?);
        let bytes = offset.value()..end;
        if bytes.is_empty() {
            return Ok(0);
        }
        let blocks = self.limits.widened(&bytes);
        let len = (bytes.end - bytes.start) as usize;
        if blocks == bytes {
            self.read_blocks(bytes.start, &mut buf[..len])?;
            return Ok(len);
        }
        let mut whole = zeroed(blocks.end - blocks.start)?;
        self.read_blocks(blocks.start, &mut whole)?;
        let head = (bytes.start - blocks.start) as usize;
        buf[..len].copy_from_slice(&whole[head..head + len]);
        Ok(len)
    }

    /// Fills `buf` with the blocks from byte `start` on; past the end there are zeroes.
    fn read_blocks(&self, start: u64, buf: &mut [u8]) -> Result<(), StorageError> {
        for piece in self.limits.transfers(start..start + buf.len() as u64) {
            let buf = &mut buf[(piece.start - start) as usize..(piece.end - start) as usize];
            let offset = HostOffset::new(piece.start);
            self.check(DebugCall::Read, Call::new("read", offset, buf.len() as u64))?;
            self.inner.read_padded(offset, buf)?;
        }
        Ok(())
    }

    /// Writes the blocks that `buf` at `offset` touches, in pieces.
    pub(super) fn write_within(&self, offset: HostOffset, buf: &[u8]) -> Result<(), StorageError> {
        let bytes = offset.value()..Call::new("write", offset, buf.len() as u64).end()?;
        if bytes.is_empty() {
            return Ok(());
        }
        let blocks = self.limits.widened(&bytes);
        let _change = self.changing.enter(blocks.clone());
        if blocks == bytes {
            return self.write_blocks(bytes.start, buf);
        }
        let mut whole = zeroed(blocks.end - blocks.start)?;
        self.read_around(&self.limits.padding(&bytes, &blocks), blocks.start, &mut whole)?;
        let head = (bytes.start - blocks.start) as usize;
        whole[head..head + buf.len()].copy_from_slice(buf);
        self.write_blocks(blocks.start, &whole)
    }

    /// Reads what `padding` adds to a request into the first and the last block of `whole`, which begins at
    /// byte `start`.
    fn read_around(&self, padding: &Padding, start: u64, whole: &mut [u8]) -> Result<(), StorageError> {
        let tell = |is_so: bool, event| {
            if is_so {
                self.debugger.event(event)
            }
        };
        let block = self.limits.block() as usize;
        let (head, tail, one) = (padding.head > 0, padding.tail > 0, padding.is_one_read);
        let behind = start + whole.len() as u64;
        if head || one {
            let first = if one { &mut *whole } else { &mut whole[..block] };
            tell(head, Event::PwritevRmwHead);
            tell(one && tail, Event::PwritevRmwTail);
            self.read_blocks(start, first)?;
            tell(head, Event::PwritevRmwAfterHead);
            tell(one && tail, Event::PwritevRmwAfterTail);
        }
        if tail && !one {
            let last = whole.len() - block;
            tell(true, Event::PwritevRmwTail);
            self.read_blocks(behind - block as u64, &mut whole[last..])?;
            tell(true, Event::PwritevRmwAfterTail);
        }
        Ok(())
    }

    fn write_blocks(&self, start: u64, buf: &[u8]) -> Result<(), StorageError> {
        self.writing(Event::Pwritev, || self.write_pieces(start, buf))
    }

    fn write_pieces(&self, start: u64, buf: &[u8]) -> Result<(), StorageError> {
        for piece in self.limits.transfers(start..start + buf.len() as u64) {
            let buf = &buf[(piece.start - start) as usize..(piece.end - start) as usize];
            let offset = HostOffset::new(piece.start);
            self.check(DebugCall::Write, Call::new("write", offset, buf.len() as u64))?;
            self.inner.write_at(offset, buf)?;
        }
        Ok(())
    }

    /// Makes `len` bytes at `offset` zeroes: parts of blocks are read and written.
    pub(super) fn zero_within(
        &self,
        offset: HostOffset,
        len: u64,
        mode: ZeroMode,
    ) -> Result<(), StorageError> {
        let bytes = offset.value()..Call::new("zero", offset, len).end()?;
        if bytes.is_empty() {
            return Ok(());
        }
        let blocks = self.limits.widened(&bytes);
        let _change = self.changing.enter(blocks.clone());
        let (padding, block) = (self.limits.padding(&bytes, &blocks), self.limits.block());
        if (padding.head > 0 || padding.tail > 0) && padding.is_one_read {
            return self.zero_part(&bytes, blocks);
        }
        let (mut first, mut last) = (blocks.start, blocks.end);
        if padding.head > 0 {
            first += block;
            self.zero_part(&bytes, blocks.start..first)?;
        }
        if padding.tail > 0 {
            last -= block;
        }
        if first < last {
            self.writing(Event::PwritevZero, || self.zero_pieces(first..last, mode))?;
        }
        if padding.tail > 0 { self.zero_part(&bytes, last..blocks.end) } else { Ok(()) }
    }

    /// Writes `blocks` with zeroes where `bytes` are.
    fn zero_part(&self, bytes: &Range<u64>, blocks: Range<u64>) -> Result<(), StorageError> {
        let bytes = bytes.start.max(blocks.start)..bytes.end.min(blocks.end);
        let mut whole = zeroed(blocks.end - blocks.start)?;
        let padding = Padding { is_one_read: true, ..self.limits.padding(&bytes, &blocks) };
        self.read_around(&padding, blocks.start, &mut whole)?;
        whole[(bytes.start - blocks.start) as usize..(bytes.end - blocks.start) as usize].fill(0);
        self.write_blocks(blocks.start, &whole)
    }

    fn zero_pieces(&self, blocks: Range<u64>, mode: ZeroMode) -> Result<(), StorageError> {
        for (piece, is_written) in self.limits.zeroes(blocks) {
            let (offset, len) = (HostOffset::new(piece.start), piece.end - piece.start);
            if is_written {
                self.write_pieces(piece.start, &zeroed(len)?)?;
            } else {
                self.check(DebugCall::WriteZeroes, Call::new("zero", offset, len))?;
                self.inner.write_zeroes(offset, len, mode)?;
            }
        }
        Ok(())
    }

    /// Discards the whole blocks of `len` bytes at `offset`, in pieces.
    pub(super) fn discard_within(&self, offset: HostOffset, len: u64) -> Result<(), StorageError> {
        let bytes = offset.value()..Call::new("discard", offset, len).end()?;
        for piece in self.limits.discards(bytes) {
            let (offset, len) = (HostOffset::new(piece.start), piece.end - piece.start);
            let _change = self.changing.enter(piece);
            self.check(DebugCall::Discard, Call::new("discard", offset, len))?;
            self.inner.discard(offset, len)?;
        }
        Ok(())
    }
}

/// `len` zeroes, if there is memory for them: an alignment may be larger than that.
fn zeroed(len: u64) -> Result<Vec<u8>, StorageError> {
    let mut bytes = Vec::new();
    let len = usize::try_from(len).ok().filter(|&len| bytes.try_reserve_exact(len).is_ok());
    let no_memory =
        || StorageError::new(StorageErrorKind::Io, "no memory for a whole block").with_os_code(12);
    bytes.resize(len.ok_or_else(no_memory)?, 0);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::super::debug_limits::DebugLimits;
    use super::*;
    use crate::{MemoryStorage, StorageCall, TraceStorage};
    use qcow2_core::Storage;
    use std::sync::Arc;

    fn storage(change: impl FnOnce(&mut DebugLimits)) -> (BlkdebugStorage, Arc<TraceStorage>) {
        let mut limits = DebugLimits::default();
        change(&mut limits);
        let bytes = (0..10_000).map(|at| (at % 251) as u8).collect::<Vec<_>>();
        let below = Arc::new(TraceStorage::with_log(Arc::new(MemoryStorage::from(bytes)), 100));
        (BlkdebugStorage::new(below.clone(), Vec::new()).with_limits(limits), below)
    }

    fn at(offset: u64) -> HostOffset {
        HostOffset::new(offset)
    }

    /// The calls that reached what is below since the last question.
    fn calls(below: &TraceStorage) -> Vec<(StorageCall, u64, u64)> {
        below.take_log().iter().map(|call| (call.call, call.offset.value(), call.len)).collect()
    }

    #[test]
    fn requests_are_widened_to_whole_blocks() {
        use StorageCall::{Read, Write, WriteZeroes};
        let (disk, below) = storage(|limits| limits.align = 512);
        let mut buf = [0; 600];
        assert_eq!(disk.read_at(at(9800), &mut buf).unwrap(), 200);
        assert_eq!(u64::from(buf[199]), 9999 % 251);
        assert_eq!(calls(&below), [(Read, 9728, 512)]);
        disk.write_at(at(100), &[255; 50]).unwrap();
        assert_eq!(calls(&below), [(Read, 0, 512), (Write, 0, 512)]);
        disk.write_at(at(700), &[255; 1000]).unwrap();
        assert_eq!(calls(&below), [(Read, 512, 512), (Read, 1536, 512), (Write, 512, 1536)]);
        disk.write_zeroes(at(2100), 2000, ZeroMode::MayUnmap).unwrap();
        let (first, last) =
            ([(Read, 2048, 512), (Write, 2048, 512)], [(Read, 4096, 512), (Write, 4096, 512)]);
        assert_eq!(calls(&below), [&first[..], &[(WriteZeroes, 2560, 1536)], &last].concat());
        let mut wanted: Vec<u8> = (0..10_000).map(|byte| (byte % 251) as u8).collect();
        wanted[100..150].fill(255);
        wanted[700..1700].fill(255);
        wanted[2100..4100].fill(0);
        let mut seen = vec![0; 10_000];
        disk.read_at(at(0), &mut seen).unwrap();
        assert!(seen == wanted);
        // A write at the end makes that a whole block too.
        disk.write_at(at(9990), &[1; 5]).unwrap();
        assert_eq!(disk.len().unwrap(), 10_240);
    }

    #[test]
    fn requests_are_cut_to_the_longest_transfer() {
        let (disk, below) = storage(|limits| limits.max_transfer = 1000);
        disk.write_vectored_at(at(10), &[&[1; 1500], &[2; 600]]).unwrap();
        disk.read_at(at(10), &mut [0; 1001]).unwrap();
        use StorageCall::{Read, Write};
        let wanted =
            [(Write, 10, 1000), (Write, 1010, 1000), (Write, 2010, 100), (Read, 10, 1000), (Read, 1010, 1)];
        assert_eq!(calls(&below), wanted);
    }

    #[test]
    fn a_block_larger_than_memory_is_an_error() {
        let (disk, _) = storage(|limits| limits.align = 1 << 30);
        let changing = disk.changing.enter(5..10);
        drop(disk.changing.enter(10..12));
        drop(changing);
        assert!(zeroed(u64::MAX).is_err_and(|error| error.os_code() == Some(12)));
    }
}
