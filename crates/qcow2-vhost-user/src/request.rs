//! One request of a guest: bytes in, bytes out, and a status. Virtio specification 1.2, 5.2.6 "Device
//! Operation". Knows no ring and no guest memory.

use crate::device::Device;
use crate::direct;
use crate::guest::GuestBytes;
use crate::observe::Kind;
use qcow2_core::{GuestDisk, GuestOffset, GuestRange, ZeroMode};
use std::io::{Read, Write};

/// Bytes that are in memory at once for one request; longer ones are answered in pieces.
pub const PIECE: usize = 1 << 20;
/// Ranges in one discard or zeroing request.
pub(crate) const MAX_SEGMENTS: u32 = 64;
/// Sectors in each of them: 2 GiB.
pub(crate) const MAX_SECTORS: u32 = 1 << 22;

const SECTOR: u64 = 512;
const HEADER: usize = 16;
const SEGMENT: usize = 16;
const UNMAP: u32 = 1;

const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

/// How a request ended; the byte that the guest gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Status {
    Done = 0,
    Failed = 1,
    Unsupported = 2,
}

/// A status other than `Done`.
type Outcome = Result<(), Status>;

/// What a guest sent.
pub(crate) trait Incoming: Read {
    /// Writes a first part of it to `range` without a copy in between, and returns how many bytes; `None` if
    /// that is not possible.
    fn write_to(&mut self, disk: &dyn GuestDisk, range: GuestRange) -> qcow2_core::Result<Option<usize>>;
}

/// Where a guest waits for bytes.
pub(crate) trait Outgoing: Write {
    /// Reads a first part of `range` without a copy in between, and returns how many bytes; `None` if that is
    /// not possible.
    fn read_from(&mut self, disk: &dyn GuestDisk, range: GuestRange) -> qcow2_core::Result<Option<usize>>;
}

impl Incoming for GuestBytes<'_> {
    fn write_to(&mut self, disk: &dyn GuestDisk, range: GuestRange) -> qcow2_core::Result<Option<usize>> {
        direct::write(disk, range, self)
    }
}

impl Outgoing for &mut GuestBytes<'_> {
    fn read_from(&mut self, disk: &dyn GuestDisk, range: GuestRange) -> qcow2_core::Result<Option<usize>> {
        direct::read(disk, range, self)
    }
}

/// The two sides of a request: what the guest sent and where it waits for bytes.
pub(crate) struct Transfer<R, W> {
    /// Header and data.
    pub(crate) from_guest: R,
    /// Bytes left in `from_guest`.
    pub(crate) sent: usize,
    /// Place for data, without the status.
    pub(crate) to_guest: W,
    /// Bytes that fit there.
    pub(crate) wanted: usize,
}

impl Device {
    /// Answers a request. `buffer`: scratch memory, which grows to [`PIECE`] at most.
    pub(crate) fn answer<R: Incoming, W: Outgoing>(
        &self,
        mut transfer: Transfer<R, W>,
        buffer: &mut Vec<u8>,
    ) -> Status {
        match self.try_answer(&mut transfer, buffer) {
            Ok(()) => Status::Done,
            Err(status) => status,
        }
    }

    fn try_answer<R: Incoming, W: Outgoing>(
        &self,
        transfer: &mut Transfer<R, W>,
        buffer: &mut Vec<u8>,
    ) -> Outcome {
        let header: [u8; HEADER] = transfer.take()?;
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        let offset = u64::from_le_bytes(sector).checked_mul(SECTOR).ok_or(Status::Failed)?;
        match u32::from_le_bytes([a, b, c, d]) {
            READ => self.read(offset, transfer, buffer),
            WRITE => self.write(offset, transfer, buffer),
            FLUSH => self.flush(),
            GET_ID => {
                let len = transfer.wanted.min(self.serial().len());
                transfer.to_guest.write_all(&self.serial()[..len]).map_err(|_| Status::Failed)
            }
            DISCARD => self.each_segment(transfer, |flags, range| match flags {
                0 => self.change(Kind::Discard, range, |disk| disk.discard(range)),
                _ => Err(Status::Unsupported),
            }),
            WRITE_ZEROES => self.each_segment(transfer, |flags, range| {
                let mode = match flags {
                    0 => ZeroMode::KeepAllocated,
                    UNMAP => ZeroMode::MayUnmap,
                    _ => return Err(Status::Unsupported),
                };
                self.change(Kind::WriteZeroes, range, |disk| disk.write_zeroes(range, mode))
            }),
            _ => Err(Status::Unsupported),
        }
    }

    fn read<R, W: Outgoing>(
        &self,
        offset: u64,
        transfer: &mut Transfer<R, W>,
        buffer: &mut Vec<u8>,
    ) -> Outcome {
        let whole = self.range(offset, transfer.wanted as u64)?;
        self.observer().time(Kind::Read, whole.len(), || self.read_pieces(offset, transfer, buffer))
    }

