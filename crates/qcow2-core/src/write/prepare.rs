//! The first half of a write: reserves clusters for its bytes and collects the copy-on-write edges.
//!
//! Invariant: between prepare and commit the guest clusters are claimed, so that no other request changes
//! their mapping; readers use the old mapping. Reserved clusters that are not committed are freed exactly
//! once.

use super::cow::{ClusterEdges, ranges_to_copy};
use super::plan::{WriteKind, WritePlan, kept_subclusters, plan_write, touched, written_entry};
use crate::error::Result;
use crate::image::Image;
use crate::inflight::{Claim, touched_clusters};
use crate::invariant;
use crate::meta::mapping::L2Place;
use crate::meta::page::SECTOR_SIZE;
use crate::meta::pending::Unlinked;
use crate::meta::run::ClusterRun;
use crate::port::event::Event;
use crate::port::storage::StorageErrorKind;
use crate::read::resolve::Place;
use ::alloc::vec;
use ::alloc::vec::Vec;
use core::ops::Range;
use qcow2_format::l2::L2Entry;
use qcow2_format::{GuestOffset, GuestRange, HostOffset};

/// Bytes of a run at most: long enough for large writes, short enough not to hold back other writers.
const MAX_RUN: u64 = 4 << 20;
/// Zero edges up to this length are bytes in memory, so that they go out in one write with their neighbours.
const SHORT_ZEROES: u64 = 32 << 10;

/// A copy-on-write edge: bytes beside the write that must be written to its host clusters too.
#[derive(Debug)]
pub(crate) enum Edge {
    /// These bytes at `host`.
    Bytes { host: HostOffset, bytes: Vec<u8> },
    /// `len` zeroes at `host`.
    Zeroes { host: HostOffset, len: u64 },
}

impl Edge {
    /// The host bytes that it covers.
    fn host_bytes(&self) -> Range<u64> {
        match self {
            Self::Bytes { host, bytes } => host.value()..host.value() + bytes.len() as u64,
            Self::Zeroes { host, len } => host.value()..host.value() + len,
        }
    }

    /// Bytes of memory that it takes.
    pub(crate) fn held(&self) -> usize {
        match self {
            Self::Bytes { bytes, .. } => bytes.len(),
            Self::Zeroes { .. } => 0,
        }
    }
}

/// A prepared write of a first part of a request.
pub(crate) struct Prepared<'a> {
    image: &'a Image,
    /// How many bytes of the request were prepared.
    pub(crate) len: u64,
    /// The host offset to write them to.
    pub(crate) host: HostOffset,
    /// What must be written too before the commit, in host order.
    pub(crate) edges: Vec<Edge>,
    /// Whether edges were read, and are no zeroes.
    pub(crate) copies: bool,
    change: Option<Change<'a>>,
    /// For an in-place write: keeps the mapping from changing.
    _in_place: Option<Claim<'a>>,
}

/// What the commit changes.
struct Change<'a> {
    offset: GuestOffset,
    plan: WritePlan,
    place: L2Place,
    old: Vec<L2Entry>,
    /// Host offset of the run's first cluster.
    base: HostOffset,
    /// The host clusters, if they were allocated for this write.
    reserved: Option<Unlinked>,
    /// True if the host clusters read as zeroes already.
    fresh: bool,
    _claim: Claim<'a>,
}

