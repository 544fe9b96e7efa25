//! Compares the guest content of two disks.

use crate::buffer::PageBuffer;
use crate::error::{Error, ErrorKind, Result};
use crate::executor::Executor;
use crate::map::MapExtent;
use crate::pipeline::{Order, Stages, run};
use crate::progress::Progress;
use crate::source::{SECTOR, Source};
use crate::zeroes::first_nonzero;
use qcow2_core::GuestDisk;
use std::ops::{ControlFlow, Range};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes read from each disk at a time; at least a cluster.
const CHUNK: u64 = 1 << 20;

/// Options of a comparison.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CompareOptions {
    /// Require equal sizes and equal allocation too: a stored zero differs from an unallocated one.
    pub strict: bool,
    /// Names of the disks for error messages.
    pub names: [String; 2],
}

impl Default for CompareOptions {
    fn default() -> Self {
        Self { strict: false, names: ["the first disk".into(), "the second disk".into()] }
    }
}

impl CompareOptions {
    /// With equal sizes and equal allocation required, or not.
    #[must_use]
    pub fn with_strict(self, strict: bool) -> Self {
        Self { strict, ..self }
    }

    /// With other names of the disks in error messages.
    #[must_use]
    pub fn with_names(self, names: [String; 2]) -> Self {
        Self { names, ..self }
    }
}

/// The result of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Comparison {
    /// No difference found.
    Identical,
    /// The bytes differ.
    Content {
        /// First byte of the first 512-byte sector that differs. A sector that is split by the end of a raw
        /// disk whose size is no multiple of 512 counts as two.
        offset: u64,
    },
    /// Strict only: the sizes differ. Nothing else was compared.
    Size,
    /// Strict only: the bytes before `offset` are equal, but there the allocation state differs: whether the
    /// range is allocated, zero or compressed, or whether it reaches the end of the disk in one run.
    State {
        /// First byte whose state differs.
        offset: u64,
    },
}

/// The result, with a hint for the user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CompareReport {
    /// The result.
    pub result: Comparison,
    /// Not strict: one disk is larger, and its tail was compared with zeroes.
    pub sizes_differ: bool,
}

/// Compares two disks; their sizes are rounded up to a multiple of 512. Without `strict` a smaller disk
/// counts as followed by zeroes, and it does not matter how zeroes are stored. Ranges known to be zero on
/// both sides are not read. The result does not depend on the number of workers.
///
/// Memory: at most four pieces per worker; a piece is 1 MiB, or a cluster if that is larger. Errors:
/// `Extents` and `Read`, which name the disk and the offset; `Stopped`.
pub fn compare(
    disks: [&Arc<dyn GuestDisk>; 2],
    options: &CompareOptions,
    executor: &dyn Executor,
    progress: &dyn Progress,
) -> Result<CompareReport> {
    let [a, b] = disks.map(|disk| Source::new(std::slice::from_ref(disk)));
    let sides = [a.map_err(|e| named(e, &options.names[0]))?, b.map_err(|e| named(e, &options.names[1]))?];
    let sizes = [sides[0].size(), sides[1].size()];
    let (shorter, longer) = (sizes[0].min(sizes[1]), sizes[0].max(sizes[1]));
    if options.strict && shorter != longer {
        return Ok(CompareReport { result: Comparison::Size, sizes_differ: false });
    }
    let chunk = CHUNK.max(sides[0].cluster_size()).max(sides[1].cluster_size());
    let (names, found) = (&options.names, Mutex::new(None));
    let comparing = Comparing { sides, names, shorter, longer, end: longer, chunk, progress, found };
    // Content is compared only up to the first state difference: an earlier difference of content is reported
    // instead of it.
    let state_differs = if options.strict { comparing.first_state_difference()? } else { None };
    let comparing = Comparing { end: state_differs.unwrap_or(longer), ..comparing };
    progress.set_total(comparing.end);
    if shorter == 0 && longer > 0 {
        progress.smaller_ended();
    }
    run(&comparing, 0, Order::Claimed, executor)?;
    let found = comparing.found.into_inner().unwrap_or_else(PoisonError::into_inner);
    let result = match (found, state_differs) {
        (Some(offset), _) => Comparison::Content { offset },
        (None, Some(offset)) => Comparison::State { offset },
        (None, None) => Comparison::Identical,
    };
    // qemu-img mentions the sizes only if it got past the end of the shorter disk, as do errors.
    let looked_past = found.is_none_or(|offset| offset >= shorter);
    Ok(CompareReport { result, sizes_differ: shorter != longer && looked_past })
}

