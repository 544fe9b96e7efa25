//! The messages of the protocol, as bytes and as values, in both directions.
//!
//! `encode` appends to a buffer; `decode` takes bytes from their beginning and returns the value and the
//! number of bytes it had. Decoding is total: any bytes give a value, [`DecodeError::Short`] with the number
//! of bytes that are needed at least, or [`DecodeError::Invalid`]. It allocates at most what the bytes that
//! are there can fill.
//!
//! Strings are text in the values and bytes in the messages: a byte that is no part of a UTF-8 character is a
//! private character of its own, as in [`qcow2_format::text`], so names of any bytes pass without loss.
//!
//! | phase | from the client | from the server |
//! |---|---|---|
//! | greeting | [`encode_client_flags`] | [`Greeting`] |
//! | options | [`OptionHead`], [`OptionRequest`] | [`OptionReplyHead`], [`OptionReply`], [`NameReply`] |
//! | transmission | [`Request`] and the bytes of a write | [`ReplyHead`], [`Chunk`] and the bytes of a read |

mod codes;
mod greeting;
mod option;
mod reply;
mod request;

pub use codes::{
    ChunkKind, Command, ErrorCode, InfoKind, OptionCode, ReplyKind, chunk_flag, command_flag, handshake_flag,
    state, transmission_flag,
};
pub use greeting::{Greeting, NameReply, decode_client_flags, encode_client_flags};
pub use option::{BlockSizes, Info, OptionHead, OptionReply, OptionReplyHead, OptionRequest};
pub use reply::{Chunk, Extent, ReplyHead};
pub use request::{Mode, Request};

use qcow2_format::text::{bytes_of, text_of};
use std::borrow::Cow;
use std::fmt;

/// The longest string of the protocol, in bytes.
pub const MAX_STRING: usize = 4096;
/// The largest payload that every peer accepts where no sizes were agreed on.
pub const DEFAULT_MAX_PAYLOAD: u32 = 32 << 20;
/// The longest data of an option or of its reply that is worth reading: real peers stay far below.
pub const MAX_OPTION_DATA: u32 = 64 << 10;
/// The longest payload of an error chunk: code, length, text and offset.
pub const MAX_ERROR_PAYLOAD: u64 = 4 + 2 + MAX_STRING as u64 + 8;
/// The most extents of one block status. Origin: the protocol's recommendation.
pub const MAX_EXTENTS: u64 = 1 << 20;

/// Why bytes are no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DecodeError {
    /// The message is longer: it has so many bytes, counted from the first, or more.
    Short(usize),
    /// No bytes that follow make it a message; the text tells what is wrong.
    Invalid(&'static str),
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Short(needed) => write!(f, "a message of at least {needed} bytes is cut short"),
            Self::Invalid(what) => f.write_str(what),
        }
    }
}

impl std::error::Error for DecodeError {}

/// What decoding returns: the value, and how many bytes it had.
pub type Decoded<T> = Result<(T, usize), DecodeError>;

/// Bytes that are taken from the front.
#[derive(Clone, Copy, Debug)]
struct Input<'a> {
    bytes: &'a [u8],
    taken: usize,
}

impl<'a> Input<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, taken: 0 }
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], DecodeError> {
        let end = self.taken.checked_add(len).ok_or(DecodeError::Invalid("a length without bounds"))?;
        let taken = self.bytes.get(self.taken..end).ok_or(DecodeError::Short(end))?;
        self.taken = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let bytes = self.take(N)?;
        bytes.try_into().map_err(|_| DecodeError::Short(N))
    }

    fn u16(&mut self) -> Result<u16, DecodeError> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64, DecodeError> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string with its length, 32 bits, before it.
    fn string(&mut self) -> Result<String, DecodeError> {
        let len = self.u32()? as usize;
        self.text(len)
    }

    fn text(&mut self, len: usize) -> Result<String, DecodeError> {
        if len > MAX_STRING {
            return Err(DecodeError::Invalid("a string of more than 4096 bytes"));
        }
        Ok(text_of(self.take(len)?))
    }

    /// All bytes that are left, as text: of a name, or of a message.
    fn rest(&mut self) -> Result<String, DecodeError> {
        self.text(self.left())
    }

    fn left(&self) -> usize {
        self.bytes.len() - self.taken
    }

    /// `value`, which had all the bytes that were taken.
    fn done<T>(self, value: T) -> Decoded<T> {
        Ok((value, self.taken))
    }

    /// `value`, which must have had all the bytes that are there.
    fn ended<T>(self, value: T) -> Result<T, DecodeError> {
        match self.left() {
            0 => Ok(value),
            _ => Err(DecodeError::Invalid("bytes behind the end of a message")),
        }
    }
}

/// Appends numbers and strings to a buffer.
trait Output {
    fn bytes(&mut self, bytes: &[u8]) -> &mut Self;

    fn u16(&mut self, number: u16) -> &mut Self {
        self.bytes(&number.to_be_bytes())
    }

    fn u32(&mut self, number: u32) -> &mut Self {
        self.bytes(&number.to_be_bytes())
    }

    fn u64(&mut self, number: u64) -> &mut Self {
        self.bytes(&number.to_be_bytes())
    }

    /// A string with its length.
    fn string(&mut self, text: &str) -> &mut Self {
        let bytes = name_bytes(text);
        self.u32(bytes.len() as u32).bytes(&bytes)
    }

    /// A string up to the end of a message.
    fn name(&mut self, text: &str) -> &mut Self {
        self.bytes(&name_bytes(text))
    }
}

impl Output for Vec<u8> {
    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.extend_from_slice(bytes);
        self
    }
}

/// The bytes of a name. What is over [`MAX_STRING`] is left off, at a whole character.
fn name_bytes(text: &str) -> Cow<'_, [u8]> {
    match bytes_of(text) {
        bytes if bytes.len() <= MAX_STRING => bytes,
        _ => bytes_of(short(text)),
    }
}

/// The longest beginning of `text` that a peer takes.
fn short(text: &str) -> &str {
    let mut end = text.len().min(MAX_STRING);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}
