//! An open qcow2 image: guest I/O, flush, resize, close; each call is a short list of steps.
//!
//! All calls take `&self`, and any number of threads may make them concurrently.

use crate::bitmap::Bitmaps;
use crate::crypt::Crypt;
use crate::error::{Error, ErrorKind, Result};
use crate::meta::bulk::Bulk;
use crate::meta::file::ImageFile;
use crate::meta::flush::Flusher;
use crate::meta::header::HeaderStore;
use crate::meta::mapping::Mapping;
use crate::meta::page::SECTOR_SIZE;
use crate::meta::refcount::RefcountStore;
use crate::meta::tables::Tables;
use crate::port::codec::ClusterCodec;
use crate::port::disk::{DiskExtent, ExtentState, GuestDisk};
use crate::port::storage::{Storage, ZeroMode};
use crate::read::expanded::Scratch;
use crate::read::resolve::{Place, Run};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{RwLock, read, write};
use crate::write::plan::ZeroKind;
use ::alloc::format;
use ::alloc::string::String;
use ::alloc::sync::Arc;
use core::any::Any;
use qcow2_format::{Geometry, GuestOffset, GuestRange, Header};

/// An open qcow2 image and its backing chain.
pub struct Image {
    pub(crate) file: Arc<ImageFile>,
    pub(crate) header: Arc<HeaderStore>,
    pub(crate) tables: Arc<Tables>,
    pub(crate) refcounts: Arc<RefcountStore>,
    pub(crate) flusher: Flusher,
    pub(crate) size: AtomicU64,
    pub(crate) backing: Option<Arc<dyn GuestDisk>>,
    /// True if the header names a backing file that was not opened.
    pub(crate) backing_unopened: bool,
    pub(crate) codec: Option<Arc<dyn ClusterCodec>>,
    pub(crate) scratch: Scratch,
    pub(crate) crypt: Crypt,
    /// Read-locked by every guest request, write-locked by changes of the whole image (close, snapshots,
    /// resize).
    pub(crate) structure: RwLock<()>,
    pub(crate) bitmaps: Bitmaps,
    /// True if the external data file is the guest disk byte for byte, so that zeroes must be written there
    /// too.
    pub(crate) raw_data_file: bool,
    /// True if discarded and zeroed clusters keep their host clusters.
    pub(crate) discard_no_unref: bool,
}

impl Image {
    /// The header as it is now.
    pub fn header(&self) -> Header {
        self.header.current()
    }

    /// The image's geometry.
    pub fn geometry(&self) -> Geometry {
        *self.file.geometry()
    }

    /// The image file.
    pub fn storage(&self) -> &Arc<dyn Storage> {
        self.file.shared_storage()
    }

    /// The storage of guest data: the image file or the external data file; `None` if that was not opened.
    pub fn data_storage(&self) -> Option<&Arc<dyn Storage>> {
        self.file.opened_data()
    }

    /// The codec of this image's compression type. Errors: `Unsupported` if the open options had none.
    pub fn codec(&self) -> Result<&Arc<dyn ClusterCodec>> {
        self.codec.as_ref().ok_or_else(|| {
            let kind = self.header().compression_type;
            Error::new(ErrorKind::Unsupported, format!("no codec for compression type {kind:?}"))
        })
    }

    /// The backing file's name and format in the header.
    pub fn backing_reference(&self) -> Option<(String, Option<String>)> {
        let header = self.header();
        let name = header.backing_file_name().filter(|name| !name.is_empty())?;
        Some((name, header.extensions.backing_format_name()))
    }

    pub(crate) fn with_backing(mut self, backing: Option<Arc<dyn GuestDisk>>) -> Self {
        if backing.is_some() || self.backing_reference().is_none() {
            self.backing_unopened = false;
        }
        self.backing = backing;
        self
    }

    /// Closes the image. Waits for running requests, flushes, frees all unlinked clusters, stores the
    /// bitmaps, clears the dirty bit, and pads the file to a whole cluster (or sector). Later changes fail
    /// with `Poisoned`; reads still work. Call it before the last reference is dropped: without it flushed
    /// data is safe, but clusters may leak and changed bitmaps are lost. Errors: `Storage`, `NoSpace`,
    /// `Poisoned`.
    pub fn close(&self) -> Result<()> {
        let _alone = write(&self.structure);
        if !self.file.is_writable() {
            return Ok(());
        }
        self.file.check_writable()?;
        if self.header.is_changing() {
            self.pad_file()?;
        }
        // Bitmaps after all changes that they record; the dirty bit after everything that it warns of.
        self.flusher.settle()?;
        // No operation is running, so no unlinked cluster can still be in use.
        debug_assert!(self.refcounts.is_settled(), "clusters wait to be freed when the image is closed");
        self.store_bitmaps()?;
        self.header.retract_warnings()?;
        self.file.poison();
        Ok(())
    }

