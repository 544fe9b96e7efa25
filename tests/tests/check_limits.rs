//! Images built to make a check slow or memory-hungry: both stay below a named limit.
//!
//! A single test in its own process, so that its memory use can be measured.
#![allow(clippy::print_stdout, reason = "a test says what it measured")]

use qcow2_format::bitmap::Bitmap;
use qcow2_format::feature::AutoclearFeatures;
use qcow2_format::header::{Header, Version};
use qcow2_format::snapshot::Snapshot;
use qcow2_format::{BitmapsExtension, HostOffset};
use qcow2_io::{Create, OpenFile};
use qcow2_ops::{CheckOptions, CheckReport, Inline, Silent, check};
use std::time::{Duration, Instant};

/// Memory that a check may use on top of what the process had before.
const MEMORY_LIMIT: u64 = 128 << 20;
/// Far above what a check takes, far below what following every reference separately would take.
const TIME_LIMIT: Duration = Duration::from_secs(60);

const CLUSTER: u64 = 65536;
const COPIED: u64 = 1 << 63;

/// A sparse file, written in pieces.
struct Sparse {
    _folder: tempfile::TempDir,
    storage: std::sync::Arc<dyn qcow2_core::Storage>,
}

impl Sparse {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let open = OpenFile::writable().with_create(Create::New);
        let storage = open.open(&folder.path().join("image")).expect("a new file");
        Self { _folder: folder, storage }
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.storage.write_at(HostOffset::new(at), bytes).expect("the file can be written");
    }

    fn words(&self, at: u64, words: impl Iterator<Item = u64>) {
        let mut at = at;
        let mut bytes = Vec::new();
        for word in words {
            bytes.extend_from_slice(&word.to_be_bytes());
            if bytes.len() == 1 << 20 {
                self.put(at, &bytes);
                at += bytes.len() as u64;
                bytes.clear();
            }
        }
        self.put(at, &bytes);
    }

    fn header(&self, header: &Header) {
        self.put(0, &header.encode_cluster().expect("a header"));
    }

    fn len(&self, len: u64) {
        self.storage.set_len(len).expect("a length");
    }

    /// Checks the image and prints time and memory.
    fn check(&self, name: &str) -> CheckReport {
        let started = Instant::now();
        let report = check(&*self.storage, &CheckOptions::default(), &Inline, &Silent).expect("a report");
        let (elapsed, memory) = (started.elapsed(), peak_memory());
        println!("{name}: {elapsed:?}, peak {} MiB", memory.map_or(0, |m| m >> 20));
        assert!(elapsed < TIME_LIMIT, "{name} took {elapsed:?}");
        assert!(memory.is_none_or(|m| m < MEMORY_LIMIT), "{name}: peak {memory:?}");
        report
    }
}

/// Peak memory of this process, where the system reports it.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().trim_end_matches(" kB").parse::<u64>().ok().map(|kb| kb << 10)
}

fn header(cluster_bits: u32) -> Header {
    let mut header = Header::new(Version::V3, cluster_bits);
    header.refcount_table_offset = HostOffset::new(CLUSTER);
    header.refcount_table_clusters = 1;
    header.l1_table_offset = HostOffset::new(4 * CLUSTER);
    header
}

/// 1 TiB with every cluster mapped, laid out like `preallocation=metadata`.
fn one_tib_mapped() {
    let image = Sparse::new();
    let mut h = header(16);
    let tables = 2048u64;
    let clusters = (1u64 << 40) / CLUSTER;
    h.size = 1 << 40;
    h.l1_size = tables as u32;
    image.header(&h);
    // Refcount blocks from cluster 8 on, then L2 tables, then the data.
    let used = 8 + 513 + tables + clusters;
    let blocks = used.div_ceil(32768);
    let first_l2 = 8 + blocks;
    let first_data = first_l2 + tables;
    image.words(CLUSTER, (0..blocks).map(|n| (8 + n) * CLUSTER));
    let counted = first_data + clusters;
    let count = |cluster: u64| u64::from(cluster < counted && !matches!(cluster, 2 | 3 | 5 | 6 | 7));
    image.words(
        8 * CLUSTER,
        (0..blocks * 8192).map(|w| (0..4).fold(0, |word, n| word << 16 | count(w * 4 + n))),
    );
    image.words(4 * CLUSTER, (0..tables).map(|n| COPIED | ((first_l2 + n) * CLUSTER)));
    image.words(first_l2 * CLUSTER, (0..clusters).map(|n| COPIED | ((first_data + n) * CLUSTER)));
    image.len(counted * CLUSTER);
    let report = image.check("1 TiB, all mapped");
    assert_eq!((report.corruptions, report.leaks, report.allocated_clusters), (0, 0, clusters), "{report:?}");
    assert_eq!((report.fragmented_clusters, report.image_end_offset), (0, counted * CLUSTER));
}

