//! Options and their replies.
//!
//! | option | bytes | | reply | bytes |
//! |---|---|---|---|---|
//! | `IHAVEOPT` | 8 | | magic 0x0003e889045565a9 | 8 |
//! | option | 4 | | option | 4 |
//! | | | | kind | 4 |
//! | length | 4 | | length | 4 |
//! | data | | | data | |

use super::greeting::OPTION_MAGIC;
use super::{DecodeError, Decoded, InfoKind, Input, OptionCode, Output, ReplyKind, short};

/// What precedes the data of an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHead {
    /// Which option.
    pub option: OptionCode,
    /// Length of the data that follows, in bytes.
    pub len: u32,
}

impl OptionHead {
    /// Length in bytes.
    pub const LEN: usize = 16;

    /// Appends the head to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.u64(OPTION_MAGIC).u32(self.option.0).u32(self.len);
    }

    /// Reads a head. Errors: a wrong magic number.
    pub fn decode(bytes: &[u8]) -> Decoded<Self> {
        let mut input = Input::new(bytes);
        if input.u64()? != OPTION_MAGIC {
            return Err(DecodeError::Invalid("an option without its magic number"));
        }
        let head = Self { option: OptionCode(input.u32()?), len: input.u32()? };
        input.done(head)
    }
}

/// An option with its data.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OptionRequest {
    /// Begins transmission with the export of this name.
    ExportName(String),
    /// Facts about an export, and with `go` the beginning of transmission.
    Info {
        /// True for the option GO.
        go: bool,
        /// Name of the export.
        export: String,
        /// Facts that the client wants.
        wanted: Vec<InfoKind>,
    },
    /// Meta contexts of an export.
    MetaContext {
        /// True if they are chosen, false if they are only listed.
        set: bool,
        /// Name of the export.
        export: String,
        /// Names, or beginnings of names.
        queries: Vec<String>,
    },
    /// Any other option.
    Other {
        /// Which option.
        option: OptionCode,
        /// Its data; most have none.
        data: Vec<u8>,
    },
}

impl OptionRequest {
    /// An option without data.
    pub fn plain(option: OptionCode) -> Self {
        Self::Other { option, data: Vec::new() }
    }

    /// Which option it is.
    pub fn option(&self) -> OptionCode {
        match self {
            Self::ExportName(_) => OptionCode::EXPORT_NAME,
            Self::Info { go: true, .. } => OptionCode::GO,
            Self::Info { go: false, .. } => OptionCode::INFO,
            Self::MetaContext { set: true, .. } => OptionCode::SET_META_CONTEXT,
            Self::MetaContext { set: false, .. } => OptionCode::LIST_META_CONTEXT,
            Self::Other { option, .. } => *option,
        }
    }

    /// Appends head and data to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut data = Vec::new();
        match self {
            Self::ExportName(name) => {
                data.name(name);
            }
            Self::Info { export, wanted, .. } => {
                data.string(export).u16(wanted.len() as u16);
                wanted.iter().for_each(|kind| {
                    data.u16(kind.0);
                });
            }
            Self::MetaContext { export, queries, .. } => {
                data.string(export).u32(queries.len() as u32);
                queries.iter().for_each(|query| {
                    data.string(query);
                });
            }
            Self::Other { data: bytes, .. } => {
                data.bytes(bytes);
            }
        }
        OptionHead { option: self.option(), len: data.len() as u32 }.encode(out);
        out.bytes(&data);
    }

    /// Reads the data of `option`, all of it. Errors: data that is too short, too long, or not text.
    pub fn decode(option: OptionCode, data: &[u8]) -> Result<Self, DecodeError> {
        let mut input = Input::new(data);
        let request = match option {
            OptionCode::EXPORT_NAME => Self::ExportName(input.rest()?),
            OptionCode::INFO | OptionCode::GO => {
                let (go, export, count) = (option == OptionCode::GO, input.string()?, input.u16()?);
                let mut wanted = Vec::new();
                for _ in 0..count {
                    wanted.push(InfoKind(input.u16()?));
                }
                Self::Info { go, export, wanted }
            }
            OptionCode::LIST_META_CONTEXT | OptionCode::SET_META_CONTEXT => {
                let set = option == OptionCode::SET_META_CONTEXT;
                let (export, count) = (input.string()?, input.u32()?);
                let mut queries = Vec::new();
                for _ in 0..count {
                    queries.push(input.string()?);
                }
                Self::MetaContext { set, export, queries }
            }
            option => Self::Other { option, data: input.take(data.len())?.to_vec() },
        };
        input.ended(request)
    }
}

/// What precedes the data of a reply to an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionReplyHead {
    /// The option that is replied to.
    pub option: OptionCode,
    /// Kind of the reply.
    pub kind: ReplyKind,
    /// Length of the data that follows, in bytes.
    pub len: u32,
}

impl OptionReplyHead {
    /// Length in bytes.
    pub const LEN: usize = 20;

    /// Appends the head to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.u64(REPLY_MAGIC).u32(self.option.0).u32(self.kind.0).u32(self.len);
    }

    /// Reads a head. Errors: a wrong magic number.
    pub fn decode(bytes: &[u8]) -> Decoded<Self> {
        let mut input = Input::new(bytes);
        if input.u64()? != REPLY_MAGIC {
            return Err(DecodeError::Invalid("a reply to an option without its magic number"));
        }
        let (option, kind) = (OptionCode(input.u32()?), ReplyKind(input.u32()?));
        let head = Self { option, kind, len: input.u32()? };
        input.done(head)
    }
}

