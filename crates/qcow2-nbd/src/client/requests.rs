//! Requests that are under way, and what their replies mean.

use super::Violation;
use super::ranges::Ranges;
use crate::proto::{
    ChunkKind, Command, DecodeError, ErrorCode, Extent, MAX_ERROR_PAYLOAD, MAX_EXTENTS, Mode, ReplyHead,
    Request, chunk_flag, command_flag,
};
use std::collections::BTreeMap;

/// What the next bytes from the server are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Pass exactly so many bytes to [`Requests::receive`]; no more than [`Requests::MOST`].
    Bytes(usize),
    /// Bytes of a read: take `len` bytes from the connection to where the request's bytes from `start` on
    /// go, then call [`Requests::data_received`].
    Data {
        /// The request.
        cookie: u64,
        /// Where they go, counted from the first byte of the request.
        start: u64,
        /// How many.
        len: u64,
    },
}

/// What the server said about a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Bytes of a read are zeroes.
    Hole {
        /// The request.
        cookie: u64,
        /// The first one, counted from the first byte of the request.
        start: u64,
        /// How many.
        len: u64,
    },
    /// Extents of a meta context, behind those of it that came before.
    Status {
        /// The request.
        cookie: u64,
        /// Id of the context.
        context: u32,
        /// The extents.
        extents: Vec<Extent>,
    },
    /// The reply is complete.
    Done {
        /// The request, which is not under way any more.
        cookie: u64,
        /// [`ErrorCode::NONE`] for success. All bytes of a read have arrived then.
        error: ErrorCode,
    },
}

/// The requests of a connection. Any number may be under way.
///
/// ```
/// use qcow2_nbd::client::{Event, Need, Requests};
/// use qcow2_nbd::proto::{Command, ErrorCode, Mode, ReplyHead, Request};
///
/// let (mut requests, mut sent, mut reply) = (Requests::new(Mode::Simple), Vec::new(), Vec::new());
/// let read = Request { command: Command::READ, flags: 0, cookie: 0, offset: 512, len: 4 };
/// let cookie = requests.submit(read, &mut sent)?;
///
/// // What the server answers, without the four bytes.
/// ReplyHead::Simple { error: ErrorCode::NONE, cookie }.encode(&mut reply)?;
/// assert_eq!(requests.need(), Need::Bytes(reply.len()));
/// assert_eq!(requests.receive(&reply)?, None);
/// assert_eq!(requests.need(), Need::Data { cookie, start: 0, len: 4 });
/// assert_eq!(requests.data_received()?, Some(Event::Done { cookie, error: ErrorCode::NONE }));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Requests {
    mode: Mode,
    next_cookie: u64,
    pending: BTreeMap<u64, Pending>,
    state: State,
}

/// A request that is under way.
#[derive(Debug)]
struct Pending {
    command: Command,
    offset: u64,
    len: u64,
    arrived: Ranges,
    chunks: u32,
    /// Meta contexts whose extents have come, or are coming.
    contexts: Vec<u32>,
    error: ErrorCode,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Head,
    HeadRest([u8; ReplyHead::PREFIX], usize),
    /// What precedes the bytes, or describes the hole, of a chunk.
    Range(Chunk),
    Data(Chunk, u64, u64),
    StatusHead(Chunk),
    /// So many extents are left.
    Extents(Chunk, u32, u64),
    /// The code of an error.
    Error(Chunk),
    /// Bytes that mean nothing.
    Skip(Chunk, u64),
}

#[derive(Clone, Copy, Debug)]
struct Chunk {
    cookie: u64,
    kind: ChunkKind,
    len: u64,
    is_last: bool,
}

impl Requests {
    /// The most bytes that [`receive`](Self::receive) takes at once.
    pub const MOST: usize = 4096;

    /// `mode`: what the handshake agreed on.
    pub fn new(mode: Mode) -> Self {
        Self { mode, next_cookie: 1, pending: BTreeMap::new(), state: State::Head }
    }

