//! Repair on request: recomputes refcounts from the tables and copied flags from the refcounts, then clears
//! the dirty and the corrupt bit.
//!
//! The guest data does not change. Order on disk: refcounts, barrier; copied flags, barrier; the header's
//! bits. A crash leaves an image that still needs repair, with fewer errors left.

use crate::damage::bad_l1_entry;
use crate::error::{Error, ErrorKind, Result, TableKind};
use crate::image::Image;
use crate::meta::file::read_words;
use crate::meta::overlap::OverlapChecks;
use crate::sync::write;
use ::alloc::format;
use qcow2_format::l1::L1Entry;
use qcow2_format::l2::{ClusterEntry, L2Entry};
use qcow2_format::{HostOffset, L1Index};

impl Image {
    /// Sets every refcount to the number of references in the tables; with `only_lower`, only refcounts that
    /// are too high. The image must be open for repair. Errors: `Corrupt` for damaged tables, before anything
    /// has changed; `Unsupported` with `only_lower` if the refcount structure has to be rebuilt; `ReadOnly`,
    /// `Poisoned`, `Storage`. Spec: "Refcount blocks".
    pub fn repair_refcounts(&self, only_lower: bool) -> Result<()> {
        let _alone = write(&self.structure);
        self.file.check_writable()?;
        let counts = self.recount().references()?;
        if !self.correct_refcounts(&counts, only_lower)? {
            if only_lower {
                let message = "the refcount structure has to be rebuilt; lowering refcounts is not enough";
                return Err(Error::new(ErrorKind::Unsupported, message));
            }
            self.rebuild_refcounts(&counts)?;
        }
        self.flusher.settle()
    }

    /// Makes the copied flags of the active disk's L2 tables and clusters agree with the refcounts: set if
    /// the refcount is one, clear otherwise. An L2 table that is referenced as other metadata or data too is
    /// not written: its bytes may not be entries. Errors: `Corrupt` for damaged tables; `ReadOnly`,
    /// `Poisoned`, `Storage`. Spec: "Cluster mapping".
    pub fn repair_copied_flags(&self) -> Result<()> {
        let _alone = write(&self.structure);
        self.file.check_writable()?;
        let (l1, entries) = self.mapping().l1_contents();
        if !self.is_certain(OverlapChecks::ACTIVE_L1, l1, entries.len() as u64 * 8, 1)? {
            let message = format!("l1 table at {l1} shares clusters with other metadata or data");
            return Err(Error::corrupt(message).in_table(TableKind::L1).at_host(l1));
        }
        let named = self.recount().named_l2_tables()?;
        for (index, raw) in (0u64..).zip(entries) {
            let index = L1Index::new(index);
            let entry =
                L1Entry::decode(raw, self.file.geometry()).map_err(|e| bad_l1_entry(index, e).at_host(l1))?;
            let Some(table) = entry.l2_table else { continue };
            let copied = self.is_sole(table)?;
            if entry.copied != copied {
                self.mapping().set_l1_entry(index, L1Entry { l2_table: Some(table), copied });
            }
            let times = named.get(&table.value()).copied().unwrap_or(0);
            if self.is_certain(OverlapChecks::L2, table, self.file.geometry().cluster_size(), times)? {
                self.repair_l2_flags(table)?;
            }
        }
        self.flusher.settle()
    }

    /// Clears the dirty and the corrupt bit. Errors: `ReadOnly`, `Poisoned`, `Storage`.
    pub fn clear_damage_marks(&self) -> Result<()> {
        let _alone = write(&self.structure);
        self.file.check_writable()?;
        self.header.clear_damage_marks()
    }

    fn repair_l2_flags(&self, table: HostOffset) -> Result<()> {
        let size = self.file.geometry().cluster_size();
        let mut words = read_words(self.file.storage(), table, size / 8)?;
        let mut changed = false;
        for entry in words.chunks_exact_mut((self.file.geometry().l2_entry_size() / 8) as usize) {
            let bitmap = entry.get(1).copied().unwrap_or(0);
            let decoded = self.file.l2_format().decode(entry[0], bitmap);
            let decoded = decoded.map_err(|e| {
                Error::corrupt(format!("l2 table at {table} is damaged"))
                    .in_table(TableKind::L2)
                    .at_host(table)
                    .with_source(e)
            })?;
            let L2Entry::Standard(cluster @ ClusterEntry { host: Some(host), .. }) = decoded else {
                continue;
            };
            let copied = self.file.has_data_file() || self.is_sole(host)?;
            if copied != cluster.copied {
                let new = L2Entry::Standard(ClusterEntry { copied, ..cluster });
                if let Some((raw, _)) = self.file.l2_format().encode(&new) {
                    (entry[0], changed) = (raw, true);
                }
            }
        }
        if changed {
            self.tables.write_words(OverlapChecks::L2, table, &words)?;
            self.file.flush()?;
            self.mapping().forget_table(table);
        }
        Ok(())
    }

    /// True if nothing else uses the clusters of a table of `kinds`: no other metadata is known there, and
    /// their refcounts equal `times`, the number of references to the table. A higher refcount means another
    /// owner, and nothing shows which of the two is right.
    fn is_certain(&self, kinds: OverlapChecks, table: HostOffset, len: u64, times: u64) -> Result<bool> {
        let run = self.tables.run_of(kinds, table, len);
        if self.tables.guard().hit_by(kinds, run.clusters).is_some() {
            return Ok(false);
        }
        self.refcounts.all_have(run.clusters, times)
    }

    /// True if the refcount of the cluster at `host` is one.
    fn is_sole(&self, host: HostOffset) -> Result<bool> {
        Ok(self.refcounts.count(self.file.geometry().host_cluster(host).value())? == 1)
    }
}
