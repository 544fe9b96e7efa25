//! The start image of a simulation: a random shape with every kind of cluster, built without the engine.

use super::codec::RunCodec;
use super::codecs;
use crate::arbitrary::{BackingShape, DataFileShape, ENCRYPTIONS, Shape};
use crate::builder::{Builder, Built, Cluster};
use crate::pages::PageBytes;
use crate::pattern;
use crate::rng::Rng;
use crate::storage::PageStorage;
use crate::world::keys;
use qcow2_core::{
    ClusterCodec, ImageFormat, NoResolver, OpenOptions, Reference, ResolveError, ResolvedSource, Resolver,
    Storage,
};
use qcow2_format::HostOffset;
use qcow2_format::extension::BitmapsExtension;
use qcow2_format::feature::{AutoclearFeatures, CompatibleFeatures, IncompatibleFeatures};
use qcow2_format::header::{CompressionType, CryptMethod, Header, Version};
use std::sync::Arc;

/// How a simulation starts.
#[derive(Clone, Debug)]
pub(super) struct Start {
    pub(super) shape: Shape,
    pub(super) image: PageBytes,
    /// The data file, if the shape has one.
    pub(super) data: Option<PageBytes>,
    backing_file: Option<PageBytes>,
    backing: Vec<u8>,
    /// Freed clusters are discarded in the storage.
    discard_freed: bool,
    /// Discarded guest clusters keep their host clusters.
    discard_no_unref: bool,
    /// Limit of the table cache in bytes.
    cache: Option<u64>,
    /// The guest content.
    pub(super) guest: Vec<u8>,
}

impl Start {
    /// Draws a shape and its content.
    pub(super) fn draw(rng: &mut Rng) -> Self {
        let shape = draw_shape(rng);
        let mut guest = vec![0; shape.size as usize];
        let backing = shape.backing.map_or(0, |backing| backing.size as usize);
        let backing = pattern::bytes(BACKING_SEED, 0, backing);
        let n = backing.len().min(guest.len());
        guest[..n].copy_from_slice(&backing[..n]);
        let mut builder = Builder::with_header(header(&shape));
        let chance = rng.pick(&[0, 4, 12, 15]);
        // The builder cannot encrypt: encrypted images start empty.
        let chance = if shape.encryption.is_some() { 0 } else { chance };
        for index in 0..shape.size.div_ceil(shape.cluster_size()) {
            if rng.below(16) < chance {
                builder = builder.cluster(index, draw_cluster(rng, &shape, index, &mut guest));
            }
        }
        let bitmap = shape.version3 && rng.one_in(4);
        // Derived from values already drawn: another draw would change the run of every known seed.
        let records = !(shape.size / 512).is_multiple_of(3);
        let mut built = if bitmap { with_bitmap(builder, records) } else { builder.build() };
        if shape.cluster_bits == 9 && shape.refcount_order >= 5 && rng.one_in(4) {
            crowd(rng, &shape, &mut built);
        }
        let image = PageBytes::from_bytes(&built.bytes);
        let data = shape.data_file.map(|_| data_file(&shape, &built, &guest));
        let backing_file = shape.backing.map(|_| PageBytes::from_bytes(&backing));
        let (discard_freed, cache) = (rng.one_in(3), rng.pick(&[None, Some(0), Some(4096)]));
        let discard_no_unref = shape.version3 && rng.one_in(3);
        Self { shape, image, data, backing_file, backing, discard_freed, discard_no_unref, cache, guest }
    }

    /// Options for opening the image for writing.
    pub(super) fn open_options(&self) -> OpenOptions {
        let mut options = OpenOptions::default();
        options.writable = true;
        options.codecs = codecs();
        options.keys = keys(&self.shape);
        options.discard_freed = self.discard_freed;
        options.discard_no_unref = self.discard_no_unref;
        options.l2_cache_size = self.cache;
        options.refcount_cache_size = self.cache;
        options
    }

    /// Content of the backing file; empty without one.
    pub(super) fn backing(&self) -> &[u8] {
        &self.backing
    }

    /// The image on `storage` and its data file as a source for the engine.
    pub(super) fn source(&self, storage: Arc<dyn Storage>, data: Option<Arc<dyn Storage>>) -> ResolvedSource {
        let backing =
            self.backing_file.clone().map(|bytes| Arc::new(PageStorage::new(bytes)) as Arc<dyn Storage>);
        ResolvedSource {
            storage,
            format: ImageFormat::Qcow2,
            name: "image".to_owned(),
            id: None,
            resolver: Arc::new(Neighbours { backing, data }),
        }
    }
}

