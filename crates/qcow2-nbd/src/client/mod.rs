//! A client as two state machines without I/O: [`Handshake`] up to an [`Export`], then [`Requests`].
//!
//! Both ask for a number of bytes, take exactly so many, and say what is next. What they remember is bounded
//! by the limits of [`proto`](crate::proto), whatever a server sends.

mod handshake;
mod ranges;
mod requests;

pub use handshake::{
    Context, Export, Goal, Handshake, HandshakeError, HandshakeFailure, Listed, Negotiation, Step,
};
pub use requests::{Event, Need, Requests};

use crate::proto::DecodeError;
use std::fmt;

/// What a server sent against the protocol; the connection is out of step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Violation(pub(crate) &'static str);

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the server sent {}", self.0)
    }
}

impl std::error::Error for Violation {}

impl From<DecodeError> for Violation {
    fn from(error: DecodeError) -> Self {
        match error {
            DecodeError::Invalid(what) => Self(what),
            DecodeError::Short(_) => Self("a message that is too short for its kind"),
        }
    }
}
