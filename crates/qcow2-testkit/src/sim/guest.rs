//! What each guest sector may hold after a power cut: its content at the last flush, or anything written
//! since.

use super::snapshots::Snapshots;
use crate::crash::SECTOR;
use qcow2_core::GuestRange;
use std::sync::Arc;

/// The content of one sector.
pub(super) type Content = Arc<[u8; SECTOR as usize]>;

/// A value that may be the one of the last flush or any later one: a sector's content, or the disk's size.
#[derive(Clone, Debug)]
struct Register<T> {
    /// Oldest first: the value that the last flush made durable, then all later ones.
    allowed: Vec<T>,
    /// How many of them finished operations wrote; a flush that starts now makes the last of these durable.
    finished: usize,
    /// The value of `finished` when the flush in flight began.
    flushing: usize,
    /// Values that a flush has outdated, for messages.
    outdated: Vec<T>,
}

impl<T: PartialEq> Register<T> {
    fn new(value: T) -> Self {
        Self { allowed: vec![value], finished: 1, flushing: 1, outdated: Vec::new() }
    }

    fn latest(&self) -> &T {
        self.allowed.last().unwrap_or_else(|| unreachable!("there is always a value"))
    }

    /// The operation has returned and left `value`.
    fn finish(&mut self, value: T) {
        if *self.latest() != value {
            self.allowed.push(value);
        }
        self.finished = self.allowed.len();
    }

    fn finish_flush(&mut self) {
        let old = self.flushing - 1;
        self.outdated.extend(self.allowed.drain(..old));
        let len = self.outdated.len();
        self.outdated.drain(..len.saturating_sub(MOST_OUTDATED));
        self.finished -= old;
        self.flushing = 1;
    }
}

/// What a reader may see of the guest disk after a power cut.
#[derive(Clone, Debug)]
pub(super) struct Guest {
    /// Never shrinks; sectors past the current end are kept in case the disk grows again.
    sectors: Vec<Register<Content>>,
    size: Register<u64>,
    /// The smallest size the disk ever had, or was being resized to.
    smallest: u64,
    snapshots: Snapshots,
}

impl Guest {
    /// A disk with the durable content `bytes`, a multiple of 512 long.
    pub(super) fn new(bytes: &[u8]) -> Self {
        let sectors = bytes.as_chunks().0.iter().map(|content| Register::new(Arc::new(*content)));
        Self {
            sectors: sectors.collect(),
            size: Register::new(bytes.len() as u64),
            smallest: bytes.len() as u64,
            snapshots: Snapshots::default(),
        }
    }

    /// The smallest size the disk ever had, or was being resized to.
    pub(super) fn smallest_size(&self) -> u64 {
        self.smallest
    }

    /// The snapshots.
    pub(super) fn snapshots(&mut self) -> &mut Snapshots {
        &mut self.snapshots
    }

    /// The snapshots, read-only.
    pub(super) fn seen_snapshots(&self) -> &Snapshots {
        &self.snapshots
    }

    /// Records that a snapshot with `content` was applied, durably.
    pub(super) fn finish_apply(&mut self, content: &[u8]) {
        let mut snapshots = std::mem::take(&mut self.snapshots);
        snapshots.going_back = None;
        *self = Self { snapshots, ..Self::new(content) };
    }

    /// The whole disk as the guest reads it now.
    pub(super) fn current(&self) -> Vec<u8> {
        let all = GuestRange::new(qcow2_core::GuestOffset::new(0), self.size());
        all.map(|all| self.current_at(all)).unwrap_or_default()
    }

    /// Current size in bytes.
    pub(super) fn size(&self) -> u64 {
        *self.size.latest()
    }

    /// Records that a resize to `size` bytes, a multiple of 512, begins. If a crash restores the
    /// old size, the bytes past the new end may also read as zeroes or as `backing` does. Added bytes are
    /// zeroes.
    pub(super) fn start_resize(&mut self, size: u64, backing: &[u8]) {
        let zeroes = Arc::new([0; SECTOR as usize]);
        let old = self.size();
        self.smallest = self.smallest.min(size);
        self.size.allowed.push(size);
        for index in size / SECTOR..old / SECTOR {
            let sector = &mut self.sectors[index as usize];
            let mut below = [0; SECTOR as usize];
            if let Some(bytes) = backing.get((index * SECTOR) as usize..) {
                let n = bytes.len().min(SECTOR as usize);
                below[..n].copy_from_slice(&bytes[..n]);
            }
            sector.allowed.extend([Arc::new(below), Arc::clone(&zeroes)]);
        }
        if self.sectors.len() < (size / SECTOR) as usize {
            self.sectors.resize((size / SECTOR) as usize, Register::new(zeroes));
        }
    }

