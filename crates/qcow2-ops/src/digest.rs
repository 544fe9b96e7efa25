//! BLAKE3 digest of the guest content. Slower than CRC-32, but collision resistant.

use crate::error::{Error, ErrorKind, Result};
use crate::executor::Executor;
use crate::pipeline::{Order, Stages, run};
use crate::progress::Progress;
use crate::source::{Below, Content, Source};
use qcow2_core::GuestDisk;
use std::fmt;
use std::ops::{ControlFlow, Range};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes read at a time.
const CHUNK: u64 = 1 << 20;

/// The BLAKE3 digest of a disk. `Display` prints the usual 64 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blake3(pub [u8; 32]);

impl fmt::Display for Blake3 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Computes the digest of the whole disk, equal to that of its raw bytes. Disk: reads tables and data; ranges
/// known to be zero are not read. All workers read; the digest is computed in guest order. Memory: two chunks
/// of 1 MiB per worker. Errors: `Extents`, `Read`, `Stopped`.
pub fn checksum_blake3(
    disk: &Arc<dyn GuestDisk>,
    executor: &dyn Executor,
    progress: &dyn Progress,
) -> Result<Blake3> {
    let source = Source::new(std::slice::from_ref(disk))?;
    let size = disk.size();
    let digesting = Digesting { source, size, progress, digest: Mutex::new(blake3::Hasher::new()) };
    progress.set_total(size);
    run(&digesting, 0, Order::Claimed, executor)?;
    let digest = digesting.digest.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok(Blake3(*digest.finalize().as_bytes()))
}

struct Digesting<'a> {
    source: Source,
    size: u64,
    progress: &'a dyn Progress,
    digest: Mutex<blake3::Hasher>,
}

#[derive(Default)]
struct Slot {
    range: Range<u64>,
    bytes: Vec<u8>,
}

impl Stages for Digesting<'_> {
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
        *cursor = start.saturating_add(CHUNK).min(self.size);
        slot.range = start..*cursor;
        Ok(true)
    }

    fn prepare(&self, slot: &mut Slot) -> Result<()> {
        slot.bytes.clear();
        slot.bytes.resize((slot.range.end - slot.range.start) as usize, 0);
        let mut at = slot.range.start;
        while at < slot.range.end {
            let run = self.source.content_at(at, slot.range.end - at, Below::Nothing)?;
            if run.content != Content::Zero {
                let from = (at - slot.range.start) as usize;
                let part = &mut slot.bytes[from..from + run.len as usize];
                self.source.read_at(at, part).map_err(|e| {
                    Error::new(ErrorKind::Read, format!("error while reading at byte {at}")).with_source(e)
                })?;
            }
            at = run.end();
        }
        Ok(())
    }

    fn finish(&self, slot: &mut Slot) -> Result<ControlFlow<()>> {
        self.digest.lock().unwrap_or_else(PoisonError::into_inner).update(&slot.bytes);
        self.progress.advance(slot.range.end - slot.range.start);
        Ok(ControlFlow::Continue(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::Inline;
    use crate::progress::Silent;
    use crate::testing::{TestDisk, Threads};

    #[test]
    fn matches_blake3_of_the_raw_bytes() {
        for (seed, size) in (0..).zip([0, 1, 513, 1 << 20, 5_000_001]) {
            let disk = TestDisk::mixed(size, 700_000, seed);
            let expected = *blake3::hash(&disk.content()).as_bytes();
            let disk = Arc::new(disk) as Arc<dyn GuestDisk>;
            for workers in [1, 3] {
                assert_eq!(checksum_blake3(&disk, &Threads(workers), &Silent).unwrap(), Blake3(expected));
            }
        }
    }

    #[test]
    fn known_digest_of_an_empty_disk() {
        let disk: Arc<dyn GuestDisk> = Arc::new(TestDisk::data(Vec::new()));
        let digest = checksum_blake3(&disk, &Inline, &Silent).unwrap().to_string();
        assert_eq!(digest, "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262");
    }
}
