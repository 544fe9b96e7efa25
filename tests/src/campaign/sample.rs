//! The images that a campaign damages, and the damage.

use crate::fixtures::codecs;
use qcow2_core::format::Version;
use qcow2_core::{
    CreateOptions, GuestOffset, GuestRange, Image, ImageFormat, NewSnapshot, OpenOptions, Storage, ZeroMode,
    create,
};
use qcow2_testkit::pattern;
use qcow2_testkit::rng::Rng;
use qcow2_testkit::semantic;
use qcow2_testkit::world::Shelf;
use std::sync::Arc;

/// File name of the image.
const IMAGE: &str = "image.qcow2";
/// File name of its external data file.
pub(super) const DATA: &str = "data.raw";
/// Larger image files are not part of a campaign: its limits are for small ones.
const MAX_FILE: usize = 1 << 20;

/// What a damage is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// Some bytes anywhere, most of them near the start.
    Random,
    /// One field of the header or of a table: a semantic mutant.
    Semantic,
}

/// An image with damage, and what it was before.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Which field was damaged, or how many bytes.
    pub kind: &'static str,
    /// The guest's clusters in the whole image.
    pub whole: Vec<Vec<u8>>,
    /// The damaged image file.
    pub bytes: Vec<u8>,
    /// The content of its external data file.
    pub data: Option<Vec<u8>>,
}

impl Sample {
    /// The sample that `seed` stands for.
    pub fn new(seed: u64, damage: Damage) -> Self {
        let mut rng = Rng::new(seed);
        loop {
            let whole = Whole::new(&mut rng);
            if whole.bytes.len() > MAX_FILE {
                continue;
            }
            let mut bytes = whole.bytes.clone();
            let kind = match damage {
                Damage::Random => Some(scatter(&mut bytes, &mut rng)),
                Damage::Semantic => semantic::damage(&mut bytes, &mut rng),
            };
            if let Some(kind) = kind.filter(|_| bytes != whole.bytes) {
                return Self { kind, whole: whole.clusters, bytes, data: whole.data };
            }
        }
    }
}

/// Changes a few bytes. The first eight stay: they say what the file is.
fn scatter(bytes: &mut [u8], rng: &mut Rng) -> &'static str {
    let len = bytes.len() as u64;
    let (count, kind) = rng.pick(&[(1, "one byte"), (2, "2 bytes"), (5, "5 bytes"), (20, "20 bytes")]);
    for _ in 0..count {
        let end = rng.pick(&[len, 512, 8192]).min(len);
        let at = rng.between(8, end - 1) as usize;
        let new = [rng.next_u64() as u8, 0, 255, bytes[at] ^ 1 << rng.below(8)];
        bytes[at] = rng.pick(&new);
    }
    kind
}

struct Whole {
    bytes: Vec<u8>,
    data: Option<Vec<u8>>,
    clusters: Vec<Vec<u8>>,
}

impl Whole {
    /// An image of any kind that has tables: both versions, all refcount widths, snapshots, bitmaps,
    /// compressed clusters, zero clusters, subclusters, external data.
    fn new(rng: &mut Rng) -> Self {
        let mut options = CreateOptions::new(0);
        options.cluster_size = rng.pick(&[512, 1024, 4096, 65_536, 65_536]);
        options.size = options.cluster_size * rng.between(20, 100);
        let old = rng.one_in(6);
        let external = !old && rng.one_in(10);
        if old {
            options.version = Version::V2;
        } else {
            options.extended_l2 = options.cluster_size == 65_536 && rng.one_in(2);
            options.refcount_bits = rng.pick(&[1, 8, 16, 16, 16, 16, 32, 64]);
        }
        let shelf = Shelf::default();
        let data = external.then(|| shelf.file(DATA) as Arc<dyn Storage>);
        if let Some(data) = &data {
            data.set_len(options.size).expect("a length");
            options.data_file = Some(DATA.to_owned());
        }
        create(&(shelf.file(IMAGE) as Arc<dyn Storage>), data.as_ref(), &options).expect("a new image");
        let image = open(&shelf, true);
        let snapshots = options.refcount_bits > 1 && !external && rng.one_in(2);
        for step in 0..rng.between(3, 8) {
            change(&image, &options, step, rng);
            if snapshots && rng.one_in(3) {
                let mut new = NewSnapshot::default();
                new.name = format!("s{step}").into();
                image.create_snapshot(&new).expect("a snapshot");
            }
        }
        if !old && rng.one_in(4) {
            image.add_bitmap(b"b0", 16).expect("a bitmap");
            change(&image, &options, 9, rng);
        }
        image.close().expect("a whole image closes");
        let bytes = |name| shelf.file(name).bytes().to_vec();
        Self {
            bytes: bytes(IMAGE),
            data: data.map(|_| bytes(DATA)),
            clusters: clusters(&open(&shelf, false)),
        }
    }
}

fn open(shelf: &Shelf, writable: bool) -> Arc<Image> {
    let mut options = OpenOptions::default();
    (options.codecs, options.writable) = (codecs(), writable);
    Image::open(shelf.source(IMAGE, ImageFormat::Qcow2), &options).expect("a whole image opens")
}

fn change(image: &Image, options: &CreateOptions, step: u64, rng: &mut Rng) {
    let cluster = options.cluster_size;
    let start = rng.below(options.size / cluster) * cluster;
    let len = (cluster * rng.between(1, 4)).min(options.size - start);
    let range = GuestRange::new(GuestOffset::new(start), len).expect("a short range");
    match rng.below(8) {
        0 if options.data_file.is_none() => {
            // Refused where the cluster is written already; that is as good.
            let bytes = vec![step as u8 + 1; cluster as usize];
            drop(image.write_compressed(GuestOffset::new(start), &bytes));
        }
        1 => image.write_zeroes(range, ZeroMode::KeepAllocated).expect("zeroes"),
        2 => image.discard(range).expect("a discard"),
        _ => {
            let bytes = pattern::bytes(step + 1, start, len as usize);
            image.write_at(GuestOffset::new(start), &bytes).expect("a write");
        }
    }
}

fn clusters(image: &Image) -> Vec<Vec<u8>> {
    let (size, cluster) = (image.size(), image.cluster_size());
    let read = |index: u64| {
        let start = index * cluster;
        let mut bytes = vec![0; cluster.min(size - start) as usize];
        image.read_at(GuestOffset::new(start), &mut bytes).expect("a whole image reads");
        bytes
    };
    (0..size.div_ceil(cluster)).map(read).collect()
}
