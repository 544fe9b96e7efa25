//! Snapshots: internal ones (find, create, apply, delete) and external ones.

use crate::error::{Error, ErrorKind, Result};
use crate::port::NewStorage;
use qcow2_core::format::snapshot::Snapshot;
use qcow2_core::format::text::bytes_of;
use qcow2_core::{CreateOptions, ErrorKind as CoreErrorKind, GuestDisk, Image, ImageFormat, NewSnapshot};

/// Selects a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SnapshotName {
    /// By id or, if no snapshot has that id, by name.
    Any(String),
    /// By id, by name, or by both; all that are given must match.
    Exact {
        /// The id.
        id: Option<String>,
        /// The name.
        name: Option<String>,
    },
}

impl SnapshotName {
    /// Index of the first matching snapshot.
    pub fn position(&self, snapshots: &[Snapshot]) -> Option<usize> {
        let is = |field: &[u8], text: &str| *field == *bytes_of(text);
        match self {
            Self::Any(text) => {
                let by_id = snapshots.iter().position(|s| is(&s.id, text));
                by_id.or_else(|| snapshots.iter().position(|s| is(&s.name, text)))
            }
            Self::Exact { id: None, name: None } => None,
            Self::Exact { id, name } => snapshots.iter().position(|s| {
                id.as_ref().is_none_or(|text| is(&s.id, text))
                    && name.as_ref().is_none_or(|text| is(&s.name, text))
            }),
        }
    }
}

/// Creates a snapshot. Disk: as [`Image::create_snapshot`]. Errors: `Unsupported` if the image cannot have
/// snapshots, `Metadata` otherwise, with the engine's error as source.
pub fn create(image: &Image, new: &NewSnapshot) -> Result<Snapshot> {
    image.create_snapshot(new).map_err(|error| failed("taking the snapshot", error))
}

/// Reverts the disk to the snapshot. Disk: as [`Image::apply_snapshot`]. Errors: `NotFound`; `Unsupported` if
/// the image cannot be reverted; `Metadata` otherwise, with the engine's error as source.
pub fn apply(image: &Image, name: &SnapshotName) -> Result<()> {
    let snapshot = find(image, name)?;
    image.apply_snapshot(&snapshot).map_err(|error| failed("applying the snapshot", error))
}

/// Deletes a snapshot. Disk: as [`Image::delete_snapshot`]. Errors: as [`apply`].
pub fn delete(image: &Image, name: &SnapshotName) -> Result<()> {
    let snapshot = find(image, name)?;
    image.delete_snapshot(&snapshot).map_err(|error| failed("deleting the snapshot", error))
}

/// Creates an external snapshot: a new overlay of `old`, which is only read. `backing_file` and `old_format`:
/// the name and the format of `old` that the overlay records. It has the size of `old`, rounded up to whole
/// sectors, and is a version 3 image with the default options.
///
/// Disk: creates the file, then writes as [`create`](qcow2_core::create()). The file is discarded if the
/// image cannot be completed. Errors: `InvalidOption` with a [`Refusal`](qcow2_core::Refusal) as source,
/// before the file is created; `Create` with the caller's or the engine's error.
pub fn external(
    old: &dyn GuestDisk,
    old_format: &ImageFormat,
    backing_file: &str,
    new: &dyn NewStorage,
) -> Result<()> {
    // Raw disks may end inside a sector.
    let size = old.size().checked_next_multiple_of(512).unwrap_or(old.size());
    let options = CreateOptions::new(size).with_backing(backing_file, old_format.name());
    options.check().map_err(|e| Error::new(ErrorKind::InvalidOption, "creating the image").with_source(e))?;
    let storage =
        new.make().map_err(|e| Error::new(ErrorKind::Create, "making the file").with_boxed_source(e))?;
    qcow2_core::create(&storage, None, &options)
        .map_err(|e| Error::new(ErrorKind::Create, "creating the image").with_source(e))
        .inspect_err(|_| new.discard())
}

