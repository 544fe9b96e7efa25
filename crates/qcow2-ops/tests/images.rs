//! Converts to and from qcow2 images and checks content, layout and qemu-img's opinion.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "these are tests"
)]

use qcow2_codec::{Deflate, Zstd};
use qcow2_core::format::header::CompressionType;
use qcow2_core::{
    Codecs, CreateOptions, ExtentState, GuestDisk, GuestOffset, GuestRange, Image, ImageFormat, NoResolver,
    OpenOptions, RawDisk, Reference, ResolveError, ResolvedSource, Resolver, Storage, ZeroMode, create,
};
use qcow2_io::MemoryStorage;
use qcow2_ops::{ConvertOptions, CopyReport, Executor, Silent, convert};
use qcow2_testkit::oracle::Tool;
use qcow2_testkit::pattern;
use std::sync::Arc;

const MIB: u64 = 1 << 20;

struct Threads(usize);

impl Executor for Threads {
    fn workers(&self) -> usize {
        self.0
    }

    fn run(&self, job: &(dyn Fn(usize) + Sync)) {
        std::thread::scope(|scope| {
            for worker in 0..self.0 {
                scope.spawn(move || job(worker));
            }
        });
    }
}

fn random(seed: u64) -> impl FnMut() -> u64 {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x >> 11
    }
}

/// Runs of zeroes, text and noise of up to `run` bytes.
fn disk_bytes(size: u64, run: u64, seed: u64) -> Vec<u8> {
    let mut next = random(seed);
    let mut bytes = vec![0; size as usize];
    let mut at = 0;
    while at < bytes.len() {
        let end = bytes.len().min(at + 1 + (next() % run) as usize);
        match next() % 3 {
            0 => {}
            1 => bytes[at..end].fill_with(|| next() as u8),
            _ => bytes[at..end].fill_with(|| b"qcow2 cluster "[next() as usize % 14]),
        }
        at = end;
    }
    bytes
}

fn raw(bytes: &[u8]) -> Arc<dyn GuestDisk> {
    Arc::new(RawDisk::new(stored(bytes), false).unwrap())
}

fn stored(bytes: &[u8]) -> Arc<dyn Storage> {
    let storage = MemoryStorage::with_len(bytes.len() as u64);
    for (at, chunk) in (0..).step_by(4096).zip(bytes.chunks(4096)) {
        // Chunks that are not written stay holes.
        if chunk.iter().any(|&b| b != 0) {
            storage.write_at(qcow2_core::HostOffset::new(at), chunk).unwrap();
        }
    }
    Arc::new(storage)
}

/// Resolves every name to the same raw bytes.
struct Base(Arc<dyn Storage>);

impl Resolver for Base {
    fn resolve(&self, _: Reference<'_>, _writable: bool) -> Result<ResolvedSource, ResolveError> {
        Ok(resolved(&self.0, ImageFormat::Raw, Arc::new(NoResolver)))
    }
}

fn resolved(storage: &Arc<dyn Storage>, format: ImageFormat, resolver: Arc<dyn Resolver>) -> ResolvedSource {
    ResolvedSource { storage: Arc::clone(storage), format, name: "test".into(), id: None, resolver }
}

fn open(storage: &Arc<dyn Storage>, writable: bool) -> Arc<Image> {
    open_on(storage, writable, Arc::new(NoResolver))
}

fn open_on(storage: &Arc<dyn Storage>, writable: bool, resolver: Arc<dyn Resolver>) -> Arc<Image> {
    let mut options = OpenOptions::default();
    options.writable = writable;
    options.codecs = Codecs::new(Arc::new(Deflate::default()), Arc::new(Zstd::default()));
    Image::open(resolved(storage, ImageFormat::Qcow2, resolver), &options).unwrap()
}

fn content(disk: &dyn GuestDisk) -> Vec<u8> {
    let mut bytes = pattern::unread(disk.size() as usize);
    disk.read_at(GuestOffset::new(0), &mut bytes).unwrap();
    bytes
}

