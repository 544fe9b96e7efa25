//! Our client and our server on a pair of sockets: every mode, lengths around all limits, requests in
//! parallel, and clients that misbehave.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a test may stop")]

mod common;

use common::Memory;
use qcow2_nbd::blocking::server::{BUFFER, Crew, Negotiated, PIECE, Transmission, transmit};
use qcow2_nbd::blocking::{Connection, Failure, Job, Plain, Transfer};
use qcow2_nbd::client::{Negotiation, Step};
use qcow2_nbd::proto::*;
use qcow2_nbd::server::*;
use qcow2_nbd::tls;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

type Client = Connection<Plain<UnixStream>, UnixStream>;

fn facts(size: usize) -> Facts {
    use transmission_flag::*;
    let flags =
        HAS_FLAGS | SEND_FLUSH | SEND_FUA | SEND_TRIM | SEND_WRITE_ZEROES | SEND_CACHE | SEND_FAST_ZERO;
    let mut facts = Facts::new("disk", size as u64, flags);
    facts.contexts = vec!["base:allocation".to_owned(), "qemu:allocation-depth".to_owned()];
    facts
}

/// Serves `disk` to `stream` until the client has left.
fn serve(mut stream: &UnixStream, disk: &Memory, size: usize, crew: &Crew) {
    let offer = Arc::new(Offer::new(vec![Arc::new(facts(size))]));
    let negotiated = qcow2_nbd::blocking::server::negotiate(&mut stream, offer);
    if let Ok(Negotiated::Session(session)) = negotiated {
        let with = Transmission { session: &session, disk, crew };
        let _ = transmit(stream, stream, with);
    }
}

/// What a client asks for that wants this mode.
fn wanted_in(mode: Mode) -> Negotiation {
    let mut wanted = Negotiation::with_export("disk");
    wanted.extended = mode == Mode::Extended;
    wanted.structured = mode != Mode::Simple;
    wanted
}

/// Calls `work` with a client of `disk`.
fn with_client(disk: &Memory, size: usize, mode: Mode, work: impl FnOnce(&Client)) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let crew = Crew::new(8);
    std::thread::scope(|scope| {
        scope.spawn(|| serve(&ours, disk, size, &crew));
        let wanted = wanted_in(mode);
        let Step::Ready(export) = qcow2_nbd::blocking::negotiate(&mut theirs, wanted).unwrap() else {
            panic!("no export")
        };
        assert_eq!((export.size, export.mode), (size as u64, mode));
        let client = Connection::new(Plain(theirs.try_clone().unwrap()), theirs, export.mode);
        work(&client);
        client.disconnect();
    });
}

const MODES: [Mode; 3] = [Mode::Simple, Mode::Structured, Mode::Extended];

fn read(client: &Client, offset: usize, buf: &mut [u8]) -> Result<(), ErrorCode> {
    let (offset, len) = (offset as u64, buf.len() as u64);
    code(client.run(&mut [Job::new(Command::READ, offset, len, Transfer::Receive(buf))]))
}

fn write(client: &Client, offset: usize, data: &[u8], flags: u16) -> Result<(), ErrorCode> {
    let (offset, len) = (offset as u64, data.len() as u64);
    let job = Job::new(Command::WRITE, offset, len, Transfer::Send(data)).with_flags(flags);
    code(client.run(&mut [job]))
}

fn command(client: &Client, command: Command, flags: u16, range: (u64, u64)) -> Result<(), ErrorCode> {
    let job = Job::new(command, range.0, range.1, Transfer::None).with_flags(flags);
    code(client.run(&mut [job]))
}

#[track_caller]
fn code(result: Result<(), Failure>) -> Result<(), ErrorCode> {
    match result {
        Err(Failure::Server(code)) => Err(code),
        result => {
            result.unwrap();
            Ok(())
        }
    }
}

