//! A connected socket, of any kind.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
#[cfg(unix)]
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A connection. Like a standard socket it is read and written through a shared reference.
#[derive(Debug)]
pub(super) enum Socket {
    Tcp(TcpStream),
    #[cfg(unix)]
    Unix(UnixStream),
}

macro_rules! each {
    ($self:expr, $socket:ident => $call:expr) => {
        match $self {
            Socket::Tcp($socket) => $call,
            #[cfg(unix)]
            Socket::Unix($socket) => $call,
        }
    };
}

impl Socket {
    /// Sets how long one read may take.
    fn set_read_patience(&self, patience: Option<Duration>) -> io::Result<()> {
        each!(self, socket => socket.set_read_timeout(patience))
    }

    /// Sets how long one write may take.
    fn set_write_patience(&self, patience: Option<Duration>) -> io::Result<()> {
        each!(self, socket => socket.set_write_timeout(patience))
    }

    /// Reads and writes may take for ever.
    pub(super) fn be_patient(&self) -> io::Result<()> {
        self.set_read_patience(None).and_then(|()| self.set_write_patience(None))
    }

    /// The other side is heard no more.
    pub(super) fn close_for_reading(&self) {
        // Fails where the other side has closed it already.
        let _ = each!(self, socket => socket.shutdown(Shutdown::Read));
    }

    /// Ends the connection, also for threads that read or write.
    pub(super) fn close(&self) {
        let _ = each!(self, socket => socket.shutdown(Shutdown::Both));
    }
}

impl Read for &Socket {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        each!(self, socket => (&*socket).read(buf))
    }
}

impl Write for &Socket {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        each!(self, socket => (&*socket).write(buf))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// When the handshake of a client must be over.
#[derive(Debug)]
pub(super) struct Deadline {
    until: Option<Instant>,
    is_over: AtomicBool,
}

impl Deadline {
    /// From now on.
    pub(super) fn new(limit: Option<Duration>) -> Self {
        let until = limit.and_then(|limit| Instant::now().checked_add(limit));
        Self { until, is_over: AtomicBool::new(false) }
    }

    /// The handshake is over: nothing needs to end in time any more.
    pub(super) fn lift(&self) {
        self.is_over.store(true, Ordering::Relaxed);
    }

    /// What is left of the time.
    fn left(&self) -> io::Result<Option<Duration>> {
        let Some(until) = self.until else { return Ok(None) };
        match until.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
            left => Ok(Some(left)),
        }
    }
}

/// A socket all of whose reads and writes must end in time, however few bytes each of them moves.
#[derive(Clone, Copy)]
pub(super) struct Hurried<'a> {
    socket: &'a Socket,
    deadline: &'a Deadline,
}

impl<'a> Hurried<'a> {
    pub(super) fn new(socket: &'a Socket, deadline: &'a Deadline) -> Self {
        Self { socket, deadline }
    }

    fn is_hurried(&self) -> bool {
        !self.deadline.is_over.load(Ordering::Relaxed)
    }
}

impl Read for Hurried<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let mut socket = self.socket;
        if self.is_hurried() {
            socket.set_read_patience(self.deadline.left()?)?;
        }
        socket.read(buf)
    }
}

impl Write for Hurried<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let mut socket = self.socket;
        if self.is_hurried() {
            socket.set_write_patience(self.deadline.left()?)?;
        }
        socket.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
