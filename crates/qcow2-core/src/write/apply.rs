//! Carries a write plan out: prepare the place, move the bytes, commit the mapping.
//!
//! No metadata lock is held while data moves; what holds others back is the claim on the guest clusters alone.

use super::cow::{ClusterEdges, ranges_to_copy};
use super::plan::{WriteKind, WritePlan, kept_subclusters, plan_write, touched, written_entry};
use crate::error::{Error, Result};
use crate::image::Image;
use crate::meta::mapping::L2Place;
use crate::meta::pending::Unlinked;
use crate::port::disk::GuestDisk;
use crate::port::storage::ZeroMode;
use crate::read::resolve::Place;
use crate::sync::read;
use ::alloc::format;
use ::alloc::vec::Vec;
use qcow2_format::l2::L2Entry;
use qcow2_format::{GuestOffset, GuestRange, HostOffset};

/// The most bytes that are prepared as one run: long enough for large writes, short enough not to hold others back.
const MAX_RUN: u64 = 4 << 20;
/// Zeroes shorter than this are written rather than asked for.
const SHORT_ZEROES: usize = 32 << 10;

/// A prepared place for a run of clusters, to be filled and then committed.
struct Prepared {
    place: L2Place,
    old: Vec<L2Entry>,
    /// Where the first cluster of the run goes.
    host: HostOffset,
    /// The clusters were reserved for this write; given back if it fails.
    reserved: Option<(u64, u64)>,
    /// The place reads as zeroes already.
    fresh: bool,
}

impl Image {
    /// Writes `buf` at `offset`. The caller has checked the range and runs inside an operation.
    pub(crate) fn write_range(&self, offset: GuestOffset, buf: &[u8]) -> Result<()> {
        let (mut at, mut rest) = (offset.value(), buf);
        while !rest.is_empty() {
            let here = GuestOffset::new(at);
            let run = self.meta.lookup(here, rest.len() as u64)?;
            let done = match run.place {
                Place::Data { host, copied: true } => {
                    self.write_in_place(host, &rest[..run.len as usize])?;
                    run.len
                }
                _ => self.write_new(here, rest)?,
            };
            at += done;
            rest = &rest[done as usize..];
        }
        Ok(())
    }

    fn write_in_place(&self, host: HostOffset, buf: &[u8]) -> Result<()> {
        self.check_overlap(host, buf.len() as u64)?;
        Ok(self.meta.data()?.write_at(host, buf)?)
    }

    /// Refuses to write guest data over metadata: an entry that leads there is damaged.
    fn check_overlap(&self, host: HostOffset, len: u64) -> Result<()> {
        if self.meta.has_data_file() {
            return Ok(());
        }
        let geometry = &self.meta.geometry;
        let first = geometry.host_cluster(host).value();
        let count = geometry.clusters_for(geometry.in_cluster(host.value()) + len);
        match read(&self.meta.metadata_clusters).first_in(first, count) {
            None => Ok(()),
            Some(cluster) => Err(Error::corrupt(format!(
                "guest data is mapped to host cluster {cluster}, which holds metadata"
            ))),
        }
    }

    /// Writes a first part of `buf` where the mapping may have to change; returns its length.
    fn write_new(&self, offset: GuestOffset, buf: &[u8]) -> Result<u64> {
        let geometry = &self.meta.geometry;
        let len = (buf.len() as u64).min(MAX_RUN - geometry.in_cluster(offset.value()));
        let first = geometry.guest_cluster(offset).value();
        let last = geometry.guest_cluster(GuestOffset::new(offset.value() + len - 1)).value();
        let claim = self.meta.claims.claim(first, last + 1);
        let place = self.meta.writable_place(offset)?;
        let entry = |i| self.meta.entry(&place, i, offset);
        let plan = plan_write(&self.meta.l2_format, offset, len, place.entries(), entry)?;
        if let WriteKind::InPlace { host } = plan.kind {
            drop(claim);
            let inside = geometry.in_cluster(offset.value());
            self.write_in_place(HostOffset::new(host.value() + inside), &buf[..plan.len as usize])?;
            return Ok(plan.len);
        }
        let (plan, prepared) = self.prepare(offset, plan, place)?;
        let buf = &buf[..plan.len as usize];
        if let Err(error) = self.move_data(offset, &plan, &prepared, buf) {
            if let Some((first, count)) = prepared.reserved {
                self.meta.release(first, count)?;
            }
            return Err(error);
        }
        self.commit_write(offset, &plan, &prepared)?;
        Ok(plan.len)
    }

