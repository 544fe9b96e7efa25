//! An image of any shape with its backing and data files in memory, and the flat array it must read as.

use crate::arbitrary::{BackingShape, Operation, Shape};
use crate::audit::audit;
use crate::model::{DiscardRule, Model, chain};
use crate::pages::PageBytes;
use crate::pattern;
use crate::rng::Rng;
use crate::storage::PageStorage;
use crate::toy::ToyKeyring;
use qcow2_core::{
    Codecs, CreateOptions, ErrorKind, GuestOffset, Image, ImageFormat, Keyring, LuksArea, NewEncryption,
    OpenOptions, Reference, ResolveError, ResolvedSource, Resolver, SectorNumbering, SourceId, Storage,
    create,
};
use qcow2_format::header::{CompressionType, Version};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Name of the image under test on its shelf.
pub const TOP: &str = "top.qcow2";
/// Name of its external data file.
pub const DATA: &str = "top.data";

/// Named storages in memory that resolve each other's names, like files in one folder.
#[derive(Clone, Debug, Default)]
pub struct Shelf {
    files: Arc<Mutex<BTreeMap<String, Arc<PageStorage>>>>,
}

impl Shelf {
    /// The storage called `name`; created empty if missing.
    pub fn file(&self, name: &str) -> Arc<PageStorage> {
        Arc::clone(self.locked().entry(name.to_owned()).or_default())
    }

    /// Stores `bytes` under `name`.
    pub fn put(&self, name: &str, bytes: &[u8]) {
        self.locked().insert(name.to_owned(), Arc::new(PageStorage::new(PageBytes::from_bytes(bytes))));
    }

    /// Writes every storage into `folder` as a file.
    pub fn save(&self, folder: &Path) -> io::Result<()> {
        self.locked().iter().try_for_each(|(name, file)| fs::write(folder.join(name), file.bytes().to_vec()))
    }

    /// The storage called `name` as a source.
    pub fn source(&self, name: &str, format: ImageFormat) -> ResolvedSource {
        let mut hash = 0u64;
        name.bytes().for_each(|byte| hash = hash.wrapping_mul(257).wrapping_add(u64::from(byte)));
        ResolvedSource {
            storage: self.file(name),
            format,
            name: name.to_owned(),
            id: Some(SourceId { device: 0, file: hash }),
            resolver: Arc::new(self.clone()),
        }
    }

    fn locked(&self) -> MutexGuard<'_, BTreeMap<String, Arc<PageStorage>>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Resolver for Shelf {
    fn resolve(&self, reference: Reference<'_>, _writable: bool) -> Result<ResolvedSource, ResolveError> {
        let (name, format) = match reference {
            Reference::DataFile { name } | Reference::Backing { name, format: Some("raw") } => {
                (name, ImageFormat::Raw)
            }
            Reference::Backing { name, .. } => (name, ImageFormat::Qcow2),
            _ => return Err(ResolveError::denied("an unknown kind of reference")),
        };
        if !self.locked().contains_key(name) {
            return Err(ResolveError::failed(format!("no '{name}' on the shelf")));
        }
        Ok(self.source(name, format))
    }
}

/// Options that create `shape` with the engine, as the image [`TOP`].
pub fn create_options(shape: &Shape) -> CreateOptions {
    let mut options = CreateOptions::new(shape.size);
    options.version = if shape.version3 { Version::V3 } else { Version::V2 };
    options.cluster_size = shape.cluster_size();
    options.refcount_bits = 1 << shape.refcount_order;
    options.lazy_refcounts = shape.lazy_refcounts;
    options.extended_l2 = shape.extended_l2;
    options.compression_type = if shape.zstd { CompressionType::Zstd } else { CompressionType::Deflate };
    if let Some(backing) = shape.backing {
        let format = if backing.qcow2 { "qcow2" } else { "raw" };
        options = options.with_backing(format!("base.{format}"), format);
    }
    // Two clusters and 700 bytes, so that the area does not end at a cluster boundary.
    let area = || LuksArea(vec![0xa5; 2 * shape.cluster_size() as usize + 700].into());
    options.encryption = shape.encryption.map(|numbering| match numbering {
        SectorNumbering::Guest => NewEncryption::Aes,
        SectorNumbering::Host => NewEncryption::Luks(area()),
    });
    options.data_file = shape.data_file.map(|_| DATA.to_owned());
    options.data_file_raw = shape.data_file.is_some_and(|file| file.raw);
    options
}

/// The image, its backing and data files, and its model. Errors are texts that say what failed.
pub struct World {
    shape: Shape,
    shelf: Shelf,
    codecs: Codecs,
    image: Arc<Image>,
    model: Model,
}

