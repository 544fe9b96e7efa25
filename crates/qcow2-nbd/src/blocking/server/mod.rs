//! A server on a connection that blocks.
//!
//! [`negotiate`] runs the handshake, [`transmit`] serves requests until the client leaves.
//!
//! There is no queue between threads. Of the threads of a connection one has the *turn*: it reads requests
//! out of one large buffer. As long as requests are cheap it carries them out itself, straight from that
//! buffer and into a frame of replies, and sends the frame when no request is left: a batch costs one
//! system call for its requests and one for its replies. A request that may take long (a flush, a long range,
//! or any while the disk is slow) makes it pass the turn to another thread first, so that requests run in
//! parallel exactly where that is worth a change of threads.
//!
//! Memory is bounded for each connection: the buffer ([`BUFFER`]), and for each thread a frame and a payload
//! of about [`PIECE`] bytes; longer requests are moved in pieces. Threads beyond the first of a connection
//! come from a [`Crew`] that connections share. A client that does not read its replies blocks only threads
//! of its own connection.

mod frame;
mod reader;
mod transmit;

pub use reader::BUFFER;
pub use transmit::{PIECE, Transmission, transmit};

use crate::proto::{ErrorCode, Extent};
use crate::server::{Handshake, Offer, Session, Step};
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A disk that is served. Ranges lie inside its size and, but for those of `flush`, are not empty. Errors are
/// what the client is told.
pub trait Disk: Send + Sync {
    /// Fills `buf` with the bytes at `offset`.
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), ErrorCode>;

    /// Writes `data` at `offset`.
    fn write(&self, offset: u64, data: &[u8]) -> Result<(), ErrorCode>;

    /// Makes durable all changes whose calls have returned, whoever made them.
    fn flush(&self) -> Result<(), ErrorCode>;

    /// Forgets the range, or does nothing.
    fn trim(&self, offset: u64, len: u64) -> Result<(), ErrorCode>;

    /// Zeroes the range. `no_hole`: its space stays allocated. `fast`: fail with
    /// [`ErrorCode::NOT_SUPPORTED`], before anything is changed, if bytes must be written for it.
    fn write_zeroes(&self, offset: u64, len: u64, no_hole: bool, fast: bool) -> Result<(), ErrorCode>;

    /// The range will be read soon.
    fn cache(&self, offset: u64, len: u64) -> Result<(), ErrorCode>;

    /// Appends the extents of a context for a beginning of the range, at most `most` and at least one.
    fn status(
        &self,
        context: u32,
        range: (u64, u64),
        most: usize,
        extents: &mut Vec<Extent>,
    ) -> Result<(), ErrorCode>;

    /// Length of a beginning of the range, at least 1, that is known to be zeroes, or that is not (`false`).
    fn zero_run(&self, _offset: u64, len: u64) -> Result<(u64, bool), ErrorCode> {
        Ok((len, false))
    }
}

/// Threads that connections may add to their first one.
#[derive(Debug)]
pub struct Crew {
    free: AtomicUsize,
}

impl Crew {
    /// So many threads, for all connections together.
    pub fn new(threads: usize) -> Self {
        Self { free: AtomicUsize::new(threads) }
    }

    fn hire(&self) -> bool {
        self.free.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |free| free.checked_sub(1)).is_ok()
    }

    fn dismiss(&self) {
        self.free.fetch_add(1, Ordering::Relaxed);
    }
}

/// How a handshake ended, and is not an error.
#[derive(Debug)]
pub enum Negotiated {
    /// The client has an export.
    Session(Session),
    /// The client awaits TLS; [`resume`] goes on with the encrypted stream.
    StartTls(Handshake),
    /// The client has left, or may not stay; for a log.
    Ended(&'static str),
}

/// Greets the client on `stream` and negotiates. Deadlines are the stream's. Errors: of the stream.
pub fn negotiate(stream: &mut (impl Read + Write), offer: Arc<Offer>) -> io::Result<Negotiated> {
    let mut out = Vec::new();
    let handshake = Handshake::new(offer, &mut out);
    stream.write_all(&out)?;
    resume(stream, handshake)
}

/// Goes on with a handshake after TLS was established ([`Handshake::secured`]).
pub fn resume(stream: &mut (impl Read + Write), mut handshake: Handshake) -> io::Result<Negotiated> {
    let (mut bytes, mut out) = (Vec::new(), Vec::new());
    loop {
        bytes.resize(handshake.need(), 0);
        match stream.read_exact(&mut bytes) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Ok(Negotiated::Ended("the client has left"));
            }
            read => read?,
        }
        let step = handshake.receive(&bytes, &mut out);
        stream.write_all(&out)?;
        out.clear();
        match step {
            Step::More => {}
            Step::StartTls => return Ok(Negotiated::StartTls(handshake)),
            Step::Ready(session) => return Ok(Negotiated::Session(session)),
            Step::End(why) => return Ok(Negotiated::Ended(why)),
        }
    }
}
