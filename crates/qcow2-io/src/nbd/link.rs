//! The connection to a server, and another one if it is lost.

use super::NbdError;
use super::address::NbdAddress;
use super::halves::{Halves, NbdTls, Outgoing, Receiving};
use super::stream::Stream;
use qcow2_nbd::blocking::{Connection, Failure, Job, resume};
use qcow2_nbd::client::{Export, Handshake, Negotiation, Step};
use qcow2_nbd::proto::{ErrorCode, transmission_flag};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How an export is opened.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct NbdOptions {
    /// Name of the export; empty for the server's default.
    pub export: String,
    /// Whether it will be changed.
    pub writable: bool,
    /// How long the server may take to connect, to negotiate, and to answer one request; `None`: without end.
    pub timeout: Option<Duration>,
    /// How long to try to connect before there is an export.
    pub open_timeout: Duration,
    /// How long requests wait for another connection after one is lost; with zero all later requests fail.
    pub reconnect_delay: Duration,
    /// A meta context that is chosen in place of `base:allocation`. The server must have it. What it tells is shown
    /// by `status_at`; all bytes count as data, because it is not where zeroes are.
    pub context: Option<String>,
    /// Encrypts the connection; a server without TLS is refused.
    pub tls: Option<NbdTls>,
}

impl Default for NbdOptions {
    fn default() -> Self {
        Self {
            export: String::new(),
            writable: false,
            timeout: Some(super::NbdStorage::DEFAULT_TIMEOUT),
            open_timeout: Duration::ZERO,
            reconnect_delay: Duration::ZERO,
            context: None,
            tls: None,
        }
    }
}

impl NbdOptions {
    /// The meta context that is chosen.
    fn context(&self) -> &str {
        self.context.as_deref().unwrap_or(ALLOCATION)
    }
}

/// An export of which there is a connection, or will be again.
pub(super) struct Link {
    /// `None` on a stream that somebody else has connected.
    address: Option<NbdAddress>,
    options: NbdOptions,
    export: Export,
    line: Mutex<Line>,
    /// Held for a whole call where both ways of the stream cannot be used at once.
    turn: Option<Mutex<()>>,
}

/// The state of the connection.
enum Line {
    Open(Arc<Open>),
    /// There is none since then.
    Lost(Instant),
    /// There will be none.
    Closed,
}

struct Open {
    connection: Connection<Receiving, Outgoing>,
    export: Export,
}

impl Link {
    /// Connects to `address`, and tries it again for the time that `options` give it.
    pub(super) fn connect(address: &NbdAddress, mut options: NbdOptions) -> Result<Self, NbdError> {
        if let (Some(tls), NbdAddress::Tcp { host, .. }) = (&mut options.tls, address) {
            tls.hostname.get_or_insert_with(|| host.clone());
        }
        let started = Instant::now();
        let (open, turn) = loop {
            match address.connect(options.timeout).and_then(|stream| open(stream, &options)) {
                Err(error) if error.is_temporary() && started.elapsed() < options.open_timeout => {
                    thread::sleep(PAUSE);
                }
                opened => break opened?,
            }
        };
        Ok(Self::of(Some(address.clone()), options, open, turn))
    }

    pub(super) fn over(stream: Stream, options: NbdOptions) -> Result<Self, NbdError> {
        let (open, turn) = open(stream, &options)?;
        Ok(Self::of(None, options, open, turn))
    }

    fn of(address: Option<NbdAddress>, options: NbdOptions, open: Open, turn: Option<Mutex<()>>) -> Self {
        let export = open.export.clone();
        Self { address, options, export, line: Mutex::new(Line::Open(Arc::new(open))), turn }
    }

    /// What the server has told about the export.
    pub(super) fn export(&self) -> &Export {
        &self.export
    }

    /// Whether the export tells data from zeroes and holes.
    pub(super) fn has_status(&self) -> bool {
        self.export.context(ALLOCATION).is_some()
    }

    /// The id of the meta context that was chosen, on the connection that there is now.
    pub(super) fn status_context(&self) -> Option<u32> {
        let context = self.options.context();
        match &*self.line() {
            Line::Open(open) => open.export.context(context),
            // Another connection comes with the next request.
            _ => self.export.context(context),
        }
    }