/// Resolves the two names that a simulated image may contain.
struct Neighbours {
    backing: Option<Arc<dyn Storage>>,
    data: Option<Arc<dyn Storage>>,
}

impl Resolver for Neighbours {
    fn resolve(&self, reference: Reference<'_>, _writable: bool) -> Result<ResolvedSource, ResolveError> {
        let storage = match reference {
            Reference::Backing { .. } => self.backing.clone(),
            Reference::DataFile { .. } => self.data.clone(),
            _ => None,
        };
        Ok(ResolvedSource {
            storage: storage.ok_or_else(|| ResolveError::failed("no such file in the simulation"))?,
            format: ImageFormat::Raw,
            name: "neighbour".to_owned(),
            id: None,
            resolver: Arc::new(NoResolver),
        })
    }
}

/// Seed of the backing file's pattern; workloads use other seeds.
const BACKING_SEED: u64 = 1;
/// Seed of bytes that no reader may see.
const HIDDEN_SEED: u64 = 3;

/// A shape with a small disk, so that each crash image is cheap: tens of clusters, most of them small.
fn draw_shape(rng: &mut Rng) -> Shape {
    let extended_l2 = rng.one_in(6);
    let cluster_bits = if extended_l2 { 14 } else { rng.pick(&[9, 9, 9, 9, 9, 9, 10, 10, 12, 16]) };
    let most = match cluster_bits {
        9 => 150,
        10 => 60,
        12 => 20,
        14 => 8,
        _ => 3,
    };
    let cluster_size = 1u64 << cluster_bits;
    let size = (rng.between(2, most) << cluster_bits) - rng.pick(&[0, 0, 512, (cluster_size / 2) & !511]);
    let backing_size = rng.pick(&[size, (size / 2) & !511, size + cluster_size]);
    let data_file = rng.one_in(6).then(|| DataFileShape { raw: rng.one_in(2) });
    let shape = Shape {
        version3: !rng.one_in(6),
        cluster_bits,
        refcount_order: rng.between(0, 6) as u32,
        extended_l2,
        lazy_refcounts: rng.one_in(4),
        zstd: false,
        data_file,
        backing: rng.one_in(2).then_some(BackingShape { size: backing_size.max(512), qcow2: false }),
        encryption: rng.pick(ENCRYPTIONS),
        size,
    };
    shape.legalized()
}

fn header(shape: &Shape) -> Header {
    let version = if shape.version3 { Version::V3 } else { Version::V2 };
    let mut header = Header::new(version, shape.cluster_bits);
    header.size = shape.size;
    header.refcount_order = shape.refcount_order;
    header.compression_type = CompressionType::Deflate;
    if shape.encryption.is_some() {
        header.crypt_method = CryptMethod::Aes;
    }
    header.features.compatible.set(CompatibleFeatures::LAZY_REFCOUNTS, shape.lazy_refcounts);
    header.features.incompatible.set(IncompatibleFeatures::EXTENDED_L2, shape.extended_l2);
    header.features.incompatible.set(IncompatibleFeatures::DATA_FILE, shape.data_file.is_some());
    if let Some(file) = shape.data_file {
        header.extensions.data_file = Some(b"data".to_vec());
        header.features.autoclear.set(AutoclearFeatures::RAW_DATA_FILE, file.raw);
    }
    if shape.backing.is_some() {
        header.backing_file = Some(b"backing".to_vec());
        header.extensions.backing_format = Some(b"raw".to_vec());
    }
    header
}

/// Draws the content of guest cluster `index` and writes it to `guest`.
fn draw_cluster(rng: &mut Rng, shape: &Shape, index: u64, guest: &mut [u8]) -> Cluster {
    let (size, start) = (shape.cluster_size(), index * shape.cluster_size());
    let end = (start + size).min(shape.size);
    let plain = pattern::bytes(rng.pick(&[4, 5]), start, size as usize);
    let hidden = pattern::bytes(HIDDEN_SEED, start, size as usize);
    let shown = &mut guest[start as usize..end as usize];
    let len = shown.len();
    match rng.below(6) {
        0 if shape.version3 => {
            shown.fill(0);
            Cluster::Zero
        }
        1 if shape.version3 => {
            shown.fill(0);
            Cluster::ZeroAllocated(hidden)
        }
        2 if shape.extended_l2 => {
            let allocated = rng.next_u64() as u32;
            let zero = rng.next_u64() as u32 & !allocated;
            for (at, byte) in shown.iter_mut().enumerate() {
                let subcluster = at as u64 / (size / 32);
                if allocated >> subcluster & 1 == 1 {
                    *byte = plain[at];
                } else if zero >> subcluster & 1 == 1 {
                    *byte = 0;
                }
            }
            Cluster::Subclusters { allocated, zero, data: plain }
        }
        3 | 4 if shape.data_file.is_none() && compressible(shape) => {
            let plain = pattern::bytes(4, start, size as usize);
            let mut stream = vec![0; size as usize - 1];
            let Ok(Some(len)) = RunCodec.compress(&plain, &mut stream) else {
                unreachable!("the pattern of seed 4 compresses")
            };
            stream.truncate(len);
            shown.copy_from_slice(&plain[..shown.len()]);
            Cluster::Compressed(stream)
        }
        _ => {
            shown.copy_from_slice(&plain[..len]);
            Cluster::Data(plain)
        }
    }
}