struct Converted {
    file: Arc<MemoryStorage>,
    report: CopyReport,
}

impl Converted {
    fn image(&self) -> Arc<Image> {
        open(&(Arc::clone(&self.file) as Arc<dyn Storage>), false)
    }

    /// Checks the image with qemu-img, and compares it with `expected`.
    fn check_with_reference(&self, expected: &[u8], name: &str) {
        let Some(img) = Tool::find("qemu-img") else { return };
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("a.qcow2"), self.file.to_vec()).unwrap();
        std::fs::write(folder.path().join("a.raw"), expected).unwrap();
        let checked = img.run_in(folder.path(), &["check", "-f", "qcow2", "a.qcow2"]);
        assert_eq!(checked.code, Some(0), "{name}: {checked}");
        let args = ["compare", "-f", "raw", "-F", "qcow2", "a.raw", "a.qcow2"];
        let compared = img.run_in(folder.path(), &args);
        assert_eq!(compared.code, Some(0), "{name}: {compared}");
    }
}

/// Converts `bytes` to a new image.
fn converted(
    bytes: &[u8],
    create_options: &CreateOptions,
    options: &ConvertOptions,
    workers: usize,
) -> Converted {
    let file = Arc::new(MemoryStorage::new());

    let storage: Arc<dyn Storage> = file.clone();
    create(&storage, None, create_options).unwrap();
    let image = open(&storage, true);
    let report = convert(&[raw(bytes)], &*image, options, &Threads(workers), &Silent).unwrap();
    image.close().unwrap();
    Converted { file, report }
}

fn new_target() -> ConvertOptions {
    let mut options = ConvertOptions::default();
    options.target_is_zero = true;
    options
}

fn compressed() -> ConvertOptions {
    let mut options = new_target();
    options.compress = true;
    options
}

fn shapes() -> Vec<(String, CreateOptions)> {
    let mut shapes = Vec::new();
    for cluster_size in [512, 4096, 65_536, 2 * MIB] {
        for extended_l2 in [false, true] {
            for compression_type in [CompressionType::Deflate, CompressionType::Zstd] {
                if extended_l2 && cluster_size < 16_384 {
                    continue;
                }
                let mut options = CreateOptions::new(0);
                options.cluster_size = cluster_size;
                options.extended_l2 = extended_l2;
                options.compression_type = compression_type;
                shapes.push((format!("{cluster_size} extended {extended_l2} {compression_type:?}"), options));
            }
        }
    }
    shapes
}

#[test]
fn every_image_format_keeps_the_content() {
    for (seed, (name, mut create_options)) in (1..).zip(shapes()) {
        let size = 3 * MIB + seed * 512 + 70_656;
        let bytes = disk_bytes(size, 200_000, seed);
        create_options.size = size;
        for options in [new_target(), compressed()] {
            let alone = converted(&bytes, &create_options, &options, 1);
            assert!(content(&*alone.image()) == bytes, "{name}");
            assert_eq!(alone.report.compressed_clusters > 0, options.compress, "{name}");
            assert!(alone.file.to_vec().len().is_multiple_of(512), "{name}");
            alone.check_with_reference(&bytes, &name);
            for workers in [2, 5] {
                let together = converted(&bytes, &create_options, &options, workers);
                assert!(together.file.to_vec() == alone.file.to_vec(), "{name}: {workers} workers");
                assert_eq!(together.report, alone.report);
            }
            // Convert back to raw, where small holes are possible.
            let target = RawDisk::new(Arc::new(MemoryStorage::with_len(size)), true).unwrap();
            let source: Arc<dyn GuestDisk> = alone.image();
            convert(&[source], &target, &new_target(), &Threads(3), &Silent).unwrap();
            assert!(content(&target) == bytes, "{name} and back");
        }
    }
}

