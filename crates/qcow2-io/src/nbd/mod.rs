//! Storage on an export of an NBD server.
//!
//! Any number of threads have requests in flight on one connection; a long range is several requests at once.
//! If the server has limits of a request's size, ranges are split, and aligned by reading what is beside
//! them. If it supports the meta context `base:allocation`, block status is read from it. With the feature
//! `tls` connections may be encrypted.

mod address;
mod halves;
mod link;
mod range;
mod stream;

pub use address::{NbdAddress, NbdError};
pub use halves::NbdTls;
pub use link::NbdOptions;
pub use qcow2_nbd::tls::{
    Credentials as TlsCredentials, CredentialsError as TlsCredentialsError, Identity as TlsIdentity,
};

use crate::error::Call;
use link::Link;
use qcow2_core::{
    HostOffset, Length, Limits, Storage, StorageError, StorageErrorKind, StorageExtent, StorageStatus,
    ZeroMode,
};
use qcow2_nbd::blocking::{Job, Transfer};
use qcow2_nbd::proto::{Command, Extent, Mode, command_flag, state, transmission_flag};
use range::{Sizes, Split};
use std::io;
use std::sync::{PoisonError, RwLock};
use std::time::Duration;
use stream::Stream;

/// A connected NBD export.
pub struct NbdStorage {
    link: Link,
    sizes: Sizes,
    writable: bool,
    /// Held for writing while a block is read, changed and written; for reading by other changes, so that
    /// none of theirs is lost.
    edges: RwLock<()>,
}

impl NbdStorage {
    /// How long a server may take to connect, to negotiate, and to answer one request: far more than a disk
    /// that is waking up needs.
    pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(600);

    /// Connects to the server at `address` and opens the export. Errors: connection failure, protocol
    /// violation, unknown export, a read-only export that will be changed, or no answer in time. A request
    /// that is late fails, and with it the connection.
    pub fn open(address: &NbdAddress, options: &NbdOptions) -> Result<Self, NbdError> {
        Ok(Self::of(Link::connect(address, options.clone())?, options.writable))
    }

    /// Connects to the server at `address` and opens `export`. `writable`: whether it will be changed.
    /// Errors: as for [`open`](Self::open), within [`DEFAULT_TIMEOUT`](Self::DEFAULT_TIMEOUT).
    pub fn connect(address: &NbdAddress, export: &str, writable: bool) -> Result<Self, NbdError> {
        Self::connect_within(address, export, writable, Some(Self::DEFAULT_TIMEOUT))
    }

    /// Like [`connect`](Self::connect), with another time for each answer; `None`: without end. A request
    /// that is late fails, and so do all later ones.
    pub fn connect_within(
        address: &NbdAddress,
        export: &str,
        writable: bool,
        timeout: Option<Duration>,
    ) -> Result<Self, NbdError> {
        let export = export.to_owned();
        Self::open(address, &NbdOptions { export, writable, timeout, ..NbdOptions::default() })
    }

    /// Opens `export` on an existing connection: an inherited socket, a tunnel, another program's pipes.
    /// `stream` reads everything that the server sends, from its greeting on, and writes to the server. The
    /// server has any time for its answers, and one request is in flight at a time. Errors: as for
    /// [`connect`](Self::connect).
    pub fn over(
        stream: impl io::Read + io::Write + Send + 'static,
        export: &str,
        writable: bool,
    ) -> Result<Self, NbdError> {
        let export = export.to_owned();
        let options = NbdOptions { export, writable, timeout: None, ..NbdOptions::default() };
        Ok(Self::of(Link::over(Stream::untimed(stream), options)?, writable))
    }

    fn of(link: Link, writable: bool) -> Self {
        let sizes = Sizes::of(link.export(), link.has_status());
        Self { link, sizes, writable, edges: RwLock::new(()) }
    }

    fn size(&self) -> u64 {
        self.link.export().size
    }

    fn has(&self, flag: u16) -> bool {
        self.link.export().has(flag)
    }

    fn check_change(&self, call: Call) -> Result<(), StorageError> {
        if !self.writable {
            return Err(call.read_only());
        }
        if call.end()? > self.size() {
            return Err(call.past_end(self.size()));
        }
        Ok(())
    }

    /// Sends requests without payload for `len` bytes at `offset`, which are whole blocks.
    fn ranges(&self, command: Command, flags: u16, offset: u64, len: u64) -> io::Result<()> {
        let (mut at, end, mut jobs) = (offset, offset + len, Vec::new());
        while at < end {
            let len = self.sizes.range.min(end - at);
            jobs.push(Job::new(command, at, len, Transfer::None).with_flags(flags));
            at += len;
            if jobs.len() == BATCH || at == end {
                self.link.run(&mut jobs)?;
                jobs.clear();
            }
        }
        Ok(())
    }

