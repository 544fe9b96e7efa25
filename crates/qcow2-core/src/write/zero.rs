//! Write zeroes and discard: mapping changes for whole (sub)clusters, written zeroes for the rest.

use super::plan::{ZeroKind, ZeroPlan, mask, plan_zero};
use crate::error::Result;
use crate::image::Image;
use crate::inflight::Claim;
use crate::meta::page::SECTOR_SIZE;
use crate::meta::pending::Unlinked;
use crate::port::storage::ZeroMode;
use crate::read::resolve::Place;
use ::alloc::vec::Vec;
use qcow2_format::l2::{ClusterEntry, L2Entry};
use qcow2_format::{GuestOffset, GuestRange, HostOffset};

/// Clusters that are changed under one claim at most.
const MAX_CLUSTERS: u64 = 1 << 12;
static ZEROES: [u8; 16 << 10] = [0; 16 << 10];

impl Image {
    /// Zeroes, discards or deallocates `range`, as `kind` says. The caller has checked the range and runs
    /// inside an operation.
    pub(crate) fn zero_range(&self, range: GuestRange, kind: ZeroKind) -> Result<()> {
        let unit = match kind {
            ZeroKind::Discard | ZeroKind::Forget => self.file.geometry().cluster_size(),
            ZeroKind::Keep | ZeroKind::Unmap => self.file.geometry().subcluster_size(),
        };
        let (start, end) = (range.start().value(), range.end().value());
        // The last unit counts as whole even if the disk ends inside it.
        let whole_end = if end == self.size() { end.next_multiple_of(unit) } else { end - end % unit };
        let whole_start = start.next_multiple_of(unit);
        if whole_start >= whole_end {
            return self.zero_part(range, kind);
        }
        self.zero_part(between(start, whole_start), kind)?;
        self.zero_whole(whole_start, whole_end, kind)?;
        self.zero_part(between(whole_end, end), kind)
    }

    /// Zeroes bytes at the edges of (sub)clusters. A discard does nothing there.
    fn zero_part(&self, range: GuestRange, kind: ZeroKind) -> Result<()> {
        if kind == ZeroKind::Discard {
            return Ok(());
        }
        let unit = self.file.geometry().subcluster_size();
        let (mut at, end) = (range.start().value(), range.end().value());
        while at < end {
            let next = end.min(at - at % unit + unit);
            self.zero_edge(between(at, next), kind)?;
            at = next;
        }
        Ok(())
    }

    /// Zeroes `range`, a part of one subcluster. All of it becomes zeroes of this layer if that changes no
    /// byte beside `range`: what is below may change later. Otherwise zeroes are written.
    fn zero_edge(&self, range: GuestRange, kind: ZeroKind) -> Result<()> {
        // The claim waits for writes in flight, whose commit may turn the subcluster into data.
        let claim = self.mapping().claim(range.start(), 1);
        let unit = self.file.geometry().subcluster_size();
        let start = range.start().value() - range.start().value() % unit;
        if self.may_widen(range, start, unit)? {
            return self.zero_claimed(claim, GuestOffset::new(start), unit, kind).map(drop);
        }
        drop(claim);
        self.write_zero_bytes(range)
    }

    /// True if the subcluster of `unit` bytes at `start` has no data in this layer, the entry can say that it
    /// is zeroes, and its bytes outside of `range` read as zeroes.
    fn may_widen(&self, range: GuestRange, start: u64, unit: u64) -> Result<bool> {
        let run = self.mapping().lookup(range.start(), range.len())?;
        if !matches!(run.place, Place::Unallocated | Place::Zero { .. }) {
            return Ok(false);
        }
        if !self.file.l2_format().zero_flag && self.shows_below() {
            return Ok(false);
        }
        let end = (start + unit).min(self.size());
        Ok(self.reads_zero(between(start, range.start().value()))?
            && self.reads_zero(between(range.end().value(), end))?)
    }

