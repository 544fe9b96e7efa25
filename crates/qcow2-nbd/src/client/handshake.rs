//! From the greeting to an export: the options, in the order in which a server must see them.

use super::Violation;
use crate::proto::{
    BlockSizes, Greeting, Info, InfoKind, MAX_OPTION_DATA, Mode, NameReply, OptionCode, OptionReply,
    OptionReplyHead, OptionRequest, ReplyKind, encode_client_flags, handshake_flag,
};
use std::fmt;

/// What the handshake is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Goal {
    /// Transmission with the export.
    #[default]
    Go,
    /// Facts about the export, then the end.
    Info,
    /// The names of all exports, then the end.
    List,
}

/// What a client asks for.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Negotiation {
    /// What the handshake is for.
    pub goal: Goal,
    /// Name of the export; empty for the server's default.
    pub export: String,
    /// Meta contexts for block status. Those that the server does not have are left out.
    pub contexts: Vec<String>,
    /// Whether structured replies are asked for; contexts need them.
    pub structured: bool,
    /// Whether extended headers are asked for, before structured replies.
    pub extended: bool,
    /// Whether limits of a request's size are asked for, and will be kept.
    pub block_sizes: bool,
    /// Whether the connection must be encrypted.
    pub tls: bool,
}

impl Default for Negotiation {
    fn default() -> Self {
        Self {
            goal: Goal::Go,
            export: String::new(),
            contexts: vec!["base:allocation".to_owned()],
            structured: true,
            extended: true,
            block_sizes: true,
            tls: false,
        }
    }
}

impl Negotiation {
    /// Everything this client can, for `export`.
    pub fn with_export(export: &str) -> Self {
        Self { export: export.to_owned(), ..Self::default() }
    }
}

/// A meta context that was agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Context {
    /// By which block status calls it.
    pub id: u32,
    /// Its name.
    pub name: String,
}

/// An export, as the handshake describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Export {
    /// Bytes of it.
    pub size: u64,
    /// See [`transmission_flag`](crate::proto::transmission_flag).
    pub flags: u16,
    /// Headers of requests and replies.
    pub mode: Mode,
    /// The meta contexts that block status is about.
    pub contexts: Vec<Context>,
    /// Limits of a request's size, if the server has told them. They are valid ones.
    pub block_sizes: Option<BlockSizes>,
    /// The server's text about it.
    pub description: Option<String>,
}

impl Export {
    /// The id of the meta context `name`.
    pub fn context(&self, name: &str) -> Option<u32> {
        self.contexts.iter().find(|context| context.name == name).map(|context| context.id)
    }

    /// True if all bits of `flag` are set.
    pub fn has(&self, flag: u16) -> bool {
        self.flags & flag == flag
    }
}

/// An export of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// A text for people; may be empty.
    pub description: String,
}

/// What the caller of a handshake does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Send what was appended to the buffer, receive exactly so many bytes, and pass them on. May be 0.
    Receive(usize),
    /// Send what was appended, run the handshake of TLS, and call [`Handshake::secured`].
    StartTls,
    /// Send what was appended. Transmission has begun, or for [`Goal::Info`] all is known.
    Ready(Export),
    /// Send what was appended. The list is complete.
    Listed(Vec<Listed>),
}

/// Why there is no export.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HandshakeFailure {
    /// The server speaks another protocol.
    NotNbd,
    /// The server broke the protocol.
    Violation(Violation),
    /// The server refused an option.
    Refused {
        /// Which one.
        option: OptionCode,
        /// Why.
        kind: ReplyKind,
        /// The server's text; may be empty.
        message: String,
    },
    /// An old-style server has one export, without a name.
    NoNames,
    /// The server is too old for what was asked for: for TLS, for a list, for facts.
    TooOld,
    /// The server began transmission without the export's size.
    NoSize,
}

/// A failed handshake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HandshakeError(HandshakeFailure);