    /// Records that the resize has returned and left `size`.
    pub(super) fn finish_resize(&mut self, size: u64) {
        self.size.finish(size);
        for sector in self.sectors.iter_mut().skip((size / SECTOR) as usize) {
            sector.finished = sector.allowed.len();
        }
    }

    /// Current content of the sectors in `range`.
    pub(super) fn current_at(&self, range: GuestRange) -> Vec<u8> {
        let sectors = (range.start().value() / SECTOR) as usize..(range.end().value() / SECTOR) as usize;
        self.sectors[sectors].iter().flat_map(|sector| **sector.latest()).collect()
    }

    /// Records that a write of `bytes` at byte `offset` begins.
    pub(super) fn start_write(&mut self, offset: u64, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let from = (at % SECTOR) as usize;
            let n = (SECTOR as usize - from).min(bytes.len() - done);
            let sector = &mut self.sectors[(at / SECTOR) as usize];
            let mut content = **sector.latest();
            content[from..from + n].copy_from_slice(&bytes[done..done + n]);
            sector.allowed.push(Arc::new(content));
            done += n;
        }
    }

    /// Records that the operation on `len` bytes at `offset` has returned and that `seen` reads back.
    pub(super) fn finish(&mut self, offset: u64, seen: &[u8]) {
        let first = offset / SECTOR;
        for (index, content) in (first..).zip(seen.as_chunks().0) {
            let sector = &mut self.sectors[index as usize];
            sector.finish(Arc::new(*content));
        }
    }

    /// Like [`judge`](Self::judge), for a range read back after an operation without a crash.
    pub(super) fn judge_at(&self, offset: u64, seen: &[u8]) -> Result<(), String> {
        let first = (offset / SECTOR) as usize;
        for (index, content) in (first..).zip(seen.as_chunks().0) {
            self.sectors[index].judge(content).map_err(|what| self.describe(index, content, what))?;
        }
        Ok(())
    }

    /// Checks that every sector of `seen`, read from a crash image, holds an allowed content.
    pub(super) fn judge(&self, seen: &[u8]) -> Result<(), String> {
        if self.snapshots.going_back.as_ref().is_some_and(|content| content[..] == *seen) {
            return Ok(());
        }
        if !self.size.allowed.contains(&(seen.len() as u64)) {
            return Err(format!("disk has {} bytes, allowed {:?}", seen.len(), self.size.allowed));
        }
        self.judge_at(0, seen)
    }

    /// Records that a flush starts.
    pub(super) fn start_flush(&mut self) {
        for sector in &mut self.sectors {
            sector.flushing = sector.finished;
        }
        self.size.flushing = self.size.finished;
    }

    /// Records that the flush has returned: what it covered is now the oldest allowed content.
    pub(super) fn finish_flush(&mut self) {
        for sector in &mut self.sectors {
            sector.finish_flush();
        }
        self.size.finish_flush();
    }

    fn describe(&self, index: usize, content: &[u8], what: &str) -> String {
        let elsewhere = self.sectors.iter().position(|other| other.allowed.iter().any(|c| c[..] == *content));
        let origin = match elsewhere {
            Some(other) if content.iter().any(|&b| b != 0) => format!("; it belongs to sector {other}"),
            _ => String::new(),
        };
        let wanted: Vec<String> =
            self.sectors[index].allowed.iter().map(|c| against(&c[..], content)).collect();
        format!(
            "guest sector {index} (offset {:#x}) holds {what} {}{origin}; allowed {wanted:?}",
            index as u64 * SECTOR,
            head(content)
        )
    }
}

/// How many outdated contents of a sector are kept for messages.
const MOST_OUTDATED: usize = 4;

impl Register<Content> {
    fn judge(&self, content: &[u8; SECTOR as usize]) -> Result<(), &'static str> {
        if self.allowed.iter().rev().any(|allowed| **allowed == *content) {
            Ok(())
        } else if self.outdated.iter().any(|outdated| **outdated == *content) {
            Err("content that a flush had outdated,")
        } else if content.iter().all(|&byte| byte == 0) {
            Err("zeroes,")
        } else {
            Err("content never written there,")
        }
    }
}