    /// The mapping of guest ranges to host offsets.
    pub(crate) fn mapping(&self) -> &Mapping {
        self.flusher.mapping()
    }

    /// Changes of whole trees of L2 tables and their clusters. The caller holds the structure lock for
    /// writing.
    pub(crate) fn bulk(&self) -> Bulk<'_> {
        Bulk::new(&self.tables, &self.refcounts, &self.flusher)
    }

    /// Rebuilds the map of clusters that hold metadata from the tables on disk.
    pub(crate) fn learn_metadata(&self) -> Result<()> {
        let (_, l1) = self.mapping().l1_contents();
        self.refcounts.with_table(|refcount_table| self.tables.learn(&l1, refcount_table))
    }

    /// Pads the image file to a whole cluster or sector; see [`ImageFile::pad_end`].
    pub(crate) fn pad_file(&self) -> Result<()> {
        self.file.pad_end(self.refcounts.next_packed(), SECTOR_SIZE)
    }

    pub(crate) fn check_range(&self, start: GuestOffset, len: u64) -> Result<GuestRange> {
        let size = self.size();
        GuestRange::new(start, len).filter(|range| range.end().value() <= size).ok_or_else(|| {
            let message =
                format!("{len} bytes at guest offset {start} pass the end of the disk at {size:#x}");
            Error::new(ErrorKind::OutOfRange, message).at_guest(start)
        })
    }

    /// Checks that `len` bytes at `start` are inside the disk and that the image can be changed.
    pub(crate) fn check_change(&self, start: GuestOffset, len: u64) -> Result<GuestRange> {
        let range = self.check_range(start, len)?;
        self.file.check_writable()?;
        Ok(range)
    }

    /// The extent of this layer at `range.start()`. The caller runs inside an operation.
    pub(crate) fn extent_of(&self, range: GuestRange) -> Result<DiskExtent> {
        Ok(self.extent_from(self.mapping().lookup(range.start(), range.len())?))
    }

    pub(crate) fn extent_from(&self, run: Run) -> DiskExtent {
        let plain = self.crypt.is_plain();
        let state = match run.place {
            Place::Unallocated => ExtentState::Unallocated,
            Place::Zero { host } => ExtentState::Zero { host: host.filter(|_| plain) },
            Place::Data { host, .. } => ExtentState::Data { host: plain.then_some(host) },
            Place::Compressed(_) => ExtentState::Compressed,
        };
        DiskExtent { len: run.len, state }
    }

    fn change(
        &self,
        start: GuestOffset,
        len: u64,
        make: impl FnOnce(GuestRange) -> Result<()>,
    ) -> Result<()> {
        let range = self.check_change(start, len)?;
        {
            // Released before the flush: an operation that is still running keeps the epoch from advancing,
            // and the flush could then free less.
            let _structure = read(&self.structure);
            let _operation = self.flusher.enter();
            let _sectors = self.crypt.hold(range);
            self.begin_change()?;
            self.bitmaps.mark(range);
            make(range)?;
        }
        self.flusher.flush_if_pressed()
    }

    /// Compresses and writes one cluster; if it does not get smaller, writes it uncompressed. `offset`:
    /// cluster aligned. `cluster`: the bytes of the whole cluster; at the end of the disk only as many as the
    /// disk has. Disk: as [`write_compressed_stream`](Self::write_compressed_stream).
    ///
    /// Errors: `InvalidOption` for a part of a cluster; `Unsupported` without a codec, with an external data
    /// file, with encryption, or if the cluster is allocated already; as [`write_at`](Self::write_at).
    pub fn write_compressed(&self, offset: GuestOffset, cluster: &[u8]) -> Result<()> {
        let size = self.file.geometry().cluster_size() as usize;
        let whole = cluster.len() == size
            || offset.checked_add(cluster.len() as u64) == Some(GuestOffset::new(self.size()));
        if !self.file.geometry().is_aligned(offset.value()) || !whole || cluster.len() > size {
            let message = format!(
                "compressed write of {} bytes at {offset}: allowed are whole clusters",
                cluster.len()
            );
            return Err(Error::new(ErrorKind::InvalidOption, message));
        }
        let mut plain = self.scratch.take(size);
        plain[..cluster.len()].copy_from_slice(cluster);
        plain[cluster.len()..size].fill(0);
        // One byte short of a cluster: a stream as long as the cluster saves nothing.
        let mut out = self.scratch.take(size);
        let stream = self.codec()?.compress(&plain[..size], &mut out[..size - 1])?;
        let result = match stream {
            Some(len) => self.write_compressed_stream(offset, &out[..len]),
            None => self.write_at(offset, cluster),
        };
        self.scratch.give(plain);
        self.scratch.give(out);
        result
    }

    /// Stores a compressed cluster. `offset`: cluster aligned. `stream`: the output of [`codec`](Self::codec)
    /// for the cluster's bytes, shorter than a cluster. The cluster must have no host cluster: unallocated or
    /// zero. Disk: writes the stream behind the last one; mapping and refcounts follow with the next flush.
    /// Errors: as [`write_compressed`](Self::write_compressed).
    pub fn write_compressed_stream(&self, offset: GuestOffset, stream: &[u8]) -> Result<()> {
        self.write_compressed_streams(&[(offset, stream)])
    }

    /// Stores several compressed clusters, in ascending order of their offsets: the same as
    /// [`write_compressed_stream`](Self::write_compressed_stream) for each, with fewer and longer writes.
    /// After an error the first ones may be stored.
    pub fn write_compressed_streams(&self, streams: &[(GuestOffset, &[u8])]) -> Result<()> {
        let (Some(&(first, _)), Some(&(last, _))) = (streams.first(), streams.last()) else { return Ok(()) };
        let end = last.value().saturating_add(self.file.geometry().cluster_size()).min(self.size());
        self.change(first, end.saturating_sub(first.value()), |_| self.pack_streams(streams))
    }
}

