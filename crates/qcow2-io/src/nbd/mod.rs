//! Storage on an export of an NBD server.
//!
//! One connection, one request in flight. If the server supports the meta context `base:allocation`, block
//! status is read from it. TLS is not supported.

mod handshake;
mod stream;
mod wire;

pub use handshake::{NbdAddress, NbdError};

use crate::error::Call;
use handshake::Agreed;
use qcow2_core::{
    HostOffset, Length, Limits, Storage, StorageError, StorageErrorKind, StorageExtent, ZeroMode,
};
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use stream::Stream;
use wire::{Command, Reply, Request, flag};

/// A connected NBD export.
pub struct NbdStorage {
    agreed: Agreed,
    writable: bool,
    /// `None` after a failure that leaves the connection out of sync with the server.
    line: Mutex<Option<Line>>,
}

struct Line {
    stream: Stream,
    next_cookie: u64,
}

impl NbdStorage {
    /// How long a server may take to connect, to negotiate, and to answer one request: far more than a disk
    /// that is waking up needs.
    pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(600);

    /// Connects to the server at `address` and opens `export`. `writable`: whether it will be changed.
    /// Errors: connection failure, protocol violation, unknown export, a read-only export with `writable`, or
    /// no answer within [`DEFAULT_TIMEOUT`](Self::DEFAULT_TIMEOUT).
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
        Self::agree(address.connect(timeout)?, export, writable)
    }

    /// Opens `export` on an existing connection: an inherited socket, a tunnel, another program's pipes.
    /// `stream` reads everything that the server sends, from its greeting on, and writes to the server. The
    /// server has any time for its answers. Errors: as for [`connect`](Self::connect).
    pub fn over(
        stream: impl io::Read + io::Write + Send + 'static,
        export: &str,
        writable: bool,
    ) -> Result<Self, NbdError> {
        Self::agree(Stream::untimed(stream), export, writable)
    }

    fn agree(mut stream: Stream, export: &str, writable: bool) -> Result<Self, NbdError> {
        let agreed = handshake::agree(&mut stream, export)?;
        if writable && agreed.flags & flag::READ_ONLY != 0 {
            return Err(NbdError::new("Could not open image: Permission denied").with_code(13));
        }
        Ok(Self { agreed, writable, line: Mutex::new(Some(Line { stream, next_cookie: 1 })) })
    }

    /// Sends one request and receives its reply. An error reported by the server leaves the connection
    /// usable; any other error closes it.
    fn request(&self, request: &Request<'_>, reply: &mut Reply<'_>) -> io::Result<()> {
        let mut line = self.line();
        let Some(open) = line.as_mut() else {
            return Err(io::Error::from_raw_os_error(BROKEN));
        };
        let cookie = open.next_cookie;
        open.next_cookie += 1;
        open.stream.begin();
        let answered = wire::send(&mut open.stream, request, cookie)
            .and_then(|()| wire::receive(&mut open.stream, request, cookie, self.agreed.structured, reply));
        match answered {
            Ok(0) => Ok(()),
            Ok(code) => Err(io::Error::from_raw_os_error(code)),
            Err(error) => {
                // The rest of the reply may still arrive, and later requests would take it for their own.
                *line = None;
                Err(error)
            }
        }
    }

    fn line(&self) -> MutexGuard<'_, Option<Line>> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has(&self, flag: u16) -> bool {
        self.agreed.flags & flag != 0
    }

    /// Splits `len` bytes at `offset` into requests of at most `max` bytes.
    fn each(
        call: Call,
        max: u64,
        mut request: impl FnMut(u64, u64) -> io::Result<()>,
    ) -> Result<(), StorageError> {
        let (mut at, end) = (call.offset.value(), call.end()?);
        while at < end {
            let len = max.min(end - at);
            request(at, len).map_err(|error| call.failed(error))?;
            at += len;
        }
        Ok(())
    }

    fn check_change(&self, call: Call) -> Result<(), StorageError> {
        if !self.writable {
            return Err(call.read_only());
        }
        if call.end()? > self.agreed.size {
            return Err(call.past_end(self.agreed.size));
        }
        Ok(())
    }
}

impl Storage for NbdStorage {
    fn len(&self) -> Result<u64, StorageError> {
        Ok(self.agreed.size)
    }

    fn read_at(&self, offset: HostOffset, buf: &mut [u8]) -> Result<usize, StorageError> {
        let inside = self.agreed.size.saturating_sub(offset.value()).min(buf.len() as u64);
        let call = Call::new("read", offset, inside);
        Self::each(call, MAX_PAYLOAD, |at, len| {
            let from = (at - offset.value()) as usize;
            let part = &mut buf[from..from + len as usize];
            self.request(&Request::new(Command::Read, at, len), &mut Reply::Data(part))
        })?;
        Ok(inside as usize)
    }

