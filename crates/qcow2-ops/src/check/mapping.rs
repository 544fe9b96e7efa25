//! Checks the mapping: the references of every L1 and L2 entry, of the active state and of all snapshots.
//!
//! L1 entries are collected in batches and sorted by L2 table. So each L2 table is read once per batch,
//! however many entries point to it, and in file order.

use super::collect::{Key, Phase};
use super::finding::Finding;
use super::refcounts::Ones;
use super::{Pass, metadata_error};
use crate::error::Result;
use qcow2_core::HostOffset;
use qcow2_core::walk::{Owner, PIECE_SIZE, Pieces, Reference, Segment, overlay};
use qcow2_format::bytes;
use qcow2_format::l1::{self, L1Entry};
use qcow2_format::l2::{L2Fault, L2Item};
use qcow2_format::{FormatErrorKind, L1Index, L2Index};
use std::ops::Range;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};

/// L1 entries per batch; 32 MiB of memory at most.
const BATCH: usize = 1 << 20;

/// QEMU's statistics of the active state.
#[derive(Debug, Default)]
pub(super) struct Statistics {
    pub(super) allocated: AtomicU64,
    pub(super) fragmented: AtomicU64,
    pub(super) compressed: AtomicU64,
}

/// An L2 table with the number of L1 entries in the batch that point to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct TableUse {
    table: HostOffset,
    /// Number of entries in the active L1 table.
    active: u64,
    /// Number of entries in snapshots' L1 tables.
    inactive: u64,
    /// Sort position of the first of these entries: its L1 index, or its host offset if only snapshots use
    /// the table.
    first: u64,
}

/// Location of an L1 entry.
#[derive(Clone, Copy)]
enum L1Place {
    Active(L1Index),
    Inactive { at: HostOffset, times: u64 },
}

impl L1Place {
    fn key(self) -> Key {
        match self {
            Self::Active(index) => Key(Phase::Active, index.value(), 0),
            Self::Inactive { at, .. } => Key(Phase::Snapshots, at.value(), 0),
        }
    }

    fn times(self) -> u64 {
        if let Self::Inactive { times, .. } = self { times } else { 1 }
    }
}

