//! Rescues of damaged images of real file systems: what can still be derived from the damaged file is read,
//! and a file system of which nothing is lost is whole.
//!
//! `QCOW2_RESCUE_SIZE` (MiB, default 24) makes the disks larger. Each test prints a table of shares.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may stop, and says what it measured")]

use qcow2_codec::{Deflate, Zstd};
use qcow2_core::{
    Codecs, CreateOptions, GuestDisk, GuestOffset, HostOffset, Image, ImageFormat, NewSnapshot, NoResolver,
    OpenOptions, RawDisk, ResolvedSource, Storage, create,
};
use qcow2_format::l1::L1Entry;
use qcow2_format::l2::L2Entry;
use qcow2_format::{CompressionType, Header, L2Index};
use qcow2_io::OpenFile;
use qcow2_ops::rescue::{Evidence, Range, RescueReport};
use qcow2_ops::{ConvertOptions, Inline, RescueFiles, RescueOptions, Silent, convert, rescue};
use qcow2_testkit::builder::{Builder, Cluster};
use qcow2_testkit::oracle::Tool;
use qcow2_testkit::pages::PageBytes;
use qcow2_testkit::pattern;
use qcow2_testkit::storage::PageStorage;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

fn codecs() -> Codecs {
    Codecs::new(Arc::new(Deflate::default()), Arc::new(Zstd::default()))
}

fn disk_mib() -> u64 {
    std::env::var("QCOW2_RESCUE_SIZE").ok().and_then(|text| text.parse().ok()).unwrap_or(24)
}

/// The programs that make and check file systems, and the folder of this run.
struct Bench {
    mke2fs: Tool,
    e2fsck: Tool,
    debugfs: Tool,
    folder: tempfile::TempDir,
    /// Disks have no large part that is zeroes.
    dense: bool,
}

