//! Requests of the transmission phase.
//!
//! | compact | bytes | | extended | bytes |
//! |---|---|---|---|---|
//! | magic 0x25609513 | 4 | | magic 0x21e41c71 | 4 |
//! | flags | 2 | | flags | 2 |
//! | command | 2 | | command | 2 |
//! | cookie | 8 | | cookie | 8 |
//! | offset | 8 | | offset | 8 |
//! | length | 4 | | length | 8 |
//!
//! The bytes of a write follow.

use super::{Command, DecodeError, Decoded, Input, Output, command_flag};

/// What the handshake agreed on for requests and replies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Compact requests, simple replies.
    #[default]
    Simple,
    /// Compact requests, replies in chunks.
    Structured,
    /// Requests and chunks with numbers of 64 bits.
    Extended,
}

/// A request, without the bytes of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What to do.
    pub command: Command,
    /// See [`command_flag`].
    pub flags: u16,
    /// Comes back in the reply; one of no other request that is under way.
    pub cookie: u64,
    /// First byte of the range.
    pub offset: u64,
    /// Length of the range in bytes; below 2^32 but in [`Mode::Extended`].
    pub len: u64,
}

impl Request {
    /// Length in bytes.
    pub fn head_len(mode: Mode) -> usize {
        if mode == Mode::Extended { 32 } else { 28 }
    }

    /// Length of the payload that follows, in bytes.
    pub fn payload_len(&self, mode: Mode) -> u64 {
        let has_payload = match mode {
            Mode::Extended => self.flags & command_flag::PAYLOAD_LEN != 0,
            _ => self.command == Command::WRITE,
        };
        if has_payload { self.len } else { 0 }
    }

    /// Appends the request to `out`. Errors: a length that `mode` has no room for.
    pub fn encode(&self, mode: Mode, out: &mut Vec<u8>) -> Result<(), DecodeError> {
        let Self { command, flags, cookie, offset, len } = *self;
        let magic = if mode == Mode::Extended { EXTENDED } else { COMPACT };
        let short = u32::try_from(len);
        if mode != Mode::Extended && short.is_err() {
            return Err(DecodeError::Invalid("a length of 2^32 or more without extended headers"));
        }
        out.u32(magic).u16(flags).u16(command.0).u64(cookie).u64(offset);
        match (mode, short) {
            (Mode::Extended, _) | (_, Err(_)) => out.u64(len),
            (_, Ok(len)) => out.u32(len),
        };
        Ok(())
    }

    /// Reads a request. Errors: a wrong magic number.
    pub fn decode(bytes: &[u8], mode: Mode) -> Decoded<Self> {
        let mut input = Input::new(bytes);
        let magic = if mode == Mode::Extended { EXTENDED } else { COMPACT };
        if input.u32()? != magic {
            return Err(DecodeError::Invalid("a request without its magic number"));
        }
        let (flags, command) = (input.u16()?, Command(input.u16()?));
        let (cookie, offset) = (input.u64()?, input.u64()?);
        let len = if mode == Mode::Extended { input.u64()? } else { u64::from(input.u32()?) };
        input.done(Self { command, flags, cookie, offset, len })
    }
}

const COMPACT: u32 = 0x2560_9513;
const EXTENDED: u32 = 0x21e4_1c71;
