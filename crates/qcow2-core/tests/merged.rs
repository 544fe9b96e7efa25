//! Chains of layers that nobody changes, read by one index: they read as a flat array with the same history.
#![allow(missing_docs, clippy::unwrap_used)]

use qcow2_core::{
    Codecs, CreateOptions, DiskExtent, Error, ExtentState, GuestDisk, GuestOffset, GuestRange, HostOffset,
    Image, ImageFormat, LiveDisk, LuksArea, NewEncryption, OpenOptions, RawDisk, SectorNumbering, Storage,
    ZeroMode, create,
};
use qcow2_testkit::model::chain;
use qcow2_testkit::pattern;
use qcow2_testkit::rng::Rng;
use qcow2_testkit::sim::RunCodec;
use qcow2_testkit::toy::ToyKeyring;
use qcow2_testkit::world::Shelf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const SECTOR: u64 = 512;

/// The files of a chain, from the bottom up, and what its top reads as.
struct Chain {
    shelf: Shelf,
    names: Vec<String>,
    content: Vec<u8>,
    numbering: SectorNumbering,
}

fn range(start: u64, len: u64) -> GuestRange {
    GuestRange::new(GuestOffset::new(start), len).unwrap()
}

fn writable(mut options: OpenOptions) -> OpenOptions {
    options.writable = true;
    options
}

impl Chain {
    fn draw(rng: &mut Rng, layers: usize) -> Self {
        let numbering = rng.pick(&[SectorNumbering::Guest, SectorNumbering::Host]);
        let mut made = Self { shelf: Shelf::default(), names: Vec::new(), content: Vec::new(), numbering };
        let size = rng.between(1, 1500);
        if rng.one_in(3) {
            let len = rng.between(1, 2 * size * SECTOR);
            made.content = pattern::bytes(rng.next_u64() | 1, 0, len as usize);
            made.shelf.put("raw", &made.content);
            made.names.push("raw".to_owned());
        }
        while made.names.len() < layers {
            let size = if rng.one_in(3) { rng.between(1, 2 * size) } else { size };
            made.add_layer(rng, size * SECTOR);
        }
        made
    }

    fn options(&self) -> OpenOptions {
        let codec = Arc::new(RunCodec);
        let keys = Arc::new(ToyKeyring(self.numbering));
        OpenOptions::read_only().with_codecs(Codecs::new(codec.clone(), codec)).with_keys(keys)
    }

    fn open(&self, options: OpenOptions) -> Arc<Image> {
        let top = self.names.last().unwrap();
        Image::open(self.shelf.source(top, ImageFormat::Qcow2), &options).unwrap()
    }

    fn add_layer(&mut self, rng: &mut Rng, size: u64) {
        let name = format!("layer{}", self.names.len());
        let mut options = CreateOptions::new(size);
        options.cluster_size = rng.pick(&[512, 1024, 4096, 16384, 65536, 65536]);
        options.extended_l2 = options.cluster_size >= 16384 && rng.one_in(3);
        let area = LuksArea(vec![0xa5; 1000].into());
        options.encryption = rng.one_in(8).then_some(match self.numbering {
            SectorNumbering::Guest => NewEncryption::Aes,
            SectorNumbering::Host => NewEncryption::Luks(area),
        });
        let data_file = options.encryption.is_none() && rng.one_in(8);
        let data: Arc<dyn Storage> = self.shelf.file(&format!("{name}.data"));
        options.data_file = data_file.then(|| format!("{name}.data"));
        if let Some(below) = self.names.last() {
            options = options.with_backing(below, if below == "raw" { "raw" } else { "qcow2" });
        }
        let file: Arc<dyn Storage> = self.shelf.file(&name);
        create(&file, data_file.then_some(&data), &options).unwrap();
        self.names.push(name);
        self.content.resize(size as usize, 0);
        let image = self.open(writable(self.options()));
        let may_compress = options.encryption.is_none() && !data_file;
        for _ in 0..rng.below(12) {
            change(rng, &image, &mut self.content, may_compress);
        }
        image.close().unwrap();
        self.check(rng, &*image, 4);
    }

    /// Reads all of `disk`, and `count` random ranges first.
    fn check(&self, rng: &mut Rng, disk: &dyn GuestDisk, count: u64) {
        check(rng, disk, &self.content, count);
    }
}

