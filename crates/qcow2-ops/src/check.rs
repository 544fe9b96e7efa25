//! Checks an image: every reference against the refcounts, every copied flag, every entry's validity. Never
//! repairs.
//!
//! Counts, statistics and the order of findings are those of `qemu-img check`. Findings are values, so that a
//! caller can print its own messages. Two differences: an invalid L1 entry or L2 table is not followed, and
//! damaged bitmaps are findings (QEMU refuses to open the image).
//!
//! Memory is bounded by named limits, whatever the tables contain: reference counts for one window of the
//! file at a time ([`MAX_COUNTERS_SIZE`]), one batch of L1 entries, a piece of a table per worker, and the
//! requested number of findings.

mod collect;
pub(crate) mod counters;
mod finding;
mod mapping;
mod refcounts;
mod shared;

pub use finding::{Class, Finding, Found};

use crate::error::{Error, ErrorKind, Result};
use crate::executor::Executor;
use crate::progress::Progress;
use collect::{Collected, Collector, Key, Phase};
use counters::{CHUNK, Counters};
use mapping::{Statistics, touched};
use qcow2_core::Storage;
use qcow2_core::walk::{self, Holes, Owner, Reference, Segment, TablePlace, Walk, overlay};
use qcow2_format::bitmap::BitmapTableEntry;
use qcow2_format::refcount::{self, decode_table_entry};
use qcow2_format::{FormatErrorKind, HostOffset, bytes};
use refcounts::Stored;
use shared::Shared;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Memory for reference counts in bytes. A larger file is checked in windows: 4 TiB at a time with 64 KiB
/// clusters and 16-bit refcounts.
pub const MAX_COUNTERS_SIZE: u64 = 128 << 20;

/// The most clusters of a file that can be checked. Origin: QEMU.
pub const MAX_CLUSTERS: u64 = i32::MAX as u64;

/// Options of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CheckOptions {
    /// Number of findings listed in the report; all are counted.
    pub max_findings: usize,
    /// Memory for reference counts in bytes, at most [`MAX_COUNTERS_SIZE`]. Less memory means more passes
    /// over the tables. The minimum is the counts for one refcount block, 128 KiB by default.
    pub counters_size: u64,
}

impl Default for CheckOptions {
    fn default() -> Self {
        Self { max_findings: 10_000, counters_size: MAX_COUNTERS_SIZE }
    }
}

impl CheckOptions {
    /// With at most this many findings listed.
    #[must_use]
    pub fn with_max_findings(self, max_findings: usize) -> Self {
        Self { max_findings, ..self }
    }

    /// With this many bytes of memory for reference counts.
    #[must_use]
    pub fn with_counters_size(self, counters_size: u64) -> Self {
        Self { counters_size, ..self }
    }
}

/// The result of a check.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CheckReport {
    /// Number of corruptions, repeats included.
    pub corruptions: u64,
    /// Number of clusters whose refcount is above their references.
    pub leaks: u64,
    /// Number of things that could not be checked.
    pub check_errors: u64,
    /// The first findings, in QEMU's order.
    pub findings: Vec<Found>,
    /// Number of findings that are not listed.
    pub omitted: u64,
    /// True if the refcount table or blocks cannot be repaired in place and must be rebuilt.
    pub needs_rebuild: bool,
    /// True if references could not be counted, because the snapshot table is unreadable. Refcounts and leaks
    /// were not checked then, and the numbers below are 0.
    pub incomplete: bool,
    /// Number of guest clusters.
    pub total_clusters: u64,
    /// Guest clusters with a host offset, including compressed and preallocated ones.
    pub allocated_clusters: u64,
    /// Allocated clusters that do not follow the previous one in the file, and all compressed ones.
    pub fragmented_clusters: u64,
    /// Allocated clusters that are compressed.
    pub compressed_clusters: u64,
    /// End of the last used host cluster in bytes; may be past the end of the file.
    pub image_end_offset: u64,
    /// True if the dirty bit is set. Refcounts may then be stale, which is not damage.
    pub dirty: bool,
    /// True if the corrupt bit is set.
    pub corrupt: bool,
}