#[test]
fn what_was_written_is_read_in_every_mode_and_length() {
    let size = 3 * PIECE;
    let lengths =
        [1, 511, 4096, 64 << 10, (64 << 10) + 1, BUFFER - 28, BUFFER, BUFFER + 1, PIECE, PIECE + 1, size - 9];
    for mode in MODES {
        let disk = Memory::new(size);
        with_client(&disk, size, mode, |client| {
            for (number, len) in lengths.into_iter().enumerate() {
                let offset = (number * 7) % (size - len).max(1);
                let data: Vec<u8> = (0..len).map(|at| ((at * 31 + number) % 0xe0) as u8 + 1).collect();
                write(client, offset, &data, 0).unwrap();
                let mut back = vec![0x5a; len];
                read(client, offset, &mut back).unwrap();
                assert!(back == data, "{mode:?}: {len} bytes at {offset}");
            }
            // Zeroes between, as holes of a long read where the mode has them.
            command(client, Command::WRITE_ZEROES, 0, (100_000, 300_000)).unwrap();
            command(client, Command::TRIM, 0, (500_000, 100_000)).unwrap();
            let mut back = vec![0x5a; size];
            read(client, 0, &mut back).unwrap();
            assert!(back[100_000..400_000].iter().all(|byte| *byte == 0), "{mode:?}");
            assert!(back[99_000..100_000].iter().any(|byte| *byte != 0), "{mode:?}");
            command(client, Command::CACHE, 0, (0, size as u64)).unwrap();
            command(client, Command::FLUSH, 0, (0, 0)).unwrap();
            assert_eq!(disk.flushes.load(Ordering::SeqCst), 1);
            write(client, 0, &[1], command_flag::FUA).unwrap();
            assert_eq!(disk.flushes.load(Ordering::SeqCst), 2);
            let fast = command(client, Command::WRITE_ZEROES, command_flag::FAST_ZERO, (0, 1));
            assert_eq!(fast, Err(ErrorCode::NOT_SUPPORTED));
        });
    }
}

#[test]
fn an_error_is_that_of_its_request_and_the_connection_goes_on() {
    let size = 4 * PIECE;
    for mode in MODES {
        let disk = Memory::new(size);
        with_client(&disk, size, mode, |client| {
            write(client, 4096, &[0xee], 0).unwrap();
            let mut buf = [0; 16];
            assert_eq!(read(client, 4096, &mut buf), Err(ErrorCode::IO), "{mode:?}");
            assert_eq!(write(client, 4096, &[1, 2], 0), Err(ErrorCode::IO), "{mode:?}");
            read(client, 4095, &mut buf).unwrap();
            // A payload whose request is refused is not taken for requests.
            assert_eq!(write(client, size - 1, &[1; 70_000], 0), Err(ErrorCode::NO_SPACE), "{mode:?}");
            // An early piece fails: the rest is taken and thrown away.
            assert_eq!(write(client, 4096, &vec![3; PIECE + 5], 0), Err(ErrorCode::IO), "{mode:?}");
            read(client, 0, &mut buf).unwrap();
            if mode != Mode::Simple {
                // A late piece of a read fails, after others were sent.
                write(client, 4096, &[0xee], 0).unwrap_err();
                write(client, PIECE * 2, &[0xee], 0).unwrap();
                let mut long = vec![0; PIECE * 3 - 8192];
                assert_eq!(read(client, 8192, &mut long), Err(ErrorCode::IO), "{mode:?}");
                read(client, 0, &mut buf).unwrap();
            }
        });
    }
}

