//! Where compressed streams go: one behind the other, sharing host clusters.
//!
//! Each host cluster that a stream touches has one reference for it. Spec: "Compressed Clusters Descriptor".

use crate::error::{Error, ErrorKind, Result};
use crate::image::Image;
use crate::meta::Meta;
use crate::port::event::Event;
use crate::sync::lock;
use ::alloc::format;
use qcow2_format::l2::{ClusterEntry, CompressedCluster, L2Entry};
use qcow2_format::{GuestOffset, HostOffset};

impl Image {
    /// Stores `stream` as the cluster at `offset`. The caller has checked that the cluster is inside the disk.
    pub(crate) fn pack_stream(&self, offset: GuestOffset, stream: &[u8]) -> Result<()> {
        let geometry = &self.meta.geometry;
        if !self.crypt.is_plain() {
            let message = "compressed clusters are not possible with encryption";
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        if self.meta.has_data_file() {
            let message = "compressed clusters are not possible with an external data file";
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        if !geometry.is_aligned(offset.value())
            || stream.is_empty()
            || stream.len() as u64 >= geometry.cluster_size()
        {
            let message =
                format!("compressed stream of {} bytes at {offset}: not a smaller cluster", stream.len());
            return Err(Error::new(ErrorKind::InvalidOption, message));
        }
        let first = geometry.guest_cluster(offset).value();
        let _claim = self.meta.claims.claim(first, first + 1);
        let place = self.meta.writable_place(offset)?;
        if !is_free(&self.meta.entry(&place, 0, offset)?) {
            let message =
                format!("guest offset {offset} is allocated: a compressed write needs an unused cluster");
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let host = self.meta.reserve_packed(stream.len() as u64)?;
        let descriptor = CompressedCluster { host, len: stream.len() as u64 };
        self.meta.event(Event::WriteCompressed);
        let written = self.meta.storage.write_at(host, stream).map_err(Error::from);
        let result =
            written.and_then(|()| self.meta.commit(&place, 1, &[], |_| L2Entry::Compressed(descriptor)));
        if result.is_err()
            && let Some(run) = self.unlinked(&L2Entry::Compressed(descriptor))
        {
            self.meta.release(run.first, run.count)?;
        }
        result
    }
}

fn is_free(entry: &L2Entry) -> bool {
    matches!(entry, L2Entry::Standard(ClusterEntry { host: None, .. }))
}

impl Meta {
    /// Reserves `len` bytes for a stream, less than a cluster: behind the last stream where its cluster has room or the
    /// next one can be had, else at the start of a new cluster.
    fn reserve_packed(&self, len: u64) -> Result<HostOffset> {
        let size = self.geometry.cluster_size();
        if let Some((start, end)) = self.join_pack()?
            && let Some(host) = self.extend_packed(start, end, len)?
        {
            return Ok(host);
        }
        let reserved = self.allocate(1)?;
        let start = reserved.offset.value();
        self.set_pack(start + len, start + size);
        Ok(reserved.offset)
    }

    /// Takes the place behind the last stream and adds a reference to its host cluster: in one step, because the cluster
    /// may be freed, and used for something else, as soon as nobody holds one.
    fn join_pack(&self) -> Result<Option<(u64, u64)>> {
        let mut refcounts = lock(&self.refcounts);
        let Some((start, end)) = refcounts.pack.take() else { return Ok(None) };
        let first = start >> self.geometry.cluster_bits();
        if start >= end || self.refcount_of(&refcounts, first)? == 0 {
            return Ok(None);
        }
        match self.raise(&refcounts, first, 1) {
            Ok(()) => Ok(Some((start, end))),
            Err(error) if error.kind() == ErrorKind::NoSpace => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// A place for `len` bytes from `start` on, in a cluster that ends at `end` and has been joined.
    fn extend_packed(&self, start: u64, end: u64, len: u64) -> Result<Option<HostOffset>> {
        let size = self.geometry.cluster_size();
        let first = start >> self.geometry.cluster_bits();
        if len <= end - start {
            self.set_pack(start + len, end);
            return Ok(Some(HostOffset::new(start)));
        }
        if self.reserve_at(end >> self.geometry.cluster_bits())? {
            self.set_pack(start + len, end + size);
            return Ok(Some(HostOffset::new(start)));
        }
        self.release(first, 1)?;
        Ok(None)
    }

    fn set_pack(&self, start: u64, end: u64) {
        lock(&self.refcounts).pack = (start < end).then_some((start, end));
    }
}