#[track_caller]
fn check(rng: &mut Rng, disk: &dyn GuestDisk, content: &[u8], count: u64) {
    let size = content.len() as u64;
    assert_eq!(disk.size(), size);
    for number in 0..=count {
        let start = rng.below(size);
        let len = rng.pick(&[1, 512, 4096, 70_000]).min(size - start);
        let (start, len) = if number == count { (0, size) } else { (start, len) };
        let mut seen = pattern::unread(len as usize);
        disk.read_at(GuestOffset::new(start), &mut seen).unwrap_or_else(|e| panic!("{}", chain(&e)));
        let wanted = &content[start as usize..(start + len) as usize];
        if let Some(at) = seen.iter().zip(wanted).position(|(a, b)| a != b) {
            panic!("{len} bytes at {start:#x} differ at {:#x}", start + at as u64);
        }
    }
}

/// The extents of a whole chain, as letters for sectors: data, compressed, or neither. Checks that layers
/// which a walk may leave out have nothing.
fn extents(disk: &Arc<dyn GuestDisk>) -> String {
    let live = LiveDisk::new(Arc::clone(disk));
    let (mut at, mut text) = (0, String::new());
    while at < live.size() {
        let left = range(at, live.size() - at);
        let extent = live.extent_at(left).unwrap_or_else(|e| panic!("{}", chain(&e)));
        text += &match extent.state {
            ExtentState::Data { .. } => "d",
            ExtentState::Compressed => "c",
            _ => "-",
        }
        .repeat(extent.len.div_ceil(SECTOR) as usize);
        let (layers, len) = disk.layers_without(left);
        let mut layer = Arc::clone(disk);
        for _ in 0..layers {
            assert!(is_unallocated(&*layer, at, len), "{len} bytes at {at:#x}, {layers} layers left out");
            layer = Arc::clone(layer.backing().unwrap());
        }
        at += extent.len;
    }
    text
}

fn is_unallocated(disk: &dyn GuestDisk, start: u64, len: u64) -> bool {
    let (mut at, end) = (start, disk.size().min(start + len));
    while at < end {
        let extent = disk.extent_at(range(at, end - at)).unwrap();
        if extent.state != ExtentState::Unallocated {
            return false;
        }
        at += extent.len;
    }
    true
}

fn change(rng: &mut Rng, image: &Image, content: &mut [u8], may_compress: bool) {
    let size = content.len() as u64;
    let start = rng.below(size);
    let len = rng.pick(&[1, 512, 3000, 20_000, 200_000]).min(size - start);
    let seed = rng.next_u64() | 1;
    let part = &mut content[start as usize..(start + len) as usize];
    match rng.below(5) {
        0 => {
            image.write_zeroes(range(start, len), ZeroMode::MayUnmap).unwrap();
            part.fill(0);
        }
        1 if may_compress => {
            let cluster = image.cluster_size();
            let start = start / cluster * cluster;
            let bytes = vec![seed as u8; cluster.min(size - start) as usize];
            // Refused where the cluster is allocated already.
            if image.write_compressed(GuestOffset::new(start), &bytes).is_ok() {
                content[start as usize..start as usize + bytes.len()].copy_from_slice(&bytes);
            }
        }
        _ => {
            pattern::fill(seed, start, part);
            image.write_at(GuestOffset::new(start), part).unwrap();
        }
    }
}

#[test]
fn chains_of_all_kinds_of_layers_read_as_a_flat_array() {
    for seed in 0..60 {
        let mut rng = Rng::new(seed);
        let layers = rng.pick(&[1, 2, 3, 5, 9, 20, 64]);
        let made = Chain::draw(&mut rng, layers);
        for exchangeable in [false, true] {
            let budget = rng.pick(&[None, None, Some(0), Some(1000), Some(30_000)]);
            let options = made.options().with_index_size(budget).with_exchangeable(exchangeable);
            if made.names.last().unwrap() == "raw" {
                continue;
            }
            made.check(&mut rng, &*made.open(options.clone()), 30);
            let plain: Arc<dyn GuestDisk> = made.open(made.options().with_index_size(Some(0)));
            let merged: Arc<dyn GuestDisk> = made.open(options.clone());
            assert_eq!(extents(&merged), extents(&plain));
            // The same below a top that changes.
            let file: Arc<dyn Storage> = made.shelf.file("over");
            let overlay = CreateOptions::new(made.content.len() as u64).with_cluster_size(4096);
            let overlay = overlay.with_backing(made.names.last().unwrap(), "qcow2");
            create(&file, None, &overlay).unwrap();
            let top = open(&made.shelf, "over", &writable(options));
            let mut content = made.content.clone();
            for _ in 0..6 {
                change(&mut rng, &top, &mut content, false);
                check(&mut rng, &*top, &content, 6);
            }
        }
    }
}