#[test]
fn out_of_order_images_are_valid() {
    let size = 9 * MIB;
    let bytes = disk_bytes(size, 300_000, 77);
    for mut options in [new_target(), compressed()] {
        options.out_of_order = true;
        let converted = converted(&bytes, &CreateOptions::new(size), &options, 5);
        assert!(content(&*converted.image()) == bytes);
        converted.check_with_reference(&bytes, "out of order");
    }
}

#[test]
fn only_data_clusters_are_allocated() {
    let mut bytes = vec![0; 8 * MIB as usize];
    bytes[5 * MIB as usize] = 1;
    bytes[8 * MIB as usize - 1] = 1;
    let sparse = converted(&bytes, &CreateOptions::new(8 * MIB), &new_target(), 3);
    let image = sparse.image();
    let mut data = Vec::new();
    for cluster in 0..128u64 {
        let range = GuestRange::new(GuestOffset::new(cluster << 16), 65_536).unwrap();
        match image.extent_at(range).unwrap().state {
            ExtentState::Unallocated => {}
            ExtentState::Data { .. } => data.push(cluster),
            other => panic!("cluster {cluster}: {other:?}"),
        }
    }
    assert_eq!(data, [80, 127]);

    let mut all = new_target();
    all.sparse_size = 0;
    let full = converted(&bytes, &CreateOptions::new(8 * MIB), &all, 3);
    assert_eq!(full.report.data_bytes, 8 * MIB);
    all.compress = true;
    let packed = converted(&bytes, &CreateOptions::new(8 * MIB), &all, 3);
    assert_eq!(packed.report.compressed_clusters, 128);
    packed.check_with_reference(&bytes, "compressed zeroes");
}

#[test]
fn source_ending_inside_a_cluster_of_a_larger_target() {
    let bytes = disk_bytes(MIB + 512, 1 << 20, 4).iter().map(|b| b | 1).collect::<Vec<_>>();
    for options in [new_target(), compressed()] {
        let converted = converted(&bytes, &CreateOptions::new(2 * MIB), &options, 2);
        let mut expected = bytes.clone();
        expected.resize(2 * MIB as usize, 0);
        assert!(content(&*converted.image()) == expected);
        converted.check_with_reference(&expected, "larger target");
    }
}

/// A memory overlay over `base` with clusters of `cluster_size` bytes.
fn overlay(base: &Arc<dyn Storage>, size: u64, cluster_size: u64, extended_l2: bool) -> Arc<Image> {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    let mut options = CreateOptions::new(size);
    (options.cluster_size, options.extended_l2) = (cluster_size, extended_l2);
    options = options.with_backing("base", "raw");
    create(&storage, None, &options).unwrap();
    open_on(&storage, true, Arc::new(Base(Arc::clone(base))))
}

#[test]
fn keep_backing_copies_only_the_top_layer() {
    let (size, base_size) = (6 * MIB, 4 * MIB + 30_208);
    let base = stored(&disk_bytes(base_size, 100_000, 8));
    for (source_cluster, target_cluster, extended) in
        [(4096, 65_536, false), (512, 4096, false), (65_536, 65_536, true), (2 * MIB, 16_384, false)]
    {
        let source = overlay(&base, size, source_cluster, extended && source_cluster >= 16_384);
        let (mut next, noise) = (random(source_cluster), disk_bytes(size, 9000, 9));
        for round in 0..150 {
            let (at, len) = (next() % size, next() % 30_000);
            let end = size.min(at + len);
            if at < 4 * MIB && end > 2 * MIB {
                continue;
            }
            let at_offset = GuestOffset::new(at);
            if round % 3 == 0 {
                let range = GuestRange::between(at_offset, GuestOffset::new(end));
                source.write_zeroes(range, ZeroMode::MayUnmap).unwrap();
            } else {
                source.write_at(at_offset, &noise[at as usize..end as usize]).unwrap();
            }
        }
        let expected = content(&*source);
        for compress in [false, true] {
            let target = overlay(&base, size, target_cluster, extended);
            let mut options = new_target();
            (options.keep_backing, options.compress) = (true, compress);
            let from: Arc<dyn GuestDisk> = source.clone();
            convert(&[from], &*target, &options, &Threads(3), &Silent).unwrap();
            assert!(content(&*target) == expected, "{source_cluster} to {target_cluster}, {compress}");
            // The cluster that the backing file ends in is copied where clusters are compressed.
            let copied = compress.then(|| base_size - base_size % target_cluster);
            assert_kept(&source, &target, target_cluster, copied);
        }
    }
}

