//! The transmission phase: what a request asks for, and what its reply looks like.

use super::Facts;
use crate::proto::{
    Chunk, ChunkKind, Command, DEFAULT_MAX_PAYLOAD, ErrorCode, Extent, Mode, ReplyHead, Request, chunk_flag,
    command_flag, transmission_flag,
};
use std::sync::Arc;

/// What a request asks for, inside the export's bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Work {
    /// Reads the range of the request.
    Read {
        /// In one chunk.
        whole: bool,
    },
    /// Writes its payload.
    Write,
    /// Makes durable what was written, on any connection.
    Flush,
    /// Forgets the range.
    Trim,
    /// Will read the range soon.
    Cache,
    /// Zeroes the range.
    WriteZeroes {
        /// Its space stays allocated.
        no_hole: bool,
        /// Fails where writing the bytes would be as fast.
        fast: bool,
    },
    /// Asks for the extents of the range.
    BlockStatus {
        /// Only for the first of each context.
        one: bool,
    },
    /// Ends the connection when all that is under way is done.
    Disconnect,
}

/// Why a request is not carried out. The connection goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// For the client's program.
    pub error: ErrorCode,
    /// For people.
    pub text: &'static str,
}

/// A client and its export.
#[derive(Clone, Debug)]
pub struct Session {
    export: usize,
    facts: Arc<Facts>,
    mode: Mode,
    contexts: Vec<u32>,
}

impl Session {
    pub(super) fn new(export: usize, facts: Arc<Facts>, mode: Mode, contexts: Vec<u32>) -> Self {
        Self { export, facts, mode, contexts }
    }

    /// Position of the export in its offer.
    pub fn export(&self) -> usize {
        self.export
    }

    /// The export.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// The headers that were negotiated.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// The ids of the meta contexts that the client chose.
    pub fn contexts(&self) -> &[u32] {
        &self.contexts
    }

    /// The transmission flags that the client sees.
    pub fn flags(&self) -> u16 {
        let df = if self.mode == Mode::Simple { 0 } else { transmission_flag::SEND_DF };
        self.facts.flags | transmission_flag::HAS_FLAGS | df
    }

    /// Length of the payload behind `request`, carried out or not. Errors: one too long to be read and
    /// dropped; the connection ends.
    pub fn payload_len(&self, request: &Request) -> Result<usize, Refusal> {
        // QEMU's client writes without the flag PAYLOAD_LEN that extended headers ask for.
        let len = match request.command {
            Command::WRITE => request.len,
            _ => request.payload_len(self.mode),
        };
        match len {
            len if len <= u64::from(self.facts.sizes.maximum.min(DEFAULT_MAX_PAYLOAD)) => Ok(len as usize),
            _ => Err(Refusal { error: ErrorCode::INVALID, text: "a payload that is too long" }),
        }
    }

    /// Judges `request`. The range of what it returns lies inside the export.
    pub fn judge(&self, request: &Request) -> Result<Work, Refusal> {
        let Request { command, flags, offset, len, .. } = *request;
        let refuse = |error, text| Err(Refusal { error, text });
        let Some((work, known)) = self.work(command, flags) else {
            return refuse(ErrorCode::INVALID, "an unknown command");
        };
        if work == Work::Disconnect {
            return Ok(work);
        }
        if flags & !(known | command_flag::FUA) != 0 {
            return refuse(ErrorCode::INVALID, "flags that the command does not have");
        }
        if work == Work::Flush {
            return Ok(work);
        }
        let has = |flag: u16| self.facts.flags & flag != 0;
        let changes = matches!(work, Work::Write | Work::Trim | Work::WriteZeroes { .. });
        if changes && has(transmission_flag::READ_ONLY) {
            return refuse(ErrorCode::PERM, "the export is read-only");
        }
        if offset.checked_add(len).is_none_or(|end| end > self.facts.size) {
            let beyond = matches!(work, Work::Write | Work::WriteZeroes { .. });
            let error = if beyond { ErrorCode::NO_SPACE } else { ErrorCode::INVALID };
            return refuse(error, "a range past the end of the export");
        }
        match work {
            Work::Read { .. } if len > self.facts.sizes.maximum.into() => {
                refuse(ErrorCode::INVALID, "a read that is too long")
            }
            Work::Read { whole: true } if len > MAX_WHOLE => {
                refuse(ErrorCode::OVERFLOW, "a read that is too long for one chunk")
            }
            Work::BlockStatus { .. } if self.contexts.is_empty() => {
                refuse(ErrorCode::INVALID, "no meta context was chosen")
            }
            Work::BlockStatus { .. } if len == 0 => {
                refuse(ErrorCode::INVALID, "the block status of no bytes")
            }
            work => Ok(work),
        }
    }

