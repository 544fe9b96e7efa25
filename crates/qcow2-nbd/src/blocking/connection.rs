//! The transmission phase for many threads: who sends, who reads, who gets what.

use crate::client::{Event, Need, Requests, Violation};
use crate::proto::{Command, ErrorCode, Extent, Mode, Request};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::{self, BufReader, Read, Write};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

/// The half of a connection that replies come from.
pub trait Incoming: Read + Send {
    /// From now on the next reply is awaited: an adapter with deadlines starts one.
    fn begin(&mut self) {}
}

/// A half without deadlines.
#[derive(Debug)]
pub struct Plain<R>(pub R);

impl<R: Read> Read for Plain<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl<R: Read + Send> Incoming for Plain<R> {}

/// The bytes that go with a request.
#[derive(Debug)]
#[non_exhaustive]
pub enum Transfer<'a> {
    /// None.
    None,
    /// The bytes of a write, as many as the request is long.
    Send(&'a [u8]),
    /// Where the bytes of a read go, as many as the request is long.
    Receive(&'a mut [u8]),
    /// Where the extents of a block status go, each with the id of its meta context.
    Status(&'a mut Vec<(u32, Extent)>),
}

/// A request and its bytes.
#[derive(Debug)]
pub struct Job<'a> {
    command: Command,
    flags: u16,
    offset: u64,
    len: u64,
    transfer: Transfer<'a>,
}

impl<'a> Job<'a> {
    /// `offset`, `len`: the range in bytes.
    pub fn new(command: Command, offset: u64, len: u64, transfer: Transfer<'a>) -> Self {
        Self { command, flags: 0, offset, len, transfer }
    }

    /// Sets flags; see [`command_flag`](crate::proto::command_flag).
    pub fn with_flags(mut self, flags: u16) -> Self {
        self.flags |= flags;
        self
    }
}

/// Why a job failed.
#[derive(Debug)]
#[non_exhaustive]
pub enum Failure {
    /// The server reported an error. The connection goes on.
    Server(ErrorCode),
    /// The connection failed, or the server broke the protocol. All later jobs fail.
    Lost(io::Error),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Server(error) => write!(f, "the server reported error {}", error.0),
            Self::Lost(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for Failure {}

/// A connection in its transmission phase.
pub struct Connection<R, W> {
    /// Taken before `shared`.
    outgoing: Mutex<W>,
    shared: Mutex<Shared<R>>,
    /// Something in `shared` changed that a waiting thread may be waiting for.
    changed: Condvar,
    window: usize,
    patience: Option<Duration>,
}

struct Shared<R> {
    requests: Requests,
    /// The half that replies come from, while no thread reads.
    incoming: Option<BufReader<R>>,
    /// The call whose bytes are next, which must read on.
    called: Option<u64>,
    next_call: u64,
    /// Which call a request belongs to.
    owners: BTreeMap<u64, u64>,
    /// Calls that wait, and can read their bytes themselves.
    waiting: BTreeSet<u64>,
    /// What came for calls while another one was reading.
    inbox: BTreeMap<u64, Vec<News>>,
    /// Why the connection is of no use any more.
    lost: Option<(io::ErrorKind, String)>,
}

/// What came for a call.
enum News {
    Event(Event),
    Data { cookie: u64, start: u64, bytes: Vec<u8> },
}

/// What a call has under way: cookies and indexes of jobs.
type Mine = Vec<(u64, usize)>;

/// What the server owes a call.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Owed {
    Nothing,
    /// Replies without bytes, any number of which fit into the buffers of a connection.
    Heads,
    /// Replies with bytes.
    Bytes,
}

impl Owed {
    fn by(mine: &Mine, jobs: &[Job<'_>]) -> Self {
        let short = |job: &Job<'_>| matches!(job.transfer, Transfer::None | Transfer::Send(_));
        match mine.is_empty() {
            true => Self::Nothing,
            false if mine.iter().all(|&(_, index)| short(&jobs[index])) => Self::Heads,
            false => Self::Bytes,
        }
    }
}

impl<R: Incoming, W: Write + Send> Connection<R, W> {
    /// `mode`: what the handshake agreed on.
    pub fn new(incoming: R, outgoing: W, mode: Mode) -> Self {
        let shared = Shared {
            requests: Requests::new(mode),
            incoming: Some(BufReader::with_capacity(BUFFER, incoming)),
            called: None,
            next_call: 0,
            owners: BTreeMap::new(),
            waiting: BTreeSet::new(),
            inbox: BTreeMap::new(),
            lost: None,
        };
        let (outgoing, shared) = (Mutex::new(outgoing), Mutex::new(shared));
        Self { outgoing, shared, changed: Condvar::new(), window: DEFAULT_WINDOW, patience: None }
    }

    /// Sets how many jobs of one call are under way at once; at least 1.
    pub fn with_window(mut self, window: usize) -> Self {
        self.window = window.max(1);
        self
    }

    /// Sets how long a call waits for a reply while others get theirs; the connection is lost then.
    pub fn with_patience(mut self, patience: Option<Duration>) -> Self {
        self.patience = patience;
        self
    }

    /// Carries out `jobs`, in any order and several at once, and waits for all of them. Errors: the first
    /// error of the server, after which jobs that are not under way yet are left out; or a lost connection.
    pub fn run(&self, jobs: &mut [Job<'_>]) -> Result<(), Failure> {
        let call = {
            let mut shared = self.shared();
            shared.next_call += 1;
            shared.next_call
        };
        for job in jobs.iter_mut() {
            // What an earlier try has left in it.
            if let Transfer::Status(extents) = &mut job.transfer {
                extents.clear();
            }
        }
        let (mut mine, mut next, mut failed) = (Mine::new(), 0, None);
        loop {
            while next < jobs.len() && mine.len() < self.window && failed.is_none() {
                let Some(cookie) = self.send(call, &jobs[next], Owed::by(&mine, jobs))? else { break };
                mine.push((cookie, next));
                next += 1;
            }
            if mine.is_empty() {
                return failed.map_or(Ok(()), |error| Err(Failure::Server(error)));
            }
            let error = loop {
                if let Some(error) = self.receive(call, &mut mine, jobs)? {
                    break error;
                }
            };
            if error != ErrorCode::NONE && failed.is_none() {
                failed = Some(error);
            }
        }
    }

    /// Tells the server that no more requests come. Nothing is waited for.
    pub fn disconnect(&self) {
        let mut out = Vec::new();
        let request = Request { command: Command::DISCONNECT, flags: 0, cookie: 0, offset: 0, len: 0 };
        let mut outgoing = self.outgoing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut shared = self.shared();
        if shared.lost.is_none() && shared.requests.submit(request, &mut out).is_ok() {
            drop(shared);
            let _ = outgoing.write_all(&out).and_then(|()| outgoing.flush());
        }
    }

    fn shared(&self) -> MutexGuard<'_, Shared<R>> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends the request of `job` with its bytes; returns its cookie. `None` if that has to wait until
    /// replies are read, of which the call is `owed` some: another call is sending, perhaps to a server that
    /// takes no bytes before it is rid of these replies; or the bytes of `job` are many, with which the same
    /// would happen.
    fn send(&self, call: u64, job: &Job<'_>, owed: Owed) -> Result<Option<u64>, Failure> {
        let payload: &[u8] = match &job.transfer {
            Transfer::Send(bytes) => bytes,
            _ => &[],
        };
        let mut outgoing = match self.outgoing.try_lock() {
            Ok(outgoing) if owed < Owed::Bytes || payload.len() <= SMALL => outgoing,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            _ if owed > Owed::Nothing => return Ok(None),
            _ => self.outgoing.lock().unwrap_or_else(PoisonError::into_inner),
        };
        let (mut out, mut shared) = (Vec::with_capacity(32), self.shared());
        if let Some(lost) = shared.lost() {
            return Err(lost);
        }
        let Job { command, flags, offset, len, .. } = *job;
        let request = Request { command, flags, cookie: 0, offset, len };
        let cookie = shared
            .requests
            .submit(request, &mut out)
            .map_err(|error| Failure::Lost(io::Error::new(io::ErrorKind::InvalidInput, error)))?;
        shared.owners.insert(cookie, call);
        drop(shared);
        let sent = match payload.len() {
            // One system call and one packet where copying costs less.
            len if len <= SMALL => {
                out.extend_from_slice(payload);
                outgoing.write_all(&out)
            }
            _ => outgoing.write_all(&out).and_then(|()| outgoing.write_all(payload)),
        };
        match sent.and_then(|()| outgoing.flush()) {
            Ok(()) => Ok(Some(cookie)),
            Err(error) => Err(self.lose(error)),
        }
    }

    /// Waits for the reply to one of this call's requests and returns its error; `None` if another call reads
    /// on, and this one waits again.
    fn receive(
        &self,
        call: u64,
        mine: &mut Mine,
        jobs: &mut [Job<'_>],
    ) -> Result<Option<ErrorCode>, Failure> {
        let deadline = self.patience.and_then(|patience| Instant::now().checked_add(patience));
        let mut shared = self.shared();
        let incoming = loop {
            if let Some(error) = take_news(shared.inbox.remove(&call), mine, jobs, &mut shared.inbox, call) {
                shared.waiting.remove(&call);
                if shared.called == Some(call) {
                    // This call goes on sending first: somebody else has to read.
                    shared.called = None;
                    self.changed.notify_all();
                }
                return Ok(Some(error));
            }
            if let Some(lost) = shared.lost() {
                return Err(lost);
            }
            if shared.called.is_none_or(|called| called == call)
                && let Some(incoming) = shared.incoming.take()
            {
                shared.called = None;
                shared.waiting.remove(&call);
                break incoming;
            }
            shared.waiting.insert(call);
            shared = match deadline {
                None => self.changed.wait(shared).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        drop(shared);
                        let text = "the server answers other requests only";
                        return Err(self.lose(io::Error::new(io::ErrorKind::TimedOut, text)));
                    }
                    self.changed.wait_timeout(shared, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        };
        drop(shared);
        self.read(call, incoming, mine, jobs)
    }

    /// Reads replies until one of this call's requests is done, or another call must read on.
    fn read(
        &self,
        call: u64,
        mut incoming: BufReader<R>,
        mine: &mut Mine,
        jobs: &mut [Job<'_>],
    ) -> Result<Option<ErrorCode>, Failure> {
        incoming.get_mut().begin();
        let mut bytes = [0; Requests::MOST];
        loop {
            let mut shared = self.shared();
            if let Some(lost) = shared.lost() {
                return Err(lost);
            }
            let need = shared.requests.need();
            let event = match need {
                Need::Bytes(len) => {
                    drop(shared);
                    incoming.read_exact(&mut bytes[..len]).map_err(|error| self.lose(error))?;
                    shared = self.shared();
                    shared.requests.receive(&bytes[..len])
                }
                Need::Data { cookie, start, len } => {
                    let owner = shared.owners.get(&cookie).copied();
                    if owner != Some(call)
                        && let Some(owner) = owner.filter(|owner| shared.waiting.contains(owner))
                    {
                        shared.called = Some(owner);
                        shared.incoming = Some(incoming);
                        drop(shared);
                        self.changed.notify_all();
                        return Ok(None);
                    }
                    drop(shared);
                    let kept = self.data(&mut incoming, mine, jobs, (cookie, start, len))?;
                    shared = self.shared();
                    if let (Some(bytes), Some(owner)) = (kept, owner) {
                        shared.inbox.entry(owner).or_default().push(News::Data { cookie, start, bytes });
                    }
                    shared.requests.data_received()
                }
            };
            let event = match event {
                Ok(Some(event)) => event,
                Ok(None) => continue,
                Err(violation) => {
                    drop(shared);
                    return Err(self.lose(broken(violation)));
                }
            };
            let Some(event) = self.pass_on(&mut shared, call, event) else { continue };
            if let Some(error) = apply(News::Event(event), mine, jobs) {
                shared.incoming = Some(incoming);
                drop(shared);
                self.changed.notify_all();
                return Ok(Some(error));
            }
        }
    }

    /// Returns `event` if it is this call's; another call gets it in its inbox.
    fn pass_on(&self, shared: &mut Shared<R>, call: u64, event: Event) -> Option<Event> {
        let (cookie, is_done) = (event.cookie(), matches!(event, Event::Done { .. }));
        let owner = match is_done {
            true => shared.owners.remove(&cookie),
            false => shared.owners.get(&cookie).copied(),
        }?;
        if owner == call {
            return Some(event);
        }
        shared.inbox.entry(owner).or_default().push(News::Event(event));
        if is_done {
            self.changed.notify_all();
        }
        None
    }

    /// Takes bytes of a read to their place, or returns them if that is another call's.
    fn data(
        &self,
        incoming: &mut BufReader<R>,
        mine: &Mine,
        jobs: &mut [Job<'_>],
        (cookie, start, len): (u64, u64, u64),
    ) -> Result<Option<Vec<u8>>, Failure> {
        if let Some(place) = place(mine, jobs, cookie, start, len) {
            incoming.read_exact(place).map_err(|error| self.lose(error))?;
            return Ok(None);
        }
        // No longer than the read that was asked for; the memory grows with what comes.
        let mut bytes = Vec::new();
        let read = incoming.by_ref().take(len).read_to_end(&mut bytes);
        match read {
            Ok(read) if read as u64 == len => Ok(Some(bytes)),
            Ok(_) => Err(self.lose(io::ErrorKind::UnexpectedEof.into())),
            Err(error) => Err(self.lose(error)),
        }
    }

    /// Notes that the connection is lost, for all that wait and all that come.
    fn lose(&self, error: io::Error) -> Failure {
        let mut shared = self.shared();
        if shared.lost.is_none() {
            shared.lost = Some((error.kind(), error.to_string()));
        }
        drop(shared);
        self.changed.notify_all();
        Failure::Lost(error)
    }
}

impl<R> Shared<R> {
    fn lost(&self) -> Option<Failure> {
        self.lost.as_ref().map(|(kind, text)| Failure::Lost(io::Error::new(*kind, text.clone())))
    }
}

impl<R, W> fmt::Debug for Connection<R, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("window", &self.window).finish_non_exhaustive()
    }
}

impl Event {
    fn cookie(&self) -> u64 {
        match *self {
            Self::Hole { cookie, .. } | Self::Status { cookie, .. } | Self::Done { cookie, .. } => cookie,
        }
    }
}

/// Applies what came for this call up to the end of a request, whose error is returned; the rest goes back.
fn take_news(
    news: Option<Vec<News>>,
    mine: &mut Mine,
    jobs: &mut [Job<'_>],
    inbox: &mut BTreeMap<u64, Vec<News>>,
    call: u64,
) -> Option<ErrorCode> {
    let mut news = news?.into_iter();
    let done = news.by_ref().find_map(|item| apply(item, mine, jobs));
    let rest: Vec<News> = news.collect();
    if !rest.is_empty() {
        inbox.insert(call, rest);
    }
    done
}

/// Applies what came for a job; returns the error if the job is done.
fn apply(news: News, mine: &mut Mine, jobs: &mut [Job<'_>]) -> Option<ErrorCode> {
    match news {
        News::Data { cookie, start, bytes } => {
            if let Some(place) = place(mine, jobs, cookie, start, bytes.len() as u64) {
                place.copy_from_slice(&bytes);
            }
        }
        News::Event(Event::Hole { cookie, start, len }) => {
            if let Some(place) = place(mine, jobs, cookie, start, len) {
                place.fill(0);
            }
        }
        News::Event(Event::Status { cookie, context, extents }) => {
            let job = mine.iter().find(|(of, _)| *of == cookie).and_then(|&(_, index)| jobs.get_mut(index));
            if let Some(Job { transfer: Transfer::Status(all), .. }) = job {
                all.extend(extents.into_iter().map(|extent| (context, extent)));
            }
        }
        News::Event(Event::Done { cookie, error }) => {
            let index = mine.iter().position(|(of, _)| *of == cookie)?;
            mine.swap_remove(index);
            return Some(error);
        }
    }
    None
}

/// Where bytes of the read `cookie` go.
fn place<'a>(
    mine: &Mine,
    jobs: &'a mut [Job<'_>],
    cookie: u64,
    start: u64,
    len: u64,
) -> Option<&'a mut [u8]> {
    let &(_, index) = mine.iter().find(|(of, _)| *of == cookie)?;
    let Transfer::Receive(buf) = &mut jobs.get_mut(index)?.transfer else { return None };
    let start = usize::try_from(start).ok()?;
    buf.get_mut(start..start.checked_add(usize::try_from(len).ok()?)?)
}

fn broken(violation: Violation) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, violation)
}

/// Jobs of one call that are under way at once: as many as QEMU's server takes from a client.
const DEFAULT_WINDOW: usize = 16;
/// What is read ahead. Larger reads go past it.
const BUFFER: usize = 8 << 10;
/// Payloads up to this length are sent with their head.
const SMALL: usize = 16 << 10;
