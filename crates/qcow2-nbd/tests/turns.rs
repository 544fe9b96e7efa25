//! A server that takes no more requests before it is rid of its replies, as one without threads is.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test may stop")]

use qcow2_nbd::blocking::{Connection, Job, Plain, Transfer};
use qcow2_nbd::proto::*;
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::sync::mpsc::channel;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

/// Bytes of a request's head.
const HEAD: usize = 28;
/// More than goes into one piece with its head.
const LONG: usize = 64 << 10;

#[derive(Default)]
struct Link {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Replies on their way.
    replies: VecDeque<u8>,
    /// The head of the request that the server is reading, and how much of its payload is missing.
    head: Vec<u8>,
    missing: usize,
    /// How many requests there were.
    requests: usize,
    /// Somebody waits to send a payload.
    stuck: bool,
    /// The first reply is held back until somebody is stuck.
    holds_first: bool,
}

/// What a client sends.
struct Sender(Arc<Link>);

impl Write for Sender {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.0.state.lock().unwrap();
        if state.missing > 0 {
            // The payload of a write: not before all replies have been read.
            state.stuck = true;
            self.0.changed.notify_all();
            while !state.replies.is_empty() {
                state = self.0.changed.wait(state).unwrap();
            }
            let taken = bytes.len().min(state.missing);
            state.missing -= taken;
            if state.missing == 0 {
                reply(&mut state, 0);
            }
            self.0.changed.notify_all();
            return Ok(taken);
        }
        let taken = bytes.len().min(HEAD - state.head.len());
        state.head.extend_from_slice(&bytes[..taken]);
        if state.head.len() == HEAD {
            state.requests += 1;
            let len = u32::from_be_bytes(state.head[24..28].try_into().unwrap()) as usize;
            match state.head[6..8] {
                [0, 0] => reply(&mut state, len),
                _ => state.missing = len,
            }
            self.0.changed.notify_all();
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A simple reply with `len` bytes of data to the request whose head was read.
fn reply(state: &mut State, len: usize) {
    state.replies.extend(0x6744_6698_u32.to_be_bytes());
    state.replies.extend([0; 4]);
    state.replies.extend(&state.head[8..16]);
    state.replies.extend(std::iter::repeat_n(7, len));
    state.head.clear();
}

/// What a client receives.
struct Receiver(Arc<Link>);

impl Read for Receiver {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let mut state = self.0.state.lock().unwrap();
        while state.replies.is_empty() || (state.holds_first && !state.stuck) {
            state = self.0.changed.wait(state).unwrap();
        }
        // A reply and its byte at a time, so that the second one is still there after the first.
        let len = buf.len().min(17).min(state.replies.len());
        buf.iter_mut().zip(state.replies.drain(..len)).for_each(|(to, from)| *to = from);
        self.0.changed.notify_all();
        Ok(len)
    }
}

/// Runs `run` on threads of their own, as a test that hangs could not fail; all of it must end.
fn must_end(jobs: Vec<Box<dyn FnOnce() + Send>>) {
    let (done, ends) = channel();
    let count = jobs.len();
    for job in jobs {
        let done = done.clone();
        thread::spawn(move || {
            job();
            let _ = done.send(());
        });
    }
    for _ in 0..count {
        ends.recv_timeout(Duration::from_secs(60)).expect("a call that waits for itself");
    }
}

#[test]
fn a_call_that_is_owed_replies_reads_them_while_another_one_sends() {
    let link = Arc::new(Link::default());
    link.state.lock().unwrap().holds_first = true;
    let connection = Connection::new(Plain(Receiver(link.clone())), Sender(link.clone()), Mode::Simple);
    let connection = Arc::new(connection.with_window(2));
    let (reader, writer) = (connection.clone(), connection);
    let reads = move || {
        let mut bytes = [[0; 1]; 3];
        let mut jobs: Vec<_> =
            bytes.iter_mut().map(|byte| Job::new(Command::READ, 0, 1, Transfer::Receive(byte))).collect();
        reader.run(&mut jobs).unwrap();
        assert_eq!(bytes, [[7]; 3]);
    };
    let writes = move || {
        let mut state = link.state.lock().unwrap();
        while state.requests < 2 {
            state = link.changed.wait(state).unwrap();
        }
        drop(state);
        let payload = vec![1; LONG];
        writer.run(&mut [Job::new(Command::WRITE, 0, LONG as u64, Transfer::Send(&payload))]).unwrap();
    };
    must_end(vec![Box::new(reads), Box::new(writes)]);
}

#[test]
fn a_call_that_is_owed_bytes_reads_them_before_it_sends_many() {
    let link = Arc::new(Link::default());
    let connection = Connection::new(Plain(Receiver(link.clone())), Sender(link), Mode::Simple);
    let both = move || {
        let (mut byte, payload) = ([0; 1], vec![1; LONG]);
        let read = Job::new(Command::READ, 0, 1, Transfer::Receive(&mut byte));
        let write = Job::new(Command::WRITE, 0, LONG as u64, Transfer::Send(&payload));
        connection.run(&mut [read, write]).unwrap();
        assert_eq!(byte, [7]);
    };
    must_end(vec![Box::new(both)]);
}
