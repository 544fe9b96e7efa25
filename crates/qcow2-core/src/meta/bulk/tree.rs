//! Passes over all L2 tables of an L1 table; each is read once, however many L1 entries point to it.

use crate::damage::{Damage, L2Slot, bad_l1_entry};
use crate::error::{Error, Result, TableKind};
use crate::meta::overlap::OverlapChecks;
use crate::meta::pending::Unlinked;
use crate::meta::run::ClusterRun;
use crate::meta::tables::Tables;
use ::alloc::format;
use ::alloc::vec::Vec;
use qcow2_format::l1::L1Entry;
use qcow2_format::l2::{L2Fault, L2Format, L2Item};
use qcow2_format::{Geometry, HostOffset, L1Index};

/// Bytes of adjacent L2 tables that are read or written at a time, but never less than one table.
const PIECE: u64 = 1 << 20;

/// Gets the host offset of an L2 table, the number of L1 entries that point to it, and its bytes. Returns
/// true if it has changed the bytes.
type VisitTable<'a> = dyn FnMut(HostOffset, u64, &mut [u8]) -> Result<bool> + 'a;

/// The L2 tables of an L1 table in host order, and for each the number of L1 entries that point to it.
pub(crate) struct Tree {
    tables: Vec<(HostOffset, u64)>,
}

impl Tree {
    /// The L2 tables that these raw L1 entries point to. Errors: `Corrupt` for a misaligned entry.
    pub(crate) fn new(entries: &[u64], geometry: &Geometry) -> Result<Self> {
        let mut offsets = Vec::new();
        for (index, &raw) in entries.iter().enumerate().filter(|(_, raw)| **raw != 0) {
            let index = L1Index::new(index as u64);
            let entry = L1Entry::decode(raw, geometry).map_err(|e| bad_l1_entry(index, e))?;
            offsets.extend(entry.l2_table);
        }
        offsets.sort_unstable();
        let mut tables: Vec<(HostOffset, u64)> = Vec::new();
        for offset in offsets {
            match tables.last_mut() {
                Some((last, times)) if *last == offset => *times += 1,
                _ => tables.push((offset, 1)),
            }
        }
        debug_assert!(tables.windows(2).all(|pair| pair[0].0 < pair[1].0), "a table is in the tree twice");
        Ok(Self { tables })
    }

    /// The host offsets of the tables.
    pub(crate) fn offsets(&self) -> impl Iterator<Item = HostOffset> + '_ {
        self.tables.iter().map(|&(offset, _)| offset)
    }

    /// Calls `visit` for every run of host clusters that the tree refers to, its L2 tables included, with the
    /// number of references. Errors: `Corrupt` for a damaged entry, which marks the image corrupt.
    pub(super) fn for_each_run(
        &self,
        tables: &Tables,
        visit: &mut dyn FnMut(Unlinked, u64) -> Result<()>,
    ) -> Result<()> {
        self.visit_runs(tables, visit).map_err(|error| tables.header().marked_if_damaged(error))
    }

    fn visit_runs(&self, tables: &Tables, visit: &mut dyn FnMut(Unlinked, u64) -> Result<()>) -> Result<()> {
        let format = tables.file().l2_format();
        for &(offset, times) in &self.tables {
            visit(Unlinked::one(&format.geometry, OverlapChecks::L2, offset), times)?;
        }
        self.for_each_table(tables, &mut |table, times, bytes| {
            let mut result = Ok(());
            format.scan(bytes, |item| {
                if result.is_ok() {
                    result = visit_item((format, table), item, &mut |run| visit(Unlinked::data(run), times));
                }
            });
            result.map(|()| false)
        })
    }

    /// Reads the tables in pieces and calls `visit` for each; writes back the tables that `visit` has
    /// changed. Skips tables in holes of the storage: they are all zero.
    pub(super) fn for_each_table(&self, tables: &Tables, visit: &mut VisitTable<'_>) -> Result<()> {
        let (file, mut buffer) = (tables.file(), Vec::new());
        let size = file.geometry().cluster_size();
        let mut rest = &self.tables[..];
        while let Some(&(start, _)) = rest.first() {
            let most = (PIECE / size).max(1) as usize;
            let follows = |(index, (offset, _)): (usize, &(HostOffset, u64))| {
                start.checked_add(index as u64 * size) == Some(*offset)
            };
            let count = rest.iter().enumerate().take(most).take_while(|&next| follows(next)).count();
            // The first table always matches, so every piece has at least one and the loop ends.
            assert!(count > 0, "an empty piece of tables");
            let (piece, later) = rest.split_at(count);
            rest = later;
            let len = piece.len() as u64 * size;
            let extent = file.storage().extent_at(start, len)?;
            if !extent.data && extent.len >= len {
                continue;
            }
            buffer.resize(len as usize, 0);
            file.storage().read_padded(start, &mut buffer)?;
            let mut changed: Option<(usize, usize)> = None;
            for (index, (&(offset, times), bytes)) in
                piece.iter().zip(buffer.chunks_exact_mut(size as usize)).enumerate()
            {
                if visit(offset, times, bytes)? {
                    changed = Some((changed.map_or(index, |(first, _)| first), index + 1));
                }
            }
            if let Some((first, end)) = changed {
                let at = HostOffset::new(start.value() + first as u64 * size);
                let bytes = &buffer[first * size as usize..end * size as usize];
                tables.write(OverlapChecks::L2, at, bytes)?;
            }
        }
        Ok(())
    }
}

fn visit_item(
    (format, table): (&L2Format, HostOffset),
    item: L2Item,
    visit: &mut dyn FnMut(ClusterRun) -> Result<()>,
) -> Result<()> {
    let geometry = &format.geometry;
    match item {
        L2Item::Clusters { host, count, .. } => {
            visit(ClusterRun::new(geometry.host_cluster(host).value(), count))
        }
        L2Item::Compressed { stream, .. } => {
            let run = ClusterRun::of_bytes(geometry, stream.host, stream.len.max(1));
            visit(run.ok_or_else(|| Error::corrupt("a compressed stream passes 2^64"))?)
        }
        L2Item::Fault { fault: L2Fault::ReservedBits | L2Fault::CompressedCopied, .. } => Ok(()),
        L2Item::Fault { index, fault, raw } => {
            let message = format!("l2 entry {index} of table at {table}: {fault:?} in {raw:#018x}");
            let error = Error::corrupt(message).in_table(TableKind::L2).at_host(table);
            let (entry, offset, to_change) = (L2Slot { table, index }, format.offset_bits(raw), None);
            let zero = fault == L2Fault::PreallocatedMisaligned;
            Err(match fault {
                L2Fault::DataMisaligned | L2Fault::PreallocatedMisaligned => {
                    error.with_damage(Damage::ClusterOffset { entry, offset, zero, to_change })
                }
                L2Fault::SubclusterBitmap | L2Fault::UnallocatedWithBitmap => {
                    error.with_damage(Damage::SubclusterBitmap { entry, to_change })
                }
                _ => error,
            })
        }
    }
}