impl HandshakeError {
    /// What happened.
    pub fn failure(&self) -> &HandshakeFailure {
        &self.0
    }
}

impl fmt::Display for HandshakeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            HandshakeFailure::NotNbd => f.write_str("the server does not speak NBD"),
            HandshakeFailure::Violation(violation) => violation.fmt(f),
            HandshakeFailure::Refused { option, kind, message } => {
                write!(f, "the server refused option {} with reply {:#x}", option.0, kind.0)?;
                if message.is_empty() { Ok(()) } else { write!(f, ": {message}") }
            }
            HandshakeFailure::NoNames => f.write_str("the server has one export, which has no name"),
            HandshakeFailure::TooOld => f.write_str("the server is too old for what was asked"),
            HandshakeFailure::NoSize => f.write_str("the server did not tell the size of the export"),
        }
    }
}

impl std::error::Error for HandshakeError {}

impl<T: Into<Violation>> From<T> for HandshakeError {
    fn from(error: T) -> Self {
        Self(HandshakeFailure::Violation(error.into()))
    }
}

/// A handshake.
///
/// ```
/// use qcow2_nbd::client::{Handshake, Negotiation, Step};
///
/// // An old-style server sends all there is to know, and asks nothing.
/// let mut server = b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53".to_vec();
/// server.extend(1_048_576u64.to_be_bytes());
/// server.extend(1u32.to_be_bytes());
/// server.extend([0; 124]);
///
/// let mut handshake = Handshake::new(Negotiation::default());
/// let (mut sent, mut received, mut step) = (Vec::new(), &server[..], handshake.start());
/// let export = loop {
///     step = match step {
///         Step::Receive(len) => {
///             let (bytes, rest) = received.split_at(len);
///             received = rest;
///             handshake.receive(bytes, &mut sent)?
///         }
///         Step::Ready(export) => break export,
///         _ => unreachable!("neither TLS nor a list was asked for"),
///     }
/// };
/// assert_eq!((export.size, sent.len()), (1_048_576, 0));
/// # Ok::<(), qcow2_nbd::client::HandshakeError>(())
/// ```
#[derive(Debug)]
pub struct Handshake {
    negotiation: Negotiation,
    state: State,
    no_zeroes: bool,
    export: Export,
    size_known: bool,
    listed: Vec<Listed>,
    /// Replies to the option that is under way.
    replies: usize,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Greeting,
    GreetingRest([u8; Greeting::PREFIX]),
    /// A reply to this option.
    Head(OptionCode),
    Body(OptionReplyHead),
    NameReply,
    Over,
}

impl Handshake {
    /// Begins with nothing sent or received.
    pub fn new(negotiation: Negotiation) -> Self {
        Self {
            negotiation,
            state: State::Greeting,
            no_zeroes: false,
            export: Export::default(),
            size_known: false,
            listed: Vec::new(),
            replies: 0,
        }
    }

    /// The first step.
    pub fn start(&self) -> Step {
        Step::Receive(Greeting::PREFIX)
    }