impl Bench {
    fn find() -> Option<Self> {
        Some(Self {
            mke2fs: Tool::find("mke2fs")?,
            e2fsck: Tool::find("e2fsck")?,
            debugfs: Tool::find("debugfs")?,
            folder: tempfile::tempdir().unwrap(),
            dense: true,
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A raw disk of `mib` with files on it; `seed` chooses them.
    fn make_disk(&self, seed: u64, mib: u64, used_mib: u64) -> FileSystem {
        let (tree, raw) = (self.path(&format!("tree{seed}")), self.path(&format!("disk{seed}.raw")));
        fs::create_dir_all(tree.join("many")).unwrap();
        for number in 0..used_mib {
            let bytes = pattern::bytes(seed * 1000 + number + 1, 0, 700 << 10);
            fs::write(tree.join(format!("large{number}")), bytes).unwrap();
            for small in 0..8 {
                let text = format!("file {number}.{small} of {seed}\n").repeat(400 + 37 * small);
                fs::write(tree.join(format!("many/{number}.{small}")), text).unwrap();
            }
        }
        let size = format!("{mib}M");
        let (tree_name, raw_name) = (tree.to_str().unwrap(), raw.to_str().unwrap());
        let inodes = (files_of(&tree).len() + 20).to_string();
        let mut args = vec!["-q", "-t", "ext4", "-m", "0", "-N", &inodes];
        // A journal and spare inodes are zeroes, which an image does not have: ranges without a table.
        if self.dense {
            args.extend(["-O", "^has_journal,^resize_inode"]);
        }
        args.extend(["-d", tree_name, raw_name, &size]);
        self.mke2fs.run_in(self.folder.path(), &args).success();
        FileSystem { tree, raw }
    }

    /// The file system in `disk` has no error, and the files of `tree`.
    fn check_file_system(&self, what: &str, disk: &Arc<dyn GuestDisk>, tree: &Path) {
        let out = self.path("out.raw");
        let storage = OpenFile::writable().with_create(qcow2_io::Create::Truncate).open(&out).unwrap();
        storage.set_len(disk.size()).unwrap();
        let target = RawDisk::new(storage, true).unwrap();
        let mut options = ConvertOptions::default();
        options.target_is_zero = true;
        convert(std::slice::from_ref(disk), &target, &options, &Inline, &Silent).unwrap();
        drop(target);
        let checked = self.e2fsck.run_in(self.folder.path(), &["-fn", "out.raw"]);
        assert_eq!(checked.code, Some(0), "{what}: {checked:?}");
        let dump = self.path("dump");
        let _ = fs::remove_dir_all(&dump);
        fs::create_dir(&dump).unwrap();
        self.debugfs.run_in(self.folder.path(), &["-R", "rdump / dump", "out.raw"]).success();
        for file in files_of(tree) {
            let name = file.strip_prefix(tree).unwrap();
            assert!(
                fs::read(dump.join(name)).unwrap() == fs::read(&file).unwrap(),
                "{what}: {}",
                name.display()
            );
        }
    }
}

struct FileSystem {
    tree: PathBuf,
    raw: PathBuf,
}

fn files_of(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        match entry.file_type().unwrap().is_dir() {
            true => files.extend(files_of(&entry.path())),
            false => files.push(entry.path()),
        }
    }
    files
}

fn open(storage: Arc<dyn Storage>, writable: bool) -> Arc<Image> {
    let mut options = OpenOptions::default();
    options.codecs = codecs();
    options.writable = writable;
    let (format, resolver) = (ImageFormat::Qcow2, Arc::new(NoResolver));
    let source = ResolvedSource { storage, format, name: "image".to_owned(), id: None, resolver };
    Image::open(source, &options).unwrap()
}

/// What an image is made like.
#[derive(Clone, Copy)]
struct Kind {
    cluster_size: u64,
    extended: bool,
    compress: Option<CompressionType>,
}

const PLAIN: Kind = Kind { cluster_size: 65_536, extended: false, compress: None };

/// An image of the disks, one after the other, with a snapshot of each but the last.
fn image(kind: Kind, disks: &[&FileSystem]) -> PageBytes {
    let file = Arc::new(PageStorage::default());
    let storage = Arc::clone(&file) as Arc<dyn Storage>;
    let mut options = CreateOptions::new(fs::metadata(&disks[0].raw).unwrap().len());
    options.cluster_size = kind.cluster_size;
    options.extended_l2 = kind.extended;
    options.compression_type = kind.compress.unwrap_or(CompressionType::Deflate);
    create(&storage, None, &options).unwrap();
    let image = open(storage, true);
    for (index, disk) in disks.iter().enumerate() {
        if index > 0 {
            let mut new = NewSnapshot::default();
            new.name = format!("s{index}").into();
            image.create_snapshot(&new).unwrap();
        }
        let raw = OpenFile::read_only().open(&disk.raw).unwrap();
        let source: Arc<dyn GuestDisk> = Arc::new(RawDisk::new(raw, false).unwrap());
        let mut options = ConvertOptions::default();
        options.target_is_zero = index == 0;
        options.compress = kind.compress.is_some();
        convert(&[source], &*image, &options, &Inline, &Silent).unwrap();
    }
    image.close().unwrap();
    file.bytes()
}

/// The mapping of a whole image, read by the test itself.
struct Whole {
    bytes: PageBytes,
    header: Header,
    /// L1 index and host offset of every L2 table.
    tables: Vec<(u64, u64)>,
    /// Host range of every mapped guest cluster, with its L2 table.
    clusters: BTreeMap<u64, (u64, u64, u64)>,
    /// The guest's bytes of each.
    content: BTreeMap<u64, Vec<u8>>,
}

fn part(bytes: &PageBytes, at: u64, len: u64) -> Vec<u8> {
    let mut part = vec![0; len as usize];
    bytes.read(at, &mut part);
    part
}

impl Whole {
    fn new(bytes: PageBytes) -> Self {
        let header = Header::parse(&part(&bytes, 0, 2 << 20)).unwrap();
        let format = header.l2_format().unwrap();
        let geometry = format.geometry;
        let image = open(Arc::new(PageStorage::new(bytes.clone())), false);
        let (mut tables, mut clusters, mut content) = (Vec::new(), BTreeMap::new(), BTreeMap::new());
        let l1 = part(&bytes, header.l1_table_offset.value(), u64::from(header.l1_size) * 8);
        for (index, raw) in (0..).zip(qcow2_format::bytes::words(&l1)) {
            let Some(table) = L1Entry::decode(raw, &geometry).unwrap().l2_table else { continue };
            tables.push((index, table.value()));
            let words = part(&bytes, table.value(), geometry.cluster_size());
            for entry in 0..geometry.l2_entries() {
                let (raw, bitmap) = format.words_at(&words, L2Index::new(entry)).unwrap();
                let (host, len) = match format.decode(raw, bitmap).unwrap() {
                    L2Entry::Standard(entry) if entry.allocated != 0 => {
                        (entry.host.unwrap().value(), geometry.cluster_size())
                    }
                    L2Entry::Compressed(stream) => (stream.host.value(), stream.len),
                    L2Entry::Standard(_) => continue,
                };
                let guest = index * geometry.l2_entries() + entry;
                let start = guest * geometry.cluster_size();
                let mut buf = vec![0; geometry.cluster_size().min(header.size - start) as usize];
                image.read_at(GuestOffset::new(start), &mut buf).unwrap();
                clusters.insert(guest, (table.value(), host, len.min(bytes.len() - host)));
                content.insert(guest, buf);
            }
        }
        Self { bytes, header, tables, clusters, content }
    }

    /// Guest clusters whose L2 table and bytes survive in `damaged`.
    fn derivable(&self, damaged: &PageBytes) -> Vec<u64> {
        let size = 1 << self.header.cluster_bits;
        let same = |at: u64, len: u64| {
            at + len <= damaged.len() && part(damaged, at, len) == part(&self.bytes, at, len)
        };
        let mut tables: BTreeMap<u64, bool> = BTreeMap::new();
        let mut survives = |&(table, host, len): &(u64, u64, u64)| {
            *tables.entry(table).or_insert_with(|| same(table, size)) && same(host, len)
        };
        self.clusters.iter().filter(|(_, place)| survives(place)).map(|(&guest, _)| guest).collect()
    }

    fn zero(&self, bytes: &mut PageBytes, at: u64, len: u64) {
        bytes.zero(at, len.min(bytes.len().saturating_sub(at)));
    }

    fn damaged(&self, damage: &str) -> PageBytes {
        let mut bytes = self.bytes.clone();
        let size = 1 << self.header.cluster_bits;
        let l1 = (self.header.l1_table_offset.value(), u64::from(self.header.l1_size) * 8);
        match damage {
            "nothing" => {}
            "header" => self.zero(&mut bytes, 0, size),
            "l1" => self.zero(&mut bytes, l1.0, l1.1),
            "header and l1" => {
                self.zero(&mut bytes, 0, size);
                self.zero(&mut bytes, l1.0, l1.1);
            }
            "every tenth l2" => {
                let tenth = self.tables.iter().skip(self.tables.len().min(10) - 1).step_by(10);
                tenth.for_each(|&(_, table)| self.zero(&mut bytes, table, size));
            }
            "cut in half" => bytes.set_len(bytes.len() / 2),
            "header, cut in half" => {
                self.zero(&mut bytes, 0, size);
                bytes.set_len(bytes.len() / 2);
            }
            "snapshot table" => self.zero(&mut bytes, self.header.snapshots_offset.value(), 4096),
            other => panic!("{other}"),
        }
        bytes
    }
}

/// Damages the image and rescues it. At least 99.9 % of what can be derived must be there, nothing may be
/// wrong without being reported, and a file system of which nothing is lost must be whole.
fn check(bench: &Bench, what: &str, bytes: PageBytes, tree: &Path, damages: &[&str]) {
    let whole = Whole::new(bytes);
    for &damage in damages {
        let outcome = Outcome::of(&whole, whole.damaged(damage));
        outcome.print(what, damage);
        let (recovered, derivable) = (outcome.recovered, outcome.derivable);
        assert!(recovered * 1000 >= derivable * 999, "{what}, {damage}");
        assert!(outcome.lost() == 0 || !outcome.report.is_complete(), "{what}, {damage}");
        assert!(outcome.report.is_complete() || damage != "nothing", "{what}: {:?}", outcome.report);
        if outcome.lost() == 0 && derivable == whole.clusters.len() {
            bench.check_file_system(&format!("{what}, {damage}"), &outcome.disk, tree);
        }
    }
}

/// What became of one damaged image.
struct Outcome {
    disk: Arc<dyn GuestDisk>,
    report: RescueReport,
    derivable: usize,
    /// How many of those read as before, and how many of all.
    recovered: usize,
    all: usize,
    of: usize,
    /// The clusters behind these counts, with whether they read as before.
    clusters: Vec<(u64, bool)>,
}

impl Outcome {
    fn of(whole: &Whole, damaged: PageBytes) -> Self {
        let derivable = whole.derivable(&damaged);
        let storage = Arc::new(PageStorage::new(damaged.clone()));
        let files = RescueFiles::new(Arc::clone(&storage) as _, codecs());
        let rescued = rescue(&files, &RescueOptions::default(), &Silent).unwrap();
        let disk = rescued.disk();
        let matches = |guest: &&u64| {
            let expected = &whole.content[guest];
            let start = **guest << whole.header.cluster_bits;
            let mut buf = pattern::unread(expected.len());
            start + buf.len() as u64 <= disk.size()
                && disk.read_at(GuestOffset::new(start), &mut buf).is_ok()
                && buf == *expected
        };
        let clusters: Vec<(u64, bool)> = derivable.iter().map(|guest| (*guest, matches(&guest))).collect();
        let recovered = clusters.iter().filter(|(_, same)| *same).count();
        let all = whole.clusters.keys().filter(matches).count();
        assert!(storage.bytes().to_vec() == damaged.to_vec(), "nothing is written");
        let (report, derivable, of) = (rescued.report(), derivable.len(), whole.clusters.len());
        Self { disk, report, derivable, recovered, all, of, clusters }
    }

    /// Counts as derivable only the clusters of tables that are `placed`.
    fn keep(&mut self, whole: &Whole, placed: impl Fn(u64) -> bool) {
        let kept = self.clusters.iter().filter(|(guest, _)| placed(whole.clusters[guest].0));
        let same: Vec<bool> = kept.map(|(_, same)| *same).collect();
        (self.derivable, self.recovered) = (same.len(), same.iter().filter(|same| **same).count());
    }

    fn lost(&self) -> usize {
        self.of - self.all
    }

    fn print(&self, what: &str, damage: &str) {
        let Self { derivable, recovered, all, of, .. } = self;
        let share = *recovered as f64 * 100.0 / (*derivable).max(1) as f64;
        let summary = summary(&self.report);
        println!(
            "{what:<16} {damage:<20} {recovered:>6} of {derivable:>6} derivable ({share:>7.3} %), \
             {all:>6} of {of:>6} all; {summary}"
        );
    }
}

/// The L1 index and the table of a range.
fn table_of(range: &Range<(Evidence, HostOffset)>) -> (u64, u64) {
    (range.start >> 29, range.what.1.value())
}

fn summary(report: &RescueReport) -> String {
    let guessed = report.placed.listed.iter().filter(|range| range.what.0.is_guess()).count();
    let reasons: Vec<_> = report.lost.listed.iter().map(|range| range.what.name()).collect();
    let mut kinds = reasons.clone();
    kinds.sort_unstable();
    kinds.dedup();
    format!(
        "{} tables, {guessed} guessed, {} unplaced; {} lost bytes {kinds:?}",
        report.tables, report.unplaced.0, report.lost.bytes
    )
}

const DAMAGES: &[&str] =
    &["nothing", "header", "l1", "header and l1", "every tenth l2", "cut in half", "header, cut in half"];

fn check_kind(what: &str, kind: Kind) {
    let Some(bench) = Bench::find() else { return };
    let mib = disk_mib();
    let disk = bench.make_disk(1, mib, mib * 11 / 10);
    check(&bench, what, image(kind, &[&disk]), &disk.tree, DAMAGES);
}

#[test]
fn clusters_of_64k() {
    check_kind("64k", PLAIN);
}

#[test]
fn clusters_of_4k() {
    check_kind("4k", Kind { cluster_size: 4096, ..PLAIN });
}

#[test]
fn clusters_of_512() {
    check_kind("512", Kind { cluster_size: 512, ..PLAIN });
}

#[test]
fn clusters_of_2m() {
    check_kind("2m", Kind { cluster_size: 2 << 20, ..PLAIN });
}

#[test]
fn deflated_clusters_of_4k() {
    let kind = Kind { cluster_size: 4096, compress: Some(CompressionType::Deflate), ..PLAIN };
    check_kind("deflate 4k", kind);
}

#[test]
fn zstd_clusters_of_64k() {
    check_kind("zstd 64k", Kind { compress: Some(CompressionType::Zstd), ..PLAIN });
}

#[test]
fn extended_l2_entries_of_64k() {
    check_kind("extended 64k", Kind { extended: true, ..PLAIN });
}

#[test]
fn extended_l2_entries_of_16k() {
    check_kind("extended 16k", Kind { cluster_size: 16 << 10, extended: true, ..PLAIN });
}

fn check_snapshots(cluster_size: u64) {
    let Some(bench) = Bench::find() else { return };
    let mib = disk_mib();
    let disks = [1, 2].map(|seed| bench.make_disk(seed, mib, mib * 11 / 10));
    let bytes = image(Kind { cluster_size, ..PLAIN }, &[&disks[0], &disks[1]]);
    let damages: Vec<&str> = DAMAGES.iter().copied().chain(["snapshot table"]).collect();
    check(&bench, &format!("snapshot, {cluster_size}"), bytes, &disks[1].tree, &damages);
}

#[test]
fn a_snapshot_in_clusters_of_4k() {
    check_snapshots(4096);
}

#[test]
fn a_snapshot_in_clusters_of_64k() {
    check_snapshots(65_536);
}

/// A new image like `PLAIN` that `fill` has written to.
fn written(size: u64, fill: impl FnOnce(&Image)) -> PageBytes {
    let file = Arc::new(PageStorage::default());
    let storage = Arc::clone(&file) as Arc<dyn Storage>;
    create(&storage, None, &CreateOptions::new(size)).unwrap();
    let image = open(storage, true);
    fill(&image);
    image.close().unwrap();
    file.bytes()
}

/// The clusters of 64 KiB of a raw disk that are not zeroes.
fn used_clusters(disk: &FileSystem) -> Vec<(u64, Vec<u8>)> {
    let raw = OpenFile::read_only().open(&disk.raw).unwrap();
    let (len, mut at, mut used) = (raw.len().unwrap(), 0, Vec::new());
    while at < len {
        let extent = raw.extent_at(HostOffset::new(at), len - at).unwrap();
        let end = at + extent.len;
        for start in (at / CLUSTER * CLUSTER..end).step_by(CLUSTER as usize).filter(|_| extent.data) {
            let mut bytes = vec![0; CLUSTER as usize];
            raw.read_padded(HostOffset::new(start), &mut bytes).unwrap();
            if used.last().is_none_or(|(last, _)| *last < start) && bytes.iter().any(|&byte| byte != 0) {
                used.push((start, bytes));
            }
        }
        at = end;
    }
    used
}

const CLUSTER: u64 = 64 << 10;
/// Guest bytes of an L2 table of `PLAIN`.
const RANGE: u64 = 512 << 20;

/// The disk as a guest leaves it: written in pieces of at most 1 MiB, in no order.
fn random_writes(image: &Image, disk: &FileSystem) {
    let used = used_clusters(disk);
    let mut pieces: Vec<&[(u64, Vec<u8>)]> =
        used.chunk_by(|a, b| a.0 + CLUSTER == b.0).flat_map(|run| run.chunks(16)).collect();
    let mut state = 1u64;
    for last in (1..pieces.len()).rev() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        pieces.swap(last, (state >> 33) as usize % (last + 1));
    }
    for piece in pieces {
        let bytes: Vec<u8> = piece.iter().flat_map(|(_, bytes)| bytes.iter().copied()).collect();
        image.write_at(GuestOffset::new(piece[0].0), &bytes).unwrap();
    }
}

/// What tells where the L2 tables of a wide image belong if its L1 table is gone.
struct Places {
    /// The tables that a superblock of ext4 or a snapshot tells the range of.
    told: Vec<u64>,
    /// The writer went through the disk from its beginning to its end.
    in_order: bool,
}

impl Places {
    /// Blocks of 4 KiB, groups of 128 MiB; copies are in group 1 and in powers of 3, 5 and 7.
    fn of(whole: &Whole, in_order: bool, snapshot: Option<u64>) -> Self {
        let is_copy = |group: u64| [3u64, 5, 7].iter().any(|base| (0..9).any(|n| base.pow(n) == group));
        let has_copy = |guest: u64| {
            let start = guest * CLUSTER;
            let at = if start == 0 { 1024 } else { 0 };
            let group = start / (128 << 20);
            let is_start = start.is_multiple_of(128 << 20) && (group == 0 || is_copy(group));
            is_start && whole.content[&guest][at + 56..at + 58] == [0x53, 0xef]
        };
        let mut told: Vec<u64> =
            whole.clusters.iter().filter(|(guest, _)| has_copy(**guest)).map(|(_, place)| place.0).collect();
        if let Some(l1) = snapshot {
            // A snapshot's table of the range that is the disk's too, or has one of its clusters.
            let words = part(&whole.bytes, l1, whole.header.size.div_ceil(RANGE) * 8);
            let old: Vec<u64> =
                qcow2_format::bytes::words(&words).map(|raw| raw & 0xff_ffff_ffff_fe00).collect();
            for &(index, table) in &whole.tables {
                let now = part(&whole.bytes, table, CLUSTER);
                let then = part(&whole.bytes, old[index as usize], CLUSTER);
                let hosts = |table: &[u8]| -> Vec<u64> {
                    qcow2_format::bytes::words(table).map(|raw| raw & 0xff_ffff_ffff_fe00).collect()
                };
                let same = hosts(&now).into_iter().zip(hosts(&then)).any(|(a, b)| a != 0 && a == b);
                told.extend((old[index as usize] != 0 && same).then_some(table));
            }
        }
        Self { told, in_order }
    }

