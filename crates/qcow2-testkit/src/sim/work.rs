//! The workload: operations on the image, each announced to the judge before it begins.

use super::Configure;
use super::guest::Guest;
use super::snapshots::Taken;
use super::start::Start;
use crate::arbitrary::{Operation, Shape};
use crate::crash::SECTOR;
use crate::model::chain;
use crate::pattern;
use crate::rng::Rng;
use qcow2_core::{ErrorKind, GuestOffset, GuestRange, Image, NewSnapshot, OpenOptions};
use qcow2_format::Version;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// One step of a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// An operation of any disk. `Reopen` closes the image and opens it again.
    Plain(Operation),
    /// Resizes the disk to this many bytes.
    Resize(u64),
    /// Drops all allocations of the overlay.
    MakeEmpty,
    /// A compressed write of the guest cluster at `offset` with the pattern of `seed`, if the engine accepts
    /// it; three clusters in one call if bit 2 of the seed is set.
    Compressed {
        /// Cluster aligned.
        offset: u64,
        /// Seed of the content.
        seed: u64,
    },
    /// Takes a snapshot named after this number.
    TakeSnapshot(u64),
    /// Applies one of the snapshots, if there are any.
    ApplySnapshot(u64),
    /// Deletes one of the snapshots, if there are any.
    DeleteSnapshot(u64),
}

impl Step {
    /// The step limited to a disk of `size` bytes; `None` if nothing is left.
    pub(super) fn clipped(self, size: u64) -> Option<Self> {
        let clip = |range: GuestRange| {
            let end = GuestOffset::new(range.end().value().min(size));
            Some(GuestRange::between(range.start(), end)).filter(|range| !range.is_empty())
        };
        Some(match self {
            Self::Plain(Operation::Read(range)) => Self::Plain(Operation::Read(clip(range)?)),
            Self::Plain(Operation::Discard(range)) => Self::Plain(Operation::Discard(clip(range)?)),
            Self::Plain(Operation::Write { range, seed }) => {
                Self::Plain(Operation::Write { range: clip(range)?, seed })
            }
            Self::Plain(Operation::Zero { range, mode }) => {
                Self::Plain(Operation::Zero { range: clip(range)?, mode })
            }
            Self::Compressed { offset, .. } if offset >= size => return None,
            other => other,
        })
    }
}

/// Draws `count` steps. Every write gets unique content, so that misplaced bytes are detected.
pub(super) fn draw_work(rng: &mut Rng, shape: &Shape, count: usize) -> Vec<Step> {
    // Seeds divisible by 4 compress; small seeds belong to the start image.
    let base = rng.next_u64() << 12 | 1 << 11;
    let draw = |index| {
        let seed = base + 4 * index as u64 + u64::from(!rng.one_in(3));
        if rng.one_in(8) {
            return Step::Plain(Operation::Flush);
        }
        if rng.one_in(14) {
            return match rng.below(4) {
                0 => Step::ApplySnapshot(rng.below(8)),
                1 => Step::DeleteSnapshot(rng.below(8)),
                _ => Step::TakeSnapshot(seed),
            };
        }
        if rng.one_in(24) {
            let sectors = rng.between(1, shape.size * 3 / 2 / SECTOR);
            return if sectors.is_multiple_of(3) { Step::MakeEmpty } else { Step::Resize(SECTOR * sectors) };
        }
        match Operation::random(rng, shape.size, shape.cluster_size()) {
            Operation::Write { range, .. } if rng.one_in(6) => {
                let offset = range.start().value() & !(shape.cluster_size() - 1);
                Step::Compressed { offset, seed: seed & !3 }
            }
            Operation::Write { range, .. } => Step::Plain(Operation::Write { range, seed }),
            other => Step::Plain(other),
        }
    };
    (0..count).map(draw).collect()
}

/// Opens the image under test with these options.
pub(super) type Opener<'a> = Box<dyn Fn(&OpenOptions) -> Result<Arc<Image>, String> + 'a>;

/// An image under test and its expected content.
pub(super) struct Work<'a> {
    open: Opener<'a>,
    options: OpenOptions,
    disk: Arc<Image>,
    guest: Arc<Mutex<Guest>>,
    shape: Shape,
    backing: &'a [u8],
}

impl<'a> Work<'a> {
    /// Opens the image for writing; it must read as `guest` expects.
    pub(super) fn start(
        start: &'a Start,
        guest: Arc<Mutex<Guest>>,
        open: Opener<'a>,
        configure: &Configure,
    ) -> Result<Self, String> {
        let mut options = start.open_options();
        configure(&mut options);
        let disk = open(&options)?;
        let work = Self { open, options, disk, guest, shape: start.shape, backing: start.backing() };
        work.check_all()?;
        Ok(work)
    }

