//! What each guest sector may hold after a power cut: its content at the last flush, or anything written
//! since.

use super::snapshots::Snapshots;
use crate::crash::SECTOR;
use qcow2_core::GuestRange;
use std::sync::Arc;

/// The content of one sector.
pub(super) type Content = Arc<[u8; SECTOR as usize]>;

/// Something whose value may be that of the last flush or any since: a sector's content, the disk's size.
#[derive(Clone, Debug)]
struct Register<T> {
    /// Oldest first: what the last flush made durable, then everything since.
    allowed: Vec<T>,
    /// How many of them belong to finished operations; a flush that starts now makes the last of these
    /// durable.
    finished: usize,
    /// `finished` as it was when the flush that is under way began.
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

    /// The operation has returned, and `value` is what it left.
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

/// The guest disk as a reader after a power cut may see it.
#[derive(Clone, Debug)]
pub(super) struct Guest {
    /// Never fewer than the disk had at any time; those past its end are waiting for it to grow again.
    sectors: Vec<Register<Content>>,
    size: Register<u64>,
    /// The fewest bytes that the disk ever had, or was to have.
    smallest: u64,
    snapshots: Snapshots,
}

impl Guest {
    /// A disk that durably holds `bytes`, a multiple of 512.
    pub(super) fn new(bytes: &[u8]) -> Self {
        let sectors = bytes.as_chunks().0.iter().map(|content| Register::new(Arc::new(*content)));
        Self {
            sectors: sectors.collect(),
            size: Register::new(bytes.len() as u64),
            smallest: bytes.len() as u64,
            snapshots: Snapshots::default(),
        }
    }

    /// The fewest bytes that the disk ever had, or was to have.
    pub(super) fn smallest_size(&self) -> u64 {
        self.smallest
    }

    /// The snapshots.
    pub(super) fn snapshots(&mut self) -> &mut Snapshots {
        &mut self.snapshots
    }

    /// The same, to look at.
    pub(super) fn seen_snapshots(&self) -> &Snapshots {
        &self.snapshots
    }

    /// Notes that the disk has gone back to `content`, durably.
    pub(super) fn finish_apply(&mut self, content: &[u8]) {
        let mut snapshots = std::mem::take(&mut self.snapshots);
        snapshots.going_back = None;
        *self = Self { snapshots, ..Self::new(content) };
    }

    /// Everything the guest sees now.
    pub(super) fn current(&self) -> Vec<u8> {
        let all = GuestRange::new(qcow2_core::GuestOffset::new(0), self.size());
        all.map(|all| self.current_at(all)).unwrap_or_default()
    }

    /// Bytes of the disk as it is now.
    pub(super) fn size(&self) -> u64 {
        *self.size.latest()
    }

    /// Notes that the disk is about to become `size` bytes, a multiple of 512. What is cut off may also read
    /// as zeroes or as `backing` does, should the old size come back; what is added is zeroes.
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

    /// Notes that the resize has returned and left `size`.
    pub(super) fn finish_resize(&mut self, size: u64) {
        self.size.finish(size);
        for sector in self.sectors.iter_mut().skip((size / SECTOR) as usize) {
            sector.finished = sector.allowed.len();
        }
    }

    /// The sectors of `range` as they read now.
    pub(super) fn current_at(&self, range: GuestRange) -> Vec<u8> {
        let sectors = (range.start().value() / SECTOR) as usize..(range.end().value() / SECTOR) as usize;
        self.sectors[sectors].iter().flat_map(|sector| **sector.latest()).collect()
    }

    /// Notes that `bytes` are about to be written at byte `offset`.
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

    /// Notes that the operation on the `len` bytes at `offset` has returned and that `seen` reads back now.
    pub(super) fn finish(&mut self, offset: u64, seen: &[u8]) {
        let first = offset / SECTOR;
        for (index, content) in (first..).zip(seen.as_chunks().0) {
            let sector = &mut self.sectors[index as usize];
            sector.finish(Arc::new(*content));
        }
    }

    /// Whether sector contents read back after an operation are among the allowed ones, as
    /// [`judge`](Self::judge).
    pub(super) fn judge_at(&self, offset: u64, seen: &[u8]) -> Result<(), String> {
        let first = (offset / SECTOR) as usize;
        for (index, content) in (first..).zip(seen.as_chunks().0) {
            self.sectors[index].judge(content).map_err(|what| self.describe(index, content, what))?;
        }
        Ok(())
    }

    /// Whether `seen`, read from a crash image, holds in every sector a content that it may have.
    pub(super) fn judge(&self, seen: &[u8]) -> Result<(), String> {
        if self.snapshots.going_back.as_ref().is_some_and(|content| content[..] == *seen) {
            return Ok(());
        }
        if !self.size.allowed.contains(&(seen.len() as u64)) {
            return Err(format!("disk has {} bytes, allowed {:?}", seen.len(), self.size.allowed));
        }
        self.judge_at(0, seen)
    }

    /// Notes that a flush starts.
    pub(super) fn start_flush(&mut self) {
        for sector in &mut self.sectors {
            sector.flushing = sector.finished;
        }
        self.size.flushing = self.size.finished;
    }

    /// Notes that the flush has returned: what it covered is the oldest that may be left.
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

/// So many outdated contents of a sector are remembered.
const MOST_OUTDATED: usize = 4;

impl Register<Content> {
    fn judge(&self, content: &[u8; SECTOR as usize]) -> Result<(), &'static str> {
        if self.allowed.iter().rev().any(|allowed| **allowed == *content) {
            Ok(())
        } else if self.outdated.iter().any(|outdated| **outdated == *content) {
            Err("what a flush had outdated,")
        } else if content.iter().all(|&byte| byte == 0) {
            Err("zeroes,")
        } else {
            Err("something that was never written there,")
        }
    }
}

/// An allowed content, and from where to where the seen one differs from it.
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
    fn a_flush_leaves_only_what_was_finished_before_it() {
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
    fn a_resize_is_old_or_new_and_shows_nothing_old() {
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
    fn parts_of_sectors_keep_the_rest() {
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
    fn an_operation_with_several_outcomes_settles_on_what_is_seen() {
        let mut guest = Guest::new(&disk(&[1, 2]));
        guest.start_write(0, &disk(&[0, 0]));
        guest.finish(0, &disk(&[1, 0]));
        guest.start_flush();
        guest.finish_flush();
        check(&guest, &[1, 0], None);
        check(&guest, &[0, 0], Some("a flush had outdated"));
    }
}