    /// Takes the bytes that the last step asked for, and appends to `out` what is to be sent. Errors: the
    /// server refuses, or breaks the protocol; the handshake is over then.
    pub fn receive(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Result<Step, HandshakeError> {
        let state = std::mem::replace(&mut self.state, State::Over);
        match state {
            State::Greeting => {
                let prefix = bytes.try_into().map_err(|_| Violation("nothing that was asked for"))?;
                let rest = match Greeting::decode(bytes) {
                    Err(crate::proto::DecodeError::Short(len)) => len - Greeting::PREFIX,
                    _ => return Err(HandshakeError(HandshakeFailure::NotNbd)),
                };
                self.state = State::GreetingRest(prefix);
                Ok(Step::Receive(rest))
            }
            State::GreetingRest(prefix) => {
                let (greeting, _) = Greeting::decode(&[&prefix[..], bytes].concat())?;
                self.greeted(greeting, out)
            }
            State::Head(option) => {
                let (head, _) = OptionReplyHead::decode(bytes)?;
                self.replies += 1;
                if head.option != option {
                    return Err(Violation("no reply to the option").into());
                }
                if head.len > MAX_OPTION_DATA {
                    return Err(Violation("a reply that is too long").into());
                }
                if self.replies > MAX_REPLIES {
                    return Err(Violation("replies without end").into());
                }
                self.state = State::Body(head);
                Ok(Step::Receive(head.len as usize))
            }
            State::Body(head) => self.replied(head, bytes, out),
            State::NameReply => {
                let (reply, _) = NameReply::decode(bytes, self.no_zeroes)?;
                (self.export.size, self.export.flags) = (reply.size, reply.flags);
                self.ready()
            }
            State::Over => Err(Violation("more than a handshake").into()),
        }
    }

    /// Goes on after the handshake of TLS, which [`Step::StartTls`] asked for.
    pub fn secured(&mut self, out: &mut Vec<u8>) -> Step {
        self.after(OptionCode::STARTTLS, out)
    }

    fn greeted(&mut self, greeting: Greeting, out: &mut Vec<u8>) -> Result<Step, HandshakeError> {
        let Negotiation { goal, tls, export, .. } = &self.negotiation;
        let flags = match greeting {
            Greeting::OldStyle { .. } if *tls || *goal == Goal::List => {
                return Err(HandshakeError(HandshakeFailure::TooOld));
            }
            Greeting::OldStyle { .. } if !export.is_empty() => {
                return Err(HandshakeError(HandshakeFailure::NoNames));
            }
            Greeting::OldStyle { size, flags } => {
                (self.export.size, self.export.flags) = (size, flags as u16);
                return self.ready();
            }
            Greeting::Newstyle { flags } => flags,
        };
        let fixed = flags & handshake_flag::FIXED_NEWSTYLE != 0;
        if !fixed && (*tls || *goal != Goal::Go) {
            return Err(HandshakeError(HandshakeFailure::TooOld));
        }
        self.no_zeroes = flags & handshake_flag::NO_ZEROES != 0;
        let ours = flags & (handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
        encode_client_flags(ours.into(), out);
        if !fixed {
            // Without the flag a server may close at the first option that it does not know.
            return Ok(self.ask_by_name(out));
        }
        Ok(match self.negotiation.tls {
            true => self.ask(&OptionRequest::plain(OptionCode::STARTTLS), out),
            false => self.after(OptionCode::STARTTLS, out),
        })
    }

    /// Sends the option that follows `option`.
    fn after(&mut self, option: OptionCode, out: &mut Vec<u8>) -> Step {
        let Negotiation { goal, structured, extended, contexts, .. } = &self.negotiation;
        let (is_simple, more) = (self.export.mode == Mode::Simple, *goal != Goal::List);
        let next = match option {
            OptionCode::STARTTLS if more && *extended => OptionRequest::plain(OptionCode::EXTENDED_HEADERS),
            OptionCode::STARTTLS | OptionCode::EXTENDED_HEADERS if more && *structured && is_simple => {
                OptionRequest::plain(OptionCode::STRUCTURED_REPLY)
            }
            OptionCode::STARTTLS | OptionCode::EXTENDED_HEADERS | OptionCode::STRUCTURED_REPLY
                if more && !is_simple && !contexts.is_empty() =>
            {
                let (export, queries) = (self.negotiation.export.clone(), contexts.clone());
                OptionRequest::MetaContext { set: true, export, queries }
            }
            _ if more => {
                let wanted =
                    if self.negotiation.block_sizes { vec![InfoKind::BLOCK_SIZE] } else { Vec::new() };
                let export = self.negotiation.export.clone();
                OptionRequest::Info { go: *goal == Goal::Go, export, wanted }
            }
            _ => OptionRequest::plain(OptionCode::LIST),
        };
        self.ask(&next, out)
    }

    fn ask(&mut self, option: &OptionRequest, out: &mut Vec<u8>) -> Step {
        option.encode(out);
        self.replies = 0;
        self.state = State::Head(option.option());
        Step::Receive(OptionReplyHead::LEN)
    }

    /// Chooses the export by the option that servers have had from the beginning.
    fn ask_by_name(&mut self, out: &mut Vec<u8>) -> Step {
        OptionRequest::ExportName(self.negotiation.export.clone()).encode(out);
        self.state = State::NameReply;
        Step::Receive(NameReply::len(self.no_zeroes))
    }

    fn replied(
        &mut self,
        head: OptionReplyHead,
        body: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Step, HandshakeError> {
        match OptionReply::decode(head.kind, body)? {
            OptionReply::Ack => return self.acknowledged(head.option, out),
            OptionReply::Error { kind, message } => return self.refused(head.option, kind, message, out),
            OptionReply::Server { name, description } => self.listed.push(Listed { name, description }),
            // A server may add contexts that match none of the names.
            OptionReply::MetaContext { id, name }
                if head.option == OptionCode::SET_META_CONTEXT
                    && self.negotiation.contexts.contains(&name)
                    && self.export.context(&name).is_none() =>
            {
                self.export.contexts.push(Context { id, name });
            }
            OptionReply::Info(info) => self.learn(info)?,
            // What is not known means nothing to this client.
            _ => {}
        }
        self.state = State::Head(head.option);
        Ok(Step::Receive(OptionReplyHead::LEN))
    }

    fn learn(&mut self, info: Info) -> Result<(), HandshakeError> {
        match info {
            Info::Export { size, flags } => {
                (self.export.size, self.export.flags) = (size, flags);
                self.size_known = true;
            }
            Info::BlockSizes(sizes) => {
                sizes.check().map_err(Violation)?;
                self.export.block_sizes = Some(sizes);
            }
            Info::Description(text) => self.export.description = Some(text),
            _ => {}
        }
        Ok(())
    }

    fn acknowledged(&mut self, option: OptionCode, out: &mut Vec<u8>) -> Result<Step, HandshakeError> {
        match option {
            OptionCode::STARTTLS => return Ok(Step::StartTls),
            OptionCode::EXTENDED_HEADERS => self.export.mode = Mode::Extended,
            OptionCode::STRUCTURED_REPLY => self.export.mode = Mode::Structured,
            OptionCode::GO | OptionCode::INFO if !self.size_known => {
                return Err(HandshakeError(HandshakeFailure::NoSize));
            }
            OptionCode::GO => return self.ready(),
            OptionCode::INFO => {
                OptionRequest::plain(OptionCode::ABORT).encode(out);
                return self.ready();
            }
            OptionCode::LIST => {
                OptionRequest::plain(OptionCode::ABORT).encode(out);
                return Ok(Step::Listed(std::mem::take(&mut self.listed)));
            }
            _ => {}
        }
        Ok(self.after(option, out))
    }

    fn refused(
        &mut self,
        option: OptionCode,
        kind: ReplyKind,
        message: String,
        out: &mut Vec<u8>,
    ) -> Result<Step, HandshakeError> {
        match option {
            // What these would add can be done without, unless the server says that it is ending. One that
            // takes nothing before TLS refuses the export as well.
            OptionCode::EXTENDED_HEADERS | OptionCode::STRUCTURED_REPLY | OptionCode::SET_META_CONTEXT
                if kind != ReplyKind::SHUTDOWN =>
            {
                Ok(self.after(option, out))
            }
            OptionCode::GO if kind == ReplyKind::UNSUPPORTED => Ok(self.ask_by_name(out)),
            _ => Err(HandshakeError(HandshakeFailure::Refused { option, kind, message })),
        }
    }

    fn ready(&mut self) -> Result<Step, HandshakeError> {
        Ok(Step::Ready(std::mem::take(&mut self.export)))
    }
}

/// Replies to one option, at most.
const MAX_REPLIES: usize = 1000;