    /// Runs one step, limited to the disk's size, and checks that the image then reads as it should.
    pub(super) fn step(&mut self, step: &Step) -> Result<(), String> {
        let Some(step) = step.clipped(self.guest().size()) else { return Ok(()) };
        match step {
            Step::Plain(Operation::Read(range)) => self.expect(range),
            Step::Plain(operation @ Operation::Write { range, seed }) => {
                let bytes = pattern::bytes(seed, range.start().value(), range.len() as usize);
                self.change(range, &bytes, |disk| operation.run(disk).map(drop))
            }
            Step::Plain(operation @ Operation::Zero { range, .. }) => {
                self.change(range, &vec![0; range.len() as usize], |disk| operation.run(disk).map(drop))
            }
            Step::Plain(Operation::Discard(range)) => self.discard(range),
            Step::Plain(Operation::Flush) => self.durably(|disk| disk.flush()),
            Step::Plain(Operation::Reopen) => self.reopen(),
            Step::Resize(size) => self.resize(size),
            Step::MakeEmpty => self.make_empty(),
            Step::Compressed { offset, seed } if seed & 4 == 0 => self.compressed(offset, seed),
            Step::Compressed { offset, seed } => self.compressed_together(offset, seed),
            Step::TakeSnapshot(_) | Step::ApplySnapshot(_) | Step::DeleteSnapshot(_) => self.snapshot(step),
        }
    }

    fn snapshot(&self, step: Step) -> Result<(), String> {
        let Some(change) = SnapshotChange::start(step, &mut self.guest()) else { return Ok(()) };
        match change.make(&self.disk) {
            Ok(()) => change.finish(&mut self.guest()),
            Err(error) if change.is_refusal(&error) => change.undo(&mut self.guest()),
            Err(error) => return Err(chain(&error)),
        }
        self.check_all()
    }

    fn resize(&self, size: u64) -> Result<(), String> {
        if refuses_resize(&self.disk) {
            let refusals = [ErrorKind::Unsupported, ErrorKind::Inconsistent];
            let refused = self.disk.resize(size).is_err_and(|error| refusals.contains(&error.kind()));
            return if refused { Ok(()) } else { Err("resized in spite of snapshots or bitmaps".to_owned()) };
        }
        self.guest().start_resize(size, self.backing);
        self.disk.resize(size).map_err(|error| chain(&error))?;
        self.guest().finish_resize(self.disk.size());
        self.check_all()
    }

    /// Afterwards the disk reads as the backing file; until then every sector may read as that or as before.
    fn make_empty(&self) -> Result<(), String> {
        let mut below = self.backing.to_vec();
        below.resize(self.disk.size() as usize, 0);
        self.guest().start_write(0, &below);
        self.disk.make_empty().map_err(|error| chain(&error))?;
        self.guest().finish(0, &below);
        self.check_all()
    }

    /// Closes the image; everything must then be durable.
    pub(super) fn close(&self) -> Result<(), String> {
        self.check_all()?;
        self.durably(Image::close)
    }

    fn guest(&self) -> MutexGuard<'_, Guest> {
        self.guest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(
        &self,
        range: GuestRange,
        bytes: &[u8],
        make: impl FnOnce(&Image) -> qcow2_core::Result<()>,
    ) -> Result<(), String> {
        self.guest().start_write(range.start().value(), bytes);
        make(&self.disk).map_err(|error| chain(&error))?;
        self.expect(range)?;
        let around = sectors_around(range);
        let mut guest = self.guest();
        let now = guest.current_at(around);
        guest.finish(around.start().value(), &now);
        Ok(())
    }

    /// A discarded sector may read as zeroes or as before.
    fn discard(&self, range: GuestRange) -> Result<(), String> {
        let start = range.start().value().next_multiple_of(SECTOR);
        let end = range.end().value() / SECTOR * SECTOR;
        let inner = GuestRange::between(GuestOffset::new(start), GuestOffset::new(end));
        let old = self.guest().current_at(inner);
        self.guest().start_write(start, &vec![0; inner.len() as usize]);
        self.disk.discard(range).map_err(|error| chain(&error))?;
        let seen = self.read(inner)?;
        for (index, (seen, old)) in seen.chunks(SECTOR as usize).zip(old.chunks(SECTOR as usize)).enumerate()
        {
            if seen != old && seen.iter().any(|&byte| byte != 0) {
                return Err(format!("discarded sector {index} of {inner:?} is neither zero nor as before"));
            }
        }
        self.guest().finish(start, &seen);
        Ok(())
    }