    /// Appends `request` to `out` and returns its cookie; that of `request` is not looked at. The bytes of a
    /// write are sent behind it. The offered flags and limits are the caller's to keep. Errors: a length
    /// that the headers have no room for.
    pub fn submit(&mut self, request: Request, out: &mut Vec<u8>) -> Result<u64, DecodeError> {
        let cookie = self.next_cookie;
        let mut request = Request { cookie, ..request };
        if self.mode == Mode::Extended && request.command == Command::WRITE {
            request.flags |= command_flag::PAYLOAD_LEN;
        }
        request.encode(self.mode, out)?;
        self.next_cookie = self.next_cookie.wrapping_add(1);
        let Request { command, offset, len, .. } = request;
        if command != Command::DISCONNECT {
            let (arrived, contexts) = (Ranges::default(), Vec::new());
            let error = ErrorCode::NONE;
            self.pending
                .insert(cookie, Pending { command, offset, len, arrived, chunks: 0, contexts, error });
        }
        Ok(cookie)
    }

    /// How many requests are under way.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// What comes next from the server.
    pub fn need(&self) -> Need {
        Need::Bytes(match self.state {
            State::Head => ReplyHead::PREFIX,
            State::HeadRest(_, len) => len,
            State::Range(chunk) if chunk.kind == ChunkKind::OFFSET_HOLE => 12,
            State::Range(_) => 8,
            State::Data(chunk, start, len) => return Need::Data { cookie: chunk.cookie, start, len },
            State::StatusHead(chunk) => status_head(chunk.kind) as usize,
            State::Extents(chunk, _, left) => {
                let size = Extent::size(chunk.kind == ChunkKind::BLOCK_STATUS_EXT);
                size * left.min((Self::MOST / size) as u64) as usize
            }
            State::Error(_) => 4,
            State::Skip(_, left) => left.min(Self::MOST as u64) as usize,
        })
    }

    /// Takes as many bytes as [`need`](Self::need) says. Errors: a server that breaks the protocol; the
    /// connection is of no use any more.
    pub fn receive(&mut self, bytes: &[u8]) -> Result<Option<Event>, Violation> {
        match self.state {
            State::Head => match ReplyHead::decode(bytes) {
                Ok((head, _)) => self.begin(head),
                Err(DecodeError::Short(len)) => {
                    let prefix = bytes.try_into().map_err(|_| DecodeError::Short(len))?;
                    self.state = State::HeadRest(prefix, len.saturating_sub(bytes.len()));
                    Ok(None)
                }
                Err(error) => Err(error.into()),
            },
            State::HeadRest(prefix, _) => {
                let (head, _) = ReplyHead::decode(&[&prefix[..], bytes].concat())?;
                self.begin(head)
            }
            State::Range(chunk) => self.range(chunk, bytes),
            State::StatusHead(chunk) => self.status(chunk, bytes),
            State::Extents(chunk, context, left) => self.extents(chunk, context, left, bytes),
            State::Error(chunk) => {
                let code: [u8; 4] = bytes.try_into().map_err(|_| DecodeError::Short(4))?;
                let pending = self.pending_mut(chunk.cookie)?;
                if pending.error == ErrorCode::NONE {
                    // An error chunk without an error is one all the same.
                    pending.error = ErrorCode(u32::from_be_bytes(code).max(1));
                }
                self.state = State::Skip(chunk, chunk.len - 4);
                Ok(None)
            }
            State::Skip(chunk, left) => match left.saturating_sub(bytes.len() as u64) {
                0 => self.ended(chunk),
                left => {
                    self.state = State::Skip(chunk, left);
                    Ok(None)
                }
            },
            State::Data(..) => Err(Violation("bytes of a read where a message is awaited")),
        }
    }