    /// Reads exactly `buf`, which lies in the export.
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let split = Split::of(offset, buf.len(), self.sizes.minimum);
        let (first, body, last) = split.parts_mut(buf);
        let (mut head, mut tail) = (vec![0; split.block(first)], vec![0; split.block(last)]);
        let mut jobs = Vec::new();
        self.reads(&mut jobs, split.head, &mut head);
        self.reads(&mut jobs, split.body, body);
        self.reads(&mut jobs, split.tail, &mut tail);
        self.link.run(&mut jobs)?;
        if !first.is_empty() {
            first.copy_from_slice(&head[split.skip..split.skip + first.len()]);
        }
        last.copy_from_slice(&tail[..last.len()]);
        Ok(())
    }

    /// Adds the requests that read `buf` at `offset`, both whole blocks.
    fn reads<'a>(&self, jobs: &mut Vec<Job<'a>>, offset: u64, buf: &'a mut [u8]) {
        let mut at = offset;
        for part in buf.chunks_mut(self.sizes.payload) {
            let len = part.len() as u64;
            jobs.push(Job::new(Command::READ, at, len, Transfer::Receive(part)));
            at += len;
        }
    }

    fn write(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        let split = Split::of(offset, buf.len(), self.sizes.minimum);
        let (first, body, last) = split.parts(buf);
        let mut jobs = Vec::new();
        if first.is_empty() && last.is_empty() {
            let _edges = self.edges.read().unwrap_or_else(PoisonError::into_inner);
            self.writes(&mut jobs, split.body, body);
            return self.link.run(&mut jobs);
        }
        let _edges = self.edges.write().unwrap_or_else(PoisonError::into_inner);
        let (mut head, mut tail) = (vec![0; split.block(first)], vec![0; split.block(last)]);
        self.reads(&mut jobs, split.head, &mut head);
        self.reads(&mut jobs, split.tail, &mut tail);
        self.link.run(&mut jobs)?;
        if !first.is_empty() {
            head[split.skip..split.skip + first.len()].copy_from_slice(first);
        }
        tail[..last.len()].copy_from_slice(last);
        let mut jobs = Vec::new();
        self.writes(&mut jobs, split.head, &head);
        self.writes(&mut jobs, split.body, body);
        self.writes(&mut jobs, split.tail, &tail);
        self.link.run(&mut jobs)
    }

    /// Adds the requests that write `buf` to `offset`, both whole blocks.
    fn writes<'a>(&self, jobs: &mut Vec<Job<'a>>, offset: u64, buf: &'a [u8]) {
        let mut at = offset;
        for part in buf.chunks(self.sizes.payload) {
            let len = part.len() as u64;
            jobs.push(Job::new(Command::WRITE, at, len, Transfer::Send(part)));
            at += len;
        }
    }

    fn zero(&self, offset: u64, len: u64, mode: ZeroMode) -> io::Result<()> {
        let (start, end) = self.sizes.blocks_inside(offset, len);
        let has_zeroes = self.has(transmission_flag::SEND_WRITE_ZEROES);
        if start >= end || !has_zeroes {
            return self.write_zero_bytes(offset, len);
        }
        self.write_zero_bytes(offset, start - offset)?;
        {
            let _edges = self.edges.read().unwrap_or_else(PoisonError::into_inner);
            let flags = if mode == ZeroMode::KeepAllocated { command_flag::NO_HOLE } else { 0 };
            self.ranges(Command::WRITE_ZEROES, flags, start, end - start)?;
        }
        self.write_zero_bytes(end, offset + len - end)
    }

    /// Writes zeroes like other bytes.
    fn write_zero_bytes(&self, offset: u64, len: u64) -> io::Result<()> {
        let zeroes = vec![0; len.min(ZERO_BUFFER) as usize];
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let part = &zeroes[..ZERO_BUFFER.min(end - at) as usize];
            self.write(at, part)?;
            at += part.len() as u64;
        }
        Ok(())
    }

    /// The extents from `offset` on: at least one, of `len` bytes at most in all that were asked for.
    fn status(&self, offset: u64, len: u64) -> io::Result<Vec<Extent>> {
        let most = match self.link.export().mode {
            Mode::Extended => MAX_LONG_RANGE,
            _ => MAX_RANGE,
        };
        let (start, end) = self.sizes.blocks_around(offset, len.min(most), self.size());
        let mut extents = Vec::new();
        self.link.run(&mut [Job::new(
            Command::BLOCK_STATUS,
            start,
            end - start,
            Transfer::Status(&mut extents),
        )])?;
        let context = self.link.status_context();
        let ours = extents.into_iter().filter(|(id, _)| Some(*id) == context);
        let mut before = offset - start;
        let inside = ours.filter_map(|(_, extent)| {
            let skipped = before.min(extent.len);
            before -= skipped;
            Some(Extent { len: extent.len - skipped, ..extent }).filter(|extent| extent.len > 0)
        });
        Ok(inside.collect())
    }
}

impl Storage for NbdStorage {
    fn len(&self) -> Result<u64, StorageError> {
        Ok(self.size())
    }

    fn read_at(&self, offset: HostOffset, buf: &mut [u8]) -> Result<usize, StorageError> {
        let inside = self.size().saturating_sub(offset.value()).min(buf.len() as u64);
        let call = Call::new("read", offset, inside);
        if inside > 0 {
            let buf = &mut buf[..inside as usize];
            self.read(offset.value(), buf).map_err(|error| call.failed(error))?;
        }
        Ok(inside as usize)
    }