/// With another backing file one sees which clusters are left to it: the same ones as with qemu-img.
#[test]
fn compressed_clusters_are_copied_whole() {
    let (own, other) = (stored(&[0x11; 5 * MIB as usize]), |len| stored(&vec![0x22; len]));
    let odd = 5 * MIB - 512;
    for (source_cluster, target_cluster, size, len, copied) in [
        (65_536, 4096, 5 * MIB, 3_735_692, 3_735_552..3_739_648),
        (65_536, 65_536, 5 * MIB, 3_735_692, 3_735_552..3_801_088),
        (4096, 2 * MIB, 5 * MIB, 3_735_692, 2 * MIB..5 * MIB),
        (65_536, 2 * MIB, 5 * MIB, 5_242_880, 4 * MIB..5 * MIB),
        (2 * MIB, 65_536, 5 * MIB, 100, 0..65_536),
        (65_536, 65_536, 5 * MIB, 0, 0..0),
        (65_536, 65_536, 5 * MIB, 4_194_304, 0..0),
        (65_536, 65_536, 5 * MIB, 4_194_303, 0..0),
        (65_536, 65_536, 5 * MIB, 4_194_305, 4_194_304..4_259_840),
        (65_536, 65_536, 5 * MIB, 6 << 20, 0..0),
        (65_536, 65_536, odd, 6 << 20, odd - 65_024..odd),
        (65_536, 4096, odd, 1 << 20, odd - 3584..odd),
        // A slice of an L2 table maps less than a cluster of the target, so the source never shows a whole
        // one as unallocated.
        (512, 65_536, 5 * MIB, 3 << 20, 0..5 * MIB),
        (2048, 2 * MIB, 5 * MIB, 3 << 20, 0..5 * MIB),
        (512, 32_768, 5 * MIB, 3 << 20, 0..0),
        (2048, 524_288, 5 * MIB, 3 << 20, 0..0),
    ] {
        let source: Arc<dyn GuestDisk> = overlay(&own, size, source_cluster, false);
        let target = overlay(&other(len), size, target_cluster, false);
        let mut options = new_target();
        (options.keep_backing, options.compress) = (true, true);
        convert(std::slice::from_ref(&source), &*target, &options, &Threads(3), &Silent).unwrap();
        let mut expected = vec![0x22; len.min(size as usize)];
        expected.resize(size as usize, 0);
        expected[copied.start as usize..copied.end as usize].fill(0x11);
        let place = format!("{source_cluster} to {target_cluster}, {size} over {len}");
        assert!(content(&*target) == expected, "{place}");
    }
}

/// Clusters that the source's top layer does not allocate must be unallocated in the target, except the one
/// that was copied.
fn assert_kept(source: &Image, target: &Image, cluster_size: u64, copied: Option<u64>) {
    let (mut kept, size) = (0, source.size());
    for at in (0..size).step_by(cluster_size as usize) {
        let range = |at| GuestRange::new(GuestOffset::new(at), cluster_size.min(size - at)).unwrap();
        let from = source.extent_at(range(at)).unwrap();
        if from.state == ExtentState::Unallocated && from.len == range(at).len() && copied != Some(at) {
            let to = target.extent_at(range(at)).unwrap();
            assert_eq!(to, from, "cluster at {at}");
            kept += 1;
        }
    }
    assert!(kept > 20, "{kept} clusters of {cluster_size} were kept");
}
