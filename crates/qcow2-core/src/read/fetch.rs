//! From extents to bytes: reads through the ports.

use crate::error::{Error, ErrorKind, Result};
use crate::image::Image;
use crate::invariant;
use crate::meta::page::SECTOR_SIZE;
use crate::port::event::Event;
use crate::read::resolve::Place;
use ::alloc::format;
use ::alloc::vec;
use qcow2_format::l2::CompressedCluster;
use qcow2_format::{GuestOffset, GuestRange};

impl Image {
    /// Fills `buf` with the guest bytes at `offset`, from this layer and its backing chain. The caller has
    /// checked the range and runs inside an operation.
    pub(crate) fn read_range(&self, offset: GuestOffset, buf: &mut [u8]) -> Result<()> {
        let (mut at, mut rest) = (offset.value(), buf);
        while !rest.is_empty() {
            let here = GuestOffset::new(at);
            let run = self.mapping().lookup(here, rest.len() as u64)?;
            invariant::covers(&run, rest.len() as u64);
            let (part, next) = rest.split_at_mut(run.len as usize);
            self.read_place(here, run.place, part)?;
            at += run.len;
            rest = next;
        }
        Ok(())
    }

    /// Fills `part` with the bytes at `here`, which are stored at `place` in this layer, or come from below.
    #[inline]
    pub(crate) fn read_place(&self, here: GuestOffset, place: Place, part: &mut [u8]) -> Result<()> {
        match place {
            Place::Zero { .. } => part.fill(0),
            Place::Unallocated => self.read_backing(here, part)?,
            Place::Data { host, .. } if self.crypt.is_plain() => {
                self.file.event(Event::ReadAio);
                self.file.data()?.read_padded(host, part)?;
            }
            Place::Data { host, .. } => {
                self.file.event(Event::ReadAio);
                self.read_encrypted(here, host, part)?;
            }
            Place::Compressed(stream) => self.read_compressed(here, stream, part)?,
        }
        Ok(())
    }

    /// Reads unallocated bytes: from the backing file up to its end, then zeroes.
    fn read_backing(&self, offset: GuestOffset, buf: &mut [u8]) -> Result<()> {
        let Some(backing) = &self.backing else {
            if self.backing_unopened {
                return Err(Error::new(ErrorKind::Resolve, "the backing file was not opened"));
            }
            buf.fill(0);
            return Ok(());
        };
        let there = backing.size().saturating_sub(offset.value()).min(buf.len() as u64);
        let (part, past) = buf.split_at_mut(there as usize);
        past.fill(0);
        if part.is_empty() {
            return Ok(());
        }
        self.file.event(Event::ReadBackingAio);
        backing.read_at(offset, part)
    }

    fn read_compressed(&self, offset: GuestOffset, stream: CompressedCluster, buf: &mut [u8]) -> Result<()> {
        let geometry = self.file.geometry();
        let inside = geometry.in_cluster(offset.value()) as usize;
        let cluster_size = geometry.cluster_size() as usize;
        debug_assert!(inside + buf.len() <= cluster_size, "a run of a compressed cluster passes its end");
        if let Some(cluster) = self.mapping().expanded().find(stream) {
            buf.copy_from_slice(&cluster[inside..inside + buf.len()]);
            return Ok(());
        }
        if buf.len() == cluster_size {
            return self.expand(offset, stream, buf);
        }
        let mut cluster = vec![0; cluster_size];
        self.expand(offset, stream, &mut cluster)?;
        buf.copy_from_slice(&cluster[inside..inside + buf.len()]);
        self.mapping().expanded().keep(stream, cluster);
        Ok(())
    }

    fn expand(&self, offset: GuestOffset, stream: CompressedCluster, cluster: &mut [u8]) -> Result<()> {
        debug_assert_eq!(cluster.len() as u64, self.file.geometry().cluster_size());
        let codec = self.codec()?;
        // The entry gives the length in whole sectors, and a hostile one far too many. A valid stream needs
        // at most its cluster and a sector; the rest of the limit is slack.
        let limit = 2 * self.file.geometry().cluster_size() + SECTOR_SIZE;
        let len = stream.len.min(limit) as usize;
        let mut bytes = self.scratch.take(len);
        self.file.event(Event::ReadCompressed);
        self.file.storage().read_padded(stream.host, &mut bytes[..len])?;
        let result = codec.expand(&bytes[..len], cluster).map_err(|e| {
            Error::corrupt(format!(
                "compressed cluster of guest offset {offset} at host offset {} does not expand",
                stream.host
            ))
            .at_guest(offset)
            .at_host(stream.host)
            .with_source(e)
        });
        self.scratch.give(bytes);
        result
    }

    /// True if the tables of this layer and the chain show that `range` reads as zeroes. Reads no data.
    pub(crate) fn reads_zero(&self, range: GuestRange) -> Result<bool> {
        let (mut at, end) = (range.start().value(), range.end().value());
        while at < end {
            let run = self.mapping().lookup(GuestOffset::new(at), end - at)?;
            let zero = match run.place {
                Place::Zero { .. } => true,
                Place::Unallocated => self.backing_reads_zero(at, run.len)?,
                Place::Data { .. } | Place::Compressed(_) => false,
            };
            if !zero {
                return Ok(false);
            }
            at += run.len;
        }
        Ok(true)
    }

    /// True if the tables of the backing chain show that `len` bytes at `offset` read as zeroes there.
    pub(crate) fn backing_reads_zero(&self, offset: u64, len: u64) -> Result<bool> {
        let Some(backing) = &self.backing else { return Ok(!self.backing_unopened) };
        let end = backing.size().min(offset.saturating_add(len));
        let range = GuestRange::between(GuestOffset::new(offset), GuestOffset::new(end));
        crate::chain::reads_zero(&**backing, range)
    }
}
