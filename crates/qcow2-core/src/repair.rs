//! Repair on request: refcounts from the tables, copied flags from the refcounts, and then the marks of
//! damage are cleared.
//!
//! Nothing here touches what the guest sees. Order on disk: refcounts, barrier; copied flags, barrier; the
//! header's marks. A crash leaves an image that still needs repair, with fewer errors left.

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
    /// Makes refcounts the number of references in the tables, all of them or (`only_lower`) those that are
    /// too high. The image was opened for repair. Errors: `Corrupt` where tables are damaged, so that nothing
    /// may be concluded from them, nothing having changed; `Unsupported` where only lowering cannot do;
    /// `ReadOnly`, `Poisoned`, `Storage`. Spec: "Refcount blocks".
    pub fn repair_refcounts(&self, only_lower: bool) -> Result<()> {
        let _alone = write(&self.structure);
        self.file.check_writable()?;
        let counts = self.recount().references()?;
        if !self.correct_refcounts(&counts, only_lower)? {
            if only_lower {
                let message = "the refcount structure must be made anew, which was not asked for";
                return Err(Error::new(ErrorKind::Unsupported, message));
            }
            self.rebuild_refcounts(&counts)?;
        }
        self.flusher.settle()
    }

    /// Sets the copied flag of exactly those L2 tables and clusters of the active disk whose refcount is one.
    /// A table that somebody else refers to as something else is left as it is: its bytes may not be entries.
    /// Errors: `Corrupt` for damaged tables; `ReadOnly`, `Poisoned`, `Storage`. Spec: "Cluster mapping".
    pub fn repair_copied_flags(&self) -> Result<()> {
        let _alone = write(&self.structure);
        self.file.check_writable()?;
        let (l1, entries) = self.mapping().l1_contents();
        if !self.is_certain(OverlapChecks::ACTIVE_L1, l1, entries.len() as u64 * 8, 1)? {
            return Err(Error::corrupt(format!("l1 table at {l1}: something else is there too"))
                .in_table(TableKind::L1)
                .at_host(l1));
        }
        let named = self.recount().named_l2_tables()?;
        for (index, raw) in (0u64..).zip(entries) {
            let index = L1Index::new(index);
            let entry = L1Entry::decode(raw, self.file.geometry()).map_err(|e| {
                Error::corrupt(format!("l1 entry {index} is damaged"))
                    .in_table(TableKind::L1)
                    .at_host(l1)
                    .with_source(e)
            })?;
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

    /// Clears the marks of an unclean end and of damage. Errors: `ReadOnly`, `Poisoned`, `Storage`.
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

    /// Whether a table of `kinds` has its clusters for itself: no other metadata is known there, and their
    /// refcounts are the `times` that it is named. One that is higher counts another owner, who may be right.
    fn is_certain(&self, kinds: OverlapChecks, table: HostOffset, len: u64, times: u64) -> Result<bool> {
        let run = self.tables.run_of(kinds, table, len);
        if self.tables.guard().hit_by(kinds, run.clusters).is_some() {
            return Ok(false);
        }
        self.refcounts.all_have(run.clusters, times)
    }

    /// Whether the refcount of the cluster at `host` is one.
    fn is_sole(&self, host: HostOffset) -> Result<bool> {
        Ok(self.refcounts.count(self.file.geometry().host_cluster(host).value())? == 1)
    }
}