    /// Finds the place; a run that does not fit into one piece of the file is cut shorter.
    fn prepare(&self, offset: GuestOffset, plan: WritePlan, place: L2Place) -> Result<(WritePlan, Prepared)> {
        let geometry = &self.meta.geometry;
        let mut plan = plan;
        let (host, reserved, fresh) = match plan.kind {
            WriteKind::InPlace { host } | WriteKind::Fill { host } => {
                self.check_overlap(host, plan.clusters * geometry.cluster_size())?;
                let fresh = self.meta.has_data_file() && self.meta.data()?.len()? <= host.value();
                (host, None, fresh)
            }
            WriteKind::Allocate => {
                let reserved = self.meta.allocate(plan.clusters)?;
                plan.clusters = reserved.count;
                let room = reserved.count * geometry.cluster_size() - geometry.in_cluster(offset.value());
                plan.len = plan.len.min(room);
                (reserved.offset, Some((reserved.first, reserved.count)), reserved.fresh)
            }
        };
        let old = (0..plan.clusters).map(|i| self.meta.entry(&place, i, offset)).collect::<Result<_>>()?;
        Ok((plan, Prepared { place, old, host, reserved, fresh }))
    }

    /// Puts the write's bytes and those it needs around them into the prepared place.
    fn move_data(
        &self,
        offset: GuestOffset,
        plan: &WritePlan,
        prepared: &Prepared,
        buf: &[u8],
    ) -> Result<()> {
        let geometry = &self.meta.geometry;
        let base = geometry.align_down(offset.value());
        for index in [0, plan.clusters - 1].into_iter().take(plan.clusters.min(2) as usize) {
            let edges = self.edges(offset, plan, prepared, index);
            for range in ranges_to_copy(&self.meta.l2_format, &edges) {
                let host = HostOffset::new(prepared.host.value() + (range.start().value() - base));
                self.copy_up(range, host, prepared.fresh)?;
            }
        }
        let host = HostOffset::new(prepared.host.value() + geometry.in_cluster(offset.value()));
        Ok(self.meta.data()?.write_at(host, buf)?)
    }

    /// What the `index`-th cluster of the run needs.
    fn edges(&self, offset: GuestOffset, plan: &WritePlan, prepared: &Prepared, index: u64) -> ClusterEdges {
        let format = &self.meta.l2_format;
        let size = format.geometry.cluster_size();
        let inside = format.geometry.in_cluster(offset.value());
        let start = if index == 0 { inside } else { 0 };
        let end = (inside + plan.len - index * size).min(size);
        let written = touched(format, start, end - start);
        let old = &prepared.old[index as usize];
        let needed = match plan.kind {
            WriteKind::Allocate => written | kept_subclusters(format, old),
            WriteKind::Fill { .. } | WriteKind::InPlace { .. } => match old {
                L2Entry::Standard(cluster) if cluster.host.is_some() => written & !cluster.allocated,
                _ => written,
            },
        };
        let cluster = GuestOffset::new(format.geometry.align_down(offset.value()) + index * size);
        ClusterEdges { cluster, start, end, needed }
    }

    /// Copies guest bytes as they read now to `host`. Bytes past the end of the disk are zeroes.
    fn copy_up(&self, range: GuestRange, host: HostOffset, fresh: bool) -> Result<()> {
        let data = self.meta.data()?;
        let inside =
            GuestRange::between(range.start(), GuestOffset::new(range.end().value().min(self.size())));
        let zero = self.reads_zero(inside)?;
        if zero && fresh {
            return Ok(());
        }
        let len = range.len() as usize;
        if zero && len >= SHORT_ZEROES {
            return Ok(data.write_zeroes(host, range.len(), ZeroMode::KeepAllocated)?);
        }
        let mut bytes = self.scratch.take(len);
        let (part, past) = bytes[..len].split_at_mut(inside.len() as usize);
        past.fill(0);
        let result = if zero {
            part.fill(0);
            Ok(())
        } else {
            self.read_range(range.start(), part)
        };
        let result = result.and_then(|()| Ok(data.write_at(host, &bytes[..len])?));
        self.scratch.give(bytes);
        result
    }

    /// Makes the written clusters visible.
    fn commit_write(&self, offset: GuestOffset, plan: &WritePlan, prepared: &Prepared) -> Result<()> {
        let format = &self.meta.l2_format;
        let size = format.geometry.cluster_size();
        let mut unlinked = Vec::new();
        if plan.kind == WriteKind::Allocate {
            for old in &prepared.old {
                unlinked.extend(self.unlinked(old));
            }
        }
        let entry = |i: u64| {
            let edges = self.edges(offset, plan, prepared, i);
            let old = &prepared.old[i as usize];
            let written = touched(format, edges.start, edges.end - edges.start);
            let host = HostOffset::new(prepared.host.value() + i * size);
            written_entry(old, host, written, kept_subclusters(format, old))
        };
        self.meta.commit(&prepared.place, plan.clusters, &unlinked, entry)
    }

    /// The references that an entry holds.
    pub(crate) fn unlinked(&self, entry: &L2Entry) -> Option<Unlinked> {
        let geometry = &self.meta.geometry;
        let (start, len) = match entry {
            L2Entry::Standard(cluster) => (cluster.host?, geometry.cluster_size()),
            L2Entry::Compressed(stream) => (stream.host, stream.len),
        };
        let first = geometry.host_cluster(start).value();
        let last = geometry.host_cluster(HostOffset::new(start.value() + len.max(1) - 1)).value();
        Some(Unlinked { first, count: last - first + 1 })
    }
}