    fn write_at(&self, offset: HostOffset, buf: &[u8]) -> Result<(), StorageError> {
        let call = Call::new("write", offset, buf.len() as u64);
        self.check_change(call)?;
        Self::each(call, MAX_PAYLOAD, |at, len| {
            let from = (at - offset.value()) as usize;
            let mut request = Request::new(Command::Write, at, len);
            request.payload = &buf[from..from + len as usize];
            self.request(&request, &mut Reply::Nothing)
        })
    }

    fn write_zeroes(&self, offset: HostOffset, len: u64, mode: ZeroMode) -> Result<(), StorageError> {
        let call = Call::new("zero", offset, len);
        self.check_change(call)?;
        if !self.has(flag::SEND_WRITE_ZEROES) {
            let zeroes = vec![0; len.min(ZERO_BUFFER) as usize];
            return Self::each(call, ZERO_BUFFER, |at, len| {
                let mut request = Request::new(Command::Write, at, len);
                request.payload = &zeroes[..len as usize];
                self.request(&request, &mut Reply::Nothing)
            });
        }
        Self::each(call, MAX_RANGE, |at, len| {
            let mut request = Request::new(Command::WriteZeroes, at, len);
            request.no_hole = mode == ZeroMode::KeepAllocated;
            self.request(&request, &mut Reply::Nothing)
        })
    }

    fn discard(&self, offset: HostOffset, len: u64) -> Result<(), StorageError> {
        let inside = self.agreed.size.saturating_sub(offset.value()).min(len);
        let call = Call::new("discard", offset, inside);
        if !self.writable {
            return Err(call.read_only());
        }
        // A discard is a hint; the protocol forbids requests that the server did not offer.
        if !self.has(flag::SEND_TRIM) {
            return Ok(());
        }
        Self::each(call, MAX_RANGE, |at, len| {
            self.request(&Request::new(Command::Trim, at, len), &mut Reply::Nothing)
        })
    }

    fn allocate(&self, offset: HostOffset, len: u64) -> Result<(), StorageError> {
        let call = Call::new("allocate", offset, len);
        self.check_change(call)?;
        Err(call.failed(io::ErrorKind::Unsupported.into()))
    }

    fn set_len(&self, len: u64) -> Result<(), StorageError> {
        if len == self.agreed.size {
            return Ok(());
        }
        let message =
            format!("resize to {len} bytes: the export has a fixed size of {} bytes", self.agreed.size);
        Err(StorageError::new(StorageErrorKind::FixedLength(Length::Export), message))
    }

    fn flush(&self) -> Result<(), StorageError> {
        if !self.writable || !self.has(flag::SEND_FLUSH) {
            return Ok(());
        }
        let call = Call::new("flush", HostOffset::new(0), 0);
        self.request(&Request::new(Command::Flush, 0, 0), &mut Reply::Nothing)
            .map_err(|error| call.failed(error))
    }

    fn extent_at(&self, offset: HostOffset, len: u64) -> Result<StorageExtent, StorageError> {
        let Some(context) = self.agreed.allocation else {
            return Ok(StorageExtent { len, data: true });
        };
        let call = Call::new("map", offset, len);
        let asked = len.min(MAX_RANGE);
        let mut extents = Vec::new();
        self.request(
            &Request::new(Command::BlockStatus, offset.value(), asked),
            &mut Reply::Status { context, extents: &mut extents },
        )
        .map_err(|error| call.failed(error))?;
        let mut runs = extents.iter().map(|&(len, flags)| (u64::from(len), flags & wire::STATE_ZERO == 0));
        // An empty answer would stop the caller's walk, so it counts as data.
        let Some((mut joined, data)) = runs.next().filter(|(len, _)| *len > 0) else {
            return Ok(StorageExtent { len, data: true });
        };
        // Servers may split one run into several extents, and may report past the asked range.
        joined += runs.take_while(|(_, other)| *other == data).map(|(len, _)| len).sum::<u64>();
        Ok(StorageExtent { len: joined.min(len), data })
    }

    fn limits(&self) -> Limits {
        let mut limits = Limits::default();
        limits.length = Length::Export;
        limits.fast_zeroes = self.has(flag::SEND_WRITE_ZEROES);
        limits
    }
}

/// The largest payload of a request: what the protocol says every server accepts.
const MAX_PAYLOAD: u64 = 32 << 20;
/// The largest range of a request without payload.
const MAX_RANGE: u64 = 1 << 30;
/// Zeroes sent per request if the server does not support write-zeroes.
const ZERO_BUFFER: u64 = 1 << 20;
/// `EPIPE`: the error of every call after the connection has failed.
const BROKEN: i32 = 32;