fn named(error: Error, name: &str) -> Error {
    let context = format!("{} of {name}", error.context());
    Error::new(error.kind(), context).with_disk(name).with_source(error)
}

struct Comparing<'a> {
    sides: [Source; 2],
    names: &'a [String; 2],
    /// Size of the smaller disk.
    shorter: u64,
    longer: u64,
    end: u64,
    chunk: u64,
    progress: &'a dyn Progress,
    found: Mutex<Option<u64>>,
}

/// A piece of both disks.
#[derive(Default)]
struct Slot {
    range: Range<u64>,
    /// Both are known to be zero there.
    zero: bool,
    bytes: [PageBuffer; 2],
    differs: Option<u64>,
}

/// Which sides are zero in a run of `len` bytes.
struct Pair {
    len: u64,
    zero: [bool; 2],
}

impl Comparing<'_> {
    /// The run at `at` on one side, at most `len` bytes. Past the end of the disk it is zero.
    fn extent_at(&self, side: usize, at: u64, len: u64) -> Result<MapExtent> {
        let source = &self.sides[side];
        if at >= source.size() {
            return Ok(MapExtent { start: at, len, zero: true, ..MapExtent::default() });
        }
        source
            .state_at(at, len.min(source.size() - at))
            .map_err(|e| self.failed(at, named(e, &self.names[side])))
    }

    /// `error` at the offset `at`, which says whether the end of the shorter disk was passed before.
    fn failed(&self, at: u64, error: Error) -> Error {
        if at < self.shorter { error } else { error.with_different_sizes() }
    }

    fn pair_at(&self, at: u64, len: u64) -> Result<Pair> {
        let (a, b) = (self.extent_at(0, at, len)?, self.extent_at(1, at, len)?);
        Ok(Pair { len: a.len.min(b.len), zero: [a.zero, b.zero] })
    }

    /// `at`, the end of a run of zeroes up to `end`, or the end of the sector that the end of a raw disk
    /// splits there, if its rest is zero too: one step of the progress, not two.
    fn through_padding(&self, at: u64, end: u64) -> Result<u64> {
        let sector_end = at.next_multiple_of(SECTOR).min(end);
        if at >= sector_end {
            return Ok(at);
        }
        let rest = self.pair_at(at, sector_end - at)?;
        Ok(if rest.zero == [true, true] { at + rest.len } else { at })
    }

    /// First offset at which the allocation states differ. Both disks have the same size.
    fn first_state_difference(&self) -> Result<Option<u64>> {
        let mut runs = [self.joined(0, 0)?, self.joined(1, 0)?];
        let mut at = 0;
        while at < self.end {
            let states = runs.each_ref().map(|run| state(run, self.end));
            if states[0] != states[1] {
                return Ok(Some(at));
            }
            at = (runs[0].start + runs[0].len).min(runs[1].start + runs[1].len);
            for (side, run) in runs.iter_mut().enumerate() {
                if run.start + run.len == at && at < self.end {
                    *run = self.joined(side, at)?;
                }
            }
        }
        Ok(None)
    }

    /// The run at `at` on one side, extended over all following runs with the same state whose bytes are
    /// stored one behind the other.
    fn joined(&self, side: usize, at: u64) -> Result<MapExtent> {
        if at >= self.end {
            return Ok(MapExtent { start: at, ..MapExtent::default() });
        }
        let mut run = self.extent_at(side, at, self.end - at)?;
        while run.start + run.len < self.end {
            if self.progress.should_stop() {
                return Err(stopped(at));
            }
            let next = self.extent_at(side, run.start + run.len, self.end - run.start - run.len)?;
            if !run.continues_in(&next) {
                break;
            }
            run.len += next.len;
        }
        Ok(run)
    }

    fn read(&self, side: usize, at: u64, buf: &mut [u8]) -> Result<()> {
        let source = &self.sides[side];
        let stored = source.size().saturating_sub(at).min(buf.len() as u64) as usize;
        buf[stored..].fill(0);
        source.read_at(at, &mut buf[..stored]).map_err(|e| {
            let context = format!("error while reading offset {at} of {}", self.names[side]);
            self.failed(at, Error::new(ErrorKind::Read, context).with_source(e))
        })
    }

    /// The first differing sector of a run. Only sides that are not known to be zero are read.
    fn difference(&self, at: u64, pair: &Pair, bytes: &mut [PageBuffer; 2]) -> Result<Option<u64>> {
        let [a, b] = bytes;
        for (side, buf) in [&mut *a, &mut *b].into_iter().enumerate() {
            if !pair.zero[side] {
                buf.set_len(pair.len as usize);
                self.read(side, at, buf)?;
            }
        }
        let first = match pair.zero {
            [true, true] => None,
            [true, false] => first_nonzero(b),
            [false, true] => first_nonzero(a),
            [false, false] => first_difference(a, b),
        };
        // Sectors are counted from the start of the run, like in qemu-img. A run starts inside a sector only
        // where a raw disk ends there.
        Ok(first.map(|index| at + index as u64 / SECTOR * SECTOR))
    }
}

