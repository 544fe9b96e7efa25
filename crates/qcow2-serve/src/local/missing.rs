//! Sockets of a system that has no unix sockets: there are none, so nothing is ever done with one.

use std::convert::Infallible;
use std::io::{self, Read, Write};
use std::path::Path;
use std::time::Duration;

/// A socket that listens.
#[derive(Debug)]
pub(crate) struct Socket(Infallible);

impl Socket {
    pub(crate) fn bind(_path: &Path) -> io::Result<Self> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(crate) fn set_nonblocking(&self, _nonblocking: bool) -> io::Result<()> {
        match self.0 {}
    }

    pub(crate) fn accept(&self) -> io::Result<(Stream, ())> {
        match self.0 {}
    }
}

/// A connection.
#[derive(Debug)]
pub(crate) struct Stream(Infallible);

impl Stream {
    pub(crate) fn connect(_path: &Path) -> io::Result<Self> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(crate) fn set_nonblocking(&self, _nonblocking: bool) -> io::Result<()> {
        match self.0 {}
    }

    pub(crate) fn set_read_timeout(&self, _limit: Option<Duration>) -> io::Result<()> {
        match self.0 {}
    }

    pub(crate) fn set_write_timeout(&self, _limit: Option<Duration>) -> io::Result<()> {
        match self.0 {}
    }
}

impl Read for Stream {
    fn read(&mut self, _buf: &mut [u8]) -> io::Result<usize> {
        match self.0 {}
    }
}

impl Read for &Stream {
    fn read(&mut self, _buf: &mut [u8]) -> io::Result<usize> {
        match self.0 {}
    }
}

impl Write for &Stream {
    fn write(&mut self, _buf: &[u8]) -> io::Result<usize> {
        match self.0 {}
    }

    fn flush(&mut self) -> io::Result<()> {
        match self.0 {}
    }
}
