//! A server without I/O: [`Handshake`] negotiates, [`Session`] judges requests and encodes replies.
//!
//! Both are total: whatever a client sends leads to replies or to the end of the connection. What a client
//! can make the server keep is bounded by [`MAX_OPTION_DATA`] and by what the [`Offer`] contains; what it can
//! make it do, by [`MAX_OPTIONS`] and [`MAX_SKIPPED`].
//!
//! TLS is not spoken here. With [`Tls::Required`] the handshake refuses everything until the client asks for
//! TLS, returns [`Step::StartTls`], and goes on after [`Handshake::secured`]: the caller puts TLS between
//! itself and the socket in between.

mod handshake;
mod session;

pub use handshake::{Handshake, Step};
pub use session::{Refusal, Session, Work};

use crate::proto::{BlockSizes, DEFAULT_MAX_PAYLOAD, MAX_OPTION_DATA};
use std::sync::Arc;

/// An export as clients see it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Facts {
    /// Its name; the empty one is the default export.
    pub name: String,
    /// A text for people; may be empty.
    pub description: String,
    /// Bytes of the disk.
    pub size: u64,
    /// See [`transmission_flag`](crate::proto::transmission_flag). What depends on the headers that a client
    /// negotiates (DF) is added where it applies.
    pub flags: u16,
    /// Limits of a request's size.
    pub sizes: BlockSizes,
    /// The meta contexts. The position of each is its id.
    pub contexts: Vec<String>,
}

impl Facts {
    /// An export of `size` bytes. `flags`: see [`transmission_flag`](crate::proto::transmission_flag).
    pub fn new(name: &str, size: u64, flags: u16) -> Self {
        let sizes = BlockSizes { minimum: 1, preferred: 4096, maximum: DEFAULT_MAX_PAYLOAD };
        let (name, description, contexts) = (name.to_owned(), String::new(), Vec::new());
        Self { name, description, size, flags, sizes, contexts }
    }
}

/// Whether clients must speak TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tls {
    /// There is none.
    #[default]
    None,
    /// Nothing is told before it.
    Required,
}

/// What a server offers to all its clients.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Offer {
    /// The exports. Names should differ; of equal ones the first is found.
    pub exports: Vec<Arc<Facts>>,
    /// Whether clients must speak TLS.
    pub tls: Tls,
}

impl Offer {
    /// An offer without TLS.
    pub fn new(exports: Vec<Arc<Facts>>) -> Self {
        Self { exports, tls: Tls::None }
    }

    fn find(&self, name: &str) -> Option<usize> {
        self.exports.iter().position(|facts| facts.name == name)
    }
}

/// Options of one handshake, at most. Real clients send about ten.
pub const MAX_OPTIONS: u32 = 1024;
/// Option data above [`MAX_OPTION_DATA`] that is read and dropped, so that the client gets an answer; above
/// it the connection ends.
pub const MAX_SKIPPED: u32 = 1 << 20;
/// Extents of one context in one block status, at most: half a mebibyte with headers of 64 bits.
pub const MAX_STATUS_EXTENTS: usize = 32 << 10;

const _: () = assert!(MAX_OPTION_DATA < MAX_SKIPPED);
