//! Scratch overlays: what is written to a disk goes away with the program.

use crate::keys::Keys;
use crate::open::options::default_codecs;
use qcow2_core::{
    CreateOptions, GuestDisk, ImageFormat, OpenOptions, Reference, ResolveError, ResolvedSource, Resolver,
    Result, Storage, StorageError, StorageErrorKind, create, open_disk,
};
use qcow2_io::{FileStorage, NoFlush};
use std::sync::{Arc, Mutex, PoisonError};

/// Opens a new overlay on the image in `base`, in a file without a name. `size`: of the disk in bytes, as the
/// image in `base` has it; `keys`: of the overlay's chain, the overlay itself being layer 0. Disk: makes a
/// temporary file; nothing is ever flushed to it, and `base` is only read. Errors: `Storage` without room for
/// the file; as opening a disk.
pub fn open_scratch(base: ResolvedSource, size: u64, keys: Keys) -> Result<Arc<dyn GuestDisk>> {
    let file = tempfile::tempfile().and_then(|file| FileStorage::from_file(file, true)).map_err(|error| {
        StorageError::new(StorageErrorKind::Io, format!("cannot make a temporary overlay: {error}"))
    })?;
    let storage: Arc<dyn Storage> = Arc::new(NoFlush::new(Arc::new(file)));
    let mut new = CreateOptions::new(size);
    new.backing_file = Some(base.name.clone());
    create(&storage, None, &new)?;
    let source = ResolvedSource {
        storage,
        format: ImageFormat::Qcow2,
        name: "temporary overlay".to_owned(),
        id: None,
        resolver: Arc::new(Handover(Mutex::new(Some(base)))),
    };
    let options = OpenOptions::writable().with_codecs(default_codecs()).with_keys(Arc::new(keys));
    open_disk(source, &options)
}

/// Resolves the one name in a scratch overlay to the source that is open already.
struct Handover(Mutex<Option<ResolvedSource>>);

impl Resolver for Handover {
    fn resolve(&self, _: Reference<'_>, _: bool) -> std::result::Result<ResolvedSource, ResolveError> {
        let source = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        source.ok_or_else(|| ResolveError::failed("the base of the temporary overlay was taken already"))
    }
}