/// Four million L1 entries that reference one L2 table with every entry allocated.
fn one_table_four_million_times() {
    let image = Sparse::new();
    let mut h = header(16);
    h.l1_size = 4 << 20;
    h.size = (4 << 20) * 8192 * CLUSTER;
    image.header(&h);
    let l2 = 1000 * CLUSTER;
    image.words(4 * CLUSTER, (0..4 << 20).map(|_| l2));
    image.words(l2, (0..8192).map(|n| (1001 + n) * CLUSTER));
    image.len((1001 + 8192) * CLUSTER);
    let report = image.check("one table four million times");
    assert_eq!(report.allocated_clusters, (4 << 20) * 8192);
    assert!(report.corruptions > 8192, "{report:?}");
}

/// 65536 snapshots with four million L1 entries each: their L1 tables start one cluster apart and overlap,
/// and all reference the same L2 tables.
fn overlapping_snapshots() {
    let image = Sparse::new();
    let mut h = header(9);
    h.l1_table_offset = HostOffset::new(1 << 20);
    h.l1_size = 1;
    h.size = 512;
    h.nb_snapshots = 65536;
    h.snapshots_offset = HostOffset::new(256 << 20);
    image.header(&h);
    let (l1, l2) = (2 << 20, 300 << 20);
    let mut snapshot = Snapshot::parse(&[0; 40], 512).expect("an empty snapshot").snapshot;
    let mut table = Vec::new();
    for n in 0..65536u64 {
        snapshot.l1_table_offset = HostOffset::new(l1 + n * 512);
        snapshot.l1_size = 4 << 20;
        snapshot.encode(&mut table).expect("an entry");
    }
    image.put(256 << 20, &table);
    image.words(l1, (0..8 << 20).map(|_| l2));
    image.words(l2, (0..64).map(|n| l2 + (n + 1) * 512));
    image.len(l2 + 65 * 512);
    let report = image.check("overlapping snapshots");
    assert!(report.corruptions > 64, "{report:?}");
}

/// A million refcount table entries with one block, and 65535 bitmaps with one table.
fn everything_the_same() {
    let image = Sparse::new();
    let mut h = header(16);
    h.refcount_table_clusters = 128;
    h.refcount_table_offset = HostOffset::new(1000 * CLUSTER);
    h.size = 1 << 30;
    h.l1_size = 2;
    h.features.autoclear = AutoclearFeatures::BITMAPS;
    let mut bitmap = Bitmap::new(*b"name", 31);
    bitmap.table_offset = HostOffset::new(2000 * CLUSTER);
    bitmap.table_entries = 8192;
    let mut directory = Vec::new();
    (0..65535).for_each(|_| bitmap.encode(&mut directory).expect("an entry"));
    h.extensions.bitmaps = Some(BitmapsExtension {
        count: 65535,
        reserved: 0,
        directory_size: directory.len() as u64,
        directory_offset: HostOffset::new(3000 * CLUSTER),
    });
    image.header(&h);
    image.put(3000 * CLUSTER, &directory);
    image.words(1000 * CLUSTER, (0..1 << 20).map(|_| 900 * CLUSTER));
    image.words(2000 * CLUSTER, (0..8192).map(|n| (4000 + n) * CLUSTER));
    image.len(20_000 * CLUSTER);
    let report = image.check("one block and one bitmap table");
    assert!(report.corruptions > 1 << 20 && report.needs_rebuild, "{report:?}");
}

/// A sparse file with as many clusters as a check accepts: two billion.
fn two_billion_clusters() {
    let image = Sparse::new();
    let mut h = header(9);
    h.l1_table_offset = HostOffset::new(1 << 20);
    h.refcount_table_clusters = 16384;
    h.refcount_table_offset = HostOffset::new(16 << 20);
    image.header(&h);
    image.len(((1 << 31) - 1) * 512);
    let report = image.check("two billion clusters");
    assert_eq!(report.corruptions, 1 + 16384, "header and refcount table are not counted");
    image.len((1 << 31) * 512);
    let error =
        check(&*image.storage, &CheckOptions::default(), &Inline, &Silent).expect_err("too many clusters");
    assert_eq!(error.kind(), qcow2_ops::ErrorKind::Unsupported);
}

#[test]
fn checks_of_hostile_images_stay_within_limits() {
    one_tib_mapped();
    one_table_four_million_times();
    overlapping_snapshots();
    everything_the_same();
    two_billion_clusters();
}