#[test]
fn block_status_of_each_context() {
    let disk = Memory::new(65536);
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let crew = Crew::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| serve(&ours, &disk, 65536, &crew));
        let mut wanted = Negotiation::with_export("disk");
        wanted.contexts = vec!["qemu:allocation-depth".to_owned()];
        let step = qcow2_nbd::blocking::negotiate(&mut theirs, wanted).unwrap();
        let Step::Ready(export) = step else { panic!("no export") };
        let client = Connection::new(Plain(theirs.try_clone().unwrap()), theirs, export.mode);
        write(&client, 100, &[1; 50], 0).unwrap();
        let mut extents = Vec::new();
        let job = Job::new(Command::BLOCK_STATUS, 10, 300, Transfer::Status(&mut extents));
        client.run(&mut [job]).unwrap();
        let extent = |len, flags| (1, Extent { len, flags });
        assert_eq!(extents, [extent(90, 2), extent(50, 1), extent(160, 2)]);
        let job = Job::new(Command::BLOCK_STATUS, 10, 300, Transfer::Status(&mut extents));
        client.run(&mut [job.with_flags(command_flag::REQ_ONE)]).unwrap();
        assert_eq!(extents, [extent(90, 2)]);
        client.disconnect();
    });
}

/// The first requests are carried out one by one: nobody knows yet that the disk is slow.
#[test]
fn requests_to_a_slow_disk_run_in_parallel() {
    let size = 1 << 20;
    let mut disk = Memory::new(size);
    (disk.delay, disk.meets_from) = (Duration::from_millis(2), 8);
    with_client(&disk, size, Mode::Structured, |client| {
        let mut buffers = vec![[0; 512]; 64];
        let jobs = buffers.iter_mut().enumerate();
        let mut jobs: Vec<_> = jobs
            .map(|(at, buf)| Job::new(Command::READ, at as u64 * 512, 512, Transfer::Receive(buf)))
            .collect();
        client.run(&mut jobs).unwrap();
    });
    assert!(disk.most.load(Ordering::SeqCst) > 1, "one request at a time");
}

fn tls_ends() -> (tls::Client, tls::Server) {
    let pem = |name: &str| {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tls");
        std::fs::read(folder.join(format!("{name}.pem"))).unwrap()
    };
    let mut credentials = tls::Credentials::new(pem("ca-cert"));
    credentials.verify_peer = false;
    let client = tls::Client::new(&credentials).unwrap();
    credentials.identity = Some(tls::Identity { certificate: pem("server-cert"), key: pem("server-key") });
    (client, tls::Server::new(&credentials).unwrap())
}

struct Both<R, W>(R, W);

impl<R: Read, W> Read for Both<R, W> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(buf)
    }
}

impl<R, W: Write> Write for Both<R, W> {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        self.1.write(buf)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.1.flush()
    }
}

/// Several requests of one encrypted connection are under way at once, and each gets its own bytes.
#[test]
fn requests_run_in_parallel_over_tls() {
    let size = 1 << 20;
    let mut disk = Memory::new(size);
    (disk.delay, disk.meets_from) = (Duration::from_millis(2), 8);
    let (client, server) = tls_ends();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let crew = Crew::new(8);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (incoming, outgoing) = server.handshake(&ours, &ours).unwrap();
            let mut both = Both(incoming, outgoing);
            let offer = Arc::new(Offer::new(vec![Arc::new(facts(size))]));
            let negotiated = qcow2_nbd::blocking::server::negotiate(&mut both, offer).unwrap();
            let Negotiated::Session(session) = negotiated else { panic!("no session") };
            let with = Transmission { session: &session, disk: &disk, crew: &crew };
            let _ = transmit(both.0, both.1, with);
        });
        let (incoming, outgoing) = (theirs.try_clone().unwrap(), theirs.try_clone().unwrap());
        let (incoming, outgoing) = client.handshake(None, Plain(incoming), outgoing).unwrap();
        let mut both = Both(incoming, outgoing);
        qcow2_nbd::blocking::negotiate(&mut both, wanted_in(Mode::Structured)).unwrap();
        let client = Connection::new(both.0, both.1, Mode::Structured);
        let data: Vec<u8> = (0..64u8).flat_map(|number| [number + 1; 512]).collect();
        let job = Job::new(Command::WRITE, 0, data.len() as u64, Transfer::Send(&data));
        client.run(&mut [job]).unwrap();
        let mut buffers = vec![[0; 512]; 64];
        let jobs = buffers.iter_mut().enumerate();
        let mut jobs: Vec<_> = jobs
            .map(|(at, buf)| Job::new(Command::READ, at as u64 * 512, 512, Transfer::Receive(buf)))
            .collect();
        client.run(&mut jobs).unwrap();
        drop(jobs);
        assert!(buffers.concat() == data);
        client.disconnect();
    });
    assert!(disk.most.load(Ordering::SeqCst) > 1, "one request at a time");
}

