//! A digest of the guest disk. It is the same for every image with the same guest content.
//!
//! The digest is CRC-32 (as in zip and gzip). CRCs of adjacent ranges can be combined, so all workers take
//! part, and a run of zeroes costs only as many steps as its length has bits.

use crate::buffer::PageBuffer;
use crate::error::{Error, ErrorKind, Result};
use crate::executor::Executor;
use crate::pipeline::{Order, Stages, run};
use crate::progress::Progress;
use crate::source::{Below, Content, Source};
use crc32fast::Hasher;
use qcow2_core::GuestDisk;
use std::ops::{ControlFlow, Range};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes read at a time; at least a cluster.
const CHUNK: u64 = 1 << 20;

/// Digest and size of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Checksum {
    /// CRC-32 of all bytes.
    pub crc32: u32,
    /// Size of the disk in bytes.
    pub size: u64,
}

/// Computes the digest of the whole disk, without rounding its size. Disk: reads tables and data; ranges
/// known to be zero are not read. Memory: at most two chunks per worker; a chunk is 1 MiB, or a cluster if
/// that is larger. Errors: `Extents`, `Read`, `Stopped`.
pub fn checksum(
    disk: &Arc<dyn GuestDisk>,
    executor: &dyn Executor,
    progress: &dyn Progress,
) -> Result<Checksum> {
    let source = Source::new(std::slice::from_ref(disk))?;
    let size = disk.size();
    let chunk = CHUNK.max(source.cluster_size());
    let summing = Summing { source, size, chunk, progress, total: Mutex::new(Hasher::new()) };
    progress.set_total(size);
    run(&summing, 0, Order::Claimed, executor)?;
    let total = summing.total.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok(Checksum { crc32: total.finalize(), size })
}

struct Summing<'a> {
    source: Source,
    size: u64,
    chunk: u64,
    progress: &'a dyn Progress,
    total: Mutex<Hasher>,
}

/// A piece of the disk and its CRC.
#[derive(Default)]
struct Slot {
    range: Range<u64>,
    zero: bool,
    bytes: PageBuffer,
    sum: Hasher,
}

impl Stages for Summing<'_> {
    type Cursor = u64;
    type Slot = Slot;

    fn slot(&self) -> Slot {
        Slot::default()
    }

    fn claim(&self, cursor: &mut u64, slot: &mut Slot) -> Result<bool> {
        let start = *cursor;
        if start >= self.size {
            return Ok(false);
        }
        if self.progress.should_stop() {
            return Err(Error::new(ErrorKind::Stopped, format!("stopped at byte {start} of {}", self.size)));
        }
        let run = self.source.joined_at(start, self.size - start, Below::Nothing)?;
        let chunk_end = (start - start % self.chunk).saturating_add(self.chunk).min(self.size);
        slot.zero = run.content == Content::Zero && run.end() >= chunk_end;
        *cursor = if slot.zero { run.end() } else { chunk_end };
        slot.range = start..*cursor;
        Ok(true)
    }

    fn prepare(&self, slot: &mut Slot) -> Result<()> {
        slot.sum.reset();
        if slot.zero {
            add_zeroes(&mut slot.sum, slot.range.end - slot.range.start);
            return Ok(());
        }
        let (mut at, mut zeroes) = (slot.range.start, 0);
        while at < slot.range.end {
            let run = self.source.content_at(at, slot.range.end - at, Below::Nothing)?;
            if run.content == Content::Zero {
                zeroes += run.len;
            } else {
                add_zeroes(&mut slot.sum, std::mem::take(&mut zeroes));
                slot.bytes.set_len(run.len as usize);
                self.source.read_at(at, &mut slot.bytes).map_err(|e| {
                    Error::new(ErrorKind::Read, format!("error while reading at byte {at}")).with_source(e)
                })?;
                slot.sum.update(&slot.bytes);
            }
            at = run.end();
        }
        add_zeroes(&mut slot.sum, zeroes);
        Ok(())
    }

    fn finish(&self, slot: &mut Slot) -> Result<ControlFlow<()>> {
        self.total.lock().unwrap_or_else(PoisonError::into_inner).combine(&slot.sum);
        self.progress.advance(slot.range.end - slot.range.start);
        Ok(ControlFlow::Continue(()))
    }
}

/// Zeroes that are sooner hashed than combined.
const FEW_ZEROES: [u8; 4096] = [0; 4096];

/// Appends `len` zero bytes: the CRC of a run is combined with itself to double the run.
fn add_zeroes(sum: &mut Hasher, len: u64) {
    if let Some(few) = FEW_ZEROES.get(..usize::try_from(len).unwrap_or(usize::MAX)) {
        return sum.update(few);
    }
    let mut run = Hasher::new();
    run.update(&[0]);
    let mut left = len;
    while left > 0 {
        if left & 1 == 1 {
            sum.combine(&run);
        }
        left >>= 1;
        if left > 0 {
            let half = run.clone();
            run.combine(&half);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::Inline;
    use crate::progress::Silent;
    use crate::testing::{TestDisk, Threads};

    #[track_caller]
    fn check(disk: TestDisk) {
        let (bytes, disk) = (disk.content(), Arc::new(disk) as Arc<dyn GuestDisk>);
        let expected = Checksum { crc32: crc32fast::hash(&bytes), size: bytes.len() as u64 };
        for workers in [1, 2, 5] {
            assert_eq!(checksum(&disk, &Threads(workers), &Silent).unwrap(), expected);
        }
    }

    #[test]
    fn known_crc32() {
        let disk: Arc<dyn GuestDisk> = Arc::new(TestDisk::data(b"123456789".to_vec()));
        assert_eq!(checksum(&disk, &Inline, &Silent).unwrap().crc32, 0xcbf4_3926);
    }

    #[test]
    fn matches_crc32_for_any_size_and_allocation() {
        for (seed, size) in (0..).zip([0, 1, 511, 512, 513, 1 << 20, (1 << 20) + 1, 5_000_001]) {
            check(TestDisk::mixed(size, 700_000, seed));
            check(TestDisk::empty(size, 65_536));
        }
        let base = Arc::new(TestDisk::mixed(2_000_000, 100_000, 99));
        let top = TestDisk::mixed(3_000_000, 100_000, 98);
        check(TestDisk { cluster_size: 2 << 20, ..top }.with_backing(&base));
    }

    #[test]
    fn add_zeroes_matches_hashing_zeroes() {
        for len in [0, 1, 2, 3, 255, 4096, 4097, 65_536, 1_000_001] {
            let (mut fast, mut slow) = (Hasher::new(), Hasher::new());
            fast.update(b"before");
            slow.update(b"before");
            add_zeroes(&mut fast, len);
            slow.update(&vec![0; len as usize]);
            fast.update(b"after");
            slow.update(b"after");
            assert_eq!(fast.finalize(), slow.finalize(), "{len}");
        }
        // Takes as many steps as the length has bits; hashing the zeroes would not end.
        add_zeroes(&mut Hasher::new(), u64::MAX >> 1);
    }

    #[test]
    fn errors_name_the_offset() {
        let bad = TestDisk { unreadable: Some(3_000_000..3_000_001), ..TestDisk::data(vec![1; 5_000_000]) };
        let disk: Arc<dyn GuestDisk> = Arc::new(bad);
        let error = checksum(&disk, &Threads(3), &Silent).unwrap_err();
        assert_eq!(
            (error.kind(), error.to_string()),
            (ErrorKind::Read, "error while reading at byte 2097152".into())
        );
    }
}
