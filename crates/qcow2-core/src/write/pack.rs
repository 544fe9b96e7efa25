//! Compressed writes: streams are stored one behind the other and share host clusters.
//!
//! A stream adds one to the refcount of each host cluster that it touches. Spec: "Compressed Clusters
//! Descriptor".

use crate::error::{Error, ErrorKind, Result};
use crate::image::Image;
use crate::meta::mapping::L2Place;
use crate::port::event::Event;
use ::alloc::format;
use ::alloc::vec::Vec;
use qcow2_format::l2::{ClusterEntry, CompressedCluster, L2Entry};
use qcow2_format::{GuestOffset, HostOffset};

/// A stream whose bytes in the file are reserved, and that no L2 entry points to yet.
struct Packed<'a> {
    place: L2Place,
    descriptor: CompressedCluster,
    stream: &'a [u8],
}

impl Image {
    /// Stores each stream as the cluster at its offset. Streams that follow each other in the file go out in
    /// one write. The caller has checked that the clusters are inside the disk. After an error the first
    /// streams may be stored.
    pub(crate) fn pack_streams(&self, streams: &[(GuestOffset, &[u8])]) -> Result<()> {
        self.check_streams(streams)?;
        let (Some((first, _)), Some((last, _))) = (streams.first(), streams.last()) else { return Ok(()) };
        let len = last.value().saturating_sub(first.value()) + 1;
        let _claim = self.mapping().claim(*first, len);
        let mut packed = Vec::with_capacity(streams.len());
        let reserved =
            streams.iter().try_for_each(|&(offset, stream)| self.reserve_stream(offset, stream, &mut packed));
        // After a failed reservation the streams before it are stored all the same, as if they had been
        // written one by one.
        let mut rest = &packed[..];
        while let Some(first) = rest.first() {
            let start = first.descriptor.host;
            let mut end = start.value();
            let run = rest.iter().take_while(|p| {
                let joins = p.descriptor.host.value() == end;
                end += p.descriptor.len;
                joins
            });
            let count = run.count();
            assert!(count > 0, "an empty run of compressed streams");
            let (run, later) = rest.split_at(count);
            let (linked, result) = self.store_run(start, run);
            if result.is_err() {
                for lost in run[linked..].iter().chain(later) {
                    self.release_stream(lost)?;
                }
                return result;
            }
            rest = later;
        }
        reserved
    }

    fn check_streams(&self, streams: &[(GuestOffset, &[u8])]) -> Result<()> {
        let geometry = self.file.geometry();
        let impossible_with = if !self.crypt.is_plain() {
            "encryption"
        } else if self.file.has_data_file() {
            "an external data file"
        } else {
            ""
        };
        if !impossible_with.is_empty() {
            let message = format!("compressed clusters are not possible with {impossible_with}");
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let mut next = 0;
        for (offset, stream) in streams {
            let len = stream.len() as u64;
            if !geometry.is_aligned(offset.value()) || len == 0 || len >= geometry.cluster_size() {
                let most = geometry.cluster_size() - 1;
                let message = format!(
                    "compressed stream of {len} bytes at {offset}: allowed are 1 to {most} bytes at a cluster"
                );
                return Err(Error::new(ErrorKind::InvalidOption, message));
            }
            if offset.value() < next {
                let message = format!("compressed stream at {offset}: streams must be in ascending order");
                return Err(Error::new(ErrorKind::InvalidOption, message));
            }
            next = offset.value() + 1;
        }
        Ok(())
    }

    fn reserve_stream<'a>(
        &self,
        offset: GuestOffset,
        stream: &'a [u8],
        packed: &mut Vec<Packed<'a>>,
    ) -> Result<()> {
        let place = self.mapping().writable_place(offset)?;
        if !is_free(&self.mapping().entry(&place, 0, offset)?) {
            let message = format!(
                "guest offset {offset} is allocated: a compressed write needs an unallocated cluster"
            );
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let len = stream.len() as u64;
        let descriptor = CompressedCluster { host: self.refcounts.reserve_packed(len)?, len };
        packed.push(Packed { place, descriptor, stream });
        Ok(())
    }

    /// Writes streams that follow each other at `start`, then sets their L2 entries. Returns for how many of
    /// them the entry was set.
    fn store_run(&self, start: HostOffset, run: &[Packed<'_>]) -> (usize, Result<()>) {
        run.iter().for_each(|_| self.file.event(Event::WriteCompressed));
        let bytes: Vec<&[u8]> = run.iter().map(|p| p.stream).collect();
        if let Err(error) = self.file.storage().write_vectored_at(start, &bytes) {
            return (0, Err(error.into()));
        }
        for (index, Packed { place, descriptor, .. }) in run.iter().enumerate() {
            let linked = self.mapping().commit(place, 1, &[], |_| L2Entry::Compressed(*descriptor));
            if linked.is_err() {
                return (index, linked);
            }
        }
        (run.len(), Ok(()))
    }

    fn release_stream(&self, packed: &Packed<'_>) -> Result<()> {
        match self.unlinked(&L2Entry::Compressed(packed.descriptor)) {
            Some(run) => self.refcounts.release(run),
            None => Ok(()),
        }
    }
}

fn is_free(entry: &L2Entry) -> bool {
    matches!(entry, L2Entry::Standard(ClusterEntry { host: None, .. }))
}
