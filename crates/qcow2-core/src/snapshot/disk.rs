//! Opens a snapshot as a read-only disk.

use crate::error::{Error, ErrorKind, Result};
use crate::image::Image;
use crate::meta::file::read_words;
use crate::open::OpenOptions;
use crate::port::resolver::ResolvedSource;
use crate::snapshot::{check_l1, check_size, read_snapshots};
use crate::sync::atomic::AtomicU64;
use ::alloc::sync::Arc;
use qcow2_format::snapshot::Snapshot;

impl Image {
    /// Opens the disk as it was when a snapshot was taken. `choose` gets the image's snapshots and returns
    /// the index of one. Always read-only, even if `options` are for writing. The caller must not delete the
    /// snapshot while this image is open. Disk: as [`open`](Self::open) for reading, and reads the snapshot
    /// table. Clusters past the end of the snapshot's L1 table are unallocated.
    ///
    /// Errors: `NotFound` if `choose` returns no valid index; `Corrupt` for a damaged table, and for a disk
    /// larger than any L1 table can map; as [`open`](Self::open).
    pub fn open_snapshot(
        source: ResolvedSource,
        options: &OpenOptions,
        choose: impl FnOnce(&[Snapshot]) -> Option<usize>,
    ) -> Result<Arc<Self>> {
        let options = OpenOptions { writable: false, ..options.clone() };
        let mut image = Self::open_layer(&source, &options, 0)?;
        let snapshots = read_snapshots(&*source.storage, &image.header())?;
        let snapshot = choose(&snapshots).and_then(|index| snapshots.get(index));
        let snapshot =
            snapshot.ok_or_else(|| Error::new(ErrorKind::NotFound, "image has no such snapshot"))?;
        check_l1(snapshot, image.file.geometry())?;
        check_size(snapshot, image.file.geometry())?;
        let entries = read_words(&*source.storage, snapshot.l1_table_offset, snapshot.l1_size.into())?;
        image.mapping().replace_l1(snapshot.l1_table_offset, entries);
        image.size = AtomicU64::new(snapshot.disk_size & !511);
        let backing = image.open_below(&source, &options)?;
        Ok(Arc::new(image.with_backing(backing)))
    }
}