    /// The tables whose range can be derived without the L1 table: what tells it, and among the rest of an
    /// image that was written in order those that are, between two such, as many as there are ranges.
    fn derivable(&self, whole: &Whole) -> Vec<u64> {
        let mut found = self.told.clone();
        let mut between: Vec<u64> = Vec::new();
        let mut before = None;
        for &(index, table) in &whole.tables {
            if !self.told.contains(&table) {
                between.push(table);
                continue;
            }
            let places = before.map_or(index, |before| index - before - 1);
            if self.in_order && between.len() as u64 == places {
                found.extend(&between);
            }
            (before, between) = (Some(index), Vec::new());
        }
        found
    }
}

/// Rescues a wide image from every damage. What is derivable is there, what is proved is right, and what is
/// neither is reported as a guess or as lost.
fn check_wide(what: &str, bytes: PageBytes, in_order: bool) {
    let whole = Whole::new(bytes);
    let snapshots = whole.header.snapshots_offset.value();
    let snapshot = (whole.header.nb_snapshots > 0)
        .then(|| u64::from_be_bytes(part(&whole.bytes, snapshots, 8).try_into().unwrap()));
    let placed = Places::of(&whole, in_order, snapshot).derivable(&whole);
    let damages = DAMAGES.iter().copied().chain(snapshot.map(|_| "snapshot table"));
    for damage in damages {
        let damaged = whole.damaged(damage);
        let l1 = (whole.header.l1_table_offset.value(), u64::from(whole.header.l1_size) * 8);
        let is_whole =
            l1.0 + l1.1 <= damaged.len() && part(&damaged, l1.0, l1.1) == part(&whole.bytes, l1.0, l1.1);
        let mut outcome = Outcome::of(&whole, damaged);
        if !is_whole {
            outcome.keep(&whole, |table| placed.contains(&table));
        }
        outcome.print(what, damage);
        assert!(outcome.recovered * 1000 >= outcome.derivable * 999, "{what}, {damage}");
        assert!(outcome.lost() == 0 || !outcome.report.is_complete(), "{what}, {damage}");
        let proved = outcome.report.placed.listed.iter().filter(|range| !range.what.0.is_guess());
        let wrong = proved.filter(|range| !whole.tables.contains(&table_of(range))).count();
        assert_eq!(wrong, 0, "{what}, {damage}: what is proved is right");
    }
}

/// A disk most of which is zeroes has parts without an L2 table, and nothing tells which, unless a snapshot
/// or a structure in the data does.
#[test]
fn wide_disks() {
    let Some(mut bench) = Bench::find() else { return };
    bench.dense = false;
    let disk = bench.make_disk(1, 12 << 10, disk_mib());
    check_wide("wide, ours", image(PLAIN, &[&disk]), true);
    let random = written(12 << 30, |image| random_writes(image, &disk));
    check_wide("wide, random", random, false);
    let changed = written(12 << 30, |image| {
        random_writes(image, &disk);
        let mut new = NewSnapshot::default();
        new.name = "old".into();
        image.create_snapshot(&new).unwrap();
        // Half of the ranges change, one of them is new.
        for (number, (start, bytes)) in used_clusters(&disk).into_iter().enumerate().step_by(3) {
            let bytes: Vec<u8> = bytes.into_iter().map(|byte| byte ^ 0x55).collect();
            let start = if number == 3 { 23 * RANGE } else { start };
            if start / RANGE % 2 == 1 {
                image.write_at(GuestOffset::new(start), &bytes).unwrap();
            }
        }
    });
    check_wide("wide, snapshot", changed, false);
    if let Some(qemu_img) = Tool::find("qemu-img") {
        let raw = disk.raw.to_str().unwrap();
        let args = ["convert", "-f", "raw", "-O", "qcow2", raw, "theirs.qcow2"];
        qemu_img.run_in(bench.folder.path(), &args).success();
        let theirs = fs::read(bench.path("theirs.qcow2")).unwrap();
        check_wide("wide, qemu-img", PageBytes::from_bytes(&theirs), true);
    }
}

/// A million entries for one table, a table that leads to tables and to itself, with and without the header.
/// What no writer makes costs no more than what one makes.
#[test]
fn hostile_tables_are_bounded() {
    let size = 4096;
    let clusters = [0, 1, 2, 3, 7, 512, 513, 1024, 1030, 1536, 1540];
    let builder = Builder::new(12, 2048 * size);
    let mut image = clusters
        .into_iter()
        .fold(builder, |builder, index| builder.cluster(index, Cluster::Data(vec![index as u8; 4096])))
        .build();
    let (entries, l1) = (1 << 20, image.bytes.len() as u64);
    let entry = 1 << 63 | image.l2[&0];
    image.patch(l1, &entry.to_be_bytes().repeat(entries));
    image.patch_u32(36, entries as u32).patch_u64(40, l1).patch_u64(24, 512 * size * entries as u64);
    let tables: Vec<u64> = image.l2.values().copied().collect();
    for index in 0..512 {
        let to = 1 << 63 | tables[index % tables.len()];
        image.patch_u64(tables[0] + 8 * index as u64, to);
    }
    let start = Instant::now();
    for damage in [None, Some(0), Some(40)] {
        if let Some(at) = damage {
            image.patch_u64(at, 0);
        }
        let files = RescueFiles::new(Arc::new(image.storage()), codecs());
        if let Ok(rescued) = rescue(&files, &RescueOptions::default(), &Silent) {
            assert!(!rescued.report().is_complete());
        }
    }
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}