fn find(image: &Image, name: &SnapshotName) -> Result<Snapshot> {
    let snapshots = image.snapshots().map_err(|error| failed("reading the snapshot table", error))?;
    let found = name.position(&snapshots).map(|index| snapshots[index].clone());
    found.ok_or_else(|| Error::new(ErrorKind::NotFound, "no such snapshot"))
}

fn failed(step: &str, error: qcow2_core::Error) -> Error {
    let kind = match error.kind() {
        CoreErrorKind::Unsupported => ErrorKind::Unsupported,
        CoreErrorKind::NotFound => ErrorKind::NotFound,
        _ => ErrorKind::Metadata,
    };
    Error::new(kind, step).with_source(error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::port::CallerError;
    use crate::testing::TestDisk;
    use qcow2_core::walk::read_header;
    use qcow2_core::{HostOffset, Storage};
    use qcow2_io::MemoryStorage;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn snapshot(id: &str, name: &str) -> Snapshot {
        Snapshot {
            l1_table_offset: HostOffset::new(0),
            l1_size: 0,
            id: id.into(),
            name: name.into(),
            date_seconds: 0,
            date_nanoseconds: 0,
            vm_clock_nanoseconds: 0,
            vm_state_size: 0,
            disk_size: 0,
            icount: None,
            unknown_extra: Vec::new(),
        }
    }

    #[test]
    fn ids_take_precedence_over_names() {
        let snapshots = [snapshot("1", "2"), snapshot("2", "a"), snapshot("3", "a")];
        let found = |name: SnapshotName| name.position(&snapshots).map(|index| snapshots[index].id_text());
        let any = |text: &str| found(SnapshotName::Any(text.into()));
        let exact = |id: Option<&str>, name: Option<&str>| {
            found(SnapshotName::Exact { id: id.map(Into::into), name: name.map(Into::into) })
        };
        assert_eq!(any("2").as_deref(), Some("2"));
        assert_eq!(any("a").as_deref(), Some("2"));
        assert_eq!(any("x"), None);
        assert_eq!(exact(None, Some("2")).as_deref(), Some("1"));
        assert_eq!(exact(Some("3"), Some("a")).as_deref(), Some("3"));
        assert_eq!(exact(Some("1"), Some("a")), None);
        assert_eq!(exact(None, None), None);
    }

    /// Counts how often the file was created and discarded.
    struct File {
        storage: Arc<dyn Storage>,
        made: AtomicUsize,
        discarded: AtomicUsize,
    }

    impl NewStorage for File {
        fn make(&self) -> Result<Arc<dyn Storage>, CallerError> {
            self.made.fetch_add(1, Ordering::Relaxed);
            Ok(Arc::clone(&self.storage))
        }

        fn discard(&self) {
            self.discarded.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Takes an external snapshot of a disk of `len` bytes. Also returns how often the file was created and
    /// discarded.
    fn take(len: usize, name: &str, storage: &Arc<dyn Storage>) -> (Result<()>, [usize; 2]) {
        let (made, discarded) = Default::default();
        let file = File { storage: Arc::clone(storage), made, discarded };
        let taken = external(&TestDisk::data(vec![1; len]), &ImageFormat::Raw, name, &file);
        (taken, [file.made.into_inner(), file.discarded.into_inner()])
    }

    #[test]
    fn failed_external_snapshot_leaves_no_file() {
        let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
        let (taken, counts) = take(700, "old.raw", &storage);
        taken.unwrap();
        assert_eq!(counts, [1, 0]);
        let header = read_header(&*storage).unwrap();
        assert_eq!(header.size, 1024);
        assert_eq!(header.backing_file_name().as_deref(), Some("old.raw"));
        assert_eq!(header.extensions.backing_format_name().as_deref(), Some("raw"));
        let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
        let (taken, counts) = take(512, &"n".repeat(2000), &storage);
        assert_eq!((taken.unwrap_err().kind(), counts), (ErrorKind::Create, [1, 1]));
    }
}
