//! Internal snapshots: find one by id or name, create, apply and delete.

use crate::error::{Error, ErrorKind, Result};
use qcow2_core::format::snapshot::Snapshot;
use qcow2_core::{ErrorKind as CoreErrorKind, Image, NewSnapshot};

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
        let is = |field: &[u8], text: &str| field == text.as_bytes();
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
    use qcow2_core::HostOffset;

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
}