impl dyn GuestDisk + '_ {
    /// This disk as a qcow2 image, or `None` if it is of another kind.
    pub fn as_image(&self) -> Option<&Image> {
        self.as_any()?.downcast_ref()
    }
}

/// Guest I/O: the methods of [`GuestDisk`], usable without importing the trait.
impl Image {
    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Fills `buf` with the guest bytes at `offset`; unallocated clusters come from the backing chain.
    /// Errors: `OutOfRange`, `Corrupt`, `Encrypted` without a key, `Resolve` if the backing file or data file
    /// was not opened, `Unsupported` without a codec, `Storage`.
    pub fn read_at(&self, offset: GuestOffset, buf: &mut [u8]) -> Result<()> {
        self.check_range(offset, buf.len() as u64)?;
        let _structure = read(&self.structure);
        let _operation = self.flusher.enter();
        self.read_range(offset, buf)
    }

    /// Writes `buf` at guest offset `offset`. Durable after the next [`flush`](Self::flush). After `NoSpace`
    /// a first part may be written; the image stays usable, and the write can be repeated. Errors:
    /// `OutOfRange`, `ReadOnly`, `NoSpace`, `Corrupt`, `Poisoned`, `Storage`.
    pub fn write_at(&self, offset: GuestOffset, buf: &[u8]) -> Result<()> {
        self.change(offset, buf.len() as u64, |range| self.write_range(range.start(), buf))
    }

    /// Writes each part at its guest offset. Faster than single calls if the parts ascend and no two touch
    /// the same cluster. Errors: as [`write_at`](Self::write_at); any of the parts may be written then.
    pub fn write_parts(&self, parts: &[(GuestOffset, &[u8])]) -> Result<()> {
        if !self.crypt.is_plain() {
            return parts.iter().try_for_each(|(offset, buf)| self.write_at(*offset, buf));
        }
        self.file.check_writable()?;
        for (offset, buf) in parts {
            self.check_range(*offset, buf.len() as u64)?;
        }
        {
            let _structure = read(&self.structure);
            let _operation = self.flusher.enter();
            self.begin_change()?;
            for (offset, buf) in parts {
                self.bitmaps.mark(self.check_range(*offset, buf.len() as u64)?);
            }
            self.write_batches(parts)?;
        }
        self.flusher.flush_if_pressed()
    }