/// Checks the image in `storage`. Nobody may change it meanwhile: an open image must be flushed first. The
/// external data file and backing files are not read. `executor` runs the workers; `progress` counts bytes of
/// tables.
///
/// Disk: reads all tables, some of them twice; never writes. Errors: `Metadata` if the header is invalid or
/// the storage fails, `Unsupported` for a file of more than [`MAX_CLUSTERS`] clusters, `Stopped`.
///
/// Spec: "Cluster mapping", "Host cluster management", "Snapshots", "Bitmaps".
pub fn check(
    storage: &dyn Storage,
    options: &CheckOptions,
    executor: &dyn Executor,
    progress: &dyn Progress,
) -> Result<CheckReport> {
    let header = walk::read_header(storage).map_err(metadata_error)?;
    let walk = Walk::new(storage, &header).map_err(metadata_error)?;
    let shared = Shared { executor, progress, collector: Collector::new(options.max_findings) };
    let mut report =
        CheckReport { dirty: header.is_dirty(), corrupt: header.is_corrupt(), ..Default::default() };
    let clusters = walk.geometry().clusters_for(walk.file_len());
    if clusters > MAX_CLUSTERS {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("checking a file of {clusters} clusters, allowed are {MAX_CLUSTERS}"),
        ));
    }
    match Tables::read(&walk, &shared)? {
        None => report.incomplete = true,
        Some(tables) => references(&walk, &shared, &tables, options, &mut report)?,
    }
    let Collected { corruptions, leaks, check_errors, needs_rebuild, findings, omitted } =
        shared.collector.finish();
    Ok(CheckReport { corruptions, leaks, check_errors, needs_rebuild, findings, omitted, ..report })
}

fn references(
    walk: &Walk<'_>,
    shared: &Shared<'_>,
    tables: &Tables,
    options: &CheckOptions,
    report: &mut CheckReport,
) -> Result<()> {
    let statistics = Statistics::default();
    let mut used_end = 0;
    in_windows(walk, shared, tables, (options, &statistics), &mut |pass| {
        used_end = used_end.max(pass.run(tables)?);
        Ok(())
    })?;
    report.total_clusters = walk.geometry().clusters_for(walk.header().disk_size());
    report.allocated_clusters = statistics.allocated.into_inner();
    report.fragmented_clusters = statistics.fragmented.into_inner();
    report.compressed_clusters = statistics.compressed.into_inner();
    report.image_end_offset = used_end.max(1) << walk.geometry().cluster_bits();
    Ok(())
}

/// Calls `visit` with a pass for each window of the file, in ascending order.
fn in_windows(
    walk: &Walk<'_>,
    shared: &Shared<'_>,
    tables: &Tables,
    (options, statistics): (&CheckOptions, &Statistics),
    visit: &mut dyn FnMut(&Pass<'_>) -> Result<()>,
) -> Result<()> {
    let clusters = walk.geometry().clusters_for(walk.file_len());
    let width = walk.geometry().refcount_width();
    // A window starts where a chunk of counters and a refcount block start; both are powers of two.
    let unit = walk.geometry().refcount_block_entries().max(CHUNK);
    let counters_size = options.counters_size.min(MAX_COUNTERS_SIZE);
    let window = (counters_size / Counters::bytes_per_cluster(width) / unit).max(1) * unit;
    let expected = AtomicU64::new(0);
    let mut start = 0;
    // One cluster more: a reference may reach into the cluster after the last one.
    while start <= clusters {
        let range = start..(clusters + 1).min(start + window);
        visit(&Pass {
            walk,
            shared,
            stored: Stored::new(walk, &tables.refcounts, range.clone()),
            counters: Counters::new(range.clone(), width),
            statistics,
            first: start == 0,
            clusters,
            expected: &expected,
            holes: Mutex::default(),
        })?;
        start = range.end;
    }
    Ok(())
}

/// Counts the references to every cluster of the image in `walk`, one window of the file at a time, and calls
/// `visit` with the counts of each window. Disk: reads all tables once for each window. Errors: `Metadata`,
/// `Stopped`. Damaged entries are not an error: they count as in a check.
pub(crate) fn count_references(
    walk: &Walk<'_>,
    executor: &dyn Executor,
    progress: &dyn Progress,
    visit: &mut dyn FnMut(&Counters) -> Result<()>,
) -> Result<()> {
    let shared = Shared { executor, progress, collector: Collector::new(0) };
    let Some(tables) = Tables::read(walk, &shared)? else {
        return Err(Error::new(ErrorKind::Metadata, "the snapshot table cannot be read"));
    };
    let (options, statistics) = (CheckOptions::default(), Statistics::default());
    in_windows(walk, &shared, &tables, (&options, &statistics), &mut |pass| {
        pass.count_references(&tables)?;
        visit(&pass.counters)
    })
}

/// The refcount of `cluster` on disk. `table`: the image's refcount table. `None` if it cannot be read. Disk:
/// reads one word of a refcount block.
pub(crate) fn stored_refcount(walk: &Walk<'_>, table: &[u64], cluster: u64) -> Result<Option<u64>> {
    Stored::new(walk, table, 0..0).refcount(cluster)
}

fn metadata_error(error: qcow2_core::Error) -> Error {
    Error::new(ErrorKind::Metadata, "checking the image").with_source(error)
}

/// The small tables, and those that may overlap; read once before the passes.
struct Tables {
    refcounts: Vec<u64>,
    snapshot_table_len: u64,
    snapshots: Vec<TablePlace>,
    bitmaps: Vec<TablePlace>,
}

impl Tables {
    /// Reads the tables and records their faults. `None` if the snapshot table cannot be read.
    fn read(walk: &Walk<'_>, shared: &Shared<'_>) -> Result<Option<Self>> {
        let header = walk.header();
        let mut order = 0;
        let mut note = |phase, finding| {
            order += 1;
            shared.found(Key(phase, order, 0), finding, 1);
        };
        let snapshots = walk.snapshots(&mut |fault| {
            use walk::SnapshotFault::{L1Misaligned, L1TooLarge};
            let phase = match fault {
                L1Misaligned { .. } | L1TooLarge { .. } => Phase::Snapshots,
                _ => Phase::SnapshotTable,
            };
            note(phase, Finding::Snapshot(fault));
        });
        let Some(snapshots) = snapshots.map_err(metadata_error)? else { return Ok(None) };
        if header.has_data_file() && header.nb_snapshots > 0 {
            note(Phase::Snapshots, Finding::SnapshotsWithDataFile { count: header.nb_snapshots });
        }
        let (bitmaps, fault) = walk.bitmaps().map_err(metadata_error)?;
        if let Some(fault) = fault {
            note(Phase::Bitmaps, Finding::Bitmap(fault));
        }
        Ok(Some(Self {
            refcounts: walk.refcount_table().map_err(metadata_error)?,
            snapshot_table_len: snapshots.len,
            snapshots: snapshots.l1_tables,
            bitmaps,
        }))
    }
}

/// One pass over all tables, for one window of the file.
struct Pass<'a> {
    walk: &'a Walk<'a>,
    shared: &'a Shared<'a>,
    stored: Stored<'a>,
    counters: Counters,
    statistics: &'a Statistics,
    /// True in the first pass, the only one that reports invalid entries and references outside the file.
    first: bool,
    /// Number of clusters in the file.
    clusters: u64,
    /// Bytes of tables that the check has to read, as known so far.
    expected: &'a AtomicU64,
    holes: Mutex<Holes>,
}

