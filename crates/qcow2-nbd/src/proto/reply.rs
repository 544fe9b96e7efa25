//! Replies of the transmission phase.
//!
//! | simple | bytes | | chunk | bytes | | extended chunk | bytes |
//! |---|---|---|---|---|---|---|---|
//! | magic 0x67446698 | 4 | | magic 0x668e33ef | 4 | | magic 0x6e8a278c | 4 |
//! | error | 4 | | flags | 2 | | flags | 2 |
//! | | | | kind | 2 | | kind | 2 |
//! | cookie | 8 | | cookie | 8 | | cookie | 8 |
//! | | | | | | | offset of the request | 8 |
//! | | | | length | 4 | | length | 8 |
//!
//! The payload follows: of a simple reply the bytes of a read without error.

use super::{ChunkKind, DecodeError, Decoded, ErrorCode, Input, Output, short};

/// A reply, or a chunk of one, without its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyHead {
    /// The whole reply.
    Simple {
        /// 0 for success.
        error: ErrorCode,
        /// Of the request.
        cookie: u64,
    },
    /// A part of a reply.
    Chunk {
        /// See [`chunk_flag`](super::chunk_flag).
        flags: u16,
        /// What the payload is.
        kind: ChunkKind,
        /// Of the request.
        cookie: u64,
        /// With extended headers: the offset of the request.
        offset: Option<u64>,
        /// Length of the payload in bytes; below 2^32 without extended headers.
        len: u64,
    },
}

impl ReplyHead {
    /// Length of the shortest, from which [`decode`](Self::decode) knows how many bytes there are.
    pub const PREFIX: usize = 16;

    /// The cookie of the request.
    pub fn cookie(&self) -> u64 {
        match *self {
            Self::Simple { cookie, .. } | Self::Chunk { cookie, .. } => cookie,
        }
    }

    /// Appends the head to `out`. Errors: a length that a chunk without extended headers has no room for.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), DecodeError> {
        match *self {
            Self::Simple { error, cookie } => out.u32(SIMPLE).u32(error.0).u64(cookie),
            Self::Chunk { flags, kind, cookie, offset: Some(offset), len } => {
                out.u32(EXTENDED_CHUNK).u16(flags).u16(kind.0).u64(cookie).u64(offset).u64(len)
            }
            Self::Chunk { flags, kind, cookie, offset: None, len } => {
                let len = u32::try_from(len).map_err(|_| DecodeError::Invalid("a chunk of 2^32 bytes"))?;
                out.u32(CHUNK).u16(flags).u16(kind.0).u64(cookie).u32(len)
            }
        };
        Ok(())
    }

    /// Reads a head. Errors: an unknown magic number.
    pub fn decode(bytes: &[u8]) -> Decoded<Self> {
        let mut input = Input::new(bytes);
        let magic = input.u32()?;
        let rest = match magic {
            SIMPLE => 12,
            CHUNK => 16,
            EXTENDED_CHUNK => 28,
            _ => return Err(DecodeError::Invalid("a reply with an unknown magic number")),
        };
        input.clone().take(rest)?;
        if magic == SIMPLE {
            let head = Self::Simple { error: ErrorCode(input.u32()?), cookie: input.u64()? };
            return input.done(head);
        }
        let (flags, kind, cookie) = (input.u16()?, ChunkKind(input.u16()?), input.u64()?);
        let (offset, len) = match magic {
            CHUNK => (None, u64::from(input.u32()?)),
            _ => (Some(input.u64()?), input.u64()?),
        };
        input.done(Self::Chunk { flags, kind, cookie, offset, len })
    }
}

/// A range of a meta context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes.
    pub len: u64,
    /// Its status; what the bits mean depends on the context.
    pub flags: u64,
}

impl Extent {
    /// Length in bytes. `extended`: in a chunk of the kind [`ChunkKind::BLOCK_STATUS_EXT`].
    pub fn size(extended: bool) -> usize {
        if extended { 16 } else { 8 }
    }

    /// Reads an extent.
    pub fn decode(bytes: &[u8], extended: bool) -> Decoded<Self> {
        let mut input = Input::new(bytes);
        let extent = Self::take(&mut input, extended)?;
        input.done(extent)
    }

    fn take(input: &mut Input<'_>, extended: bool) -> Result<Self, DecodeError> {
        Ok(match extended {
            true => Self { len: input.u64()?, flags: input.u64()? },
            false => Self { len: input.u32()?.into(), flags: input.u32()?.into() },
        })
    }
}

