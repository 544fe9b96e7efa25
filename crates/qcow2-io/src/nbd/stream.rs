//! A connection whose other side has only so long for an answer.

use qcow2_nbd::blocking::Incoming;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A connected socket.
pub(super) trait Socket: Read + Write + Send {
    /// Lets the next read, or the next write, take so long at most.
    fn limit(&self, way: Way, timeout: Duration) -> io::Result<()>;

    /// Splits it into a half for each way. The flag: whether using one half may wait for the other.
    fn split(self: Box<Self>) -> io::Result<Split>;
}

/// The half that is read, the half that is written, and whether they can be used at the same time.
pub(super) type Split = (Box<dyn Socket>, Box<dyn Socket>, bool);

/// A direction of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    In,
    Out,
}

macro_rules! socket {
    ($type:ty) => {
        impl Socket for $type {
            fn limit(&self, way: Way, timeout: Duration) -> io::Result<()> {
                match way {
                    Way::In => self.set_read_timeout(Some(timeout)),
                    Way::Out => self.set_write_timeout(Some(timeout)),
                }
            }

            fn split(self: Box<Self>) -> io::Result<Split> {
                Ok((Box::new(self.try_clone()?), self, true))
            }
        }
    };
}

socket!(TcpStream);
#[cfg(unix)]
socket!(std::os::unix::net::UnixStream);

/// Bytes both ways that know no limit of time. Its halves share it.
struct Untimed<T>(Arc<Mutex<T>>);

impl<T> Untimed<T> {
    fn stream(&self) -> MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Read> Read for Untimed<T> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.stream().read(buf)
    }
}

impl<T: Write> Write for Untimed<T> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.stream().write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream().flush()
    }
}

impl<T: Read + Write + Send + 'static> Socket for Untimed<T> {
    fn limit(&self, _way: Way, _timeout: Duration) -> io::Result<()> {
        Ok(())
    }

    fn split(self: Box<Self>) -> io::Result<Split> {
        Ok((Box::new(Self(self.0.clone())), self, false))
    }
}

/// A connection, or a half of one. The time for one answer starts with [`begin`](Self::begin) and ends
/// whether the server is silent or sends without end.
pub(super) struct Stream {
    socket: Box<dyn Socket>,
    timeout: Option<Duration>,
    deadline: Option<Instant>,
    /// What the socket has been told, for each way.
    limits: [Option<Duration>; 2],
}

impl Stream {
    pub(super) fn new(socket: impl Socket + 'static, timeout: Option<Duration>) -> Self {
        Self::of(Box::new(socket), timeout)
    }

    fn of(socket: Box<dyn Socket>, timeout: Option<Duration>) -> Self {
        Self { socket, timeout, deadline: None, limits: [None; 2] }
    }

    /// A connection on which every answer may take any time.
    pub(super) fn untimed(stream: impl Read + Write + Send + 'static) -> Self {
        Self::new(Untimed(Arc::new(Mutex::new(stream))), None)
    }

    /// Sets another time for each answer.
    pub(super) fn set_timeout(&mut self, timeout: Option<Duration>) {
        // The socket is told with the next answer.
        (self.timeout, self.limits) = (timeout, [None; 2]);
    }

    /// Splits it like [`Socket::split`].
    pub(super) fn split(self) -> io::Result<(Self, Sending, bool)> {
        let (incoming, outgoing, at_once) = self.socket.split()?;
        let sending = Sending { stream: Self::of(outgoing, self.timeout), is_idle: true };
        Ok((Self::of(incoming, self.timeout), sending, at_once))
    }

    /// Starts the time for the next answer.
    pub(super) fn begin(&mut self) {
        // A time too far away to be told is none.
        self.deadline = self.timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        // After a slow answer the socket has a shorter limit.
        for limit in &mut self.limits {
            *limit = limit.filter(|&limit| Some(limit) == self.timeout);
        }
    }

    /// Calls `step` with what is left of the time. The socket is told anew only where much of the time is
    /// gone, which saves a system call for each step: the last one may take half as long again.
    fn within<T>(&mut self, way: Way, step: impl FnOnce(&mut dyn Socket) -> io::Result<T>) -> io::Result<T> {
        if let Some(deadline) = self.deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.late());
            }
            let told = self.limits[way as usize];
            if told.is_none_or(|limit| left < limit / 2) {
                let limit = if told.is_none() { self.timeout.unwrap_or(left) } else { left };
                self.socket.limit(way, limit)?;
                self.limits[way as usize] = Some(limit);
            }
        }
        step(&mut *self.socket).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut if self.deadline.is_some() => self.late(),
            _ => error,
        })
    }

    fn late(&self) -> io::Error {
        let seconds = self.timeout.unwrap_or_default().as_secs();
        let text = format!("the server did not answer within {seconds} seconds");
        io::Error::new(io::ErrorKind::TimedOut, text)
    }
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.within(Way::In, |socket| socket.read(buf))
    }
}

impl Write for Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.within(Way::Out, |socket| socket.write(buf))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
    }
}

impl Incoming for Stream {
    fn begin(&mut self) {
        Self::begin(self);
    }
}

/// The half that requests go to: each has its own time, up to the flush behind it.
pub(super) struct Sending {
    stream: Stream,
    is_idle: bool,
}

impl Sending {
    /// Sets another time for each request.
    pub(super) fn set_timeout(&mut self, timeout: Option<Duration>) {
        self.stream.set_timeout(timeout);
    }
}

impl Write for Sending {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if std::mem::take(&mut self.is_idle) {
            self.stream.begin();
        }
        self.stream.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.is_idle = true;
        self.stream.flush()
    }
}

#[cfg(all(test, unix))]
#[allow(clippy::unwrap_used, reason = "a test may stop")]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn check(timeout: Duration, server: impl FnOnce(UnixStream) + Send + 'static) -> io::Error {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = std::thread::spawn(move || server(theirs));
        let mut stream = Stream::new(ours, Some(timeout));
        stream.begin();
        let error = stream.read_exact(&mut [0; 64]).unwrap_err();
        drop(stream);
        server.join().unwrap();
        error
    }

    #[test]
    fn silence_and_an_endless_answer_end_in_time() {
        let started = Instant::now();
        let silent = check(Duration::from_millis(50), |mut socket| {
            let _ = socket.read(&mut [0]);
        });
        // A byte now and then resets no clock.
        let endless = check(Duration::from_millis(200), |mut socket| {
            while socket.write_all(&[1]).is_ok() {
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        assert!(started.elapsed() < Duration::from_secs(10));
        for error in [silent, endless] {
            assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
            assert!(error.to_string().starts_with("the server did not answer within"), "{error}");
        }
    }
}