/// Up to about six streams share a host cluster, so refcounts need at least that range.
fn compressible(shape: &Shape) -> bool {
    shape.refcount_order >= 3
}

/// The data file: as built, or equal to the guest disk with the raw flag.
fn data_file(shape: &Shape, built: &Built, guest: &[u8]) -> PageBytes {
    if shape.data_file.is_some_and(|file| file.raw) {
        return PageBytes::from_bytes(guest);
    }
    let mut bytes = PageBytes::from_bytes(&built.data_file);
    bytes.set_len(bytes.len().max(shape.size));
    bytes
}

/// Leaks nearly all clusters that the first cluster of the refcount table can cover, so that the table must
/// soon move.
fn crowd(rng: &mut Rng, shape: &Shape, built: &mut Built) {
    let size = shape.cluster_size();
    let counted = (size * 8) >> shape.refcount_order;
    let blocks = size / 8;
    let used = (built.bytes.len() as u64).div_ceil(size);
    let spare = rng.between(3, 30);
    let end = blocks * counted - spare;
    let existing = used.div_ceil(counted);
    for cluster in used..existing * counted {
        built.set_refcount(cluster, 1);
    }
    let width = 1u64 << shape.refcount_order >> 3;
    for block in existing..blocks {
        let at = block * counted * size;
        built.patch_u64(built.refcount_table + block * 8, at);
        for cluster in block * counted..end.min((block + 1) * counted) {
            let low_byte = at + (cluster - block * counted + 1) * width - 1;
            built.patch(low_byte, &[1]);
        }
    }
}

/// Adds a persistent bitmap without any bit set: a directory and a table, each in a cluster at the end. Adds
/// none if the refcount blocks cannot cover these. `records`: whether the bitmap is enabled.
fn with_bitmap(mut builder: Builder, records: bool) -> Built {
    let built = builder.clone().build();
    let size = built.cluster_size();
    let first = (built.bytes.len() as u64).div_ceil(size);
    if first + 2 > ((built.l1 - built.refcount_blocks) * 8) >> builder.header_mut().refcount_order {
        return built;
    }
    let header = builder.header_mut();
    header.features.autoclear.set(AutoclearFeatures::BITMAPS, true);
    header.extensions.bitmaps = Some(BitmapsExtension {
        count: 1,
        reserved: 0,
        directory_size: 32,
        directory_offset: HostOffset::new(first * size),
    });
    let mut built = builder.build();
    built.set_refcount(first, 1).set_refcount(first + 1, 1);
    built.patch_u64(first * size, (first + 1) * size);
    // One directory entry: a bitmap "b" with 512-byte granularity, enabled or not.
    built.patch(
        first * size + 8,
        &[0, 0, 0, 1, 0, 0, 0, 2 * u8::from(records), 1, 9, 0, 1, 0, 0, 0, 0, b'b', 0, 0, 0, 0, 0, 0, 0],
    );
    built.patch((first + 2) * size - 1, &[0]);
    built
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::audit;

    #[test]
    fn starts_are_sound_and_varied() {
        let mut kinds = [0u32; 6];
        for seed in 0..600 {
            let start = Start::draw(&mut Rng::new(seed));
            let data_len = start.data.as_ref().map(PageBytes::len);
            let audit = audit(&start.image, data_len);
            assert!(audit.is_sound(), "seed {seed}: {:?} {audit:?}", start.shape);
            kinds[0] += u32::from(audit.leaks > 1000);
            kinds[1] += u32::from(start.data.is_some());
            kinds[2] += u32::from(start.backing_file.is_some());
            kinds[3] += u32::from(start.shape.extended_l2);
            kinds[4] += u32::from(!start.shape.version3);
            kinds[5] += u32::from(audit.bitmaps);
        }
        assert!(kinds.iter().all(|&n| n > 5), "{kinds:?}");
    }
}