/// An allowed content, and the range in which the seen one differs from it.
fn against(allowed: &[u8], seen: &[u8]) -> String {
    let differs = |index: &usize| allowed[*index] != seen[*index];
    let (first, last) = ((0..seen.len()).find(differs), (0..seen.len()).rfind(differs));
    format!("{} (bytes {}..={} differ)", head(allowed), first.unwrap_or(0), last.unwrap_or(0))
}

/// The first bytes of a content.
fn head(content: &[u8]) -> String {
    content.iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: usize = SECTOR as usize;

    fn disk(sectors: &[u8]) -> Vec<u8> {
        sectors.iter().flat_map(|&byte| [byte; S]).collect()
    }

    fn check(guest: &Guest, sectors: &[u8], problem: Option<&str>) {
        let result = guest.judge(&disk(sectors));
        match problem {
            None => assert_eq!(result, Ok(()), "{sectors:?}"),
            Some(part) => {
                assert!(result.as_ref().is_err_and(|e| e.contains(part)), "{sectors:?}: {result:?}")
            }
        }
    }

    #[test]
    fn unflushed_sectors_are_old_or_new() {
        let mut guest = Guest::new(&disk(&[1, 2, 3]));
        guest.start_write(512, &disk(&[7, 8]));
        for fine in [[1, 2, 3], [1, 7, 8], [1, 2, 8], [1, 7, 3]] {
            check(&guest, &fine, None);
        }
        check(&guest, &[1, 0, 3], Some("sector 1 (offset 0x200) holds zeroes"));
        check(&guest, &[1, 8, 3], Some("never written there, 0808080808080808; it belongs to sector 2"));
        check(&guest, &[1, 2], Some("disk has 1024 bytes, allowed [1536]"));
    }

    #[test]
    fn a_flush_outdates_everything_before_the_last_finished_operation() {
        let mut guest = Guest::new(&disk(&[1, 2]));
        guest.start_write(0, &disk(&[5]));
        guest.finish(0, &disk(&[5]));
        guest.start_write(512, &disk(&[6]));
        guest.start_flush();
        guest.start_write(0, &disk(&[9]));
        check(&guest, &[1, 2], None);
        guest.finish_flush();
        for fine in [[5, 2], [5, 6], [9, 2]] {
            check(&guest, &fine, None);
        }
        check(&guest, &[1, 2], Some("a flush had outdated"));
    }

    #[test]
    fn a_resize_is_old_or_new_and_reveals_no_old_bytes() {
        let mut guest = Guest::new(&disk(&[1, 2, 3]));
        guest.start_resize(512, &[7; 1024]);
        for fine in [&[1, 2, 3][..], &[1], &[1, 0, 0], &[1, 7, 3]] {
            check(&guest, fine, None);
        }
        check(&guest, &[1, 2], Some("disk has 1024 bytes"));
        check(&guest, &[1, 9, 3], Some("never written there"));
        guest.finish_resize(512);
        guest.start_flush();
        guest.finish_flush();
        check(&guest, &[1], None);
        check(&guest, &[1, 2, 3], Some("disk has 1536 bytes, allowed [512]"));
        guest.start_resize(2048, &[]);
        check(&guest, &[1, 0, 0, 0], None);
        check(&guest, &[1, 2, 0, 0], Some("a flush had outdated"));
    }

    #[test]
    fn writes_of_sector_parts_keep_the_rest() {
        let mut guest = Guest::new(&disk(&[1, 2]));
        guest.start_write(500, &[9; 20]);
        let mut new = disk(&[1, 2]);
        new[500..520].fill(9);
        let all = GuestRange::new(qcow2_core::GuestOffset::new(0), 1024).unwrap();
        assert_eq!(guest.current_at(all), new);
        assert_eq!(guest.judge(&new), Ok(()));
        new[500] = 1;
        assert!(guest.judge(&new).is_err());
    }

    #[test]
    fn an_ambiguous_operation_settles_on_what_is_read_back() {
        let mut guest = Guest::new(&disk(&[1, 2]));
        guest.start_write(0, &disk(&[0, 0]));
        guest.finish(0, &disk(&[1, 0]));
        guest.start_flush();
        guest.finish_flush();
        check(&guest, &[1, 0], None);
        check(&guest, &[0, 0], Some("a flush had outdated"));
    }
}