/// The payload of a chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Chunk<'a> {
    /// Nothing.
    None,
    /// Bytes of a read.
    Data {
        /// Offset of the first one in the export.
        offset: u64,
        /// The bytes.
        data: &'a [u8],
    },
    /// Bytes of a read that are zeroes.
    Hole {
        /// Offset of the first one in the export.
        offset: u64,
        /// How many.
        len: u32,
    },
    /// Extents of a meta context, from the offset of the request on.
    Status {
        /// The id that the handshake gave it.
        context: u32,
        /// Numbers of 64 bits.
        extended: bool,
        /// The extents.
        extents: Vec<Extent>,
    },
    /// An error.
    Error {
        /// Which one.
        error: ErrorCode,
        /// A text for people; may be empty. Bytes that are not UTF-8 are replaced.
        message: String,
        /// Where it occurred, if known.
        offset: Option<u64>,
    },
    /// A payload that is not known here.
    Other(ChunkKind, &'a [u8]),
}

impl<'a> Chunk<'a> {
    /// Its kind.
    pub fn kind(&self) -> ChunkKind {
        match self {
            Self::None => ChunkKind::NONE,
            Self::Data { .. } => ChunkKind::OFFSET_DATA,
            Self::Hole { .. } => ChunkKind::OFFSET_HOLE,
            Self::Status { extended: false, .. } => ChunkKind::BLOCK_STATUS,
            Self::Status { extended: true, .. } => ChunkKind::BLOCK_STATUS_EXT,
            Self::Error { offset: None, .. } => ChunkKind::ERROR,
            Self::Error { offset: Some(_), .. } => ChunkKind::ERROR_OFFSET,
            Self::Other(kind, _) => *kind,
        }
    }

    /// Appends the payload, without its head, to `out`. Errors: an extent of 2^32 bytes or more, or such
    /// flags, in a chunk that has no room for them.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), DecodeError> {
        match self {
            Self::None => {}
            Self::Data { offset, data } => {
                out.u64(*offset).bytes(data);
            }
            Self::Hole { offset, len } => {
                out.u64(*offset).u32(*len);
            }
            Self::Status { context, extended: true, extents } => {
                out.u32(*context).u32(extents.len() as u32);
                extents.iter().for_each(|extent| {
                    out.u64(extent.len).u64(extent.flags);
                });
            }
            Self::Status { context, extended: false, extents } => {
                out.u32(*context);
                for extent in extents {
                    let (Ok(len), Ok(flags)) = (u32::try_from(extent.len), u32::try_from(extent.flags))
                    else {
                        return Err(DecodeError::Invalid("an extent of 2^32 bytes"));
                    };
                    out.u32(len).u32(flags);
                }
            }
            Self::Error { error, message, offset } => {
                let message = short(message);
                out.u32(error.0).u16(message.len() as u16).bytes(message.as_bytes());
                if let Some(offset) = offset {
                    out.u64(*offset);
                }
            }
            Self::Other(_, data) => {
                out.bytes(data);
            }
        }
        Ok(())
    }

    /// Reads the payload of a chunk of this kind, all of it. Errors: a payload that is too short or too long.
    pub fn decode(kind: ChunkKind, payload: &'a [u8]) -> Result<Self, DecodeError> {
        let mut input = Input::new(payload);
        let chunk = match kind {
            ChunkKind::NONE => Self::None,
            ChunkKind::OFFSET_DATA => Self::Data { offset: input.u64()?, data: input.take(input.left())? },
            ChunkKind::OFFSET_HOLE => Self::Hole { offset: input.u64()?, len: input.u32()? },
            ChunkKind::BLOCK_STATUS | ChunkKind::BLOCK_STATUS_EXT => {
                let extended = kind == ChunkKind::BLOCK_STATUS_EXT;
                let context = input.u32()?;
                let count = match extended {
                    true => input.u32()? as usize,
                    false => input.left() / Extent::size(false),
                };
                let mut extents = Vec::new();
                for _ in 0..count {
                    extents.push(Extent::take(&mut input, extended)?);
                }
                Self::Status { context, extended, extents }
            }
            ChunkKind::ERROR | ChunkKind::ERROR_OFFSET => {
                let (error, len) = (ErrorCode(input.u32()?), usize::from(input.u16()?));
                let message = String::from_utf8_lossy(input.take(len)?).into_owned();
                let at_offset = kind == ChunkKind::ERROR_OFFSET;
                let offset = if at_offset { Some(input.u64()?) } else { None };
                Self::Error { error, message: short(&message).to_owned(), offset }
            }
            kind => Self::Other(kind, input.take(payload.len())?),
        };
        input.ended(chunk)
    }
}

const SIMPLE: u32 = 0x6744_6698;
const CHUNK: u32 = 0x668e_33ef;
const EXTENDED_CHUNK: u32 = 0x6e8a_278c;
