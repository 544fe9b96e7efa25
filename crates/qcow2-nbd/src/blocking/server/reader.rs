//! The half that requests come from: one large buffer, filled by as few system calls as possible.

use crate::proto::{DecodeError, Mode, Request};
use std::io::{self, Read};

/// Bytes of a connection's buffer. Origin: 32 requests with 4 KiB each, and about what a unix socket holds.
pub const BUFFER: usize = 256 << 10;

/// A stream and what was read ahead of it.
#[derive(Debug)]
pub(super) struct Reader<R> {
    stream: R,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl<R: Read> Reader<R> {
    pub(super) fn new(stream: R) -> Self {
        Self { stream, buffer: vec![0; BUFFER], start: 0, end: 0 }
    }

    /// Whether a whole request head is there already.
    pub(super) fn has_head(&self, mode: Mode) -> bool {
        self.has(Request::head_len(mode))
    }

    /// The next request; `None` at the end of the stream. Errors: of the stream; an end within a request, or
    /// something that is none.
    pub(super) fn request(&mut self, mode: Mode) -> io::Result<Option<Request>> {
        let len = Request::head_len(mode);
        match self.fill(len) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof && self.start == self.end => {
                return Ok(None);
            }
            filled => filled?,
        }
        let head = &self.buffer[self.start..self.start + len];
        let (request, taken) = Request::decode(head, mode).map_err(invalid)?;
        self.start += taken;
        Ok(Some(request))
    }

    /// Whether the next `len` bytes are there.
    pub(super) fn has(&self, len: usize) -> bool {
        self.end - self.start >= len
    }

    /// Whether the next `len` bytes are there, or fit into the buffer with those that are.
    pub(super) fn holds(&self, len: usize) -> bool {
        len <= self.buffer.len()
    }

    /// The next `len` bytes, which the buffer [`holds`](Self::holds).
    pub(super) fn borrow(&mut self, len: usize) -> io::Result<&[u8]> {
        self.fill(len)?;
        self.start += len;
        Ok(&self.buffer[self.start - len..self.start])
    }

    /// The next bytes, as many as `target` has room for.
    pub(super) fn read_exact(&mut self, target: &mut [u8]) -> io::Result<()> {
        let there = (self.end - self.start).min(target.len());
        let (first, rest) = target.split_at_mut(there);
        first.copy_from_slice(&self.buffer[self.start..self.start + there]);
        self.start += there;
        self.stream.read_exact(rest)
    }

    /// Takes `len` bytes that nobody wants.
    pub(super) fn skip(&mut self, mut len: usize) -> io::Result<()> {
        while len > 0 {
            let step = len.min(BUFFER);
            self.borrow(step)?;
            len -= step;
        }
        Ok(())
    }

    /// Reads until `len` bytes are there, and whatever else has come.
    fn fill(&mut self, len: usize) -> io::Result<()> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
        if self.start + len > self.buffer.len() {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        while self.end - self.start < len {
            match self.stream.read(&mut self.buffer[self.end..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => self.end += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

fn invalid(error: DecodeError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