    /// True if an unallocated cluster reads from a backing file.
    fn shows_below(&self) -> bool {
        self.backing.is_some() || self.backing_unopened
    }

    fn write_zero_bytes(&self, range: GuestRange) -> Result<()> {
        let (mut at, end) = (range.start().value(), range.end().value().min(self.size()));
        while at < end {
            // Pieces end at sector boundaries, so that no sector is written in two halves.
            let len = (end - at).min(ZEROES.len() as u64 - at % SECTOR_SIZE);
            self.write_range(GuestOffset::new(at), &ZEROES[..len as usize])?;
            at += len;
        }
        Ok(())
    }

    /// Zeroes the whole (sub)clusters from guest byte `start` to `end`.
    fn zero_whole(&self, start: u64, end: u64, kind: ZeroKind) -> Result<()> {
        let mut at = start;
        while at < end {
            let here = GuestOffset::new(at);
            let skip = self.skip_untouched(here, end - at, kind)?;
            at += if skip > 0 { skip } else { self.zero_clusters(here, end - at, kind)? };
        }
        Ok(())
    }

    /// Deallocates whole clusters in this layer. `range` starts at a cluster.
    pub(crate) fn forget_clusters(&self, range: GuestRange) -> Result<()> {
        self.zero_whole(range.start().value(), range.end().value(), ZeroKind::Forget)
    }

    /// How many bytes at `offset` need no change. For a discard without a backing file: those without a host
    /// cluster; for `Forget`: unallocated ones. Skipping them allocates no L2 tables.
    fn skip_untouched(&self, offset: GuestOffset, len: u64, kind: ZeroKind) -> Result<u64> {
        let run = match kind {
            ZeroKind::Discard if !self.shows_below() => self.mapping().lookup_to_change(offset, len)?,
            ZeroKind::Forget => self.mapping().lookup_to_change(offset, len)?,
            _ => return Ok(0),
        };
        let untouched = matches!(run.place, Place::Unallocated | Place::Zero { host: None })
            && !(kind == ZeroKind::Forget && run.place != Place::Unallocated);
        Ok(if untouched { run.len } else { 0 })
    }

    /// Zeroes a first part of `len` bytes at `offset`, within one page of an L2 table. Returns its length.
    fn zero_clusters(&self, offset: GuestOffset, len: u64, kind: ZeroKind) -> Result<u64> {
        let geometry = self.file.geometry();
        let size = geometry.cluster_size();
        let inside = geometry.in_cluster(offset.value());
        let wanted = geometry.clusters_for(inside + len).min(MAX_CLUSTERS);
        let claim = self.mapping().claim(offset, wanted * size - inside);
        self.zero_claimed(claim, offset, len.min(wanted * size - inside), kind)
    }

    /// [`zero_clusters`](Self::zero_clusters) under `claim`, which covers the clusters of the range.
    fn zero_claimed(&self, claim: Claim<'_>, offset: GuestOffset, len: u64, kind: ZeroKind) -> Result<u64> {
        let format = self.file.l2_format();
        let (geometry, size) = (&format.geometry, format.geometry.cluster_size());
        let inside = geometry.in_cluster(offset.value());
        let place = self.mapping().writable_place(offset)?;
        let count = geometry.clusters_for(inside + len).min(place.entries());
        let (mut entries, mut by_data) = (Vec::new(), Vec::new());
        let (mut unlinked, mut emptied) = (Vec::new(), Vec::new());
        for i in 0..count {
            let old = self.mapping().entry(&place, i, offset)?;
            let start = if i == 0 { inside } else { 0 };
            let end = (inside + len - i * size).min(size);
            let unit = geometry.subcluster_size();
            let plan_kind = self.kind_with_places_kept(kind, &old);
            let parts = mask(start / unit, end.div_ceil(unit));
            let plan = plan_zero(format, &old, parts, plan_kind, self.shows_below());
            entries.push(match plan {
                ZeroPlan::Change { entry, free } => {
                    match self.unlinked(&old) {
                        Some(run) if free => unlinked.push(run),
                        Some(run) if plan_kind != kind && end - start == size => emptied.push(run),
                        _ => {}
                    }
                    entry
                }
                ZeroPlan::Nothing => old,
                ZeroPlan::WriteData => {
                    by_data.push((i * size + start, i * size + end));
                    old
                }
            });
        }
        let done = (count * size - inside).min(len);
        assert!(done > 0, "zeroing at {offset} makes no progress");
        debug_assert_eq!(entries.len() as u64, count, "not one new entry for each cluster");
        // The data file before the mapping: if it fails, guest and raw data file must still agree.
        self.zero_data_file(offset, done, kind)?;
        self.commit_zero(&place, &entries, &unlinked)?;
        self.discard_emptied(&emptied);
        drop(claim);
        let base = offset.value() - inside;
        for (start, end) in by_data {
            self.write_zero_bytes(between(base + start, base + end))?;
        }
        Ok(done)
    }