impl World {
    /// Creates an image of `shape` and, from `seed`, the content of its backing file.
    pub fn new(shape: Shape, codecs: Codecs, seed: u64) -> Result<Self, String> {
        let shelf = Shelf::default();
        let mut content = match shape.backing {
            Some(backing) => make_base(&shelf, &codecs, backing, shape.size, seed)?,
            None => Vec::new(),
        };
        content.resize(shape.size as usize, 0);
        let top: Arc<dyn Storage> = shelf.file(TOP);
        let data = shape.data_file.map(|_| shelf.file(DATA) as Arc<dyn Storage>);
        create(&top, data.as_ref(), &create_options(&shape)).map_err(|e| format!("create: {}", chain(&e)))?;
        let rule = if shape.version3 || shape.backing.is_none() {
            DiscardRule::Zeroes { unit: shape.cluster_size() }
        } else {
            DiscardRule::Ignored
        };
        let image = open(&shelf, &codecs, &shape)?;
        Ok(Self { shape, shelf, codecs, image, model: Model::new(content, rule) })
    }

    /// The open image.
    pub fn image(&self) -> &Arc<Image> {
        &self.image
    }

    /// The expected content.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The image and its files.
    pub fn shelf(&self) -> &Shelf {
        &self.shelf
    }

    /// Runs `operation` on the image and on the model and compares the data of a read.
    pub fn step(&mut self, operation: &Operation) -> Result<(), String> {
        match operation {
            Operation::Reopen => {
                self.model.apply(operation);
                self.close()?;
                self.image = open(&self.shelf, &self.codecs, &self.shape)?;
                self.model.check_disk(&*self.image)
            }
            _ => self.model.step(&*self.image, operation),
        }
    }

    /// Writes guest cluster `index` compressed; does nothing if the image refuses it (allocated already, or
    /// an external data file).
    pub fn compress(&mut self, index: u64, seed: u64) -> Result<(), String> {
        let start = index * self.shape.cluster_size();
        let len = self.shape.size.saturating_sub(start).min(self.shape.cluster_size());
        if len == 0 {
            return Ok(());
        }
        let start = GuestOffset::new(start);
        match self.image.write_compressed(start, &pattern::bytes(seed, start.value(), len as usize)) {
            Err(error) if error.kind() == ErrorKind::Unsupported => return Ok(()),
            other => other.map_err(|e| format!("compressed write at {start}: {}", chain(&e)))?,
        }
        let end = GuestOffset::new(start.value() + len);
        let range = qcow2_core::GuestRange::between(start, end);
        self.model.apply(&Operation::Write { range, seed });
        Ok(())
    }

    /// Closes the image and checks the result: same content when reopened, a sound file without leaks, and a
    /// raw data file equal to the disk.
    pub fn finish(self) -> Result<(Shelf, Model), String> {
        self.model.check_disk(&*self.image)?;
        self.close()?;
        let data = self.shape.data_file.map(|_| self.shelf.file(DATA).bytes());
        let found = audit(&self.shelf.file(TOP).bytes(), data.as_ref().map(PageBytes::len));
        if !found.is_sound() || found.leaks > 0 || found.dirty {
            return Err(format!("after close: {found:?}"));
        }
        if let Some(data) = data.filter(|_| self.shape.data_file.is_some_and(|file| file.raw)) {
            let mut bytes = vec![0; self.model.bytes().len()];
            data.read(0, &mut bytes);
            self.model.check(GuestOffset::new(0), &bytes).map_err(|e| format!("raw data file: {e}"))?;
        }
        Ok((self.shelf, self.model))
    }

    fn close(&self) -> Result<(), String> {
        self.image.close().map_err(|e| format!("close: {}", chain(&e)))
    }
}

fn open(shelf: &Shelf, codecs: &Codecs, shape: &Shape) -> Result<Arc<Image>, String> {
    let mut options = OpenOptions::default();
    options.writable = true;
    options.codecs = codecs.clone();
    options.keys = keys(shape);
    Image::open(shelf.source(TOP, ImageFormat::Qcow2), &options).map_err(|e| format!("open: {}", chain(&e)))
}

/// The keyring for an image of `shape`, if it is encrypted.
pub fn keys(shape: &Shape) -> Option<Arc<dyn Keyring>> {
    shape.encryption.map(|numbering| Arc::new(ToyKeyring(numbering)) as Arc<dyn Keyring>)
}

/// Creates the backing file, raw or qcow2 of another geometry, and returns its content.
fn make_base(
    shelf: &Shelf,
    codecs: &Codecs,
    shape: BackingShape,
    size: u64,
    seed: u64,
) -> Result<Vec<u8>, String> {
    let mut rng = Rng::new(seed);
    if !shape.qcow2 {
        let mut model = Model::new(vec![0; shape.size as usize], DiscardRule::Ignored);
        for _ in 0..12 {
            model.apply(&Operation::random(&mut rng, shape.size, 4096));
        }
        shelf.put("base.raw", model.bytes());
        return Ok(model.bytes().to_vec());
    }
    let cluster_bits = rng.pick(&[9, 12, 16]);
    let inner = Shape { cluster_bits, extended_l2: false, ..Shape::plain(shape.size) };
    let mut world = World::new(inner, codecs.clone(), seed)?;
    for _ in 0..12 {
        let operation = Operation::random(&mut rng, shape.size, size.min(4096));
        if !matches!(operation, Operation::Reopen) {
            world.step(&operation)?;
        }
    }
    let (files, model) = world.finish()?;
    shelf.put("base.qcow2", &files.file(TOP).bytes().to_vec());
    Ok(model.bytes().to_vec())
}