    /// Makes `range` read as zeroes, without writing data if the mapping can record it. Errors: as
    /// [`write_at`](Self::write_at).
    pub fn write_zeroes(&self, range: GuestRange, mode: ZeroMode) -> Result<()> {
        let kind = match mode {
            ZeroMode::KeepAllocated => ZeroKind::Keep,
            ZeroMode::MayUnmap => ZeroKind::Unmap,
        };
        self.change(range.start(), range.len(), |range| self.zero_range(range, kind))
    }

    /// Discards `range`: frees its whole clusters. They read as zeroes afterwards, or as before if the image
    /// cannot record that (version 2 with a backing file). Parts of clusters do not change. Errors: as
    /// [`write_at`](Self::write_at).
    pub fn discard(&self, range: GuestRange) -> Result<()> {
        self.change(range.start(), range.len(), |range| self.zero_range(range, ZeroKind::Discard))
    }

    /// Makes all changes durable whose calls returned before this one. Errors: `NoSpace`, `Poisoned`,
    /// `Storage`.
    pub fn flush(&self) -> Result<()> {
        if !self.file.is_writable() {
            return Ok(());
        }
        let _structure = read(&self.structure);
        self.file.check_writable()?;
        self.flusher.flush()
    }

    /// How this layer stores the bytes at `range.start()`: an extent of at most `range.len()` bytes. Disk:
    /// may read tables. Errors: `OutOfRange`, `Corrupt`, `Storage`.
    pub fn extent_at(&self, range: GuestRange) -> Result<DiskExtent> {
        self.check_range(range.start(), range.len())?;
        let _structure = read(&self.structure);
        let _operation = self.flusher.enter();
        self.extent_of(range)
    }

    /// How many bytes from `range.start()` on have no data in this layer, at most `range.len()`: they are
    /// unallocated or zeroes, by turns too, which are many extents. 0 if there is data; less than all there
    /// are if it would take long to find them. Disk: may read tables. Errors: as
    /// [`extent_at`](Self::extent_at).
    pub fn len_without_data(&self, range: GuestRange) -> Result<u64> {
        self.check_range(range.start(), range.len())?;
        let _structure = read(&self.structure);
        let _operation = self.flusher.enter();
        self.mapping().len_without_data(range.start(), range.len())
    }

    /// The backing file, which unallocated clusters are read from.
    pub fn backing(&self) -> Option<&Arc<dyn GuestDisk>> {
        self.backing.as_ref()
    }

    /// The cluster size in bytes.
    pub fn cluster_size(&self) -> u64 {
        self.file.geometry().cluster_size()
    }

    /// The smallest unit of the mapping in bytes: a subcluster with extended L2 entries, else a cluster.
    pub fn zero_granularity(&self) -> u64 {
        self.file.geometry().subcluster_size()
    }

    /// Grows or shrinks the disk to `size` bytes, a multiple of 512; new bytes read as zeroes. Durable after
    /// the next [`flush`](Self::flush). Errors: `InvalidOption`, `Unsupported`, `ReadOnly`, `NoSpace`,
    /// `Poisoned`, `Storage`.
    pub fn resize(&self, size: u64) -> Result<()> {
        self.change_size(size)
    }
}

impl GuestDisk for Image {
    fn size(&self) -> u64 {
        Image::size(self)
    }

    fn read_at(&self, offset: GuestOffset, buf: &mut [u8]) -> Result<()> {
        Image::read_at(self, offset, buf)
    }

    fn write_at(&self, offset: GuestOffset, buf: &[u8]) -> Result<()> {
        Image::write_at(self, offset, buf)
    }

    fn write_parts(&self, parts: &[(GuestOffset, &[u8])]) -> Result<()> {
        Image::write_parts(self, parts)
    }

    fn write_zeroes(&self, range: GuestRange, mode: ZeroMode) -> Result<()> {
        Image::write_zeroes(self, range, mode)
    }

    fn discard(&self, range: GuestRange) -> Result<()> {
        Image::discard(self, range)
    }

    fn flush(&self) -> Result<()> {
        Image::flush(self)
    }

    fn extent_at(&self, range: GuestRange) -> Result<DiskExtent> {
        Image::extent_at(self, range)
    }

    fn backing(&self) -> Option<&Arc<dyn GuestDisk>> {
        Image::backing(self)
    }

    fn cluster_size(&self) -> u64 {
        Image::cluster_size(self)
    }

    fn zero_granularity(&self) -> u64 {
        Image::zero_granularity(self)
    }

    fn resize(&self, size: u64) -> Result<()> {
        Image::resize(self, size)
    }

    fn as_any(&self) -> Option<&dyn Any> {
        Some(self)
    }
}
