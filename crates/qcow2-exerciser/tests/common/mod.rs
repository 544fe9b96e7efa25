//! Disks in memory and a console that records the output.

#![allow(dead_code, reason = "each test uses a part")]

use qcow2_core::{
    CreateOptions, ImageFormat, OpenOptions, Reference, ResolveError, ResolvedSource, Resolver, Storage,
};
use qcow2_exerciser::{Console, OpenRequest, OpenedDisk, Opener, Refusal};
use qcow2_io::{CopyOnRead, MemoryStorage};
use std::cell::RefCell;
use std::error::Error;
use std::sync::Arc;

/// A disk in a storage; `open` opens it whatever the name.
pub(crate) struct OneDisk {
    storage: Arc<dyn Storage>,
    format: ImageFormat,
    below: Option<Arc<dyn Storage>>,
}

impl OneDisk {
    pub(crate) fn raw(storage: Arc<dyn Storage>) -> Self {
        Self { storage, format: ImageFormat::Raw, below: None }
    }

    /// Creates an image of `size` bytes in `storage`; with `below` as its raw backing file, if given.
    pub(crate) fn qcow2(
        storage: Arc<dyn Storage>,
        size: u64,
        cluster_size: u64,
        below: Option<Vec<u8>>,
    ) -> Self {
        let mut options = CreateOptions::new(size);
        options.cluster_size = cluster_size;
        if below.is_some() {
            options = options.with_backing("below", "raw");
        }
        qcow2_core::create(&storage, None, &options).unwrap();
        let below = below.map(|bytes| Arc::new(MemoryStorage::from(bytes)) as Arc<dyn Storage>);
        Self { storage, format: ImageFormat::Qcow2, below }
    }
}

struct Below(Arc<dyn Storage>);

impl Resolver for Below {
    fn resolve(&self, _: Reference<'_>, _: bool) -> Result<ResolvedSource, ResolveError> {
        Ok(ResolvedSource::new(self.0.clone(), ImageFormat::Raw, "below"))
    }
}

impl Opener for OneDisk {
    fn open(&self, request: &OpenRequest) -> Result<OpenedDisk, Refusal> {
        let mut source = ResolvedSource::new(self.storage.clone(), self.format.clone(), "disk");
        if let Some(below) = &self.below {
            source = source.with_resolver(Arc::new(Below(below.clone())));
        }
        let mut options = OpenOptions::default();
        options.writable = !request.read_only;
        let disk = qcow2_core::open_disk(source, &options).map_err(|error| Refusal::new(words(&error)))?;
        let disk = match request.copy_on_read && options.writable {
            true => Arc::new(CopyOnRead::new(disk)),
            false => disk,
        };
        let mut disk = OpenedDisk::new(disk, options.writable);
        disk.durable_writes = request.cache.is_writethrough();
        disk.discards = request.discards;
        Ok(disk)
    }
}

/// All output in order; lines of standard error start with `! `.
#[derive(Default)]
pub(crate) struct Transcript(RefCell<String>);

impl Transcript {
    /// The output since the last call, without times and rates.
    pub(crate) fn take(&self) -> String {
        let text = self.0.take();
        let lines = text.lines().map(|line| line.split_once(" ops; ").map_or(line, |(start, _)| start));
        lines.collect::<Vec<_>>().join("\n")
    }
}

impl Console for Transcript {
    fn out(&self, text: &str) {
        self.0.borrow_mut().push_str(text);
    }

    fn complain(&self, line: &str) {
        self.out(&format!("! {line}\n"));
    }

    fn complain_named(&self, text: &str) {
        self.complain(&format!("tool: {text}"));
    }
}

/// The kind of the storage's error, or else of the engine's.
pub(crate) fn words(error: &(dyn Error + 'static)) -> String {
    let mut next = Some(error);
    let mut last = String::new();
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref::<qcow2_core::StorageError>() {
            return format!("<{:?}>", error.kind());
        }
        if let Some(error) = error.downcast_ref::<qcow2_core::Error>() {
            last = format!("<{:?}>", error.kind());
        }
        next = error.source();
    }
    last
}