    /// The bytes that [`Need::Data`] is about have been taken.
    pub fn data_received(&mut self) -> Result<Option<Event>, Violation> {
        match self.state {
            State::Data(chunk, ..) => self.ended(chunk),
            _ => Ok(None),
        }
    }

    fn pending_mut(&mut self, cookie: u64) -> Result<&mut Pending, Violation> {
        self.pending.get_mut(&cookie).ok_or(Violation("a reply with the cookie of another request"))
    }

    fn begin(&mut self, head: ReplyHead) -> Result<Option<Event>, Violation> {
        let mode = self.mode;
        let pending = self.pending_mut(head.cookie())?;
        match head {
            ReplyHead::Simple { .. } if mode == Mode::Extended => {
                Err(Violation("a simple reply after extended headers were agreed on"))
            }
            ReplyHead::Simple { error, cookie } => {
                let chunk = Chunk { cookie, kind: ChunkKind::NONE, len: 0, is_last: true };
                if error == ErrorCode::NONE && pending.command == Command::READ {
                    if mode != Mode::Simple {
                        return Err(Violation(
                            "a simple reply to a read after structured replies were negotiated",
                        ));
                    }
                    let len = pending.len;
                    if len > 0 && !pending.arrived.add(0, len) {
                        return Err(Violation("bytes of a read twice"));
                    }
                    self.state = State::Data(chunk, 0, len);
                    return Ok(None);
                }
                pending.error = error;
                self.ended(chunk)
            }
            ReplyHead::Chunk { offset, .. } if (mode == Mode::Extended) != offset.is_some() => {
                Err(Violation("a chunk of a kind that was not agreed on"))
            }
            ReplyHead::Chunk { .. } if mode == Mode::Simple => {
                Err(Violation("a reply with an unknown magic number"))
            }
            ReplyHead::Chunk { flags, kind, cookie, len, .. } => {
                pending.chunks += 1;
                if pending.chunks > MAX_CHUNKS {
                    return Err(Violation("chunks without end"));
                }
                let is_last = flags & chunk_flag::DONE != 0;
                self.chunk(Chunk { cookie, kind, len, is_last })
            }
        }
    }

    fn chunk(&mut self, chunk: Chunk) -> Result<Option<Event>, Violation> {
        let command = self.pending_mut(chunk.cookie)?.command;
        let len = chunk.len;
        let max_status = |size: usize| status_head(chunk.kind) + MAX_EXTENTS * size as u64;
        self.state = match chunk.kind {
            ChunkKind::NONE if len == 0 => return self.ended(chunk),
            ChunkKind::OFFSET_DATA if command == Command::READ && len > 8 => State::Range(chunk),
            ChunkKind::OFFSET_HOLE if command == Command::READ && len == 12 => State::Range(chunk),
            ChunkKind::BLOCK_STATUS
                if command == Command::BLOCK_STATUS
                    && len >= 12
                    && len % 8 == 4
                    && len <= max_status(8)
                    && self.mode == Mode::Structured =>
            {
                State::StatusHead(chunk)
            }
            ChunkKind::BLOCK_STATUS_EXT
                if command == Command::BLOCK_STATUS
                    && len >= 24
                    && len % 16 == 8
                    && len <= max_status(16)
                    && self.mode == Mode::Extended =>
            {
                State::StatusHead(chunk)
            }
            kind if kind.is_error() && (6..=MAX_ERROR_PAYLOAD).contains(&len) => State::Error(chunk),
            _ => return Err(Violation("a chunk type that does not fit the request")),
        };
        Ok(None)
    }

