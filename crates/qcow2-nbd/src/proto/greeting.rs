//! How a connection begins.
//!
//! | bytes | newstyle | old style |
//! |---|---|---|
//! | 8 | `NBDMAGIC` | `NBDMAGIC` |
//! | 8 | `IHAVEOPT` | 0x00420281861253 |
//! | | handshake flags (2) | size (8), flags (4), zeroes (124) |
//!
//! A newstyle client answers with flags (4).

use super::{DecodeError, Decoded, Input, Output};

/// The first bytes of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Greeting {
    /// Options follow.
    Newstyle {
        /// See [`handshake_flag`](super::handshake_flag).
        flags: u16,
    },
    /// The old style: the only export, whose transmission begins at once.
    OldStyle {
        /// Bytes of the export.
        size: u64,
        /// Its transmission flags, in the lower half.
        flags: u32,
    },
}

impl Greeting {
    /// Bytes from which [`decode`](Self::decode) knows how many there are.
    pub const PREFIX: usize = 16;

    /// Appends the greeting to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.u64(MAGIC);
        match *self {
            Self::Newstyle { flags } => out.u64(OPTION_MAGIC).u16(flags),
            Self::OldStyle { size, flags } => out.u64(OLD_MAGIC).u64(size).u32(flags).bytes(&ZEROES),
        };
    }

    /// Reads a greeting. Errors: another protocol.
    pub fn decode(bytes: &[u8]) -> Decoded<Self> {
        let mut input = Input::new(bytes);
        if input.u64()? != MAGIC {
            return Err(DecodeError::Invalid("a greeting of another protocol"));
        }
        let greeting = match input.u64()? {
            OPTION_MAGIC => Self::Newstyle { flags: input.u16()? },
            OLD_MAGIC => {
                // The whole length at once, so that nobody asks three times.
                input.clone().take(8 + 4 + ZEROES.len())?;
                let greeting = Self::OldStyle { size: input.u64()?, flags: input.u32()? };
                input.take(ZEROES.len())?;
                greeting
            }
            _ => return Err(DecodeError::Invalid("a greeting of an unknown kind")),
        };
        input.done(greeting)
    }
}

/// Appends the client's answer to a newstyle greeting: flags, of those that the server has.
pub fn encode_client_flags(flags: u32, out: &mut Vec<u8>) {
    out.u32(flags);
}

/// Reads the client's answer to a newstyle greeting.
pub fn decode_client_flags(bytes: &[u8]) -> Decoded<u32> {
    let mut input = Input::new(bytes);
    let flags = input.u32()?;
    input.done(flags)
}

/// The reply to the option that only names an export; transmission begins behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NameReply {
    /// Bytes of the export.
    pub size: u64,
    /// Its transmission flags.
    pub flags: u16,
}

impl NameReply {
    /// Length in bytes. `no_zeroes`: both sides have the flag NO_ZEROES.
    pub fn len(no_zeroes: bool) -> usize {
        if no_zeroes { 10 } else { 10 + ZEROES.len() }
    }

    /// Appends the reply to `out`.
    pub fn encode(&self, no_zeroes: bool, out: &mut Vec<u8>) {
        out.u64(self.size).u16(self.flags);
        if !no_zeroes {
            out.bytes(&ZEROES);
        }
    }

    /// Reads a reply.
    pub fn decode(bytes: &[u8], no_zeroes: bool) -> Decoded<Self> {
        let mut input = Input::new(bytes);
        let reply = Self { size: input.u64()?, flags: input.u16()? };
        input.take(Self::len(no_zeroes) - 10)?;
        input.done(reply)
    }
}

const MAGIC: u64 = 0x4e42_444d_4147_4943;
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OLD_MAGIC: u64 = 0x0000_4202_8186_1253;
const ZEROES: [u8; 124] = [0; 124];
