//! A disk that compresses what is written to it.

use qcow2_core::{
    ErrorKind, ExtentState, GuestDisk, GuestOffset, GuestRange, Image, Result, StorageError,
    StorageErrorKind, ZeroMode, forward_guest_disk,
};
use std::sync::{Arc, Mutex, PoisonError};

/// Wraps a qcow2 image: what is written goes there as compressed clusters, the rest of a cluster that is
/// written in part being read first. As in QEMU a cluster that holds data already is not written again: such
/// a write fails with an input/output error. It does not show the image, which nobody writes to around it;
/// dropping it closes that.
pub struct CompressWrites {
    inner: Arc<dyn GuestDisk>,
    /// Held while a cluster is read and written.
    writing: Mutex<()>,
}

impl CompressWrites {
    /// Wraps `inner`; `None` where that is no image.
    pub fn new(inner: Arc<dyn GuestDisk>) -> Option<Self> {
        inner.as_image().is_some().then(|| Self { inner: Arc::clone(&inner), writing: Mutex::new(()) })
    }

    fn write(&self, image: &Image, offset: u64, buf: &[u8]) -> Result<()> {
        let cluster_size = image.cluster_size();
        let (mut at, mut rest) = (offset, buf);
        let _alone = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        while !rest.is_empty() {
            let inside = at % cluster_size;
            let start = at - inside;
            let whole = cluster_size.min(self.size().saturating_sub(start));
            let (part, later) = rest.split_at((whole - inside).min(rest.len() as u64) as usize);
            if part.len() as u64 == whole {
                write_cluster(image, start, part)?;
            } else {
                let mut bytes = vec![0; whole as usize];
                image.read_at(GuestOffset::new(start), &mut bytes)?;
                bytes[inside as usize..inside as usize + part.len()].copy_from_slice(part);
                write_cluster(image, start, &bytes)?;
            }
            (at, rest) = (at + part.len() as u64, later);
        }
        Ok(())
    }
}

fn write_cluster(image: &Image, start: u64, bytes: &[u8]) -> Result<()> {
    const IO_ERROR: i32 = 5;
    let range = GuestRange::new(GuestOffset::new(start), bytes.len() as u64);
    image.write_compressed(GuestOffset::new(start), bytes).map_err(|error| {
        let is_taken = error.kind() == ErrorKind::Unsupported
            && range.and_then(|range| image.extent_at(range).ok()).is_some_and(|extent| {
                matches!(extent.state, ExtentState::Data { .. } | ExtentState::Compressed)
            });
        match is_taken {
            true => {
                StorageError::new(StorageErrorKind::Io, "a cluster that holds data is not compressed anew")
                    .with_os_code(IO_ERROR)
                    .into()
            }
            false => error,
        }
    })
}

impl GuestDisk for CompressWrites {
    forward_guest_disk!(inner:
        size read_at discard flush extent_at backing cluster_size zero_granularity resize
    );

    fn write_at(&self, offset: GuestOffset, buf: &[u8]) -> Result<()> {
        let end = offset.checked_add(buf.len() as u64);
        match self.inner.as_image() {
            Some(image) if end.is_some_and(|end| end.value() <= self.size()) => {
                self.write(image, offset.value(), buf)
            }
            // Refused there.
            _ => self.inner.write_at(offset, buf),
        }
    }

    fn write_zeroes(&self, range: GuestRange, mode: ZeroMode) -> Result<()> {
        let step = self.cluster_size();
        let (start, end) = (range.start().value(), range.end().value());
        let first = start.next_multiple_of(step).min(end);
        let last = if end == self.size() { end } else { (end - end % step).max(first) };
        self.write_at(range.start(), &vec![0; (first - start) as usize])?;
        if let Some(middle) = GuestRange::new(GuestOffset::new(first), last - first).filter(|_| first < last)
        {
            self.inner.write_zeroes(middle, mode)?;
        }
        self.write_at(GuestOffset::new(last), &vec![0; (end - last) as usize])
    }
}

impl Drop for CompressWrites {
    fn drop(&mut self) {
        // Whoever wrote through it has flushed what matters; this leaves the image as tidy as can be.
        if let Some(image) = self.inner.as_image() {
            let _ = image.close();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryStorage;
    use qcow2_core::{CreateOptions, ImageFormat, OpenOptions, ResolvedSource};

    #[test]
    fn only_images_are_wrapped() {
        let storage: Arc<dyn qcow2_core::Storage> = Arc::new(MemoryStorage::with_len(4096));
        let raw = qcow2_core::RawDisk::new(storage, true).unwrap();
        assert!(CompressWrites::new(Arc::new(raw)).is_none());
    }

    #[test]
    fn zeroes_beside_whole_clusters_are_written_as_bytes() {
        let storage: Arc<dyn qcow2_core::Storage> = Arc::new(MemoryStorage::new());
        qcow2_core::create(&storage, None, &CreateOptions::new(299_520)).unwrap();
        let mut options = OpenOptions::default();
        options.writable = true;
        let source = ResolvedSource::new(storage, ImageFormat::Qcow2, "top");
        let disk = CompressWrites::new(qcow2_core::open_disk(source, &options).unwrap()).unwrap();
        // The end of the disk is the end of a cluster too.
        let range = |start, end| GuestRange::between(GuestOffset::new(start), GuestOffset::new(end));
        disk.write_zeroes(range(65_536, 299_520), ZeroMode::MayUnmap).unwrap();
        assert!(matches!(disk.extent_at(range(65_536, 299_520)).unwrap().state, ExtentState::Zero { .. }));
        // Without a codec nothing is compressed.
        assert!(disk.write_zeroes(range(1, 65_536), ZeroMode::MayUnmap).is_err());
        assert!(disk.write_at(GuestOffset::new(299_519), &[1, 2]).is_err());
    }
}