impl Image {
    /// Prepares a first part of a write of `len` bytes at `offset`. The caller has checked the range and runs
    /// inside an operation. Disk: may read L2 tables and the bytes around the write, may write a new L2
    /// table.
    pub(crate) fn prepare(&self, offset: GuestOffset, len: u64) -> Result<Prepared<'_>> {
        let geometry = self.file.geometry();
        let len = len.min(MAX_RUN - geometry.in_cluster(offset.value()));
        let run = self.mapping().lookup_to_change(offset, len)?;
        if let Place::Data { copied: true, host } = run.place
            && !self.goes_on(offset, (host, run.len), len)?
        {
            let mut claim = self.mapping().share(offset, run.len);
            // Looked up again: only under the claim the mapping cannot change.
            let run = self.mapping().lookup_to_change(offset, run.len)?;
            if let Place::Data { host, copied: true } = run.place {
                claim.narrow(touched_clusters(geometry, offset, run.len));
                return self.prepare_in_place(host, run.len, claim);
            }
        }
        let mut claim = self.mapping().claim(offset, len);
        let place = self.mapping().writable_place(offset)?;
        let entry = |i| self.mapping().entry(&place, i, offset);
        let plan = plan_write(self.file.l2_format(), offset, len, place.entries(), entry)?;
        assert!(plan.len > 0 && plan.len <= len && plan.clusters > 0, "{plan:?} for {len} bytes");
        if let WriteKind::InPlace { host } = plan.kind {
            let host = HostOffset::new(host.value() + geometry.in_cluster(offset.value()));
            claim.narrow(touched_clusters(geometry, offset, plan.len));
            return self.prepare_in_place(host, plan.len, claim);
        }
        let mut change = self.reserve_place(offset, plan, place, claim)?;
        match self.edges(&mut change) {
            Ok((edges, copies)) => {
                let host = HostOffset::new(change.base.value() + geometry.in_cluster(offset.value()));
                let len = change.plan.len;
                // The thread may prepare the rest while it holds this part.
                change._claim.narrow(touched_clusters(geometry, offset, len));
                let change = Some(change);
                Ok(Prepared { image: self, len, host, edges, copies, change, _in_place: None })
            }
            Err(error) => {
                self.give_back(&change)?;
                Err(error)
            }
        }
    }

    /// Whether a write of `len` bytes at `offset`, of which the first ones are data at a place, goes on right
    /// behind them in clusters that are allocated but not data: then all of it is one write.
    fn goes_on(&self, offset: GuestOffset, (host, run): (HostOffset, u64), len: u64) -> Result<bool> {
        if run >= len {
            return Ok(false);
        }
        let next = self.mapping().lookup(GuestOffset::new(offset.value() + run), len - run)?.place;
        Ok(match next {
            Place::Zero { host: Some(next) } => next.value() == host.value() + run,
            _ => false,
        })
    }

    /// `claim` covers no cluster behind the write.
    fn prepare_in_place<'a>(&'a self, host: HostOffset, len: u64, claim: Claim<'a>) -> Result<Prepared<'a>> {
        invariant::may_write(self.file.is_writable());
        debug_assert!(len > 0, "an empty write is prepared");
        self.tables.check_data_place(host, len)?;
        self.cover_sector(host.value() + len)?;
        let (edges, _in_place) = (Vec::new(), Some(claim));
        Ok(Prepared { image: self, len, host, edges, copies: false, change: None, _in_place })
    }

    /// Keeps the end of the file on a sector boundary. A write that ends inside a sector, at `end`, must not
    /// grow the file: length and bytes reach the disk separately, and a crash could leave half a sector.
    fn cover_sector(&self, end: u64) -> Result<()> {
        let sector_end = end.next_multiple_of(SECTOR_SIZE);
        let data = self.file.data()?;
        if end == sector_end || data.len()? >= sector_end {
            return Ok(());
        }
        match data.allocate(HostOffset::new(end), sector_end - end) {
            Err(error) if error.kind() != StorageErrorKind::Unsupported => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Allocates host clusters for the run, if `plan` needs new ones. Shortens the run if there is no free
    /// run of that length.
    fn reserve_place<'a>(
        &'a self,
        offset: GuestOffset,
        mut plan: WritePlan,
        place: L2Place,
        claim: Claim<'a>,
    ) -> Result<Change<'a>> {
        let geometry = self.file.geometry();
        let (base, reserved, fresh) = match plan.kind {
            WriteKind::InPlace { host } | WriteKind::Fill { host } => {
                self.tables.check_data_place(host, plan.clusters * geometry.cluster_size())?;
                // The last cluster of a run that is filled may be data, which needs no edge behind the write.
                self.cover_sector(host.value() + geometry.in_cluster(offset.value()) + plan.len)?;
                let fresh = self.file.has_data_file() && self.file.data()?.len()? <= host.value();
                (host, None, fresh)
            }
            WriteKind::Allocate => {
                let reserved = self.refcounts.allocate(plan.clusters)?;
                plan.clusters = reserved.run.count();
                let room = reserved.run.len(geometry) - geometry.in_cluster(offset.value());
                plan.len = plan.len.min(room);
                assert!(plan.clusters > 0 && plan.len > 0, "{plan:?} after {reserved:?}");
                (reserved.offset, Some(Unlinked::data(reserved.run)), reserved.fresh)
            }
        };
        let old = (0..plan.clusters).map(|i| self.mapping().entry(&place, i, offset)).collect::<Result<_>>();
        let change = Change { offset, plan, place, old: Vec::new(), base, reserved, fresh, _claim: claim };
        match old {
            Ok(old) => Ok(Change { old, ..change }),
            Err(error) => {
                self.give_back(&change)?;
                Err(error)
            }
        }
    }

    fn give_back(&self, change: &Change<'_>) -> Result<()> {
        change.reserved.map_or(Ok(()), |run| self.refcounts.release(run))
    }

    /// The copy-on-write edges, and whether any was read: only the first and the last cluster of a run can
    /// have some.
    fn edges(&self, change: &mut Change<'_>) -> Result<(Vec<Edge>, bool)> {
        let mut ranges = Vec::new();
        let last = change.plan.clusters - 1;
        for index in [0, last].into_iter().take(if last == 0 { 1 } else { 2 }) {
            ranges.extend(ranges_to_copy(self.file.l2_format(), &change.cluster_edges(self, index)));
        }
        let (mut edges, mut copies, zeroes) = (Vec::with_capacity(ranges.len()), false, !ranges.is_empty());
        for range in ranges {
            let (edge, copied) = self.edge(range, change)?;
            edges.extend(edge);
            copies |= copied;
        }
        if zeroes && !copies {
            self.file.event(Event::ClusterAllocSpace);
        }
        let base = change.base.value();
        let own = base + self.file.geometry().in_cluster(change.offset.value());
        let place = base..base + change.plan.clusters * self.file.geometry().cluster_size();
        invariant::edges_apart(edges.iter().map(Edge::host_bytes), own..own + change.plan.len, place);
        Ok((edges, copies))
    }

    /// One range of guest bytes as edges for the new host clusters, and whether it was read: it is not where
    /// it is known to be zeroes. Bytes past the end of the disk are zeroes.
    fn edge(&self, range: GuestRange, change: &Change<'_>) -> Result<(Vec<Edge>, bool)> {
        let base = self.file.geometry().align_down(change.offset.value());
        let host = HostOffset::new(change.base.value() + (range.start().value() - base));
        // The VM state lies past the end of the disk; its clusters are copied as a whole.
        let limit = if range.start().value() < self.vm_state_offset() { self.size() } else { u64::MAX };
        let inside = GuestRange::between(range.start(), GuestOffset::new(range.end().value().min(limit)));
        if self.crypt.is_plain() && self.has_nothing(inside)? {
            return Ok((zero_edges(host, range.len(), change.fresh), false));
        }
        let mut bytes = self.scratch.take_exact(range.len() as usize);
        let (part, past) = bytes.split_at_mut(inside.len() as usize);
        past.fill(0);
        self.file.event(Event::CowRead);
        self.read_range(range.start(), part)?;
        self.seal(range.start(), host, &mut bytes)?;
        Ok((vec![Edge::Bytes { host, bytes }], true))
    }

    /// True if `range` reads as zeroes because this layer has no data there and the backing file ends before
    /// it. Reads tables only.
    fn has_nothing(&self, range: GuestRange) -> Result<bool> {
        let (mut at, end) = (range.start().value(), range.end().value());
        let backing_end = self.backing.as_ref().map_or(0, |backing| backing.size());
        while at < end {
            let run = self.mapping().lookup(GuestOffset::new(at), end - at)?;
            let nothing = match run.place {
                Place::Zero { .. } => true,
                Place::Unallocated => at >= backing_end && !self.backing_unopened,
                Place::Data { .. } | Place::Compressed(_) => false,
            };
            if !nothing {
                return Ok(false);
            }
            at += run.len;
        }
        Ok(true)
    }

    /// The host clusters of the image file that `entry` refers to.
    pub(crate) fn unlinked(&self, entry: &L2Entry) -> Option<Unlinked> {
        if self.file.has_data_file() {
            return None;
        }
        let geometry = self.file.geometry();
        let (start, len) = match entry {
            L2Entry::Standard(cluster) => (cluster.host?, geometry.cluster_size()),
            L2Entry::Compressed(stream) => (stream.host, stream.len),
        };
        Some(Unlinked::data(ClusterRun::touched(geometry, start, len.max(1))))
    }
}