    /// What a command is, and the flags it has besides FUA.
    fn work(&self, command: Command, flags: u16) -> Option<(Work, u16)> {
        let has = |flag| flags & flag != 0;
        let offers = |flag| self.facts.flags & flag != 0;
        let payload = if self.mode == Mode::Extended { command_flag::PAYLOAD_LEN } else { 0 };
        Some(match command {
            Command::READ => {
                let df = if self.mode == Mode::Simple { 0 } else { command_flag::DF };
                (Work::Read { whole: has(command_flag::DF) }, df)
            }
            Command::WRITE => (Work::Write, payload),
            Command::DISCONNECT => (Work::Disconnect, 0),
            Command::FLUSH => (Work::Flush, 0),
            Command::TRIM if offers(transmission_flag::SEND_TRIM) => (Work::Trim, 0),
            Command::CACHE if offers(transmission_flag::SEND_CACHE) => (Work::Cache, 0),
            Command::WRITE_ZEROES if offers(transmission_flag::SEND_WRITE_ZEROES) => {
                let fast = match offers(transmission_flag::SEND_FAST_ZERO) {
                    true => command_flag::FAST_ZERO,
                    false => 0,
                };
                let (no_hole, is_fast) = (has(command_flag::NO_HOLE), has(command_flag::FAST_ZERO));
                (Work::WriteZeroes { no_hole, fast: is_fast }, command_flag::NO_HOLE | fast)
            }
            Command::BLOCK_STATUS => {
                (Work::BlockStatus { one: has(command_flag::REQ_ONE) }, command_flag::REQ_ONE)
            }
            _ => return None,
        })
    }

    /// Appends the head of a reply, or of its next chunk: `len` bytes of the read `request` from `at` on
    /// follow. `is_last`: no other chunk does. With simple replies there is one head, for all bytes.
    pub fn data_head(&self, request: &Request, (at, len): (u64, u64), is_last: bool, out: &mut Vec<u8>) {
        if self.mode == Mode::Simple {
            return self.simple(request, ErrorCode::NONE, out);
        }
        self.chunk_head(request, ChunkKind::OFFSET_DATA, 8 + len, is_last, out);
        out.extend_from_slice(&at.to_be_bytes());
    }

    /// Appends a chunk: `len` bytes of the read `request` from `at` on are zeroes. Not with simple replies.
    pub fn hole(&self, request: &Request, (at, len): (u64, u32), is_last: bool, out: &mut Vec<u8>) {
        self.chunk(request, &Chunk::Hole { offset: at, len }, is_last, out);
    }

    /// Appends the extents of one context. `is_last`: no other context follows.
    pub fn status(
        &self,
        request: &Request,
        (context, extents): (u32, Vec<Extent>),
        is_last: bool,
        out: &mut Vec<u8>,
    ) {
        let extended = self.mode == Mode::Extended;
        self.chunk(request, &Chunk::Status { context, extended, extents }, is_last, out);
    }

    /// Appends the reply to a request that is done and has no data.
    pub fn done(&self, request: &Request, out: &mut Vec<u8>) {
        // A read must be answered in chunks where those were negotiated; anything else is shorter without.
        match self.mode {
            Mode::Structured if request.command == Command::READ => {
                self.chunk(request, &Chunk::None, true, out);
            }
            Mode::Extended => self.chunk(request, &Chunk::None, true, out),
            _ => self.simple(request, ErrorCode::NONE, out),
        }
    }

    /// Appends the reply to a request that failed, or the last chunk of one that failed half-way.
    pub fn failed(&self, request: &Request, refusal: Refusal, out: &mut Vec<u8>) {
        if self.mode == Mode::Simple {
            return self.simple(request, refusal.error, out);
        }
        let (error, message) = (refusal.error, refusal.text.to_owned());
        self.chunk(request, &Chunk::Error { error, message, offset: None }, true, out);
    }

    fn simple(&self, request: &Request, error: ErrorCode, out: &mut Vec<u8>) {
        let fits = ReplyHead::Simple { error, cookie: request.cookie }.encode(out);
        debug_assert!(fits.is_ok(), "a simple reply has no length");
    }

    fn chunk_head(&self, request: &Request, kind: ChunkKind, len: u64, is_last: bool, out: &mut Vec<u8>) {
        let flags = if is_last { chunk_flag::DONE } else { 0 };
        let offset = (self.mode == Mode::Extended).then_some(request.offset);
        let fits = ReplyHead::Chunk { flags, kind, cookie: request.cookie, offset, len }.encode(out);
        debug_assert!(fits.is_ok(), "no chunk is longer than a payload may be");
    }

    fn chunk(&self, request: &Request, chunk: &Chunk<'_>, is_last: bool, out: &mut Vec<u8>) {
        let start = out.len();
        // The length comes first and is known last.
        self.chunk_head(request, chunk.kind(), 0, is_last, out);
        let payload = out.len();
        let fits = chunk.encode(out);
        debug_assert!(fits.is_ok(), "extents end inside the request, and so have its width");
        let len = out.len() - payload;
        match self.mode {
            Mode::Extended => out[payload - 8..payload].copy_from_slice(&(len as u64).to_be_bytes()),
            _ => out[payload - 4..payload].copy_from_slice(&(len as u32).to_be_bytes()),
        }
        debug_assert!(start < payload, "a head is never empty");
    }
}

/// The longest read in one chunk. Origin: the protocol's smallest promise is 64 KiB.
const MAX_WHOLE: u64 = 1 << 20;
