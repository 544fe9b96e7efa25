//! A snapshot as a disk of its own, for reading.

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
    /// Opens the disk as it was when a snapshot was taken: the one that `choose` picks, by its place, from
    /// the image's snapshots. For reading only, even where `options` are for writing; the snapshot must not
    /// be deleted meanwhile. Disk: as [`open`](Self::open) for reading, and the snapshot table.
    ///
    /// Errors: `NotFound` where `choose` picks none; `Corrupt` for a damaged table, and for a disk larger
    /// than any L1 table can map; as [`open`](Self::open). What the snapshot's own table is too short for was
    /// never written.
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
