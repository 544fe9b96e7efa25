//! TLS on a connection, for clients and servers. Without the feature `tls` there are only the certificates.
//!
//! A `Client` or a `Server` is made of [`Credentials`] once and begins any number of sessions. A handshake
//! turns the two halves of a connection into a `TlsReader` and a `TlsWriter`. What they wrap may have
//! deadlines, which work as without TLS.
//!
//! One thread may read while another one writes. They share the state of the session, which is locked only
//! to encrypt or decrypt bytes that are in memory, never while bytes are sent or awaited. And the reader
//! never sends: what TLS wants to answer goes out with the next write. So a peer that does not read holds up
//! the writer alone, and a silent one the reader alone.
//!
//! The cryptography is ring's.

mod credentials;
#[cfg(feature = "tls")]
mod ends;
#[cfg(feature = "tls")]
mod name;
#[cfg(feature = "tls")]
mod session;
#[cfg(feature = "tls")]
mod verify;

pub use credentials::{Credentials, CredentialsError, Identity};
#[cfg(feature = "tls")]
pub use ends::{Client, Server};
#[cfg(feature = "tls")]
pub use session::{TlsReader, TlsWriter};

use std::fmt;
use std::io;

/// Why a handshake of TLS failed.
#[derive(Debug)]
#[non_exhaustive]
pub enum TlsError {
    /// The connection failed, or ended.
    Io(io::Error),
    /// The peer's certificate is of no authority that is trusted.
    UnknownIssuer,
    /// The server's certificate is not for this name.
    WrongName(String),
    /// The server's certificate is to be checked, and there is no name to check it for.
    NoName,
    /// The peer's certificate is not valid any more.
    Expired,
    /// The peer's certificate is not valid yet.
    NotValidYet,
    /// Anything else; the text tells what.
    Failed(String),
}

impl fmt::Display for TlsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(error) => error.fmt(f),
            Self::UnknownIssuer => f.write_str("the certificate is of an unknown issuer"),
            Self::WrongName(name) => write!(f, "the certificate is not for the name '{name}'"),
            Self::NoName => f.write_str("there is no name to check the certificate for"),
            Self::Expired => f.write_str("the certificate has expired"),
            Self::NotValidYet => f.write_str("the certificate is not valid yet"),
            Self::Failed(reason) => f.write_str(reason),
        }
    }
}

impl std::error::Error for TlsError {}

impl From<io::Error> for TlsError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}