impl Pass<'_> {
    /// Follows all L1 tables: the active one, then those in `snapshots`.
    pub(super) fn mapping(&self, snapshots: &[Segment]) -> Result<()> {
        let mut batch = Vec::new();
        let active = self.walk.active_l1();
        let mut pieces = self.walk.pieces();
        for segment in overlay(&[active]) {
            self.l1_entries(segment, Some(active.offset), &mut pieces, &mut batch)?;
        }
        for &segment in snapshots {
            self.l1_entries(segment, None, &mut pieces, &mut batch)?;
        }
        self.l2_tables(&mut batch)
    }

    fn l1_entries(
        &self,
        segment: Segment,
        active: Option<HostOffset>,
        pieces: &mut Pieces<'_>,
        batch: &mut Vec<TableUse>,
    ) -> Result<()> {
        pieces.start(segment.offset, segment.len);
        while let Some((offset, piece)) = pieces.read_next().map_err(metadata_error)? {
            for (at, raw) in (offset.value()..).step_by(8).zip(bytes::words(piece)) {
                if raw == 0 {
                    continue;
                }
                let place = match active {
                    Some(start) => L1Place::Active(L1Index::new((at - start.value()) / 8)),
                    None => L1Place::Inactive { at: HostOffset::new(at), times: segment.times },
                };
                batch.extend(self.l1_entry(place, raw)?);
                if batch.len() >= BATCH {
                    self.l2_tables(batch)?;
                }
            }
        }
        Ok(())
    }

    /// Checks one L1 entry. Returns its L2 table if that can be read.
    fn l1_entry(&self, place: L1Place, raw: u64) -> Result<Option<TableUse>> {
        let geometry = self.walk.geometry();
        let (key, times) = (place.key(), place.times());
        if l1::reserved_bits(raw) != 0 {
            self.fault(key, Finding::L1Reserved { entry: raw }, times);
        }
        let table = match L1Entry::decode(raw, geometry) {
            Ok(L1Entry { l2_table: Some(table), .. }) => table,
            Ok(_) => {
                if raw & !l1::reserved_bits(raw) != 0 {
                    self.fault(key, Finding::L1CopiedWithoutTable { entry: raw }, times);
                }
                return Ok(None);
            }
            Err(error) => {
                if let &FormatErrorKind::Misaligned(offset) = error.kind() {
                    let offset = HostOffset::new(offset);
                    self.refer(
                        Reference { owner: Owner::L2Table, offset, len: geometry.cluster_size(), times },
                        key,
                    );
                    self.fault(key, Finding::L2TableMisaligned { offset }, times);
                }
                return Ok(None);
            }
        };
        self.refer(
            Reference { owner: Owner::L2Table, offset: table, len: geometry.cluster_size(), times },
            key,
        );
        let used = TableUse { table, active: 0, inactive: 0, first: key.1 };
        Ok(Some(match place {
            L1Place::Active(index) => {
                self.l1_copied(index, raw, table)?;
                TableUse { active: 1, ..used }
            }
            L1Place::Inactive { times, .. } => TableUse { inactive: times, ..used },
        }))
    }

    fn l1_copied(&self, index: L1Index, raw: u64, table: HostOffset) -> Result<()> {
        let cluster = self.walk.geometry().host_cluster(table).value();
        let copied = raw >> 63 == 1;
        if !self.judges(cluster) || self.stored.ones(cluster..cluster + 1) == expected(copied) {
            return Ok(());
        }
        if let Some(refcount) = self.stored.refcount(cluster)?.filter(|&count| copied != (count == 1)) {
            let finding = Finding::L1Copied { index: index.value(), entry: raw, refcount };
            self.shared.found(Key(Phase::Copied, index.value(), 0), finding, 1);
        }
        Ok(())
    }

    /// Reads each table of the batch once and empties the batch.
    fn l2_tables(&self, batch: &mut Vec<TableUse>) -> Result<()> {
        batch.sort_unstable_by_key(|used| used.table);
        batch.dedup_by(|next, kept| {
            let same = next.table == kept.table;
            if same {
                // The position of an active entry wins: the report follows the active state.
                let next_first = (next.active == 0, next.first);
                let kept_first = (kept.active == 0, kept.first);
                kept.first = next_first.min(kept_first).1;
                kept.active += next.active;
                kept.inactive = kept.inactive.saturating_add(next.inactive);
            }
            same
        });
        let size = self.walk.geometry().cluster_size();
        self.expect_bytes(batch.len() as u64 * size);
        let step = (PIECE_SIZE / size).max(1);
        self.shared.in_pieces(0..batch.len() as u64, step, |range, buffer| {
            self.shared.advance((range.end - range.start) * size);
            self.read_tables(&batch[range.start as usize..range.end as usize], buffer)
        })?;
        batch.clear();
        Ok(())
    }

    /// Reads and scans L2 tables in file order; adjacent tables are read together, and those in holes are
    /// not: a small file may have a hundred GiB of them.
    fn read_tables(&self, tables: &[TableUse], buffer: &mut Vec<u8>) -> Result<()> {
        let size = self.walk.geometry().cluster_size();
        let adjacent = |a: &TableUse, b: &TableUse| a.table.checked_add(size) == Some(b.table);
        for group in tables.chunk_by(adjacent) {
            let Some(first) = group.first() else { continue };
            let len = group.len() as u64 * size;
            let mut holes = self.holes.lock().unwrap_or_else(PoisonError::into_inner);
            if self.walk.is_hole(&mut holes, first.table, len).map_err(metadata_error)? {
                continue;
            }
            drop(holes);
            buffer.resize(group.len() * size as usize, 0);
            self.walk.read(first.table, buffer).map_err(metadata_error)?;
            for (used, table) in group.iter().zip(buffer.chunks_exact(size as usize)) {
                TableScan::new(self, *used, table).run()?;
            }
        }
        Ok(())
    }
}

fn expected(copied: bool) -> Ones {
    if copied { Ones::All } else { Ones::None }
}

/// The scan of one L2 table.
struct TableScan<'a> {
    pass: &'a Pass<'a>,
    used: TableUse,
    bytes: &'a [u8],
    times: u64,
    allocated: u64,
    fragmented: u64,
    compressed: u64,
    /// Host offset of the next cluster if the data were contiguous.
    next_host: Option<HostOffset>,
}

impl<'a> TableScan<'a> {
    fn new(pass: &'a Pass<'a>, used: TableUse, bytes: &'a [u8]) -> Self {
        let times = used.active.saturating_add(used.inactive);
        Self { pass, used, bytes, times, allocated: 0, fragmented: 0, compressed: 0, next_host: None }
    }

