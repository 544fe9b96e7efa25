//! Requests and replies of the transmission phase. All numbers are big-endian.
//!
//! | request | bytes | | structured reply chunk | bytes |
//! |---|---|---|---|---|
//! | magic 0x25609513 | 4 | | magic 0x668e33ef | 4 |
//! | flags | 2 | | flags (bit 0: last one) | 2 |
//! | command | 2 | | type | 2 |
//! | cookie | 8 | | cookie | 8 |
//! | offset | 8 | | payload length | 4 |
//! | length | 4 | | payload | |
//!
//! A simple reply is magic 0x67446698, error (4), cookie (8), and the data of a read.

use std::io::{self, Read, Write};

/// Command of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    Read = 0,
    Write = 1,
    Flush = 3,
    Trim = 4,
    WriteZeroes = 6,
    BlockStatus = 7,
}

/// One request.
pub(super) struct Request<'a> {
    command: Command,
    offset: u64,
    len: u64,
    /// Zeroes must stay allocated (no hole).
    pub(super) no_hole: bool,
    pub(super) payload: &'a [u8],
}

impl Request<'_> {
    /// `len`: below 2^32.
    pub(super) fn new(command: Command, offset: u64, len: u64) -> Self {
        Self { command, offset, len, no_hole: false, payload: &[] }
    }
}

/// What to do with a reply's payload.
pub(super) enum Reply<'a> {
    Nothing,
    /// Data of a read; exactly as many bytes as were requested.
    Data(&'a mut [u8]),
    /// Block status descriptors (length and flags) of the meta context with this id.
    Status {
        context: u32,
        extents: &'a mut Vec<(u32, u32)>,
    },
}

/// Transmission flags of an export.
pub(super) mod flag {
    pub(crate) const READ_ONLY: u16 = 1 << 1;
    pub(crate) const SEND_FLUSH: u16 = 1 << 2;
    pub(crate) const SEND_TRIM: u16 = 1 << 5;
    pub(crate) const SEND_WRITE_ZEROES: u16 = 1 << 6;
}

/// Block status flag: the extent reads as zeroes.
pub(super) const STATE_ZERO: u32 = 2;

pub(super) fn send(out: &mut impl Write, request: &Request<'_>, cookie: u64) -> io::Result<()> {
    let flags: u16 = if request.no_hole { NO_HOLE } else { 0 };
    let mut head = Vec::with_capacity(28);
    head.extend(REQUEST.to_be_bytes());
    head.extend(flags.to_be_bytes());
    head.extend((request.command as u16).to_be_bytes());
    head.extend(cookie.to_be_bytes());
    head.extend(request.offset.to_be_bytes());
    head.extend(u32::try_from(request.len).map_err(|_| io::ErrorKind::InvalidInput)?.to_be_bytes());
    out.write_all(&head)?;
    out.write_all(request.payload)?;
    out.flush()
}

/// Receives the whole reply and returns the server's error number, 0 for success. `Err`: the connection is
/// out of sync and must be closed.
pub(super) fn receive(
    from: &mut impl Read,
    request: &Request<'_>,
    cookie: u64,
    structured: bool,
    reply: &mut Reply<'_>,
) -> io::Result<i32> {
    let (mut code, mut covered) = (0, 0);
    for _ in 0..MAX_CHUNKS {
        match word(from)? {
            SIMPLE => {
                let error = word(from)?;
                expect_cookie(from, cookie)?;
                if let (Reply::Data(buf), 0) = (&mut *reply, error) {
                    if structured {
                        return Err(nonsense(
                            "a simple reply to a read after structured replies were negotiated",
                        ));
                    }
                    from.read_exact(buf)?;
                }
                return Ok(os_code(error));
            }
            CHUNK if structured => {
                let head = word(from)?;
                let (flags, kind) = ((head >> 16) as u16, head as u16);
                expect_cookie(from, cookie)?;
                let len = word(from)?;
                let chunk = Chunk { kind, len, start: request.offset };
                match take_chunk(from, &chunk, reply, &mut covered)? {
                    0 => {}
                    error if code == 0 => code = error,
                    _ => {}
                }
                if flags & DONE != 0 {
                    return finish(code, covered, reply);
                }
            }
            _ => return Err(nonsense("a reply with an unknown magic number")),
        }
    }
    Err(nonsense("chunks without end"))
}

