//! An open qcow2 image: what a machine asks of it, each as a list of steps.
//!
//! All calls take `&self`; any number of threads may make them at once.

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
use crate::read::resolve::Place;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{RwLock, read, write};
use crate::write::plan::ZeroKind;
use ::alloc::format;
use ::alloc::string::String;
use ::alloc::sync::Arc;
use core::any::Any;
use qcow2_format::{Geometry, GuestOffset, GuestRange, Header};

/// An open qcow2 image and the layers below it.
pub struct Image {
    pub(crate) file: Arc<ImageFile>,
    pub(crate) header: Arc<HeaderStore>,
    pub(crate) tables: Arc<Tables>,
    pub(crate) refcounts: Arc<RefcountStore>,
    pub(crate) flusher: Flusher,
    pub(crate) size: AtomicU64,
    pub(crate) backing: Option<Arc<dyn GuestDisk>>,
    /// The image names a backing file that was not opened.
    pub(crate) backing_unopened: bool,
    pub(crate) codec: Option<Arc<dyn ClusterCodec>>,
    pub(crate) scratch: Scratch,
    pub(crate) crypt: Crypt,
    /// Taken for reading by every guest request, for writing by what must be alone (close, snapshots,
    /// resize).
    pub(crate) structure: RwLock<()>,
    pub(crate) bitmaps: Bitmaps,
    /// The external data file is the guest disk byte for byte, so zeroes are written there too.
    pub(crate) raw_data_file: bool,
    /// Discarded and zeroed clusters keep their host clusters.
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

    /// Where guest data lives: the image file or the external data file; `None` where that was not opened.
    pub fn data_storage(&self) -> Option<&Arc<dyn Storage>> {
        self.file.opened_data()
    }

    /// The codec of this image's compression type. Errors: `Unsupported` where none was given on opening.
    pub fn codec(&self) -> Result<&Arc<dyn ClusterCodec>> {
        self.codec.as_ref().ok_or_else(|| {
            let kind = self.header().compression_type;
            Error::new(ErrorKind::Unsupported, format!("no codec at hand for compression type {kind:?}"))
        })
    }

    /// The backing file's name and format as the header has them.
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

    /// Ends the image's use: everything durable, every refcount exact, warning bits cleared, the file's end
    /// where other readers expect it. The image takes no changes afterwards. Call it before the last
    /// reference is dropped; without it nothing is lost that was flushed, but clusters may be left leaked.
    /// Errors: `Storage`, `Poisoned`.
    pub fn close(&self) -> Result<()> {
        let _alone = write(&self.structure);
        if !self.file.is_writable() {
            return Ok(());
        }
        self.file.check_writable()?;
        if self.header.is_changing() {
            self.pad_file()?;
        }
        // Bitmaps after everything that they record, warnings after everything that they warn of.
        self.flusher.settle()?;
        // Nobody else is in an operation, so nothing could still be seen by one.
        debug_assert!(self.refcounts.is_settled(), "clusters wait to be freed when the image is closed");
        self.store_bitmaps()?;
        self.header.retract_warnings()?;
        self.file.poison();
        Ok(())
    }

    /// Which guest range lives where.
    pub(crate) fn mapping(&self) -> &Mapping {
        self.flusher.mapping()
    }

    /// Changes of whole trees of L2 tables and what they refer to. The caller is alone with the image.
    pub(crate) fn bulk(&self) -> Bulk<'_> {
        Bulk::new(&self.tables, &self.refcounts, &self.flusher)
    }

    /// Learns again which clusters hold metadata, from what is on disk.
    pub(crate) fn learn_metadata(&self) -> Result<()> {
        let (_, l1) = self.mapping().l1_contents();
        self.refcounts.with_table(|refcount_table| self.tables.learn(&l1, refcount_table))
    }

    /// Ends the image file where other readers expect an end; see [`ImageFile::pad_end`].
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

    /// Checks that a change of `len` bytes at `start` is possible now.
    pub(crate) fn check_change(&self, start: GuestOffset, len: u64) -> Result<GuestRange> {
        let range = self.check_range(start, len)?;
        self.file.check_writable()?;
        Ok(range)
    }

    /// What this layer has from `range.start()` on. The caller runs inside an operation.
    pub(crate) fn extent_of(&self, range: GuestRange) -> Result<DiskExtent> {
        let run = self.mapping().lookup(range.start(), range.len())?;
        let plain = self.crypt.is_plain();
        let state = match run.place {
            Place::Unallocated => ExtentState::Unallocated,
            Place::Zero { host } => ExtentState::Zero { host: host.filter(|_| plain) },
            Place::Data { host, .. } => ExtentState::Data { host: plain.then_some(host) },
            Place::Compressed(_) => ExtentState::Compressed,
        };
        Ok(DiskExtent { len: run.len, state })
    }

    fn change(
        &self,
        start: GuestOffset,
        len: u64,
        make: impl FnOnce(GuestRange) -> Result<()>,
    ) -> Result<()> {
        let range = self.check_change(start, len)?;
        {
            // Held to the end of the change and let go before the flush, which may wait for others.
            let _structure = read(&self.structure);
            let _operation = self.flusher.enter();
            let _sectors = self.crypt.hold(range);
            self.begin_change()?;
            self.bitmaps.mark(range);
            make(range)?;
        }
        self.flusher.flush_if_pressed()
    }

    /// Writes one whole cluster compressed; a cluster that does not get smaller is stored plain, the end of a
    /// disk that is no multiple of the cluster size counts as whole. `offset`: cluster aligned. `cluster`: a
    /// cluster's bytes, at the end of the disk as many as are left. Disk: as
    /// [`write_compressed_stream`](Self::write_compressed_stream).
    ///
    /// Errors: `Unsupported` with an external data file or where the cluster is allocated already,
    /// `OutOfRange`.
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

    /// Stores a cluster that is compressed already. `offset`: cluster aligned; `stream`: what
    /// [`codec`](Self::codec) made of the cluster's bytes, shorter than a cluster. The cluster must be
    /// unallocated or plain zero. Disk: the stream is written behind the last one; mapping and refcounts
    /// follow at the next flush.
    pub fn write_compressed_stream(&self, offset: GuestOffset, stream: &[u8]) -> Result<()> {
        self.write_compressed_streams(&[(offset, stream)])
    }

    /// Stores several clusters that are compressed already, in ascending order of their offsets: as
    /// [`write_compressed_stream`](Self::write_compressed_stream) one by one, with fewer and longer writes.
    /// After an error a first part of them may be stored.
    pub fn write_compressed_streams(&self, streams: &[(GuestOffset, &[u8])]) -> Result<()> {
        let (Some(&(first, _)), Some(&(last, _))) = (streams.first(), streams.last()) else { return Ok(()) };
        let end = last.value().saturating_add(self.file.geometry().cluster_size()).min(self.size());
        self.change(first, end.saturating_sub(first.value()), |_| self.pack_streams(streams))
    }
}