    fn compressed(&self, offset: u64, seed: u64) -> Result<(), String> {
        let end = (offset + self.shape.cluster_size()).min(self.disk.size());
        let range = GuestRange::between(GuestOffset::new(offset), GuestOffset::new(end));
        let bytes = pattern::bytes(seed, offset, range.len() as usize);
        let old = self.guest().current_at(range);
        self.guest().start_write(offset, &bytes);
        match self.disk.write_compressed(range.start(), &bytes) {
            Ok(()) => self.guest().finish(offset, &bytes),
            // The cluster is allocated already, or there is a data file: nothing has changed.
            Err(error) if error.kind() == ErrorKind::Unsupported => self.guest().finish(offset, &old),
            Err(error) => return Err(chain(&error)),
        }
        self.expect(range)
    }

    /// Three clusters in one call; if one is refused, those before it are stored.
    fn compressed_together(&self, offset: u64, seed: u64) -> Result<(), String> {
        let size = self.shape.cluster_size();
        let end = (offset + 3 * size).min(self.disk.size());
        let range = GuestRange::between(GuestOffset::new(offset), GuestOffset::new(end));
        let bytes = pattern::bytes(seed, offset, range.len() as usize);
        let codec = self.disk.codec().map_err(|error| chain(&error))?;
        let mut streams = Vec::new();
        for cluster in bytes.chunks(size as usize) {
            let mut plain = cluster.to_vec();
            plain.resize(size as usize, 0);
            let mut stream = vec![0; size as usize - 1];
            let len = codec.compress(&plain, &mut stream).map_err(|error| error.to_string())?;
            // Incompressible clusters are left to another step.
            let Some(len) = len else { return self.compressed(offset, seed) };
            stream.truncate(len);
            streams.push(stream);
        }
        let offsets = (offset..).step_by(size as usize).map(GuestOffset::new);
        let streams: Vec<_> = offsets.zip(streams.iter().map(Vec::as_slice)).collect();
        let old = self.guest().current_at(range);
        self.guest().start_write(offset, &bytes);
        match self.disk.write_compressed_streams(&streams) {
            Ok(()) => self.guest().finish(offset, &bytes),
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                let seen = self.read(range)?;
                let len = size as usize;
                let same =
                    |a: &[u8], b: &[u8]| a.chunks(len).zip(b.chunks(len)).take_while(|(a, b)| a == b).count();
                let stored = same(&seen, &bytes).min(streams.len()) * len;
                if seen.get(stored..) != old.get(stored..) {
                    return Err(format!("{range:?} is neither as before nor written in order"));
                }
                self.guest().finish(offset, &seen);
            }
            Err(error) => return Err(chain(&error)),
        }
        self.expect(range)
    }

    fn durably(&self, make: impl FnOnce(&Image) -> qcow2_core::Result<()>) -> Result<(), String> {
        self.guest().start_flush();
        make(&self.disk).map_err(|error| chain(&error))?;
        self.guest().finish_flush();
        Ok(())
    }

    fn reopen(&mut self) -> Result<(), String> {
        self.close()?;
        self.disk = (self.open)(&self.options)?;
        self.check_all()
    }

    fn check_all(&self) -> Result<(), String> {
        let size = self.guest().size();
        if self.disk.size() != size {
            return Err(format!("disk has {} bytes, expected {size}", self.disk.size()));
        }
        self.expect(GuestRange::between(GuestOffset::new(0), GuestOffset::new(size)))
    }

    /// The range must read as the last operation on each sector left it.
    fn expect(&self, range: GuestRange) -> Result<(), String> {
        let around = sectors_around(range);
        let seen = self.read(around)?;
        let guest = self.guest();
        if seen == guest.current_at(around) {
            return Ok(());
        }
        guest.judge_at(around.start().value(), &seen)?;
        Err(format!("{around:?} reads as it did before the last change"))
    }

    fn read(&self, range: GuestRange) -> Result<Vec<u8>, String> {
        let mut seen = pattern::unread(range.len() as usize);
        self.disk.read_at(range.start(), &mut seen).map_err(|error| chain(&error))?;
        Ok(seen)
    }
}