fn flags(run: &MapExtent) -> (bool, bool, bool, bool, bool) {
    (run.present, run.zero, run.data, run.compressed, run.host.is_some())
}

fn state(run: &MapExtent, end: u64) -> ((bool, bool, bool, bool, bool), bool) {
    (flags(run), run.start + run.len == end)
}

fn stopped(at: u64) -> Error {
    Error::new(ErrorKind::Stopped, format!("stopped at byte {at}"))
}

fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    // Whole blocks first: the compiler vectorises the comparison of slices.
    let block = a.chunks(BLOCK_LEN).zip(b.chunks(BLOCK_LEN)).position(|(a, b)| a != b)?;
    let from = block * BLOCK_LEN;
    let inside = a[from..].iter().zip(&b[from..]).position(|(a, b)| a != b)?;
    Some(from + inside)
}

const BLOCK_LEN: usize = 4096;

impl Stages for Comparing<'_> {
    type Cursor = u64;
    type Slot = Slot;

    fn slot(&self) -> Slot {
        Slot::default()
    }

    fn claim(&self, cursor: &mut u64, slot: &mut Slot) -> Result<bool> {
        if *cursor < self.end {
            let start = *cursor;
            if self.progress.should_stop() {
                return Err(stopped(start));
            }
            // No piece goes on past the end of the smaller disk: what is said there is said in order.
            let end = if start < self.shorter { self.end.min(self.shorter) } else { self.end };
            let pair = self.pair_at(start, end - start)?;
            slot.zero = pair.zero == [true, true];
            *cursor = match slot.zero {
                true => self.through_padding(start + pair.len, end)?,
                false => (start - start % self.chunk).saturating_add(self.chunk).min(end),
            };
            slot.range = start..*cursor;
            return Ok(true);
        }
        Ok(false)
    }

    fn prepare(&self, slot: &mut Slot) -> Result<()> {
        let mut at = slot.range.start;
        slot.differs = None;
        while !slot.zero && at < slot.range.end && slot.differs.is_none() {
            let pair = self.pair_at(at, slot.range.end - at)?;
            slot.differs = self.difference(at, &pair, &mut slot.bytes)?;
            at += pair.len;
        }
        Ok(())
    }

    fn finish(&self, slot: &mut Slot) -> Result<ControlFlow<()>> {
        let Some(at) = slot.differs else {
            self.progress.advance(slot.range.end - slot.range.start);
            if slot.range.end == self.shorter && self.shorter < self.longer {
                self.progress.smaller_ended();
            }
            return Ok(ControlFlow::Continue(()));
        };
        *self.found.lock().unwrap_or_else(PoisonError::into_inner) = Some(at);
        Ok(ControlFlow::Break(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::Inline;
    use crate::progress::Silent;
    use crate::testing::{TestDisk, Threads, random};

    const MIB: usize = 1 << 20;

    fn disk(disk: TestDisk) -> Arc<dyn GuestDisk> {
        Arc::new(disk)
    }

    fn strict() -> CompareOptions {
        CompareOptions { strict: true, ..CompareOptions::default() }
    }

    #[track_caller]
    fn check(
        a: &Arc<dyn GuestDisk>,
        b: &Arc<dyn GuestDisk>,
        options: &CompareOptions,
        result: Comparison,
        sizes_differ: bool,
    ) {
        for (a, b) in [(a, b), (b, a)] {
            for workers in [1, 4] {
                let report = compare([a, b], options, &Threads(workers), &Silent).unwrap();
                assert_eq!(report, CompareReport { result, sizes_differ });
            }
        }
    }

    #[test]
    fn finds_the_first_differing_sector() {
        let mut next = random(3);
        let bytes: Vec<u8> = (0..6 * MIB + 100).map(|_| next() as u8).collect();
        let whole = disk(TestDisk::data(bytes.clone()));
        check(&whole, &whole, &CompareOptions::default(), Comparison::Identical, false);
        for first in [0, 1, 511, 512, MIB - 1, MIB, 3 * MIB + 513, 6 * MIB + 99] {
            let mut other = bytes.clone();
            for at in [first, first + 5000, first + 2 * MIB] {
                if let Some(byte) = other.get_mut(at) {
                    *byte ^= 0x40;
                }
            }
            let offset = (first / 512 * 512) as u64;
            let other = disk(TestDisk::data(other));
            check(&whole, &other, &CompareOptions::default(), Comparison::Content { offset }, false);
        }
    }

    #[test]
    fn allocation_of_zeroes_does_not_matter() {
        for seed in 0..8 {
            let mixed = TestDisk::mixed(3 * MIB as u64 + 77, 400_000, seed);
            let same = TestDisk::data(mixed.content());
            let mut other = mixed.content();
            let place = 1_500_000 + seed as usize * 1000;
            other[place] ^= 1;
            let mixed = disk(mixed);
            check(&mixed, &disk(same), &CompareOptions::default(), Comparison::Identical, false);
            let expected = Comparison::Content { offset: (place / 512 * 512) as u64 };
            check(&mixed, &disk(TestDisk::data(other)), &CompareOptions::default(), expected, false);
        }
    }

    #[test]
    fn tail_of_the_larger_disk_must_be_zero() {
        let with = |tail: &[u8]| disk(TestDisk::data([&[b'a'; 1000], tail].concat()));
        let (s1, s2, s3) = (with(&[]), with(&[0; 24]), with(&[0; 3000]));
        let s4 = with(&[&[0; 3000][..], b"x"].concat());
        let plain = CompareOptions::default();
        check(&s1, &s2, &plain, Comparison::Identical, false);
        check(&s1, &s3, &plain, Comparison::Identical, true);
        check(&s1, &s4, &plain, Comparison::Content { offset: 3584 }, true);
        check(&s1, &s3, &strict(), Comparison::Size, false);
        let other = disk(TestDisk::data(vec![b'b'; 5000]));
        check(&s1, &other, &plain, Comparison::Content { offset: 0 }, false);
        let empty = disk(TestDisk::data(Vec::new()));
        check(&empty, &empty, &strict(), Comparison::Identical, false);
        check(&empty, &s3, &plain, Comparison::Content { offset: 0 }, true);
    }

    #[test]
    fn the_end_of_the_smaller_disk_is_told_in_order() {
        #[derive(Default)]
        struct Seen(Mutex<(u64, Option<u64>)>);
        impl Progress for Seen {
            fn set_total(&self, _: u64) {}
            fn advance(&self, bytes: u64) {
                self.0.lock().unwrap().0 += bytes;
            }
            fn should_stop(&self) -> bool {
                false
            }
            fn smaller_ended(&self) {
                let (done, ended) = &mut *self.0.lock().unwrap();
                assert!(ended.replace(*done).is_none(), "told twice");
            }
        }
        let told = |small: &[u8], large: &[u8]| {
            let disks = [small, large].map(|bytes| disk(TestDisk::data(bytes.to_vec())));
            let seen = Seen::default();
            let options = CompareOptions::default();
            compare([&disks[1], &disks[0]], &options, &Threads(3), &seen).unwrap();
            let (done, ended) = *seen.0.lock().unwrap();
            (ended, done)
        };
        let size = 3 * MIB as u64;
        let zeroes = vec![0; 5 * MIB];
        assert_eq!(told(&zeroes[..3 * MIB], &zeroes), (Some(size), 5 * MIB as u64));
        let ones = [&vec![1; 3 * MIB][..], &zeroes[..MIB]].concat();
        assert_eq!(told(&ones[..3 * MIB], &ones), (Some(size), 4 * MIB as u64));
        assert_eq!(told(&[], &zeroes), (Some(0), 5 * MIB as u64));
        assert_eq!(told(&zeroes, &zeroes), (None, 5 * MIB as u64));
        // A difference before it, behind which nothing is done.
        let different = [&ones[..MIB], &[2], &ones[MIB + 1..]].concat();
        assert_eq!(told(&different[..2 * MIB], &ones), (None, MIB as u64));
    }

    #[test]
    fn strict_compares_allocation_states() {
        let with = |states: &str| {
            let made = TestDisk { cluster_size: 512, ..TestDisk::data(vec![0; 2048]) };
            made.set_states(states);
            disk(made)
        };
        let state = |offset| Comparison::State { offset };
        check(&with("dzd-"), &with("dzd-"), &strict(), Comparison::Identical, false);
        check(&with("dzd-"), &with("dzdd"), &strict(), state(1024), false);
        check(&with("dzdz"), &with("dzd-"), &strict(), state(1536), false);
        check(&with("dz-d"), &with("dd-d"), &strict(), state(512), false);
        check(&with("z-dd"), &with("--dd"), &strict(), state(0), false);
        check(&with("dzdz"), &with("dzd-"), &CompareOptions::default(), Comparison::Identical, false);
        // A run that reaches the end counts as a different state, like in qemu-img.
        check(&with("zzdd"), &with("zzdz"), &strict(), state(1024), false);
        // A difference in the bytes before that takes precedence.
        let different = TestDisk { cluster_size: 512, ..TestDisk::data(vec![1; 2048]) };
        different.set_states("ddz-");
        check(&with("ddzz"), &disk(different), &strict(), Comparison::Content { offset: 0 }, false);
    }

    #[test]
    fn errors_name_the_disk_and_the_offset() {
        let good = disk(TestDisk::data(vec![1; 4 * MIB]));
        let unreadable = TestDisk { unreadable: Some(0..0), ..TestDisk::data(vec![1; 4 * MIB]) };
        let broken =
            disk(TestDisk { unreadable: Some(2 * MIB as u64 + 5..2 * MIB as u64 + 6), ..unreadable });
        let names = ["good.img".into(), "bad.img".into()];
        let options = CompareOptions { names, ..CompareOptions::default() };
        let error = compare([&good, &broken], &options, &Threads(3), &Silent).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Read);
        assert_eq!(error.to_string(), format!("error while reading offset {} of bad.img", 2 * MIB));
        let unknown = disk(TestDisk { unknown: Some(0..1), ..TestDisk::data(vec![1; 4 * MIB]) });
        let error = compare([&unknown, &good], &options, &Inline, &Silent).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Extents);
        assert!(error.to_string().ends_with("of good.img"), "{error}");
        assert_eq!(error.disk(), Some("good.img"));
        // A difference before the unreadable range is reported without an error.
        let mut bytes = vec![1; 4 * MIB];
        bytes[MIB] = 2;
        let report =
            compare([&disk(TestDisk::data(bytes)), &broken], &options, &Threads(3), &Silent).unwrap();
        assert_eq!(report.result, Comparison::Content { offset: MIB as u64 });
    }
}