/// Edges for `len` zeroes at `host`. Parts of sectors are bytes, because they share a sector with the write's
/// own bytes, and a sector must be written in one piece; short runs are bytes too. `fresh`: the whole sectors
/// read as zeroes already and need no write.
fn zero_edges(host: HostOffset, len: u64, fresh: bool) -> Vec<Edge> {
    let bytes =
        |host: u64, len: u64| Edge::Bytes { host: HostOffset::new(host), bytes: vec![0; len as usize] };
    let (start, end) = (host.value(), host.value() + len);
    let first = start.next_multiple_of(SECTOR_SIZE).min(end);
    let last = (end - end % SECTOR_SIZE).max(first);
    if !fresh && len <= SHORT_ZEROES {
        return vec![bytes(start, len)];
    }
    let mut edges = Vec::new();
    if start < first {
        edges.push(bytes(start, first - start));
    }
    if !fresh && first < last {
        edges.push(Edge::Zeroes { host: HostOffset::new(first), len: last - first });
    }
    if last < end {
        edges.push(bytes(last, end - last));
    }
    edges
}

impl Change<'_> {
    /// What must be written to the `index`-th cluster of the run.
    fn cluster_edges(&self, image: &Image, index: u64) -> ClusterEdges {
        let format = image.file.l2_format();
        let size = format.geometry.cluster_size();
        let inside = format.geometry.in_cluster(self.offset.value());
        let start = if index == 0 { inside } else { 0 };
        let end = (inside + self.plan.len - index * size).min(size);
        debug_assert!(start < end, "the write has no byte in cluster {index} of its run");
        let written = touched(format, start, end - start);
        let old = &self.old[index as usize];
        let needed = match self.plan.kind {
            WriteKind::Allocate => written | kept_subclusters(format, old),
            WriteKind::Fill { .. } | WriteKind::InPlace { .. } => match old {
                L2Entry::Standard(cluster) if cluster.host.is_some() => written & !cluster.allocated,
                _ => written,
            },
        };
        let cluster = GuestOffset::new(format.geometry.align_down(self.offset.value()) + index * size);
        ClusterEdges { cluster, start, end, needed }
    }
}