    /// `kind` for one cluster: with `discard_no_unref` a cluster with a host cluster keeps it.
    fn kind_with_places_kept(&self, kind: ZeroKind, old: &L2Entry) -> ZeroKind {
        match (kind, old) {
            (ZeroKind::Unmap | ZeroKind::Discard, L2Entry::Standard(ClusterEntry { host: Some(_), .. }))
                if self.discard_no_unref =>
            {
                ZeroKind::Keep
            }
            _ => kind,
        }
    }

    /// Discards the storage of host clusters that stay allocated. The caller still holds the claim, so that
    /// no new bytes can be in them yet. A failed discard is ignored: it is a hint. Encrypted clusters are not
    /// discarded, see [`zero_data_file`](Self::zero_data_file).
    fn discard_emptied(&self, emptied: &[Unlinked]) {
        if !self.refcounts.discards_freed() || self.file.has_data_file() || !self.crypt.is_plain() {
            return;
        }
        let geometry = self.file.geometry();
        for run in emptied.iter().filter(|run| !self.tables.is_guarded(**run)) {
            let _ = self.file.storage().discard(run.clusters.offset(geometry), run.clusters.len(geometry));
        }
    }

    fn commit_zero(
        &self,
        place: &crate::meta::mapping::L2Place,
        entries: &[L2Entry],
        unlinked: &[Unlinked],
    ) -> Result<()> {
        self.mapping().commit(place, entries.len() as u64, unlinked, |i| entries[i as usize])
    }

    /// Zeroes or discards the same range of the external data file. A raw one must always read like the guest
    /// disk; in another one the space may be released. Not for `Forget`: after a crash the old entry may
    /// still be on disk, and the range must then read as the old data, not as zeroes.
    fn zero_data_file(&self, offset: GuestOffset, len: u64, kind: ZeroKind) -> Result<()> {
        // After a crash the mapping on disk may still point to the cluster; zeroes in it would decrypt to
        // noise, so encrypted clusters keep their bytes.
        if !self.file.has_data_file() || !self.crypt.is_plain() {
            return Ok(());
        }
        let data = self.file.data()?;
        let host = HostOffset::new(offset.value());
        let len = len.min(self.size().saturating_sub(offset.value()));
        if self.raw_data_file {
            let mode = if kind == ZeroKind::Keep { ZeroMode::KeepAllocated } else { ZeroMode::MayUnmap };
            data.write_zeroes(host, len, mode)?;
        } else if matches!(kind, ZeroKind::Unmap | ZeroKind::Discard) {
            let stored = data.len()?.saturating_sub(host.value()).min(len);
            if stored > 0 {
                data.discard(host, stored)?;
            }
        }
        Ok(())
    }
}

fn between(start: u64, end: u64) -> GuestRange {
    GuestRange::between(GuestOffset::new(start), GuestOffset::new(end))
}
