//! Clients of the server: the bytes of a whole connection, judged by the replies and by what the disk holds.
//!
//! The server runs on one thread, so the replies come in the order of the requests. They are read by the
//! client's own state machine. What is demanded of them follows from the requests alone: which must succeed,
//! which may, where the connection ends; a read returns what the writes before it that were acknowledged have
//! left, and at the end the disk is what they make of it.

mod answered;
mod conversation;
mod disk;
mod greeted;

use disk::Recorded;
use qcow2_nbd::blocking::server::{Crew, Negotiated, PIECE, Transmission, negotiate, transmit};
use qcow2_nbd::proto::transmission_flag::{
    HAS_FLAGS, READ_ONLY, SEND_CACHE, SEND_FAST_ZERO, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES,
};
use qcow2_nbd::server::{Facts, Offer};
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes that the server reads or sends with one call, at most: two pieces, and heads.
const MOST_AT_ONCE: usize = 2 * PIECE + (64 << 10);

/// Takes the bytes as all that a client ever sends. One input in two, by its first byte, is a handshake with
/// requests whose kinds, ranges and faults are drawn from the bytes.
pub fn nbd_requests(data: &[u8]) {
    let Some((&choice, rest)) = data.split_first() else { return };
    let is_drawn = choice & 1 == 1;
    // Of bytes as they are the number of requests has no bound but their length.
    let size = if is_drawn && choice & 2 != 0 { 2 * PIECE + 300_000 } else { 64 << 10 };
    let offer = Arc::new(offer(size as u64, choice & 4 != 0));
    let sent = if is_drawn { conversation::draw(choice, size as u64, rest) } else { rest.to_vec() };
    let most = AtomicUsize::new(0);
    let mut pipe = Pipe { input: &sent, output: Vec::new(), most: &most };
    let negotiated = negotiate(&mut pipe, Arc::clone(&offer)).expect("the pipe does not fail");
    let (mut input, mut output) = (&*sent, &*pipe.output);
    let agreed = greeted::follow(&offer, &mut input, &mut output);
    assert!(output.is_empty(), "{} bytes that belong to no reply", output.len());
    let Negotiated::Session(session) = negotiated else {
        assert_eq!(agreed, None, "an export was agreed on: {negotiated:?}");
        return;
    };
    assert_eq!(input, pipe.input, "the handshake takes its own bytes, and no others");
    let seen = (session.export(), session.mode(), session.contexts().to_vec());
    assert_eq!(agreed.as_ref(), Some(&seen));
    let disk = Recorded::new(session.facts().size);
    let with = Transmission { session: &session, disk: &disk, crew: &Crew::new(0) };
    let mut incoming = Pipe { input, output: Vec::new(), most: &most };
    let mut outgoing = Pipe { input: &[], output: Vec::new(), most: &most };
    let ended = transmit(&mut incoming, &mut outgoing, with);
    answered::check(&session, &disk, (input, &outgoing.output), &ended);
    let most = most.load(Ordering::Relaxed);
    assert!(most <= MOST_AT_ONCE, "{most} bytes at once");
}

/// An export that has everything, and one that has nothing. `is_narrow`: payloads are short.
fn offer(size: u64, is_narrow: bool) -> Offer {
    let all = HAS_FLAGS | SEND_FLUSH | SEND_FUA | SEND_TRIM | SEND_WRITE_ZEROES | SEND_CACHE | SEND_FAST_ZERO;
    let mut disk = Facts::new("disk", size, all);
    disk.description = "a disk".to_owned();
    disk.contexts = disk::CONTEXTS.map(str::to_owned).to_vec();
    if is_narrow {
        disk.sizes.maximum = 32 << 10;
    }
    Offer::new(vec![Arc::new(disk), Arc::new(Facts::new("", 4096, HAS_FLAGS | READ_ONLY))])
}

/// Bytes of a client, and what it gets.
struct Pipe<'a> {
    input: &'a [u8],
    output: Vec<u8>,
    /// The most bytes of one call.
    most: &'a AtomicUsize,
}

impl Read for Pipe<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.most.fetch_max(buf.len(), Ordering::Relaxed);
        self.input.read(buf)
    }
}

impl Write for Pipe<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.most.fetch_max(buf.len(), Ordering::Relaxed);
        self.output.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