    fn write_at(&self, offset: HostOffset, buf: &[u8]) -> Result<(), StorageError> {
        let call = Call::new("write", offset, buf.len() as u64);
        self.check_change(call)?;
        self.write(offset.value(), buf).map_err(|error| call.failed(error))
    }

    fn write_zeroes(&self, offset: HostOffset, len: u64, mode: ZeroMode) -> Result<(), StorageError> {
        let call = Call::new("zero", offset, len);
        self.check_change(call)?;
        self.zero(offset.value(), len, mode).map_err(|error| call.failed(error))
    }

    fn discard(&self, offset: HostOffset, len: u64) -> Result<(), StorageError> {
        let inside = self.size().saturating_sub(offset.value()).min(len);
        let call = Call::new("discard", offset, inside);
        if !self.writable {
            return Err(call.read_only());
        }
        let (start, end) = self.sizes.blocks_inside(offset.value().min(self.size()), inside);
        // A discard is a hint; the protocol forbids requests that the server did not offer.
        if !self.has(transmission_flag::SEND_TRIM) || start >= end {
            return Ok(());
        }
        let _edges = self.edges.read().unwrap_or_else(PoisonError::into_inner);
        self.ranges(Command::TRIM, 0, start, end - start).map_err(|error| call.failed(error))
    }

    fn allocate(&self, offset: HostOffset, len: u64) -> Result<(), StorageError> {
        let call = Call::new("allocate", offset, len);
        self.check_change(call)?;
        Err(call.failed(io::ErrorKind::Unsupported.into()))
    }

    fn set_len(&self, len: u64) -> Result<(), StorageError> {
        if len == self.size() {
            return Ok(());
        }
        let message = format!("resize to {len} bytes: the export has a fixed size of {} bytes", self.size());
        Err(StorageError::new(StorageErrorKind::FixedLength(Length::Export), message))
    }

    fn flush(&self) -> Result<(), StorageError> {
        if !self.writable || !self.has(transmission_flag::SEND_FLUSH) {
            return Ok(());
        }
        let call = Call::new("flush", HostOffset::new(0), 0);
        self.link
            .run(&mut [Job::new(Command::FLUSH, 0, 0, Transfer::None)])
            .map_err(|error| call.failed(error))
    }

    fn extent_at(&self, offset: HostOffset, len: u64) -> Result<StorageExtent, StorageError> {
        let inside = self.size().saturating_sub(offset.value()).min(len);
        if !self.link.has_status() || inside == 0 {
            return Ok(StorageExtent { len, data: true });
        }
        let call = Call::new("map", offset, len);
        let extents = self.status(offset.value(), inside).map_err(|error| call.failed(error))?;
        let mut runs = extents.iter().map(|extent| (extent.len, extent.flags & state::ZERO == 0));
        // An empty answer would stop the caller's walk, so it counts as data.
        let Some((mut joined, data)) = runs.next() else {
            return Ok(StorageExtent { len, data: true });
        };
        // Servers may split one run into several extents, and may report past the asked range.
        for (more, _) in runs.take_while(|(_, other)| *other == data) {
            joined = joined.saturating_add(more);
        }
        Ok(StorageExtent { len: joined.min(len), data })
    }

    fn status_at(&self, offset: HostOffset, len: u64) -> Result<Option<StorageStatus>, StorageError> {
        let inside = self.size().saturating_sub(offset.value()).min(len);
        if self.link.status_context().is_none() || inside == 0 {
            return Ok(None);
        }
        let call = Call::new("map", offset, len);
        let extents = self.status(offset.value(), inside).map_err(|error| call.failed(error))?;
        // As in QEMU the bits mean the same in every context.
        let bits = |extent: &Extent| extent.flags & (state::HOLE | state::ZERO);
        let Some(first) = extents.first().map(bits) else { return Ok(None) };
        let same = extents.iter().take_while(|extent| bits(extent) == first);
        let joined = same.fold(0u64, |joined, extent| joined.saturating_add(extent.len));
        let (data, zero) = (first & state::HOLE == 0, first & state::ZERO != 0);
        Ok(Some(StorageStatus { len: joined.min(inside), data, zero }))
    }

    fn limits(&self) -> Limits {
        let mut limits = Limits::default();
        limits.alignment = self.sizes.minimum;
        limits.length = Length::Export;
        limits.fast_zeroes = self.has(transmission_flag::SEND_WRITE_ZEROES);
        limits
    }
}

/// The largest range of a request without payload, where the server has no limits.
const MAX_RANGE: u64 = 1 << 30;
/// The largest range of a block status with numbers of 64 bits.
const MAX_LONG_RANGE: u64 = 1 << 42;
/// Requests without payload that are made at once; they have all memory that they need.
const BATCH: usize = 256;
/// Zeroes sent per call if the server does not support write-zeroes.
const ZERO_BUFFER: u64 = 1 << 20;
