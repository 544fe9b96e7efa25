//! A connection whose other side has only so long for an answer.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// A connected socket.
pub(super) trait Socket: Read + Write + Send {
    /// Lets the next read and write take so long at most.
    fn limit(&self, timeout: Duration) -> io::Result<()>;
}

impl Socket for TcpStream {
    fn limit(&self, timeout: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(timeout))?;
        self.set_write_timeout(Some(timeout))
    }
}

#[cfg(unix)]
impl Socket for std::os::unix::net::UnixStream {
    fn limit(&self, timeout: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(timeout))?;
        self.set_write_timeout(Some(timeout))
    }
}

/// Bytes both ways that know no limit of time.
struct Untimed<T>(T);

impl<T: Read> Read for Untimed<T> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl<T: Write> Write for Untimed<T> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl<T: Read + Write + Send> Socket for Untimed<T> {
    fn limit(&self, _timeout: Duration) -> io::Result<()> {
        Ok(())
    }
}

/// A connection. The time for one answer starts with [`begin`](Self::begin) and ends whether the server is
/// silent or sends without end.
pub(super) struct Stream {
    socket: Box<dyn Socket>,
    timeout: Option<Duration>,
    deadline: Option<Instant>,
    /// What the socket has been told.
    limit: Option<Duration>,
}

impl Stream {
    pub(super) fn new(socket: impl Socket + 'static, timeout: Option<Duration>) -> Self {
        Self { socket: Box::new(socket), timeout, deadline: None, limit: None }
    }

    /// A connection on which every answer may take any time.
    pub(super) fn untimed(stream: impl Read + Write + Send + 'static) -> Self {
        Self::new(Untimed(stream), None)
    }

    /// Starts the time for the next answer.
    pub(super) fn begin(&mut self) {
        // A time too far away to be told is none.
        self.deadline = self.timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        // After a slow answer the socket has a shorter limit.
        self.limit = self.limit.filter(|&limit| Some(limit) == self.timeout);
    }

    /// Calls `step` with what is left of the time. The socket is told anew only where much of the time is
    /// gone, which saves a system call for each step: the last one may take half as long again.
    fn within<T>(&mut self, step: impl FnOnce(&mut dyn Socket) -> io::Result<T>) -> io::Result<T> {
        if let Some(deadline) = self.deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.late());
            }
            if self.limit.is_none_or(|limit| left < limit / 2) {
                let limit = if self.limit.is_none() { self.timeout.unwrap_or(left) } else { left };
                self.socket.limit(limit)?;
                self.limit = Some(limit);
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
        self.within(|socket| socket.read(buf))
    }
}

impl Write for Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.within(|socket| socket.write(buf))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
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