/// A step that changes snapshots, and the list before it.
pub(super) struct SnapshotChange {
    step: Step,
    before: Vec<Taken>,
    after: Vec<Taken>,
    /// Index of the snapshot it is about.
    index: usize,
}

impl SnapshotChange {
    /// Records that the step begins; `None` if there is no snapshot to work on.
    pub(super) fn start(step: Step, guest: &mut Guest) -> Option<Self> {
        let before = guest.seen_snapshots().now().to_vec();
        let mut after = before.clone();
        let index = |number: u64| number.checked_rem(before.len() as u64).map(|index| index as usize);
        let index = match step {
            Step::TakeSnapshot(number) => {
                let content = Arc::new(guest.current());
                after.push(Taken { name: number.to_string().into_bytes(), content });
                0
            }
            Step::ApplySnapshot(number) => {
                let index = index(number)?;
                guest.snapshots().going_back = Some(Arc::clone(&before[index].content));
                index
            }
            Step::DeleteSnapshot(number) => {
                let index = index(number)?;
                after.remove(index);
                index
            }
            _ => return None,
        };
        guest.start_flush();
        guest.snapshots().start(after.clone());
        Some(Self { step, before, after, index })
    }

    pub(super) fn make(&self, disk: &Image) -> qcow2_core::Result<()> {
        let snapshots = disk.snapshots()?;
        // A poisoned image may not list the snapshot; its refusal comes first then.
        let missing = || qcow2_core::Error::new(ErrorKind::NotFound, "the simulation's snapshot is gone");
        let chosen = || match (snapshots.get(self.index), disk.flush()) {
            (_, Err(error)) => Err(error),
            (found, Ok(())) => found.ok_or_else(missing),
        };
        match self.step {
            Step::TakeSnapshot(number) => {
                let mut new = NewSnapshot::default();
                new.name = number.to_string().into_bytes();
                disk.create_snapshot(&new).map(drop)
            }
            Step::ApplySnapshot(_) => disk.apply_snapshot(chosen()?),
            _ => disk.delete_snapshot(chosen()?),
        }
    }

    /// The step succeeded: everything is durable.
    pub(super) fn finish(&self, guest: &mut Guest) {
        guest.finish_flush();
        guest.snapshots().finish(self.after.clone());
        if let Step::ApplySnapshot(_) = self.step {
            guest.finish_apply(&self.before[self.index].content);
        }
    }

    /// True if the image does not support the step: nothing has changed.
    pub(super) fn is_refusal(&self, error: &qcow2_core::Error) -> bool {
        let at_limit = error.kind() == ErrorKind::NoSpace && error.storage_error().is_none();
        at_limit || error.kind() == ErrorKind::Unsupported
    }

    /// The step failed and the image still accepts changes: takes over what it lists now.
    pub(super) fn settle(&self, disk: &Image, guest: &mut Guest) {
        let names: Vec<Vec<u8>> =
            disk.snapshots().unwrap_or_default().into_iter().map(|snapshot| snapshot.name).collect();
        let same = |list: &[Taken]| list.iter().map(|taken| &taken.name).eq(&names);
        let went_back = matches!(self.step, Step::ApplySnapshot(_)) && self.reads_as_applied(disk);
        if went_back || (!same(&self.before) && same(&self.after)) {
            self.finish(guest);
        } else {
            self.undo(guest);
        }
        guest.snapshots().careful = true;
    }

    fn reads_as_applied(&self, disk: &Image) -> bool {
        let mut seen = pattern::unread(disk.size() as usize);
        let read = disk.read_at(GuestOffset::new(0), &mut seen);
        read.is_ok() && seen == *self.before[self.index].content
    }

    /// Records that nothing has changed.
    pub(super) fn undo(&self, guest: &mut Guest) {
        guest.snapshots().going_back = None;
        guest.snapshots().finish(self.before.clone());
    }
}

/// True if the image must not be resized: version 2 with snapshots, or inconsistent bitmaps.
pub(super) fn refuses_resize(disk: &Image) -> bool {
    let header = disk.header();
    (header.version == Version::V2 && header.nb_snapshots > 0)
        || disk.bitmaps().is_ok_and(|bitmaps| bitmaps.iter().any(|bitmap| bitmap.in_use))
}

/// The whole sectors that cover `range`.
pub(super) fn sectors_around(range: GuestRange) -> GuestRange {
    let start = range.start().value() / SECTOR * SECTOR;
    GuestRange::between(
        GuestOffset::new(start),
        GuestOffset::new(range.end().value().next_multiple_of(SECTOR)),
    )
}