    fn read_pieces<R, W: Outgoing>(
        &self,
        offset: u64,
        transfer: &mut Transfer<R, W>,
        buffer: &mut Vec<u8>,
    ) -> Outcome {
        let mut at = offset;
        while transfer.wanted > 0 {
            let range = self.range(at, transfer.wanted as u64)?;
            if let Some(len) = transfer.to_guest.read_from(self.disk(), range).map_err(|_| Status::Failed)? {
                transfer.wanted -= len;
                at += len as u64;
                continue;
            }
            let piece = scratch(buffer, transfer.wanted);
            self.disk().read_at(GuestOffset::new(at), piece).map_err(|_| Status::Failed)?;
            transfer.to_guest.write_all(piece).map_err(|_| Status::Failed)?;
            transfer.wanted -= piece.len();
            at += piece.len() as u64;
        }
        Ok(())
    }

    fn write<R: Incoming, W>(
        &self,
        offset: u64,
        transfer: &mut Transfer<R, W>,
        buffer: &mut Vec<u8>,
    ) -> Outcome {
        self.check_writable()?;
        let whole = self.range(offset, transfer.sent as u64)?;
        self.observer().time(Kind::Write, whole.len(), || self.write_pieces(offset, transfer, buffer))?;
        self.finish_change()
    }

    fn write_pieces<R: Incoming, W>(
        &self,
        offset: u64,
        transfer: &mut Transfer<R, W>,
        buffer: &mut Vec<u8>,
    ) -> Outcome {
        let mut at = offset;
        while transfer.sent > 0 {
            let range = self.range(at, transfer.sent as u64)?;
            if let Some(len) = transfer.from_guest.write_to(self.disk(), range).map_err(|_| Status::Failed)? {
                transfer.sent -= len;
                at += len as u64;
                continue;
            }
            let piece = scratch(buffer, transfer.sent);
            transfer.from_guest.read_exact(piece).map_err(|_| Status::Failed)?;
            self.disk().write_at(GuestOffset::new(at), piece).map_err(|_| Status::Failed)?;
            transfer.sent -= piece.len();
            at += piece.len() as u64;
        }
        Ok(())
    }

    fn flush(&self) -> Outcome {
        self.observer().time(Kind::Flush, 0, || self.disk().flush()).map_err(|_| Status::Failed)
    }

    /// One range of a request that may have several.
    fn change(
        &self,
        kind: Kind,
        range: GuestRange,
        change: impl FnOnce(&dyn GuestDisk) -> qcow2_core::Result<()>,
    ) -> Outcome {
        self.observer().time(kind, range.len(), || change(self.disk())).map_err(|_| Status::Failed)
    }

    /// Runs `change` on each range of a discard or zeroing request. All are checked before the first one is
    /// changed.
    fn each_segment<R: Read, W>(
        &self,
        transfer: &mut Transfer<R, W>,
        change: impl Fn(u32, GuestRange) -> Outcome,
    ) -> Outcome {
        self.check_writable()?;
        let count = transfer.sent / SEGMENT;
        if !transfer.sent.is_multiple_of(SEGMENT) || count == 0 || count > MAX_SEGMENTS as usize {
            return Err(Status::Failed);
        }
        let mut segments = Vec::with_capacity(count);
        for _ in 0..count {
            let [segment @ .., s0, s1, s2, s3, f0, f1, f2, f3] = transfer.take::<SEGMENT>()?;
            let sectors = u32::from_le_bytes([s0, s1, s2, s3]);
            if sectors > MAX_SECTORS {
                return Err(Status::Failed);
            }
            let offset = u64::from_le_bytes(segment).checked_mul(SECTOR).ok_or(Status::Failed)?;
            let range = self.range(offset, u64::from(sectors) * SECTOR)?;
            segments.push((u32::from_le_bytes([f0, f1, f2, f3]), range));
        }
        for (flags, range) in segments.into_iter().filter(|(_, range)| !range.is_empty()) {
            change(flags, range)?;
        }
        self.finish_change()
    }

    /// A driver that switched the cache off is told of a change when it is durable.
    fn finish_change(&self) -> Outcome {
        if self.is_writeback() {
            return Ok(());
        }
        self.flush()
    }

    fn check_writable(&self) -> Outcome {
        if self.settings().read_only { Err(Status::Failed) } else { Ok(()) }
    }

    /// The range, if it is whole sectors inside the disk.
    fn range(&self, offset: u64, len: u64) -> Result<GuestRange, Status> {
        let range = GuestRange::new(GuestOffset::new(offset), len).ok_or(Status::Failed)?;
        let whole = len.is_multiple_of(SECTOR) && range.end().value() <= self.disk().size();
        if whole { Ok(range) } else { Err(Status::Failed) }
    }
}

impl<R: Read, W> Transfer<R, W> {
    /// The next `N` bytes that the guest sent.
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Status> {
        let mut bytes = [0; N];
        self.sent = self.sent.checked_sub(N).ok_or(Status::Failed)?;
        self.from_guest.read_exact(&mut bytes).map_err(|_| Status::Failed)?;
        Ok(bytes)
    }
}

/// The first `len` bytes of the buffer, at most [`PIECE`].
fn scratch(buffer: &mut Vec<u8>, len: usize) -> &mut [u8] {
    let len = len.min(PIECE);
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    &mut buffer[..len]
}

#[cfg(test)]
mod tests;
