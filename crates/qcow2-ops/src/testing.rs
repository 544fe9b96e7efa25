//! Shared by the tests of this crate: real threads, and a memory disk with injected faults.
#![cfg(test)]
#![allow(clippy::disallowed_methods, reason = "tests run real threads")]

use crate::executor::Executor;
use qcow2_core::{
    DiskExtent, Error, ErrorKind, ExtentState, GuestDisk, GuestOffset, GuestRange, HostOffset, Result,
    ZeroMode,
};
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// An executor with this many threads.
pub(crate) struct Threads(pub(crate) usize);

impl Executor for Threads {
    fn workers(&self) -> usize {
        self.0
    }

    fn run(&self, job: &(dyn Fn(usize) + Sync)) {
        std::thread::scope(|scope| {
            for worker in 0..self.0 {
                scope.spawn(move || job(worker));
            }
        });
    }
}

/// Pseudo-random numbers from a seed.
pub(crate) fn random(seed: u64) -> impl FnMut() -> u64 {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x >> 11
    }
}

/// One call that changed a [`TestDisk`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    Write(Range<u64>),
    Zeroes(Range<u64>),
}

/// A memory disk with a state per 512-byte sector: unallocated, zero or data.
#[derive(Default)]
pub(crate) struct TestDisk {
    pub(crate) bytes: Mutex<Vec<u8>>,
    /// One letter per sector: `-` unallocated, `z` zero, `d` data.
    pub(crate) states: Mutex<Vec<u8>>,
    pub(crate) changes: Mutex<Vec<Change>>,
    pub(crate) cluster_size: u64,
    pub(crate) granularity: u64,
    pub(crate) backing: Option<Arc<dyn GuestDisk>>,
    /// Reads that touch these bytes fail.
    pub(crate) unreadable: Option<Range<u64>>,
    /// Writes that touch these bytes fail.
    pub(crate) unwritable: Option<Range<u64>>,
    /// `extent_at` fails for these bytes.
    pub(crate) unknown: Option<Range<u64>>,
}

impl TestDisk {
    /// A disk that is all data.
    pub(crate) fn data(bytes: Vec<u8>) -> Self {
        let states = vec![b'd'; bytes.len().div_ceil(512)];
        Self { bytes: Mutex::new(bytes), states: Mutex::new(states), granularity: 512, ..Self::default() }
    }

    /// An empty disk with clusters of `cluster_size` bytes; 0 for a raw disk.
    pub(crate) fn empty(size: u64, cluster_size: u64) -> Self {
        let granularity = if cluster_size == 0 { 512 } else { cluster_size };
        let disk = Self { cluster_size, granularity, ..Self::data(vec![0; size as usize]) };
        disk.states.lock().unwrap().fill(if cluster_size == 0 { b'z' } else { b'-' });
        disk
    }

    /// A disk of random runs of the three states with random data; runs are at most `run` bytes long.
    pub(crate) fn mixed(size: u64, run: u64, seed: u64) -> Self {
        let mut next = random(seed);
        let disk = Self::data(vec![0; size as usize]);
        {
            let (mut bytes, mut states) = (disk.bytes.lock().unwrap(), disk.states.lock().unwrap());
            let mut at = 0;
            while at < states.len() {
                let end = states.len().min(at + 1 + (next() % (run / 512).max(1)) as usize);
                let state = [b'-', b'z', b'd', b'd'][(next() % 4) as usize];
                states[at..end].fill(state);
                // Leave some data sectors zero.
                if state == b'd' && !next().is_multiple_of(4) {
                    let end_byte = bytes.len().min(end * 512);
                    bytes[at * 512..end_byte].fill_with(|| next() as u8);
                }
                at = end;
            }
        }
        disk
    }

    pub(crate) fn with_backing(mut self, backing: &Arc<TestDisk>) -> Self {
        self.backing = Some(Arc::clone(backing) as Arc<dyn GuestDisk>);
        self
    }

    pub(crate) fn set_states(&self, states: &str) {
        *self.states.lock().unwrap() = states.as_bytes().to_vec();
    }

    /// The guest content.
    pub(crate) fn content(&self) -> Vec<u8> {
        let mut all = vec![0xaa; self.size() as usize];
        self.fill(0, &mut all);
        all
    }