/// A disk of 64 clusters in `layers` layers: cluster `i` is in layer `i` modulo their number. The files are
/// called by the numbers, from the base up. Also returns what the top reads as.
fn striped(layers: u64) -> (Shelf, Vec<u8>) {
    let shelf = Shelf::default();
    let mut content = vec![0; 64 << 16];
    for layer in 0..layers {
        let name = format!("{layer}");
        let mut options = CreateOptions::new(64 << 16);
        if layer > 0 {
            options = options.with_backing(format!("{}", layer - 1), "qcow2");
        }
        let file: Arc<dyn Storage> = shelf.file(&name);
        create(&file, None, &options).unwrap();
        let image = Image::open(shelf.source(&name, ImageFormat::Qcow2), &OpenOptions::writable()).unwrap();
        for cluster in (layer..64).step_by(layers as usize) {
            let bytes = pattern::bytes(layer + 1, cluster << 16, 1 << 16);
            image.write_at(GuestOffset::new(cluster << 16), &bytes).unwrap();
            content[(cluster << 16) as usize..((cluster + 1) << 16) as usize].copy_from_slice(&bytes);
        }
        image.close().unwrap();
    }
    (shelf, content)
}

fn open(shelf: &Shelf, name: &str, options: &OpenOptions) -> Arc<Image> {
    Image::open(shelf.source(name, ImageFormat::Qcow2), options).unwrap()
}

/// What a read of one sector gives: an error, or whether the bytes are right.
fn outcome(disk: &dyn GuestDisk, at: u64, content: &[u8]) -> Result<bool, String> {
    let mut seen = [0xee; SECTOR as usize];
    disk.read_at(GuestOffset::new(at), &mut seen).map_err(|e: Error| chain(&e))?;
    Ok(seen[..] == content[at as usize..at as usize + seen.len()])
}

#[test]
fn a_damaged_entry_of_a_lower_layer_fails_only_where_it_is_needed() {
    for damage in [0x8000_0000_0000_1200_u64, u64::MAX >> 8, 0x40ff_ffff_ffff_ffff] {
        let (shelf, content) = striped(8);
        // Cluster 10 belongs to layer 2, and cluster 11 is hidden by layer 3.
        let file = shelf.file("2");
        let word = |at: u64| {
            let mut word = [0; 8];
            file.read_at(HostOffset::new(at), &mut word).unwrap();
            u64::from_be_bytes(word)
        };
        let l2 = word(word(40)) & 0x00ff_ffff_ffff_fe00;
        for cluster in [10, 11] {
            file.write_at(HostOffset::new(l2 + cluster * 8), &damage.to_be_bytes()).unwrap();
        }
        let merged = open(&shelf, "7", &OpenOptions::read_only());
        let plain = open(&shelf, "7", &OpenOptions::read_only().with_index_size(Some(0)));
        for cluster in 0..64 {
            let at = (cluster << 16) + 1024;
            let seen = outcome(&*merged, at, &content);
            assert_eq!(seen, outcome(&*plain, at, &content), "cluster {cluster}");
            assert_eq!(seen == Ok(true), cluster != 10, "cluster {cluster}: {seen:?}");
        }
    }
}

/// A base that is opened for writing is asked at each read; once it is closed, it is merged.
#[test]
fn a_layer_that_may_change_is_not_merged() {
    let (shelf, mut content) = striped(4);
    let base = open(&shelf, "0", &OpenOptions::writable());
    let live = Arc::new(LiveDisk::frozen(base.clone()));
    let source = |name: &str| shelf.source(name, ImageFormat::Qcow2);
    let options = OpenOptions::read_only();
    let middle = Image::open_on(&source("1"), &options, live.clone()).unwrap();
    let top = Image::open_on(&source("2"), &options, middle).unwrap();
    // Cluster 3 is that of the topmost layer, which is not here.
    content[3 << 16..4 << 16].fill(0);
    for round in 0..3u8 {
        for cluster in [0, 3] {
            let bytes = [round + 1; SECTOR as usize];
            let at = cluster << 16;
            base.write_at(GuestOffset::new(at), &bytes).unwrap();
            content[at as usize..at as usize + 512].copy_from_slice(&bytes);
            assert_eq!(outcome(&*top, at, &content), Ok(true));
        }
    }
    base.close().unwrap();
    assert_eq!(outcome(&*top, 0, &content), Ok(true));
    // Exchanged: the same place reads from another disk.
    let zeroes: Arc<dyn GuestDisk> = Arc::new(RawDisk::new(shelf.file("none"), false).unwrap());
    live.hold().exchange(&zeroes);
    content[..1 << 16].fill(0);
    assert_eq!(outcome(&*top, 0, &content), Ok(true));
    assert_eq!(outcome(&*top, 1 << 16, &content), Ok(true));
}