    /// Carries out `jobs`. Errors: the server's error, or a connection that is lost and does not come back in
    /// the time for it.
    pub(super) fn run(&self, jobs: &mut [Job<'_>]) -> io::Result<()> {
        let _turn = self.turn.as_ref().map(|turn| turn.lock().unwrap_or_else(PoisonError::into_inner));
        let mut first_lost = None;
        loop {
            let open = self.open()?;
            match open.connection.run(jobs) {
                Ok(()) => return Ok(()),
                Err(Failure::Server(error)) => return Err(io::Error::from_raw_os_error(os_code(error))),
                Err(Failure::Lost(error)) => {
                    let since = *first_lost.get_or_insert_with(Instant::now);
                    // A server that takes every connection and drops it again must not hold the call.
                    let is_late = since.elapsed() >= self.options.reconnect_delay;
                    if !self.lost(&open) || is_late {
                        return Err(error);
                    }
                    thread::sleep(PAUSE);
                }
                Err(error) => return Err(io::Error::other(error)),
            }
        }
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that `open` is lost. Returns whether there may be another connection.
    fn lost(&self, open: &Arc<Open>) -> bool {
        let may_return = self.address.is_some() && !self.options.reconnect_delay.is_zero();
        let mut line = self.line();
        // Of several calls that find it lost the first one notes it.
        if matches!(&*line, Line::Open(current) if Arc::ptr_eq(current, open)) {
            *line = if may_return { Line::Lost(Instant::now()) } else { Line::Closed };
        }
        may_return
    }

    /// The connection; another one if it is lost. After the time for that there is one more attempt for each
    /// call, so that a server which comes back late is found.
    fn open(&self) -> io::Result<Arc<Open>> {
        let mut line = self.line();
        let since = match &*line {
            Line::Open(open) => return Ok(open.clone()),
            Line::Lost(since) => *since,
            Line::Closed => return Err(io::Error::from_raw_os_error(BROKEN)),
        };
        loop {
            let left = self.options.reconnect_delay.saturating_sub(since.elapsed());
            match self.again(left.max(SHORTEST)) {
                Ok(open) => {
                    let open = Arc::new(open);
                    *line = Line::Open(open.clone());
                    return Ok(open);
                }
                Err(error) if error.is_temporary() && !left.is_zero() => thread::sleep(PAUSE.min(left)),
                Err(error) => {
                    let code = error.os_code().unwrap_or(BROKEN);
                    return Err(io::Error::from_raw_os_error(code));
                }
            }
        }
    }

    /// Connects again. `limit`: how long that may take. Errors: another export than before, too.
    fn again(&self, limit: Duration) -> Result<Open, NbdError> {
        let Some(address) = &self.address else { return Err(NbdError::new("no address")) };
        let limit = self.options.timeout.map_or(limit, |timeout| timeout.min(limit));
        let quick = NbdOptions { timeout: Some(limit), ..self.options.clone() };
        let (mut halves, export) = agree(address.connect(quick.timeout)?, &quick)?;
        let (old, new) = (&self.export, &export);
        if (new.size, new.flags, new.block_sizes) != (old.size, old.flags, old.block_sizes) {
            return Err(NbdError::new("the server has another export than before"));
        }
        halves.set_timeout(self.options.timeout);
        Ok(ready(halves, export, self.options.timeout).0)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if let Line::Open(open) = &*self.line() {
            open.connection.disconnect();
        }
    }
}

fn open(stream: Stream, options: &NbdOptions) -> Result<(Open, Option<Mutex<()>>), NbdError> {
    let (halves, export) = agree(stream, options)?;
    Ok(ready(halves, export, options.timeout))
}

/// Runs the handshake.
fn agree(mut stream: Stream, options: &NbdOptions) -> Result<(Halves, Export), NbdError> {
    let mut wanted = Negotiation::with_export(&options.export);
    wanted.contexts = vec![options.context().to_owned()];
    wanted.tls = options.tls.is_some();
    let mut handshake = Handshake::new(wanted);
    stream.begin();
    let first = handshake.start();
    let mut step = resume(&mut stream, &mut handshake, first, Vec::new())?;
    let halves = match (&step, &options.tls) {
        (Step::StartTls, Some(tls)) => {
            let mut halves = Halves::encrypted(stream, tls)?;
            let mut sent = Vec::new();
            let next = handshake.secured(&mut sent);
            step = resume(&mut halves, &mut handshake, next, sent)?;
            halves
        }
        _ => Halves::plain(stream)?,
    };
    match step {
        Step::Ready(export) => {
            check(&export, options)?;
            Ok((halves, export))
        }
        _ => Err(NbdError::new("the handshake ended without an export")),
    }
}

/// Refuses an export that cannot be used as `options` want.
fn check(export: &Export, options: &NbdOptions) -> Result<(), NbdError> {
    if export.size > i64::MAX as u64 {
        return Err(NbdError::new("NBD server's disk is larger than 2^63 - 1 bytes"));
    }
    if let Some(sizes) = export.block_sizes
        && !export.size.is_multiple_of(u64::from(sizes.minimum))
    {
        let (size, minimum) = (export.size, sizes.minimum);
        let text = format!("export length {size} is not multiple of minimum block size {minimum}");
        return Err(NbdError::new(text));
    }
    if options.writable && export.has(transmission_flag::READ_ONLY) {
        return Err(NbdError::new("Could not open image: Permission denied").with_code(PERMISSION_DENIED));
    }
    if let Some(context) = &options.context
        && export.context(context).is_none()
    {
        return Err(NbdError::new("Could not open image: Invalid argument").with_code(INVALID));
    }
    Ok(())
}

/// The transmission phase begins.
fn ready(halves: Halves, export: Export, patience: Option<Duration>) -> (Open, Option<Mutex<()>>) {
    let Halves { incoming, outgoing, at_once } = halves;
    let connection = Connection::new(incoming, outgoing, export.mode).with_patience(patience);
    let (connection, turn) = match at_once {
        true => (connection, None),
        // While one half waits for bytes nothing can be sent.
        false => (connection.with_window(1), Some(Mutex::new(()))),
    };
    (Open { connection, export }, turn)
}

/// Converts a protocol error number to Linux's; those that are not known are errors of the request.
fn os_code(error: ErrorCode) -> i32 {
    match error.0 {
        1 | 5 | 12 | 22 | 28 | 75 | 95 | 108 => error.0 as i32,
        _ => 22,
    }
}

/// The meta context that tells data from zeroes and holes.
const ALLOCATION: &str = "base:allocation";
/// Between two attempts to connect.
const PAUSE: Duration = Duration::from_millis(100);
/// How long one more attempt may take when the time for it is over.
const SHORTEST: Duration = Duration::from_secs(1);
/// `EPIPE`: the error of every call after the connection has failed.
const BROKEN: i32 = 32;
/// `EINVAL`.
const INVALID: i32 = 22;
/// `EACCES`.
const PERMISSION_DENIED: i32 = 13;

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may stop")]
mod tests {
    use super::*;
    use qcow2_nbd::blocking::Transfer;
    use qcow2_nbd::proto::{Command, Greeting};
    use std::io::Write;
    use std::net::TcpListener;

    #[test]
    fn a_server_that_drops_every_connection_ends_the_call() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port().to_string();
        let mut greeting = Vec::new();
        Greeting::OldStyle { size: 4096, flags: 1 }.encode(&mut greeting);
        // Ends with the process.
        thread::spawn(move || {
            for stream in listener.incoming() {
                let _ = stream.and_then(|mut stream| stream.write_all(&greeting));
            }
        });
        let address = NbdAddress::Tcp { host: "127.0.0.1".to_owned(), port };
        let reconnect_delay = Duration::from_millis(300);
        let link = Link::connect(&address, NbdOptions { reconnect_delay, ..NbdOptions::default() }).unwrap();
        let (started, mut buf) = (Instant::now(), [0; 512]);
        link.run(&mut [Job::new(Command::READ, 0, 512, Transfer::Receive(&mut buf))]).unwrap_err();
        assert!(started.elapsed() >= reconnect_delay && started.elapsed() < Duration::from_secs(20));
    }
}