impl dyn GuestDisk + '_ {
    /// This disk as a qcow2 image, where it is one.
    pub fn as_image(&self) -> Option<&Image> {
        self.as_any()?.downcast_ref()
    }
}

/// Guest I/O: what [`GuestDisk`] has, without the trait in scope.
impl Image {
    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Fills `buf` with the guest bytes from `offset` on, through all layers below. Errors: `OutOfRange`,
    /// `Corrupt`, `Encrypted` without a key, `Storage`.
    pub fn read_at(&self, offset: GuestOffset, buf: &mut [u8]) -> Result<()> {
        self.check_range(offset, buf.len() as u64)?;
        let _structure = read(&self.structure);
        let _operation = self.flusher.enter();
        self.read_range(offset, buf)
    }

    /// Writes `buf` from guest byte `offset` on. Durable after the next [`flush`](Self::flush). Where the
    /// storage is full, a first part may be written and nothing else is lost. Errors: `OutOfRange`,
    /// `ReadOnly`, `NoSpace`, `Corrupt`, `Poisoned`, `Storage`.
    pub fn write_at(&self, offset: GuestOffset, buf: &[u8]) -> Result<()> {
        self.change(offset, buf.len() as u64, |range| self.write_range(range.start(), buf))
    }

    /// Writes each part at its guest offset; faster than single calls where the parts ascend and have their
    /// clusters to themselves. Errors: as of [`write_at`](Self::write_at) for one of the parts; any of them
    /// may be written then.
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

    /// Makes `range` read as zeroes. Errors: as [`write_at`](Self::write_at).
    pub fn write_zeroes(&self, range: GuestRange, mode: ZeroMode) -> Result<()> {
        let kind = match mode {
            ZeroMode::KeepAllocated => ZeroKind::Keep,
            ZeroMode::MayUnmap => ZeroKind::Unmap,
        };
        self.change(range.start(), range.len(), |range| self.zero_range(range, kind))
    }

    /// Says that nobody needs the content of `range`: whole clusters are freed. They read as zeroes
    /// afterwards where the image can record that, otherwise as before. Errors: as
    /// [`write_at`](Self::write_at).
    pub fn discard(&self, range: GuestRange) -> Result<()> {
        self.change(range.start(), range.len(), |range| self.zero_range(range, ZeroKind::Discard))
    }

    /// Returns when all changes completed before this call are durable. Errors: `NoSpace`, `Poisoned`,
    /// `Storage`.
    pub fn flush(&self) -> Result<()> {
        if !self.file.is_writable() {
            return Ok(());
        }
        let _structure = read(&self.structure);
        self.file.check_writable()?;
        self.flusher.flush()
    }

    /// How this layer stores the bytes from `range.start()` on, at most `range`. Disk: may read tables.
    /// Errors: `OutOfRange`, `Corrupt`, `Storage`.
    pub fn extent_at(&self, range: GuestRange) -> Result<DiskExtent> {
        self.check_range(range.start(), range.len())?;
        let _structure = read(&self.structure);
        let _operation = self.flusher.enter();
        self.extent_of(range)
    }

    /// The disk below, which unallocated bytes are read from.
    pub fn backing(&self) -> Option<&Arc<dyn GuestDisk>> {
        self.backing.as_ref()
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        self.file.geometry().cluster_size()
    }

    /// Bytes of the unit in which the mapping changes: a subcluster.
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