    /// The offset of bytes, or offset and length of a hole.
    fn range(&mut self, chunk: Chunk, bytes: &[u8]) -> Result<Option<Event>, Violation> {
        let Some((offset, rest)) = bytes.split_first_chunk() else {
            return Err(DecodeError::Short(8).into());
        };
        let len = match rest.first_chunk() {
            Some(len) => u32::from_be_bytes(*len).into(),
            None => chunk.len - 8,
        };
        let pending = self.pending_mut(chunk.cookie)?;
        let start = u64::from_be_bytes(*offset).checked_sub(pending.offset);
        let inside = start.filter(|start| start.checked_add(len).is_some_and(|end| end <= pending.len));
        let start = inside.ok_or(Violation("data outside the requested range"))?;
        if len > 0 && !pending.arrived.add(start, len) {
            return Err(Violation("bytes of a read twice"));
        }
        if chunk.kind == ChunkKind::OFFSET_DATA {
            self.state = State::Data(chunk, start, len);
            return Ok(None);
        }
        // The end of the reply is told by a skip of nothing, so that there is one event for each call.
        self.state = if chunk.is_last { State::Skip(chunk, 0) } else { State::Head };
        Ok(Some(Event::Hole { cookie: chunk.cookie, start, len }))
    }

    fn status(&mut self, chunk: Chunk, bytes: &[u8]) -> Result<Option<Event>, Violation> {
        let Some((context, rest)) = bytes.split_first_chunk() else {
            return Err(DecodeError::Short(4).into());
        };
        let context = u32::from_be_bytes(*context);
        let extended = chunk.kind == ChunkKind::BLOCK_STATUS_EXT;
        let count = (chunk.len - status_head(chunk.kind)) / Extent::size(extended) as u64;
        if let Some(told) = rest.first_chunk()
            && u64::from(u32::from_be_bytes(*told)) != count
        {
            return Err(Violation("another number of extents than there are"));
        }
        let pending = self.pending_mut(chunk.cookie)?;
        if pending.contexts.contains(&context) {
            return Err(Violation("the block status of one context twice"));
        }
        // There is one chunk for each context, and few of them.
        if pending.contexts.len() >= MAX_CONTEXTS {
            return Err(Violation("the block status of too many contexts"));
        }
        pending.contexts.push(context);
        self.state = State::Extents(chunk, context, count);
        Ok(None)
    }

    fn extents(
        &mut self,
        chunk: Chunk,
        context: u32,
        left: u64,
        bytes: &[u8],
    ) -> Result<Option<Event>, Violation> {
        let extended = chunk.kind == ChunkKind::BLOCK_STATUS_EXT;
        let parts = bytes.chunks_exact(Extent::size(extended));
        let extents = parts.map(|part| Extent::decode(part, extended).map(|(extent, _)| extent));
        let extents = extents.collect::<Result<Vec<_>, _>>()?;
        self.state = match left.saturating_sub(extents.len() as u64) {
            0 if chunk.is_last => State::Skip(chunk, 0),
            0 => State::Head,
            left => State::Extents(chunk, context, left),
        };
        Ok(Some(Event::Status { cookie: chunk.cookie, context, extents }))
    }

    /// All of `chunk` has come. Errors: the last one of a read that lacks bytes.
    fn ended(&mut self, chunk: Chunk) -> Result<Option<Event>, Violation> {
        self.state = State::Head;
        if !chunk.is_last {
            return Ok(None);
        }
        let cookie = chunk.cookie;
        let Some(pending) = self.pending.remove(&cookie) else { return Ok(None) };
        let error = pending.error;
        if error == ErrorCode::NONE && pending.command == Command::READ && !pending.arrived.are(pending.len) {
            return Err(Violation("a read with gaps"));
        }
        Ok(Some(Event::Done { cookie, error }))
    }
}

/// What precedes the extents of a chunk: the context, and with 64 bits their number.
fn status_head(kind: ChunkKind) -> u64 {
    if kind == ChunkKind::BLOCK_STATUS_EXT { 8 } else { 4 }
}

/// Chunks of one reply, at most: a read of 32 MiB in pieces of 512 bytes.
const MAX_CHUNKS: u32 = 1 << 16;
/// Meta contexts of one reply, at most.
const MAX_CONTEXTS: usize = 64;