/// The error number of a whole reply. Errors: a read lacks bytes, or has some twice.
fn finish(code: i32, covered: usize, reply: &Reply<'_>) -> io::Result<i32> {
    match reply {
        Reply::Data(buf) if code == 0 && covered != buf.len() => Err(nonsense("a read with gaps")),
        _ => Ok(code),
    }
}

struct Chunk {
    kind: u16,
    len: u32,
    start: u64,
}

/// Receives a chunk's payload; returns the error number it reports. `covered` counts the bytes of a read.
fn take_chunk(
    from: &mut impl Read,
    chunk: &Chunk,
    reply: &mut Reply<'_>,
    covered: &mut usize,
) -> io::Result<i32> {
    match (chunk.kind, reply) {
        (0, _) if chunk.len == 0 => Ok(0),
        (OFFSET_DATA, Reply::Data(buf)) if chunk.len > 8 => {
            let offset = long(from)?;
            let part = part_of(buf, offset.checked_sub(chunk.start), chunk.len - 8)?;
            *covered += part.len();
            from.read_exact(part).map(|()| 0)
        }
        (OFFSET_HOLE, Reply::Data(buf)) if chunk.len == 12 => {
            let offset = long(from)?;
            let part = part_of(buf, offset.checked_sub(chunk.start), word(from)?)?;
            *covered += part.len();
            part.fill(0);
            Ok(0)
        }
        (BLOCK_STATUS, Reply::Status { context, extents })
            if chunk.len >= 12 && chunk.len % 8 == 4 && chunk.len <= MAX_STATUS =>
        {
            let wanted = word(from)? == *context;
            if wanted && !extents.is_empty() {
                return Err(nonsense("the block status of one context twice"));
            }
            for _ in 0..chunk.len / 8 {
                let extent = (word(from)?, word(from)?);
                if wanted {
                    extents.push(extent);
                }
            }
            Ok(0)
        }
        (kind, _) if kind & ERROR_BIT != 0 && (6..=MAX_ERROR).contains(&chunk.len) => {
            let error = word(from)?;
            io::copy(&mut from.take(u64::from(chunk.len) - 4), &mut io::sink())?;
            Ok(os_code(error.max(1)))
        }
        _ => Err(nonsense("a chunk type that does not fit the request")),
    }
}

fn part_of(buf: &mut [u8], start: Option<u64>, len: u32) -> io::Result<&mut [u8]> {
    let start = start.and_then(|start| usize::try_from(start).ok());
    let range = start.and_then(|start| Some(start..start.checked_add(len as usize)?));
    range.and_then(|range| buf.get_mut(range)).ok_or_else(|| nonsense("data outside the requested range"))
}

fn expect_cookie(from: &mut impl Read, cookie: u64) -> io::Result<()> {
    if long(from)? == cookie { Ok(()) } else { Err(nonsense("a reply with the cookie of another request")) }
}

pub(super) fn word(from: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    from.read_exact(&mut bytes)?;
    Ok(u32::from_be_bytes(bytes))
}

pub(super) fn long(from: &mut impl Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    from.read_exact(&mut bytes)?;
    Ok(u64::from_be_bytes(bytes))
}

/// Converts a protocol error number to Linux's; only a few differ.
fn os_code(error: u32) -> i32 {
    match error {
        0 => 0,
        1 | 5 | 12 | 22 | 28 | 75 | 95 | 108 => error as i32,
        _ => 22,
    }
}

pub(super) fn nonsense(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the server sent {what}"))
}