impl Pass<'_> {
    /// Returns the end (exclusive) of the used clusters in this window.
    fn run(&self, tables: &Tables) -> Result<u64> {
        self.count_references(tables)?;
        self.stored.compare(self.shared, &self.counters, self.clusters)
    }

    /// Counts the references to the window's clusters.
    fn count_references(&self, tables: &Tables) -> Result<()> {
        let window = self.counters.window();
        let width = self.walk.geometry().refcount_width();
        self.expect_bytes((window.end - window.start) * u64::from(width.bits()) / 8 * 2);
        self.stored.load(self.shared)?;
        for reference in self.walk.header_references() {
            self.refer(reference, Key(Phase::Header, 0, 0));
        }
        self.mapping(&overlay(&tables.snapshots))?;
        self.snapshot_references(tables);
        self.bitmap_references(tables)?;
        self.refcount_blocks(tables);
        Ok(())
    }

    /// Adds bytes of tables to the progress total.
    fn expect_bytes(&self, bytes: u64) {
        let total = self.expected.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes);
        self.shared.progress.set_total(total);
    }

    /// Records an invalid entry, in the first pass only.
    fn fault(&self, key: Key, finding: Finding, times: u64) {
        if self.first {
            self.shared.found(key, finding, times);
        }
    }

    /// True if this pass checks references to `cluster`: it is in the window, or past the end of the file in
    /// the first pass.
    fn judges(&self, cluster: u64) -> bool {
        self.counters.window().contains(&cluster) || (self.first && cluster > self.clusters)
    }

    /// Counts one reference.
    fn refer(&self, reference: Reference, key: Key) {
        self.refer_run(reference, 1, key);
    }

    /// Counts `count` consecutive references starting with `reference`; `count` above 1 only for whole
    /// clusters.
    fn refer_run(&self, reference: Reference, count: u64, key: Key) {
        let geometry = self.walk.geometry();
        let Reference { owner, offset, len, times } = reference;
        let fits = |n: u64| {
            let end = len.checked_mul(n).and_then(|len| offset.checked_add(len));
            end.is_some_and(|end| end.value().saturating_sub(self.walk.file_len()) < geometry.cluster_size())
        };
        let inside = if fits(count) { count } else { (1..count).take_while(|&n| fits(n)).count() as u64 };
        if inside > 0 {
            self.count(touched(geometry.cluster_bits(), offset, len * inside), times, key);
        }
        for n in inside..count {
            let offset = HostOffset::new(offset.value().wrapping_add(len.wrapping_mul(n)));
            self.fault(Key(key.0, key.1, key.2 + n), Finding::PastEnd { owner, offset, len }, times);
        }
    }

    /// Adds `times` to the reference counts of `clusters`.
    fn count(&self, clusters: Range<u64>, times: u64, key: Key) {
        self.counters.add(clusters, times, |cluster, excess| {
            let offset = HostOffset::new(cluster << self.walk.geometry().cluster_bits());
            self.shared.found(key, Finding::Overflow { offset }, excess);
        });
    }

    fn snapshot_references(&self, tables: &Tables) {
        self.table_references(Owner::SnapshotL1, &tables.snapshots, Phase::Snapshots);
        if tables.snapshot_table_len > 0 {
            let (offset, len) = (self.walk.header().snapshots_offset, tables.snapshot_table_len);
            let reference = Reference { owner: Owner::SnapshotTable, offset, len, times: 1 };
            self.refer(reference, Key(Phase::Tables, 0, 0));
        }
    }

    /// Counts tables that may be identical or overlap. Each cluster is counted once, times the number of
    /// tables that touch it, so that a crafted image cannot make the check count the same clusters again and
    /// again.
    fn table_references(&self, owner: Owner, tables: &[TablePlace], phase: Phase) {
        let cluster_size = self.walk.geometry().cluster_size();
        let mut rounded = Vec::with_capacity(tables.len());
        for table in tables.iter().filter(|table| !table.is_empty()) {
            let (offset, len) = (table.offset, table.len());
            let end = offset.checked_add(len).map(HostOffset::value);
            if end.is_some_and(|end| end.saturating_sub(self.walk.file_len()) < cluster_size) {
                rounded.push(TablePlace { offset, entries: len.next_multiple_of(cluster_size) / 8 });
            } else {
                self.fault(Key(phase, offset.value(), 0), Finding::PastEnd { owner, offset, len }, 1);
            }
        }
        for Segment { offset, len, times } in overlay(&rounded) {
            let clusters = touched(self.walk.geometry().cluster_bits(), offset, len);
            self.count(clusters, times, Key(phase, offset.value(), 0));
        }
    }

    fn bitmap_references(&self, tables: &Tables) -> Result<()> {
        self.table_references(Owner::BitmapTable, &tables.bitmaps, Phase::Bitmaps);
        let geometry = self.walk.geometry();
        let mut pieces = self.walk.pieces();
        for Segment { offset, len, times } in overlay(&tables.bitmaps) {
            let key = Key(Phase::Bitmaps, offset.value(), 1);
            pieces.start(offset, len);
            while let Some((_, piece)) = pieces.read_next().map_err(metadata_error)? {
                for raw in bytes::words(piece).filter(|&raw| raw != 0) {
                    match BitmapTableEntry::decode(raw, geometry) {
                        Ok(BitmapTableEntry::Data(offset)) => {
                            let len = geometry.cluster_size();
                            self.refer(Reference { owner: Owner::BitmapData, offset, len, times }, key);
                        }
                        Ok(_) => {}
                        Err(_) => self.fault(key, Finding::BitmapTableEntry { entry: raw }, times),
                    }
                }
            }
        }
        Ok(())
    }

    /// Checks the refcount table's entries and counts the blocks. Runs last, because a block must be the only
    /// owner of its cluster.
    fn refcount_blocks(&self, tables: &Tables) {
        let geometry = self.walk.geometry();
        let file_end = if self.counters.count(self.clusters) > 0 { self.clusters + 1 } else { self.clusters };
        for (index, &raw) in (0..).zip(&tables.refcounts) {
            if raw == 0 {
                continue;
            }
            let key = Key(Phase::RefcountBlocks, index, 0);
            if refcount::reserved_bits(raw) != 0 {
                self.fault(key, Finding::RefcountTableReserved { index }, 1);
                continue;
            }
            let offset = match decode_table_entry(raw, geometry) {
                Ok(Some(offset)) => offset,
                Ok(None) => continue,
                Err(error) => {
                    debug_assert!(matches!(error.kind(), FormatErrorKind::Misaligned(_)));
                    self.fault(key, Finding::RefcountBlockMisaligned { index }, 1);
                    continue;
                }
            };
            let cluster = geometry.host_cluster(offset).value();
            if cluster >= file_end {
                self.fault(key, Finding::RefcountBlockOutside { index }, 1);
                continue;
            }
            let len = geometry.cluster_size();
            self.refer(Reference { owner: Owner::RefcountBlock, offset, len, times: 1 }, key);
            let references = self.counters.count(cluster);
            if self.counters.window().contains(&cluster) && references != 1 {
                self.shared.found(key, Finding::RefcountBlockShared { index, references }, 1);
            }
        }
    }
}
