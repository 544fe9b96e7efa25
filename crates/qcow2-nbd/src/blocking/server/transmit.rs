//! The transmission phase on threads: who reads, who works, who sends.

use super::frame::Frame;
use super::reader::Reader;
use super::{Crew, Disk};
use crate::proto::{ErrorCode, Extent, Mode, Request, command_flag};
use crate::server::{MAX_STATUS_EXTENTS, Refusal, Session, Work};
use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, Scope};
use std::time::{Duration, Instant};

/// Bytes that are moved at once: longer reads and writes are moved in pieces.
pub const PIECE: usize = 2 << 20;

/// What a connection is served with.
#[derive(Clone, Copy)]
pub struct Transmission<'a> {
    /// The client and its export.
    pub session: &'a Session,
    /// The disk of that export.
    pub disk: &'a dyn Disk,
    /// Where threads come from beyond the calling one.
    pub crew: &'a Crew,
}

/// Serves requests from `incoming` until the client leaves or the connection fails; what is under way is
/// finished first. Errors: of the stream, or a client that breaks the protocol.
pub fn transmit<R, W>(incoming: R, outgoing: W, with: Transmission<'_>) -> io::Result<()>
where
    R: Read + Send,
    W: Write + Send,
{
    let turn = Turn { reader: Some(Reader::new(incoming)), waiting: 0, is_over: false, error: None };
    let connection = Connection {
        with,
        turn: Mutex::new(turn),
        changed: Condvar::new(),
        outgoing: Mutex::new(outgoing),
        pace: AtomicU64::new(0),
    };
    std::thread::scope(|scope| connection.work(scope, false));
    let turn = connection.turn.into_inner().unwrap_or_else(PoisonError::into_inner);
    turn.error.map_or(Ok(()), Err)
}

struct Connection<'a, R, W> {
    with: Transmission<'a>,
    turn: Mutex<Turn<R>>,
    /// The turn is free, or all is over.
    changed: Condvar,
    /// Never taken while `turn` is held.
    outgoing: Mutex<W>,
    /// Nanoseconds that a cheap request takes, on average of the last ones.
    pace: AtomicU64,
}

struct Turn<R> {
    /// The requests, while no thread has the turn.
    reader: Option<Reader<R>>,
    waiting: usize,
    is_over: bool,
    /// Why, if the client did not just leave.
    error: Option<io::Error>,
}

/// What a thread has of its own.
#[derive(Default)]
struct Hands {
    frame: Frame,
    payload: Vec<u8>,
    /// Why an earlier piece of the payload was not written.
    failed: Option<ErrorCode>,
}

/// What ends a turn.
enum Next {
    /// No more requests.
    Leave,
    /// A request that may take long, with its payload, if it has one, in the thread's hands.
    Long(Request, Work),
}