    fn fill(&self, start: u64, buf: &mut [u8]) {
        let (bytes, states) = (self.bytes.lock().unwrap(), self.states.lock().unwrap());
        for (at, byte) in (start..).zip(buf) {
            *byte = match states[at as usize / 512] {
                b'd' => bytes[at as usize],
                b'-' => self.below(at),
                _ => 0,
            };
        }
    }

    fn below(&self, at: u64) -> u8 {
        let mut byte = [0];
        if let Some(backing) = self.backing.as_ref().filter(|backing| at < backing.size()) {
            backing.read_at(GuestOffset::new(at), &mut byte).unwrap();
        }
        byte[0]
    }

    fn check(&self, start: u64, len: u64, bad: &Option<Range<u64>>) -> Result<()> {
        let end = start + len;
        if end > self.size() {
            return Err(Error::new(ErrorKind::OutOfRange, format!("{start}+{len} is past the end")));
        }
        match bad.as_ref().filter(|bad| bad.start < end && start < bad.end) {
            Some(bad) => Err(Error::new(ErrorKind::Storage, format!("bytes {bad:?} are bad"))),
            None => Ok(()),
        }
    }

    /// Unallocated parts of touched sectors become data first, as with copy-on-write.
    fn touch(&self, range: &Range<u64>, state: u8) {
        for sector in range.start / 512..range.end.div_ceil(512) {
            let (from, to) = (sector * 512, (sector * 512 + 512).min(self.size()));
            let whole = range.start <= from && range.end >= to;
            let mut old = vec![0; (to - from) as usize];
            self.fill(from, &mut old);
            self.bytes.lock().unwrap()[from as usize..to as usize].copy_from_slice(&old);
            self.states.lock().unwrap()[sector as usize] = if whole { state } else { b'd' };
        }
    }
}

impl GuestDisk for TestDisk {
    fn size(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }

    fn read_at(&self, offset: GuestOffset, buf: &mut [u8]) -> Result<()> {
        self.check(offset.value(), buf.len() as u64, &self.unreadable)?;
        self.fill(offset.value(), buf);
        Ok(())
    }

    fn write_at(&self, offset: GuestOffset, buf: &[u8]) -> Result<()> {
        self.check(offset.value(), buf.len() as u64, &self.unwritable)?;
        let range = offset.value()..offset.value() + buf.len() as u64;
        self.touch(&range, b'd');
        self.bytes.lock().unwrap()[range.start as usize..range.end as usize].copy_from_slice(buf);
        self.changes.lock().unwrap().push(Change::Write(range));
        Ok(())
    }

    fn write_zeroes(&self, range: GuestRange, _mode: ZeroMode) -> Result<()> {
        self.check(range.start().value(), range.len(), &self.unwritable)?;
        let range = range.start().value()..range.end().value();
        self.touch(&range, b'z');
        self.bytes.lock().unwrap()[range.start as usize..range.end as usize].fill(0);
        self.changes.lock().unwrap().push(Change::Zeroes(range));
        Ok(())
    }

    fn discard(&self, _range: GuestRange) -> Result<()> {
        Err(Error::new(ErrorKind::Unsupported, "no discard in these tests"))
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn extent_at(&self, range: GuestRange) -> Result<DiskExtent> {
        assert!(!range.is_empty());
        self.check(range.start().value(), range.len(), &None)?;
        self.check(range.start().value(), 1, &self.unknown)?;
        let states = self.states.lock().unwrap();
        let first = range.start().value() / 512;
        let state = states[first as usize];
        let same = states[first as usize..].iter().take_while(|&&s| s == state).count() as u64;
        let len = ((first + same) * 512 - range.start().value()).min(range.len());
        let host = Some(HostOffset::new(range.start().value()));
        let state = match state {
            b'-' => ExtentState::Unallocated,
            b'z' if self.cluster_size == 0 => ExtentState::Zero { host },
            b'z' => ExtentState::Zero { host: None },
            _ => ExtentState::Data { host },
        };
        Ok(DiskExtent { len, state })
    }

    fn backing(&self) -> Option<&Arc<dyn GuestDisk>> {
        self.backing.as_ref()
    }

    fn cluster_size(&self) -> u64 {
        self.cluster_size
    }

    fn zero_granularity(&self) -> u64 {
        self.granularity
    }

    fn resize(&self, size: u64) -> Result<()> {
        self.bytes.lock().unwrap().resize(size as usize, 0);
        self.states.lock().unwrap().resize(size.div_ceil(512) as usize, b'z');
        Ok(())
    }
}