    fn run(mut self) -> Result<()> {
        let pass = self.pass;
        let mut result = Ok(());
        pass.walk.l2_format().scan(self.bytes, |item| {
            if result.is_ok() {
                result = self.item(item);
            }
        });
        if pass.first {
            let add = |total: &AtomicU64, count: u64| {
                total.fetch_add(count.saturating_mul(self.used.active), Ordering::Relaxed);
            };
            add(&pass.statistics.allocated, self.allocated);
            add(&pass.statistics.fragmented, self.fragmented);
            add(&pass.statistics.compressed, self.compressed);
        }
        result
    }

    fn item(&mut self, item: L2Item) -> Result<()> {
        match item {
            L2Item::Clusters { index, host, count, copied } => self.clusters(index, host, count, copied),
            L2Item::Compressed { index, stream } => {
                self.allocated += 1;
                self.compressed += 1;
                self.fragmented += 1;
                let reference = Reference {
                    owner: Owner::Compressed,
                    offset: stream.host,
                    len: stream.len,
                    times: self.times,
                };
                self.pass.refer(reference, self.key(index));
                Ok(())
            }
            L2Item::Fault { index, fault, raw } => {
                self.fault(index, fault, raw);
                Ok(())
            }
        }
    }

    fn key(&self, index: L2Index) -> Key {
        let phase = if self.used.active > 0 { Phase::Active } else { Phase::Snapshots };
        Key(phase, self.used.first, 1 + index.value())
    }

    fn fault(&self, index: L2Index, fault: L2Fault, raw: u64) {
        let format = self.pass.walk.l2_format();
        let offset = format.offset_bits(raw);
        let finding =
            Finding::L2Entry { fault, table: self.used.table, index: index.value(), entry: raw, offset };
        self.pass.fault(self.key(index), finding, self.times);
    }

    fn clusters(&mut self, index: L2Index, host: HostOffset, count: u64, copied: bool) -> Result<()> {
        let pass = self.pass;
        let size = pass.walk.geometry().cluster_size();
        self.allocated += count;
        if self.next_host.is_some_and(|next| next != host) {
            self.fragmented += 1;
        }
        self.next_host = host.checked_add(count * size);
        if pass.walk.l2_format().external_data {
            return if copied || !pass.first { Ok(()) } else { self.not_copied_in_data_file(index, count) };
        }
        let reference = Reference { owner: Owner::Data, offset: host, len: size, times: self.times };
        pass.refer_run(reference, count, self.key(index));
        if self.used.active > 0 { self.copied_flags(index, host, count, copied) } else { Ok(()) }
    }

    fn not_copied_in_data_file(&self, index: L2Index, count: u64) -> Result<()> {
        if self.used.active > 0 {
            (index.value()..index.value() + count).for_each(|index| self.flag(L2Index::new(index), 1));
        }
        Ok(())
    }

    /// Compares the copied flags of a run with the refcounts on disk.
    fn copied_flags(&self, index: L2Index, host: HostOffset, count: u64, copied: bool) -> Result<()> {
        let pass = self.pass;
        let first = pass.walk.geometry().host_cluster(host).value();
        if pass.stored.ones(first..first + count) == expected(copied) {
            return Ok(());
        }
        for n in 0..count {
            let cluster = first + n;
            if !pass.judges(cluster) || pass.stored.ones(cluster..cluster + 1) == expected(copied) {
                continue;
            }
            // The bitmap of ones says mismatch, or nothing: the cluster is outside the window. Read the
            // refcount itself.
            if let Some(refcount) = pass.stored.refcount(cluster)?.filter(|&r| copied != (r == 1)) {
                self.flag(L2Index::new(index.value() + n), refcount);
            }
        }
        Ok(())
    }

    fn flag(&self, index: L2Index, refcount: u64) {
        let raw = self.pass.walk.l2_format().words_at(self.bytes, index).map_or(0, |words| words.0);
        let finding =
            Finding::L2Copied { table: self.used.table, index: index.value(), entry: raw, refcount };
        self.pass.shared.found(
            Key(Phase::Copied, self.used.first, 1 + index.value()),
            finding,
            self.used.active,
        );
    }
}

/// The clusters touched by `len` bytes from `offset`. `len` is at least 1 and the end does not exceed 2^64.
pub(super) fn touched(cluster_bits: u32, offset: HostOffset, len: u64) -> Range<u64> {
    offset.value() >> cluster_bits..((offset.value() + (len - 1)) >> cluster_bits) + 1
}
