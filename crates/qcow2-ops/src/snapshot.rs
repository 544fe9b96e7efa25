//! Internal snapshots: choosing one, and seeing the disk as it was then.
//!
//! A snapshot is an L1 table and a size of its own; everything below is shared. So an image whose header is replaced,
//! on the way from the storage, by one that names those, is the disk of the snapshot. Spec: "Snapshots".

use crate::error::{Error, ErrorKind, Result};
use crate::info::{read_header, read_snapshots};
use qcow2_core::format::snapshot::Snapshot;
use qcow2_core::{
    HostOffset, Limits, ResolvedSource, Storage, StorageError, StorageErrorKind, StorageExtent, ZeroMode,
};
use std::sync::Arc;

/// How a snapshot is named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SnapshotName {
    /// By an id or, if no snapshot has that id, by a name.
    Any(String),
    /// By what is given of id and name, all of which must match.
    Exact {
        /// The id.
        id: Option<String>,
        /// The name.
        name: Option<String>,
    },
}

impl SnapshotName {
    /// The first snapshot of that name.
    pub fn find<'a>(&self, snapshots: &'a [Snapshot]) -> Option<&'a Snapshot> {
        let is = |field: &[u8], text: &str| field == text.as_bytes();
        match self {
            Self::Any(text) => {
                let by_id = snapshots.iter().find(|s| is(&s.id, text));
                by_id.or_else(|| snapshots.iter().find(|s| is(&s.name, text)))
            }
            Self::Exact { id: None, name: None } => None,
            Self::Exact { id, name } => snapshots.iter().find(|s| {
                id.as_ref().is_none_or(|text| is(&s.id, text))
                    && name.as_ref().is_none_or(|text| is(&s.name, text))
            }),
        }
    }
}

/// `source`, a qcow2 image, as it was when the snapshot was taken; `None` where there is no such snapshot. For reading
/// only. Disk: reads the header and the snapshot table.
///
/// Errors: `Open` and `Metadata` as [`info`](crate::info()) has them.
pub fn at_snapshot(source: ResolvedSource, name: &SnapshotName) -> Result<Option<ResolvedSource>> {
    let mut header = read_header(&*source.storage)?;
    let snapshots = read_snapshots(&*source.storage, &header)?;
    let Some(snapshot) = name.find(&snapshots) else {
        return Ok(None);
    };
    header.size = snapshot.disk_size;
    header.l1_size = snapshot.l1_size;
    header.l1_table_offset = snapshot.l1_table_offset;
    let first_cluster = header
        .encode_cluster()
        .map_err(|e| Error::new(ErrorKind::Metadata, "header of the snapshot").with_source(e))?;
    let storage: Arc<dyn Storage> = Arc::new(Patched { first_cluster, inner: source.storage });
    Ok(Some(ResolvedSource { storage, ..source }))
}

/// A storage whose first bytes are others; for reading only.
struct Patched {
    first_cluster: Vec<u8>,
    inner: Arc<dyn Storage>,
}

impl Storage for Patched {
    fn len(&self) -> Result<u64, StorageError> {
        Ok(self.inner.len()?.max(self.first_cluster.len() as u64))
    }

    fn read_at(&self, offset: HostOffset, buf: &mut [u8]) -> Result<usize, StorageError> {
        let start = usize::try_from(offset.value()).unwrap_or(usize::MAX);
        let patch = self.first_cluster.get(start..).unwrap_or_default();
        let n = patch.len().min(buf.len());
        let (patched, rest) = buf.split_at_mut(n);
        patched.copy_from_slice(&patch[..n]);
        match offset.checked_add(n as u64) {
            Some(at) if !rest.is_empty() => Ok(n + self.inner.read_at(at, rest)?),
            _ => Ok(n),
        }
    }

    fn write_at(&self, _offset: HostOffset, _buf: &[u8]) -> Result<(), StorageError> {
        Err(read_only())
    }

    fn write_zeroes(&self, _offset: HostOffset, _len: u64, _mode: ZeroMode) -> Result<(), StorageError> {
        Err(read_only())
    }

    fn discard(&self, _offset: HostOffset, _len: u64) -> Result<(), StorageError> {
        Err(read_only())
    }

    fn allocate(&self, _offset: HostOffset, _len: u64) -> Result<(), StorageError> {
        Err(read_only())
    }

    fn set_len(&self, _len: u64) -> Result<(), StorageError> {
        Err(read_only())
    }

    fn flush(&self) -> Result<(), StorageError> {
        Ok(())
    }

    fn extent_at(&self, offset: HostOffset, len: u64) -> Result<StorageExtent, StorageError> {
        let patch = (self.first_cluster.len() as u64).saturating_sub(offset.value());
        match patch {
            0 => self.inner.extent_at(offset, len),
            _ => Ok(StorageExtent { len: len.min(patch), data: true }),
        }
    }

    fn limits(&self) -> Limits {
        self.inner.limits()
    }

    fn used_bytes(&self) -> Result<Option<u64>, StorageError> {
        self.inner.used_bytes()
    }
}

fn read_only() -> StorageError {
    StorageError::new(StorageErrorKind::ReadOnly, "a snapshot is for reading only")
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn by_id_first_and_then_by_name() {
        let snapshots = [snapshot("1", "2"), snapshot("2", "a"), snapshot("3", "a")];
        let found = |name: SnapshotName| name.find(&snapshots).map(Snapshot::id_text);
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
}