impl Prepared<'_> {
    /// True if the commit changes the mapping; false for an in-place write.
    pub(crate) fn changes_mapping(&self) -> bool {
        self.change.is_some()
    }

    /// Makes the written clusters visible. The caller has written the bytes and all edges.
    pub(crate) fn commit(mut self) -> Result<()> {
        let image = self.image;
        for edge in self.edges.drain(..) {
            if let Edge::Bytes { bytes, .. } = edge {
                image.scratch.give(bytes);
            }
        }
        let Some(change) = self.change.as_ref() else { return Ok(()) };
        let format = image.file.l2_format();
        let size = format.geometry.cluster_size();
        let mut unlinked = Vec::new();
        if change.plan.kind == WriteKind::Allocate {
            unlinked.extend(change.old.iter().filter_map(|old| image.unlinked(old)));
        }
        let was_copied = |old: &L2Entry| matches!(old, L2Entry::Standard(cluster) if cluster.copied);
        let all_copied = change.old.iter().all(was_copied);
        invariant::ours_alone(change.reserved.is_some(), all_copied, image.file.has_data_file());
        debug_assert_eq!(change.old.len() as u64, change.plan.clusters);
        let entry = |i: u64| {
            let edges = change.cluster_edges(image, i);
            let old = &change.old[i as usize];
            let written = touched(format, edges.start, edges.end - edges.start);
            let host = HostOffset::new(change.base.value() + i * size);
            written_entry(old, host, written, kept_subclusters(format, old))
        };
        image.mapping().commit(&change.place, change.plan.clusters, &unlinked, entry)?;
        self.change = None;
        Ok(())
    }
}

impl Drop for Prepared<'_> {
    fn drop(&mut self) {
        let change = self.change.take();
        if let Some(run) = change.as_ref().and_then(|change| change.reserved) {
            // `free`, not `release`: some bytes may be written, and on a full disk the space is needed. If
            // the refcount cannot be lowered the clusters leak, which is harmless.
            let _ = self.image.flusher.free(&[run]);
        }
    }
}
