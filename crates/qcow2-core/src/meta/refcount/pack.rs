//! Allocation for compressed streams, which follow each other and share host clusters.
//!
//! A stream adds one to the refcount of each host cluster that it touches. Spec: "Compressed Clusters
//! Descriptor".

use super::RefcountStore;
use crate::error::{ErrorKind, Result};
use crate::meta::pending::Unlinked;
use crate::meta::run::ClusterRun;
use crate::sync::lock;
use core::ops::Range;
use qcow2_format::HostOffset;

impl RefcountStore {
    /// Reserves `len` bytes for a stream, less than a cluster: directly behind the last stream, if its
    /// cluster has enough space or the next cluster is free, else at the start of a new cluster.
    pub(crate) fn reserve_packed(&self, len: u64) -> Result<HostOffset> {
        debug_assert!(len > 0 && len < self.geometry().cluster_size(), "a stream of {len} bytes");
        if let Some(room) = self.join_pack()?
            && let Some(host) = self.extend_packed(room, len)?
        {
            return Ok(host);
        }
        let reserved = self.allocate_for_streams()?;
        let start = reserved.offset.value();
        self.set_pack(start + len..start + self.geometry().cluster_size());
        Ok(reserved.offset)
    }

    /// The host offset behind the last stream, if its cluster has space left.
    pub(crate) fn next_packed(&self) -> Option<u64> {
        lock(&self.state).pack.as_ref().map(|room| room.start)
    }

    /// Takes the space behind the last stream and adds a reference to its host cluster. Both under one lock:
    /// without a reference the cluster could be freed and reused in between.
    fn join_pack(&self) -> Result<Option<Range<u64>>> {
        let mut refcounts = lock(&self.state);
        let Some(room) = refcounts.pack.take() else { return Ok(None) };
        let first = self.cluster_at(room.start);
        if room.is_empty() || self.count_in(&refcounts, first)? == 0 {
            return Ok(None);
        }
        match self.raise(&refcounts, ClusterRun::one(first)) {
            Ok(()) => Ok(Some(room)),
            Err(error) if error.kind() == ErrorKind::NoSpace => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Reserves `len` bytes at `room.start`, in a cluster that ends at `room.end` and already has the new
    /// stream's reference. Takes the next cluster too if they do not fit; `None` if that is not free.
    fn extend_packed(&self, room: Range<u64>, len: u64) -> Result<Option<HostOffset>> {
        let start = HostOffset::new(room.start);
        if len <= room.end - room.start {
            self.set_pack(room.start + len..room.end);
            return Ok(Some(start));
        }
        if self.reserve_at(self.geometry().clusters_below(room.end))? {
            self.set_pack(room.start + len..room.end + self.geometry().cluster_size());
            return Ok(Some(start));
        }
        self.release(Unlinked::data(ClusterRun::one(self.cluster_at(room.start))))?;
        Ok(None)
    }

    fn cluster_at(&self, host: u64) -> u64 {
        self.geometry().host_cluster(HostOffset::new(host)).value()
    }

    fn set_pack(&self, room: Range<u64>) {
        debug_assert!(
            room.start <= room.end && self.geometry().is_aligned(room.end),
            "free bytes {room:?} for streams do not end at a cluster boundary"
        );
        lock(&self.state).pack = Some(room).filter(|room| !room.is_empty());
    }
}