impl<'a, R: Read + Send, W: Write + Send> Connection<'a, R, W> {
    /// What each thread does. `is_extra`: a thread of the crew, which leaves if it has nothing to do.
    fn work<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>, is_extra: bool) {
        let mut hands = Hands::default();
        let _guard = Guard(self);
        while let Some(mut reader) = self.take_turn(is_extra) {
            match self.serve(&mut reader, &mut hands) {
                Ok(Next::Long(request, work)) => {
                    self.pass_turn(reader, scope);
                    if let Err(error) = self.run_long(&request, work, &mut hands) {
                        self.end(Some(error));
                    }
                }
                Ok(Next::Leave) => self.end(None),
                Err(error) => {
                    // What was carried out is answered, whatever came behind it.
                    let _ = self.send(&mut hands.frame);
                    self.end(Some(error));
                }
            }
        }
        if is_extra {
            self.with.crew.dismiss();
        }
    }

    fn turn(&self) -> MutexGuard<'_, Turn<R>> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the turn. `None`: the connection is over, or an extra thread has waited for long enough.
    fn take_turn(&self, is_extra: bool) -> Option<Reader<R>> {
        let mut turn = self.turn();
        loop {
            if turn.is_over {
                return None;
            }
            if let Some(reader) = turn.reader.take() {
                return Some(reader);
            }
            turn.waiting += 1;
            let patience = if is_extra { IDLE } else { Duration::MAX };
            let (woken, timeout) =
                self.changed.wait_timeout(turn, patience).unwrap_or_else(PoisonError::into_inner);
            turn = woken;
            turn.waiting -= 1;
            if is_extra && timeout.timed_out() && turn.reader.is_none() {
                return None;
            }
        }
    }

    /// Lets another thread read on: one that waits, or a new one.
    fn pass_turn<'scope>(&'scope self, reader: Reader<R>, scope: &'scope Scope<'scope, '_>) {
        let mut turn = self.turn();
        turn.reader = Some(reader);
        let is_awaited = turn.waiting > 0;
        drop(turn);
        if is_awaited {
            self.changed.notify_one();
        } else if self.with.crew.hire() {
            let started = Builder::new().spawn_scoped(scope, move || self.work(scope, true));
            if started.is_err() {
                self.with.crew.dismiss();
            }
        }
    }

    /// No thread reads on. The first error is the one that is told.
    fn end(&self, error: Option<io::Error>) {
        let mut turn = self.turn();
        if !turn.is_over {
            (turn.is_over, turn.error) = (true, error);
        }
        drop(turn);
        self.changed.notify_all();
    }

    /// Sends what is in `frame`.
    fn send(&self, frame: &mut Frame) -> io::Result<()> {
        if frame.len() > 0 {
            let mut outgoing = self.outgoing.lock().unwrap_or_else(PoisonError::into_inner);
            let sent = outgoing.write_all(frame.bytes());
            frame.clear();
            return sent;
        }
        Ok(())
    }

    /// Carries out requests up to one that may take long.
    fn serve(&self, reader: &mut Reader<R>, hands: &mut Hands) -> io::Result<Next> {
        let session = self.with.session;
        let mode = session.mode();
        let mut batch = 0;
        loop {
            if !reader.has_head(mode) || batch >= BATCH || hands.frame.len() >= BATCH_BYTES {
                self.send(&mut hands.frame)?;
                batch = 0;
            }
            let Some(request) = reader.request(mode)? else {
                self.send(&mut hands.frame)?;
                return Ok(Next::Leave);
            };
            let payload = session.payload_len(&request).map_err(drop_client)?;
            let work = match session.judge(&request) {
                Ok(Work::Disconnect) => {
                    self.send(&mut hands.frame)?;
                    return Ok(Next::Leave);
                }
                Ok(work) => work,
                Err(refusal) => {
                    // Replies first: the payload may take long to come.
                    if payload > 0 {
                        self.send(&mut hands.frame)?;
                        reader.skip(payload)?;
                    }
                    hands.frame.push(|out| session.failed(&request, refusal, out));
                    batch += 1;
                    continue;
                }
            };
            if self.is_long(&request, work) || !reader.holds(payload) {
                self.send(&mut hands.frame)?;
                self.take_payload(reader, &request, payload, hands)?;
                return Ok(Next::Long(request, work));
            }
            if !reader.has(payload) {
                // It may take long to come, and the client may want its replies first.
                self.send(&mut hands.frame)?;
                batch = 0;
            }
            let data = reader.borrow(payload)?;
            let begun = Instant::now();
            self.run(&request, work, data, &mut hands.frame);
            self.note_pace(begun.elapsed());
            batch += 1;
        }
    }

    fn is_long(&self, request: &Request, work: Work) -> bool {
        match work {
            _ if request.flags & command_flag::FUA != 0 => true,
            Work::Read { .. } | Work::Write => {
                request.len > SHORT || self.pace.load(Ordering::Relaxed) > SLOW
            }
            _ => true,
        }
    }

    /// Counts the time of a short request in. One that the system put off for once must not weigh more than
    /// a few others.
    fn note_pace(&self, took: Duration) {
        let took = took.as_nanos().min(u128::from(SLOW) * 8) as u64;
        let pace = self.pace.load(Ordering::Relaxed);
        self.pace.store(pace - pace / 8 + took / 8, Ordering::Relaxed);
    }

    /// Reads the payload of a write into the thread's hands. All of a long one but its last piece is written
    /// at once, with the turn: it comes from the stream that the others wait for.
    fn take_payload(
        &self,
        reader: &mut Reader<R>,
        request: &Request,
        len: usize,
        hands: &mut Hands,
    ) -> io::Result<()> {
        let mut left = len;
        hands.payload.clear();
        let mut result = Ok(());
        while left > 0 {
            let step = left.min(PIECE);
            hands.payload.resize(step, 0);
            reader.read_exact(&mut hands.payload)?;
            left -= step;
            if left > 0 && result.is_ok() {
                let offset = request.offset + (len - left - step) as u64;
                result = self.with.disk.write(offset, &hands.payload);
            }
        }
        hands.failed = result.err();
        Ok(())
    }

    /// Carries out a request that [`serve`](Self::serve) has handed out, and replies.
    fn run_long(&self, request: &Request, work: Work, hands: &mut Hands) -> io::Result<()> {
        let Hands { frame, payload, failed } = hands;
        match work {
            Work::Read { whole } if request.len > PIECE as u64 || self.may_have_holes(request, whole) => {
                return self.read_in_pieces(request, whole, frame);
            }
            Work::Write => {
                // The first pieces are written already.
                let start = request.offset + (request.len - payload.len() as u64);
                let written = match failed.take() {
                    Some(error) => Err(error),
                    None => self.write(request, start, payload),
                };
                self.reply(request, written, frame);
            }
            work => {
                let begun = Instant::now();
                self.run(request, work, &[], frame);
                if matches!(work, Work::Read { .. }) && request.len <= SHORT {
                    self.note_pace(begun.elapsed());
                }
            }
        }
        self.send(frame)
    }

    /// Carries out a request and appends its reply. `data`: the payload of a write.
    fn run(&self, request: &Request, work: Work, data: &[u8], frame: &mut Frame) {
        let (session, disk) = (self.with.session, self.with.disk);
        let Request { offset, len, .. } = *request;
        let is_empty = len == 0;
        let done = match work {
            Work::Read { .. } if !is_empty => {
                let start = frame.len();
                frame.push(|out| session.data_head(request, (offset, len), true, out));
                match disk.read(offset, frame.space(len as usize)) {
                    Ok(()) => return,
                    Err(error) => {
                        frame.truncate(start);
                        Err(error)
                    }
                }
            }
            Work::Write => self.write(request, offset, data),
            Work::Flush => disk.flush(),
            Work::Trim if !is_empty => disk.trim(offset, len).and_then(|()| self.made_durable(request)),
            Work::WriteZeroes { no_hole, fast } if !is_empty => {
                let zeroed = disk.write_zeroes(offset, len, no_hole, fast);
                zeroed.and_then(|()| self.made_durable(request))
            }
            Work::Cache if !is_empty => disk.cache(offset, len),
            Work::BlockStatus { one } => match self.status(request, one, frame) {
                Ok(()) => return,
                Err(error) => Err(error),
            },
            _ => Ok(()),
        };
        self.reply(request, done, frame);
    }

    fn reply(&self, request: &Request, done: Result<(), ErrorCode>, frame: &mut Frame) {
        let session = self.with.session;
        match done {
            Ok(()) => frame.push(|out| session.done(request, out)),
            Err(error) => frame.push(|out| session.failed(request, Refusal { error, text: "" }, out)),
        }
    }

    fn write(&self, request: &Request, offset: u64, data: &[u8]) -> Result<(), ErrorCode> {
        if !data.is_empty() {
            self.with.disk.write(offset, data)?;
        }
        self.made_durable(request)
    }

    fn made_durable(&self, request: &Request) -> Result<(), ErrorCode> {
        match request.flags & command_flag::FUA {
            0 => Ok(()),
            _ => self.with.disk.flush(),
        }
    }

    fn status(&self, request: &Request, one: bool, frame: &mut Frame) -> Result<(), ErrorCode> {
        let (session, start) = (self.with.session, frame.len());
        let most = if one { 1 } else { MAX_STATUS_EXTENTS };
        let contexts = session.contexts();
        for (at, context) in contexts.iter().enumerate() {
            let mut extents: Vec<Extent> = Vec::new();
            let range = (request.offset, request.len);
            if let Err(error) = self.with.disk.status(*context, range, most, &mut extents) {
                frame.truncate(start);
                return Err(error);
            }
            let is_last = at + 1 == contexts.len();
            frame.push(|out| session.status(request, (*context, extents), is_last, out));
        }
        Ok(())
    }

    fn may_have_holes(&self, request: &Request, whole: bool) -> bool {
        self.with.session.mode() != Mode::Simple && !whole && request.len > SHORT
    }

    /// Reads and sends piece after piece.
    fn read_in_pieces(&self, request: &Request, whole: bool, frame: &mut Frame) -> io::Result<()> {
        let (session, disk) = (self.with.session, self.with.disk);
        let is_simple = session.mode() == Mode::Simple;
        // A simple reply is one piece on the wire: nobody else may send before its end.
        let mut outgoing = is_simple.then(|| self.outgoing.lock().unwrap_or_else(PoisonError::into_inner));
        let end = request.offset + request.len;
        let mut at = request.offset;
        if let Some(outgoing) = &mut outgoing {
            frame.push(|out| session.data_head(request, (at, request.len), true, out));
            outgoing.write_all(frame.bytes())?;
            frame.clear();
        }
        let splits = self.may_have_holes(request, whole);
        while at < end {
            let most = (end - at).min(PIECE as u64);
            let run = if splits { next_run(disk, at, most) } else { Ok((most, false)) };
            let (start, is_last) = (frame.len(), |len| at + len == end);
            let piece = run.and_then(|(len, is_zero)| {
                if is_zero {
                    frame.push(|out| session.hole(request, (at, len as u32), is_last(len), out));
                    return Ok(len);
                }
                if !is_simple {
                    frame.push(|out| session.data_head(request, (at, len), is_last(len), out));
                }
                disk.read(at, frame.space(len as usize)).map(|()| len)
            });
            match (piece, &mut outgoing) {
                (Ok(len), _) => at += len,
                // The client counts on the bytes that the head has promised: only an end tells it.
                (Err(error), Some(_)) => {
                    return Err(io::Error::other(format!("error {} in the middle of a reply", error.0)));
                }
                (Err(error), None) => {
                    frame.truncate(start);
                    self.reply(request, Err(error), frame);
                    at = end;
                }
            }
            if frame.len() >= PIECE || at == end {
                match &mut outgoing {
                    Some(outgoing) => {
                        outgoing.write_all(frame.bytes())?;
                        frame.clear();
                    }
                    None => self.send(frame)?,
                }
            }
        }
        Ok(())
    }
}