/// A disk that fails where it is asked.
struct Failing(u64);

impl GuestDisk for Failing {
    fn size(&self) -> u64 {
        self.0
    }

    fn read_at(&self, _: GuestOffset, _: &mut [u8]) -> qcow2_core::Result<()> {
        Err(Error::new(qcow2_core::ErrorKind::Busy, "asked"))
    }

    fn write_at(&self, _: GuestOffset, _: &[u8]) -> qcow2_core::Result<()> {
        unreachable!()
    }

    fn write_zeroes(&self, _: GuestRange, _: ZeroMode) -> qcow2_core::Result<()> {
        unreachable!()
    }

    fn discard(&self, _: GuestRange) -> qcow2_core::Result<()> {
        unreachable!()
    }

    fn flush(&self) -> qcow2_core::Result<()> {
        Ok(())
    }

    fn extent_at(&self, _: GuestRange) -> qcow2_core::Result<DiskExtent> {
        unreachable!()
    }

    fn resize(&self, _: u64) -> qcow2_core::Result<()> {
        unreachable!()
    }
}

#[test]
fn a_disk_below_is_asked_up_to_its_end_and_its_error_is_returned() {
    let (shelf, content) = striped(4);
    let below = Arc::new(Failing((4 << 16) + 100));
    let options = OpenOptions::read_only();
    let image = Image::open_on(&shelf.source("1", ImageFormat::Qcow2), &options, below).unwrap();
    assert_eq!(outcome(&*image, 1 << 16, &content), Ok(true));
    for at in [0, 2 << 16, 4 << 16] {
        assert_eq!(outcome(&*image, at, &content), Err("asked".to_owned()), "{at:#x}");
    }
    // Behind its end there are zeroes.
    assert_eq!(outcome(&*image, (4 << 16) + 512, &vec![0; content.len()]), Ok(true));
}

/// Readers go on while a layer in the middle is exchanged for a copy of itself. The old file is overwritten
/// then.
#[test]
fn no_read_uses_a_layer_after_its_exchange() {
    let (shelf, content) = striped(6);
    let options = OpenOptions::read_only().with_exchangeable(true);
    let top = open(&shelf, "5", &options);
    let node = Arc::clone(top.backing().unwrap());
    let node = node.as_live().unwrap().layer();
    let node = Arc::clone(node.backing().unwrap());
    let done = AtomicBool::new(false);
    let bytes = shelf.file("3").bytes().to_vec();
    std::thread::scope(|scope| {
        for thread in 0..3 {
            let (top, content, done) = (&top, &content, &done);
            scope.spawn(move || {
                let mut rng = Rng::new(thread);
                while !done.load(Ordering::Relaxed) {
                    let at = rng.below(64 * 128) * SECTOR;
                    assert_eq!(outcome(&**top, at, content), Ok(true), "{at:#x}");
                }
            });
        }
        for round in 0..40 {
            let name = format!("copy{round}");
            shelf.put(&name, &bytes);
            let old = node.as_live().unwrap().layer();
            let below = Arc::clone(old.backing().unwrap());
            let source = shelf.source(&name, ImageFormat::Qcow2);
            let copy: Arc<dyn GuestDisk> = Image::open_on(&source, &OpenOptions::read_only(), below).unwrap();
            drop(node.as_live().unwrap().hold().exchange(&copy));
            // Nobody reads it any more.
            let file = Arc::clone(old.as_image().unwrap().storage());
            let len = file.len().unwrap();
            file.write_at(HostOffset::new(0), &vec![0xdd; len as usize]).unwrap();
        }
        done.store(true, Ordering::Relaxed);
    });
}
