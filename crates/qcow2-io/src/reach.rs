//! Which bytes of which file an opening reaches, so that two openings that reach the same bytes are found
//! under any name.
//!
//! A loop device reaches a range of its backing file, a partition a range of its disk. A file of an overlay
//! file system that has not been copied up is the file of a layer: it has another device number, but shows
//! that file's inode number, length and times.

use qcow2_core::SourceId;
use std::fs::{File, Metadata};
use std::ops::Range;
use std::path::Path;

/// What one opening reaches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reach {
    id: SourceId,
    bytes: Range<u64>,
    #[cfg(target_os = "linux")]
    inode: linux::Inode,
}

impl Reach {
    /// What the open file with this `metadata` reaches; `None` where the system does not tell. `is_overlay`:
    /// it is in an overlay file system.
    #[cfg(unix)]
    pub(crate) fn of(metadata: &Metadata, is_overlay: bool) -> Option<Self> {
        #[cfg(target_os = "linux")]
        {
            linux::reach(metadata, is_overlay)
        }
        #[cfg(not(target_os = "linux"))]
        {
            let _ = is_overlay;
            Some(Self { id: own_id(metadata), bytes: 0..u64::MAX })
        }
    }

    #[cfg(not(unix))]
    pub(crate) fn of(_metadata: &Metadata, _is_overlay: bool) -> Option<Self> {
        None
    }

    /// True if some bytes are reached by both.
    pub(crate) fn meets(&self, other: &Self) -> bool {
        let overlap = self.bytes.start < other.bytes.end && other.bytes.start < self.bytes.end;
        #[cfg(target_os = "linux")]
        let same = self.id == other.id || self.inode.is_shown_by(&other.inode);
        #[cfg(not(target_os = "linux"))]
        let same = self.id == other.id;
        overlap && same
    }
}

/// Identifies the file at `path`, as [`FileStorage::id`](crate::FileStorage::id) does an open one; `None` if
/// there is none, or where the system does not tell.
pub fn file_id(path: &Path) -> Option<SourceId> {
    source_id(&path.metadata().ok()?)
}

/// Identifies a file, for comparing two openings; a loop device of a whole file as that file. `None` where
/// the system does not tell.
pub(crate) fn source_id(metadata: &Metadata) -> Option<SourceId> {
    #[cfg(unix)]
    {
        // Two parts of a file are two sources.
        let reach = Reach::of(metadata, false).filter(|reach| reach.bytes == (0..u64::MAX));
        Some(reach.map_or_else(|| own_id(metadata), |reach| reach.id))
    }
    #[cfg(not(unix))]
    {
        let _ = metadata;
        None
    }
}

/// The identity of a file by itself. Two device nodes of one device have different inodes but the same
/// content.
#[cfg(unix)]
fn own_id(metadata: &Metadata) -> SourceId {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    match metadata.file_type().is_block_device() {
        true => SourceId { device: u64::MAX, file: metadata.rdev() },
        false => SourceId { device: metadata.dev(), file: metadata.ino() },
    }
}

/// True for a file in an overlay file system.
pub(crate) fn is_overlay(file: &File) -> bool {
    #[cfg(target_os = "linux")]
    {
        rustix::fs::fstatfs(file).is_ok_and(|system| system.f_type == OVERLAY)
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = file;
        false
    }
}

/// The same for a file that is not open.
pub(crate) fn is_overlay_at(path: &Path) -> bool {
    #[cfg(target_os = "linux")]
    {
        rustix::fs::statfs(path).is_ok_and(|system| system.f_type == OVERLAY)
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = path;
        false
    }
}

/// The magic number of overlay file systems.
#[cfg(target_os = "linux")]
const OVERLAY: rustix::fs::FsWord = 0x794c_7630;

#[cfg(target_os = "linux")]
mod linux {
    use super::{Metadata, Path, Range, Reach, SourceId, is_overlay_at, own_id};
    use std::ffi::OsStr;
    use std::fs;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    use std::path::PathBuf;