const REQUEST: u32 = 0x2560_9513;
const SIMPLE: u32 = 0x6744_6698;
const CHUNK: u32 = 0x668e_33ef;
const NO_HOLE: u16 = 1 << 1;
const DONE: u16 = 1;
const OFFSET_DATA: u16 = 1;
const OFFSET_HOLE: u16 = 2;
const BLOCK_STATUS: u16 = 5;
const ERROR_BIT: u16 = 1 << 15;
/// Chunks of one reply, at most: a read of 32 MiB in pieces of 512 bytes.
const MAX_CHUNKS: usize = 1 << 16;
/// The longest error chunk accepted: a message of 4,096 bytes.
const MAX_ERROR: u32 = 4096 + 6 + 8;
/// The longest list of descriptors accepted. Origin: the protocol's recommendation, 2^20 descriptors.
const MAX_STATUS: u32 = (1 << 23) + 4;

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(flags: u16, kind: u16, payload: &[u8]) -> Vec<u8> {
        let mut bytes = CHUNK.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(9u64.to_be_bytes());
        bytes.extend((payload.len() as u32).to_be_bytes());
        bytes.extend(payload);
        bytes
    }

    fn read(bytes: &[u8]) -> Result<(i32, Vec<u8>), String> {
        let (request, mut buf) = (Request::new(Command::Read, 100, 4), vec![9; 4]);
        let code = receive(&mut &bytes[..], &request, 9, true, &mut Reply::Data(&mut buf));
        code.map(|code| (code, buf)).map_err(|error| error.to_string())
    }

    fn data(offset: u64, bytes: &[u8]) -> Vec<u8> {
        [&offset.to_be_bytes()[..], bytes].concat()
    }

    #[test]
    fn chunks_of_a_read_may_arrive_in_any_order() {
        let hole = [&data(100, &[])[..], &2u32.to_be_bytes()].concat();
        let bytes = [chunk(0, OFFSET_DATA, &data(102, &[1, 2])), chunk(DONE, OFFSET_HOLE, &hole)].concat();
        assert_eq!(read(&bytes), Ok((0, vec![0, 0, 1, 2])));
        let error = [&5u32.to_be_bytes()[..], &[0, 2], b"no"].concat();
        assert_eq!(read(&chunk(DONE, 0x8001, &error)), Ok((5, vec![9; 4])));
    }

    #[test]
    fn replies_without_end_are_refused() {
        let last = chunk(DONE, OFFSET_DATA, &data(100, &[1, 2, 3, 4]));
        let after = |count| [chunk(0, 0, &[]).repeat(count), last.clone()].concat();
        assert!(read(&after(MAX_CHUNKS - 1)).is_ok());
        assert!(read(&after(MAX_CHUNKS)).unwrap_err().contains("without end"));
        let status = [&7u32.to_be_bytes()[..], &[0; 8]].concat();
        let twice = [chunk(0, BLOCK_STATUS, &status), chunk(DONE, BLOCK_STATUS, &status)].concat();
        for (bytes, is_ok) in [(&twice[20 + 12..], true), (&twice, false)] {
            let mut extents = Vec::new();
            let request = Request::new(Command::BlockStatus, 0, 512);
            let mut reply = Reply::Status { context: 7, extents: &mut extents };
            let received = receive(&mut &bytes[..], &request, 9, true, &mut reply);
            assert_eq!(received.is_ok(), is_ok, "{extents:?}");
            assert_eq!(extents.len(), 1);
        }
    }

    #[test]
    fn invalid_replies_are_refused() {
        for bytes in [
            chunk(DONE, OFFSET_DATA, &data(102, &[1, 2])),
            chunk(DONE, OFFSET_DATA, &data(99, &[1, 2, 3, 4])),
            chunk(DONE, OFFSET_DATA, &data(102, &[1, 2, 3, 4])),
            chunk(DONE, OFFSET_DATA, &data(u64::MAX, &[1])),
            chunk(DONE, BLOCK_STATUS, &[0; 12]),
            vec![0; 40],
            Vec::new(),
        ] {
            assert!(read(&bytes).is_err(), "{bytes:?}");
        }
    }
}