/// Requests for which the client never takes a reply stop the server's reading, not its memory's limits; and
/// closing the socket ends it.
#[test]
fn a_client_that_never_reads_is_not_read_from_for_ever() {
    let size = 4 << 20;
    let disk = Memory::new(size);
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let crew = Crew::new(4);
    std::thread::scope(|scope| {
        let server = scope.spawn(|| serve(&ours, &disk, size, &crew));
        let wanted = wanted_in(Mode::Simple);
        qcow2_nbd::blocking::negotiate(&mut theirs, wanted).unwrap();
        let mut request = Vec::new();
        let (command, flags, cookie) = (Command::READ, 0, 1);
        Request { command, flags, cookie, offset: 0, len: 60 << 10 }
            .encode(Mode::Simple, &mut request)
            .unwrap();
        theirs.set_nonblocking(true).unwrap();
        // Until the socket takes no more: the server does not read on.
        let mut sent = 0;
        let mut pauses = 0;
        while pauses < 20 {
            match theirs.write(&request) {
                Ok(len) if len == request.len() => (sent, pauses) = (sent + 1, 0),
                _ => {
                    pauses += 1;
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
            assert!(sent < 1_000_000, "requests without end are taken");
        }
        drop(theirs);
        server.join().unwrap();
    });
}

/// A client may look at a reply before it sends the rest of its next request.
#[test]
fn replies_do_not_wait_for_the_payload_of_the_next_request() {
    let disk = Memory::new(65536);
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let crew = Crew::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| serve(&ours, &disk, 65536, &crew));
        qcow2_nbd::blocking::negotiate(&mut theirs, wanted_in(Mode::Simple)).unwrap();
        let mut bytes = Vec::new();
        for (command, cookie) in [(Command::READ, 1), (Command::WRITE, 2)] {
            let request = Request { command, flags: 0, cookie, offset: 0, len: 512 };
            request.encode(Mode::Simple, &mut bytes).unwrap();
        }
        // One packet: the server has both heads when it works on the first.
        theirs.write_all(&bytes).unwrap();
        // Only for a server that waits for ever.
        theirs.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let read = theirs.read_exact(&mut [0; 16 + 512]);
        let rest = read.and_then(|()| theirs.write_all(&[1; 512]));
        let written = rest.and_then(|()| theirs.read_exact(&mut [0; 16]));
        theirs.shutdown(std::net::Shutdown::Both).unwrap();
        written.unwrap();
    });
}

#[test]
fn a_client_that_leaves_in_the_middle_ends_its_server() {
    for cut in [0, 1, 27, 28, 29, 4000] {
        let disk = Memory::new(65536);
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let crew = Crew::new(4);
        std::thread::scope(|scope| {
            let server = scope.spawn(|| serve(&ours, &disk, 65536, &crew));
            let wanted = wanted_in(Mode::Simple);
            qcow2_nbd::blocking::negotiate(&mut theirs, wanted).unwrap();
            let mut request = Vec::new();
            let (command, flags, cookie) = (Command::WRITE, 0, 1);
            Request { command, flags, cookie, offset: 0, len: 8192 }
                .encode(Mode::Simple, &mut request)
                .unwrap();
            request.resize(28 + 8192, 1);
            theirs.write_all(&request[..cut]).unwrap();
            theirs.shutdown(std::net::Shutdown::Write).unwrap();
            server.join().unwrap();
            ours.shutdown(std::net::Shutdown::Both).unwrap();
            assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
        });
    }
}