/// Limits of a request's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths are multiples of it: a power of two, up to 64 KiB.
    pub minimum: u32,
    /// Offsets and lengths that are multiples of it are fast: a power of two.
    pub preferred: u32,
    /// The longest payload of a read or a write.
    pub maximum: u32,
}

impl BlockSizes {
    /// Checks what the protocol demands of the three. Errors: what is wrong.
    pub fn check(&self) -> Result<(), &'static str> {
        let Self { minimum, preferred, maximum } = *self;
        if !minimum.is_power_of_two() || minimum > 64 << 10 {
            return Err("a minimum block size that is no power of two up to 65536");
        }
        if !preferred.is_power_of_two() || preferred < minimum {
            return Err("a preferred block size that is no power of two, or below the minimum");
        }
        if maximum < minimum || (maximum != u32::MAX && !maximum.is_multiple_of(minimum)) {
            return Err("a maximum block size that is no multiple of the minimum");
        }
        Ok(())
    }
}

/// A fact about an export.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Info {
    /// Size in bytes, and transmission flags.
    Export {
        /// Bytes of the export.
        size: u64,
        /// See [`transmission_flag`](super::transmission_flag).
        flags: u16,
    },
    /// The name the server has for the export.
    Name(String),
    /// A text for people.
    Description(String),
    /// Limits of a request's size.
    BlockSizes(BlockSizes),
    /// A fact that is not known here.
    Other(InfoKind, Vec<u8>),
}

impl Info {
    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Export { size, flags } => out.u16(InfoKind::EXPORT.0).u64(*size).u16(*flags),
            Self::Name(name) => out.u16(InfoKind::NAME.0).name(name),
            Self::Description(text) => out.u16(InfoKind::DESCRIPTION.0).name(text),
            Self::BlockSizes(BlockSizes { minimum, preferred, maximum }) => {
                out.u16(InfoKind::BLOCK_SIZE.0).u32(*minimum).u32(*preferred).u32(*maximum)
            }
            Self::Other(kind, data) => out.u16(kind.0).bytes(data),
        };
    }

    fn decode(input: &mut Input<'_>) -> Result<Self, DecodeError> {
        Ok(match InfoKind(input.u16()?) {
            InfoKind::EXPORT => Self::Export { size: input.u64()?, flags: input.u16()? },
            InfoKind::NAME => Self::Name(input.rest()?),
            InfoKind::DESCRIPTION => Self::Description(input.rest()?),
            InfoKind::BLOCK_SIZE => {
                let (minimum, preferred) = (input.u32()?, input.u32()?);
                Self::BlockSizes(BlockSizes { minimum, preferred, maximum: input.u32()? })
            }
            kind => Self::Other(kind, input.take(input.left())?.to_vec()),
        })
    }
}

/// A reply to an option, with its data.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OptionReply {
    /// The option was accepted; the last reply.
    Ack,
    /// An export of a list.
    Server {
        /// Name of the export.
        name: String,
        /// A text for people.
        description: String,
    },
    /// A fact about an export.
    Info(Info),
    /// A meta context.
    MetaContext {
        /// By which block status calls it; 0 in a list.
        id: u32,
        /// Its name.
        name: String,
    },
    /// The option was refused; the last reply.
    Error {
        /// Why.
        kind: ReplyKind,
        /// A text for people; may be empty. Bytes that are not UTF-8 are replaced.
        message: String,
    },
    /// A reply that is not known here.
    Other(ReplyKind, Vec<u8>),
}

impl OptionReply {
    /// Its kind.
    pub fn kind(&self) -> ReplyKind {
        match self {
            Self::Ack => ReplyKind::ACK,
            Self::Server { .. } => ReplyKind::SERVER,
            Self::Info(_) => ReplyKind::INFO,
            Self::MetaContext { .. } => ReplyKind::META_CONTEXT,
            Self::Error { kind, .. } | Self::Other(kind, _) => *kind,
        }
    }

    /// Appends the reply to `option`, head and data, to `out`.
    pub fn encode(&self, option: OptionCode, out: &mut Vec<u8>) {
        let mut data = Vec::new();
        match self {
            Self::Ack => {}
            Self::Server { name, description } => {
                data.string(name).name(description);
            }
            Self::Info(info) => info.encode(&mut data),
            Self::MetaContext { id, name } => {
                data.u32(*id).name(name);
            }
            Self::Error { message, .. } => {
                data.bytes(short(message).as_bytes());
            }
            Self::Other(_, bytes) => {
                data.bytes(bytes);
            }
        }
        OptionReplyHead { option, kind: self.kind(), len: data.len() as u32 }.encode(out);
        out.bytes(&data);
    }

    /// Reads the data of a reply of this kind, all of it. Errors: data that is too short, too long, or not
    /// text.
    pub fn decode(kind: ReplyKind, data: &[u8]) -> Result<Self, DecodeError> {
        let mut input = Input::new(data);
        let reply = match kind {
            // Some servers add data to it, which means nothing.
            ReplyKind::ACK => return Ok(Self::Ack),
            ReplyKind::SERVER => Self::Server { name: input.string()?, description: input.rest()? },
            ReplyKind::INFO => Self::Info(Info::decode(&mut input)?),
            ReplyKind::META_CONTEXT => Self::MetaContext { id: input.u32()?, name: input.rest()? },
            kind if kind.is_error() => {
                let message = String::from_utf8_lossy(data);
                return Ok(Self::Error { kind, message: short(&message).to_owned() });
            }
            kind => Self::Other(kind, input.take(data.len())?.to_vec()),
        };
        input.ended(reply)
    }
}

const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