/// A beginning of the range that is sent in one chunk: a hole, or data with what is too short to be one.
fn next_run(disk: &dyn Disk, at: u64, most: u64) -> Result<(u64, bool), ErrorCode> {
    let (mut total, is_zero) = disk.zero_run(at, most)?;
    if is_zero && total >= MIN_HOLE {
        return Ok((total, true));
    }
    while total < most {
        let (len, is_zero) = disk.zero_run(at + total, most - total)?;
        if is_zero && len >= MIN_HOLE {
            break;
        }
        total += len;
    }
    Ok((total, false))
}

/// Ends the connection if a thread panics: no other would get its turn.
struct Guard<'a, 'b, R: Read + Send, W: Write + Send>(&'a Connection<'b, R, W>);

impl<R: Read + Send, W: Write + Send> Drop for Guard<'_, '_, R, W> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.end(None);
        }
    }
}

fn drop_client(refusal: Refusal) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, refusal.text)
}

/// Requests whose replies are sent together, at most: the client works on them while the next ones run.
const BATCH: usize = 16;
/// Bytes of replies that are sent together, about.
const BATCH_BYTES: usize = 64 << 10;
/// The longest range that a thread reads or writes with the turn, in bytes.
const SHORT: u64 = 64 << 10;
/// Zeroes that are worth a chunk of their own, in bytes. Clients bound the chunks of a reply.
const MIN_HOLE: u64 = 4096;
/// Nanoseconds of a request above which it is worth its own thread: several times what passing the turn
/// costs.
const SLOW: u64 = 50_000;
/// How long an extra thread waits for work.
const IDLE: Duration = Duration::from_secs(2);
