//! A client on a connection that blocks.
//!
//! [`negotiate`] runs a handshake. A [`Connection`] then carries out [`Job`]s for any number of threads at
//! once, several of each.
//!
//! There is no thread for replies: of the threads that wait, one reads. It takes what is its own, passes on
//! what is not, and leaves the connection to the next one. The bytes of a read go straight to the memory of
//! the thread that wants them; if that thread is busy with sending, the reader keeps them for it. So no
//! thread that sends can hold up the replies which a server must get rid of before it reads on.

mod connection;
pub mod server;

pub use connection::{Connection, Failure, Incoming, Job, Plain, Transfer};

use crate::client::{Handshake, HandshakeError, Negotiation, Step};
use std::fmt;
use std::io::{self, Read, Write};

/// Why there is no export.
#[derive(Debug)]
#[non_exhaustive]
pub enum NegotiateError {
    /// The connection failed, or ended.
    Io(io::Error),
    /// The server refused, or broke the protocol.
    Handshake(HandshakeError),
}

impl fmt::Display for NegotiateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(error) => error.fmt(f),
            Self::Handshake(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for NegotiateError {}

impl From<io::Error> for NegotiateError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<HandshakeError> for NegotiateError {
    fn from(error: HandshakeError) -> Self {
        Self::Handshake(error)
    }
}

/// Runs a handshake on `stream`: up to its end, or to [`Step::StartTls`], after which the caller goes on with
/// the encrypted stream in [`resume`].
pub fn negotiate(stream: &mut (impl Read + Write), negotiation: Negotiation) -> Result<Step, NegotiateError> {
    let mut handshake = Handshake::new(negotiation);
    let first = handshake.start();
    resume(stream, &mut handshake, first, Vec::new())
}

/// Goes on with a handshake from `step`. `sent`: what it has appended for sending.
pub fn resume(
    stream: &mut (impl Read + Write),
    handshake: &mut Handshake,
    mut step: Step,
    mut sent: Vec<u8>,
) -> Result<Step, NegotiateError> {
    loop {
        if !sent.is_empty() {
            stream.write_all(&sent)?;
            stream.flush()?;
            sent.clear();
        }
        let Step::Receive(len) = step else { return Ok(step) };
        // Bounded by the longest reply that the handshake takes.
        let mut bytes = vec![0; len];
        stream.read_exact(&mut bytes)?;
        step = handshake.receive(&bytes, &mut sent)?;
    }
}