    /// What a file of an overlay and the file of the layer that it shows have in common.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub(super) struct Inode {
        is_overlay: bool,
        /// The lower half of the number: the upper half may tell the layer.
        number: u32,
        len: u64,
        blocks: u64,
        modified: (i64, i64),
        changed: (i64, i64),
    }

    impl Inode {
        fn of(data: &Metadata, is_overlay: bool) -> Self {
            Self {
                is_overlay,
                number: (data.ino() & u64::from(u32::MAX)) as u32,
                len: data.len(),
                blocks: data.blocks(),
                modified: (data.mtime(), data.mtime_nsec()),
                changed: (data.ctime(), data.ctime_nsec()),
            }
        }

        /// True if one is in an overlay and the other is what it shows. Elsewhere equal numbers and times
        /// mean nothing: a snapshot of a file system has them too.
        pub(super) fn is_shown_by(&self, other: &Self) -> bool {
            self.is_overlay != other.is_overlay
                && *self == Self { is_overlay: self.is_overlay, ..other.clone() }
        }
    }

    pub(super) fn reach(metadata: &Metadata, is_overlay: bool) -> Option<Reach> {
        let mut bytes = 0..u64::MAX;
        let (mut id, mut inode) = (own_id(metadata), Inode::of(metadata, is_overlay));
        let mut device = metadata.file_type().is_block_device().then(|| metadata.rdev());
        for _ in 0..MAX_STACK {
            let Some(below) = device.and_then(below) else { return Some(Reach { id, bytes, inode }) };
            bytes = within(&bytes, &below.bytes);
            id = below.id;
            device = below.device;
            inode = below.inode.unwrap_or(inode);
        }
        None
    }

    /// What a block device is a view of.
    struct Below {
        id: SourceId,
        bytes: Range<u64>,
        /// Number of the device, if it is one.
        device: Option<u64>,
        inode: Option<Inode>,
    }

    /// The disk of a partition, the backing file of a loop device.
    fn below(device: u64) -> Option<Below> {
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        let dir = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
        if dir.join("partition").exists() {
            let start = number(&dir.join("start"))?.checked_mul(SECTOR)?;
            let end = start.checked_add(number(&dir.join("size"))?.checked_mul(SECTOR)?)?;
            let disk = fs::read_to_string(dir.join("../dev")).ok()?;
            let (major, minor) = disk.trim().split_once(':')?;
            let disk = rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?);
            let id = SourceId { device: u64::MAX, file: disk };
            return Some(Below { id, bytes: start..end, device: Some(disk), inode: None });
        }
        let name = fs::read(dir.join("loop/backing_file")).ok()?;
        let name = Path::new(OsStr::from_bytes(name.strip_suffix(b"\n")?));
        let data = fs::metadata(name).ok()?;
        let start = number(&dir.join("loop/offset")).unwrap_or(0);
        let len = number(&dir.join("loop/sizelimit")).filter(|&len| len > 0);
        Some(Below {
            id: own_id(&data),
            bytes: start..len.map_or(u64::MAX, |len| start.saturating_add(len)),
            device: data.file_type().is_block_device().then(|| data.rdev()),
            inode: Some(Inode::of(&data, is_overlay_at(name))),
        })
    }

    /// Where `bytes` of a view that begins at the start of `outer` are in the whole.
    pub(super) fn within(bytes: &Range<u64>, outer: &Range<u64>) -> Range<u64> {
        let start = outer.start.saturating_add(bytes.start).min(outer.end);
        start..outer.start.saturating_add(bytes.end).clamp(start, outer.end)
    }

    fn number(file: &Path) -> Option<u64> {
        fs::read_to_string(file).ok()?.trim().parse().ok()
    }

    /// Unit of the places of partitions.
    const SECTOR: u64 = 512;
    /// Views upon views that are followed. The kernel allows no more loop devices above each other.
    const MAX_STACK: usize = 16;
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::linux::within;
    use super::*;

    #[test]
    fn a_view_of_a_view_is_a_range_of_the_whole() {
        let all = 0..u64::MAX;
        assert_eq!(within(&all, &(4096..8192)), 4096..8192);
        assert_eq!(within(&(512..1024), &(4096..8192)), 4608..5120);
        assert_eq!(within(&(512..u64::MAX), &(4096..8192)), 4608..8192);
        assert_eq!(within(&(9000..9001), &(4096..8192)), 8192..8192);
        assert_eq!(within(&(512..1024), &all), 512..1024);
    }

    #[test]
    fn disjoint_ranges_of_one_file_do_not_meet() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a"), b"a").unwrap();
        let whole = Reach::of(&dir.path().join("a").metadata().unwrap(), false).unwrap();
        let part = |bytes: Range<u64>| Reach { bytes, ..whole.clone() };
        assert!(whole.meets(&whole));
        assert!(whole.meets(&part(512..1024)) && part(512..1024).meets(&whole));
        assert!(!part(0..512).meets(&part(512..1024)));
    }

    /// Equal inodes on different devices are one file only if one of the devices is an overlay.
    #[test]
    fn a_file_of_an_overlay_is_known_by_what_it_shows() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a"), b"a").unwrap();
        let data = dir.path().join("a").metadata().unwrap();
        let [layer, mut shown] = [false, true].map(|is_overlay| Reach::of(&data, is_overlay).unwrap());
        shown.id.device += 1;
        assert!(layer.meets(&shown) && shown.meets(&layer));
        let snapshot = Reach { id: shown.id, ..layer.clone() };
        assert!(!layer.meets(&snapshot));
        std::fs::write(dir.path().join("a"), b"changed").unwrap();
        let later = Reach::of(&dir.path().join("a").metadata().unwrap(), false).unwrap();
        assert!(!later.meets(&shown));
    }
}
