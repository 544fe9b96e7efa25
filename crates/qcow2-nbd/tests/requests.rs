//! Replies of the transmission phase, against the state machine and over connections in memory.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a test may stop")]

use qcow2_nbd::blocking::{Connection, Failure, Job, Plain, Transfer};
use qcow2_nbd::client::{Event, Need, Requests, Violation};
use qcow2_nbd::proto::*;
use std::io::{Read, Write};
use std::thread;

fn chunk(cookie: u64, is_last: bool, mode: Mode, chunk: &Chunk<'_>) -> Vec<u8> {
    let (mut payload, mut bytes) = (Vec::new(), Vec::new());
    chunk.encode(&mut payload).unwrap();
    let offset = (mode == Mode::Extended).then_some(0);
    let (kind, len) = (chunk.kind(), payload.len() as u64);
    let flags = if is_last { chunk_flag::DONE } else { 0 };
    ReplyHead::Chunk { flags, kind, cookie, offset, len }.encode(&mut bytes).unwrap();
    bytes.extend(payload);
    bytes
}

/// Passes `bytes` to a client with one request under way; returns what it says, and the bytes of a read.
fn replies(command: Command, mode: Mode, bytes: &[u8]) -> Result<(Vec<Event>, Vec<u8>), Violation> {
    let mut requests = Requests::new(mode);
    let request = Request { command, flags: 0, cookie: 0, offset: 100, len: 4 };
    assert_eq!(requests.submit(request, &mut Vec::new()).unwrap(), 1);
    let (mut events, mut buf, mut rest) = (Vec::new(), vec![9; 4], bytes);
    loop {
        let event = match requests.need() {
            Need::Bytes(len) => {
                let Some((bytes, after)) = rest.split_at_checked(len) else { return Ok((events, buf)) };
                rest = after;
                assert!(len <= Requests::MOST);
                requests.receive(bytes)?
            }
            Need::Data { cookie: 1, start, len } => {
                let (start, len) = (start as usize, len as usize);
                let Some((bytes, after)) = rest.split_at_checked(len) else { return Ok((events, buf)) };
                rest = after;
                buf[start..start + len].copy_from_slice(bytes);
                requests.data_received()?
            }
            need => panic!("{need:?}"),
        };
        match event {
            Some(Event::Hole { start, len, .. }) => buf[start as usize..][..len as usize].fill(0),
            Some(event) => events.push(event),
            None => {}
        }
    }
}

fn read(mode: Mode, bytes: &[u8]) -> Result<(Option<ErrorCode>, Vec<u8>), String> {
    let (events, buf) = replies(Command::READ, mode, bytes).map_err(|violation| violation.to_string())?;
    match events[..] {
        [] => Ok((None, buf)),
        [Event::Done { error, cookie: 1 }] => Ok((Some(error), buf)),
        _ => panic!("{events:?}"),
    }
}

const CHUNKED: [Mode; 2] = [Mode::Structured, Mode::Extended];

#[test]
fn chunks_of_a_read_come_in_any_order() {
    for mode in CHUNKED {
        let bytes = [
            chunk(1, false, mode, &Chunk::Data { offset: 102, data: &[1, 2] }),
            chunk(1, true, mode, &Chunk::Hole { offset: 100, len: 2 }),
        ];
        assert_eq!(read(mode, &bytes.concat()), Ok((Some(ErrorCode::NONE), vec![0, 0, 1, 2])));
        let error = Chunk::Error { error: ErrorCode::IO, message: "no".into(), offset: Some(101) };
        let late = [bytes[0].clone(), chunk(1, false, mode, &error), chunk(1, true, mode, &Chunk::None)];
        assert_eq!(read(mode, &late.concat()), Ok((Some(ErrorCode::IO), vec![9, 9, 1, 2])));
        let zero = Chunk::Error { error: ErrorCode::NONE, message: "".into(), offset: None };
        assert_eq!(read(mode, &chunk(1, true, mode, &zero)).unwrap().0, Some(ErrorCode(1)));
    }
    let mut simple = Vec::new();
    ReplyHead::Simple { error: ErrorCode::NONE, cookie: 1 }.encode(&mut simple).unwrap();
    simple.extend([1, 2, 3, 4]);
    assert_eq!(read(Mode::Simple, &simple), Ok((Some(ErrorCode::NONE), vec![1, 2, 3, 4])));
    assert!(read(Mode::Structured, &simple).is_err() && read(Mode::Extended, &simple).is_err());
    let mut refused = Vec::new();
    ReplyHead::Simple { error: ErrorCode::INVALID, cookie: 1 }.encode(&mut refused).unwrap();
    assert_eq!(read(Mode::Structured, &refused), Ok((Some(ErrorCode::INVALID), vec![9; 4])));
}

#[test]
fn wrong_chunks_are_violations() {
    for mode in CHUNKED {
        let data = |offset, data: &'static [u8]| Chunk::Data { offset, data };
        let last = |payload: &Chunk<'_>| chunk(1, true, mode, payload);
        let extended = mode != Mode::Extended;
        let extents = vec![Extent { len: 4, flags: 0 }];
        for (text, bytes) in [
            ("gaps", last(&data(102, &[1, 2]))),
            ("gaps", last(&Chunk::None)),
            ("outside", last(&data(99, &[1, 2, 3, 4]))),
            ("outside", last(&data(102, &[1, 2, 3]))),
            ("outside", last(&data(u64::MAX, &[1]))),
            ("outside", last(&Chunk::Hole { offset: 100, len: u32::MAX })),
            ("twice", [chunk(1, false, mode, &data(100, &[1, 2])), last(&data(101, &[1, 2]))].concat()),
            ("does not fit", last(&data(100, &[]))),
            ("does not fit", last(&Chunk::Status { context: 0, extended, extents: extents.clone() })),
            ("does not fit", last(&Chunk::Other(ChunkKind(77), &[1]))),
            ("does not fit", last(&Chunk::Other(ChunkKind::ERROR, &[0; 5000]))),
            ("cookie", chunk(2, true, mode, &Chunk::None)),
            ("unknown magic", vec![0; 40]),
            ("without end", chunk(1, false, mode, &Chunk::None).repeat((1 << 16) + 1)),
        ] {
            let seen = read(mode, &bytes).unwrap_err();
            assert!(seen.contains(text), "{text}: {seen}");
        }
    }
    assert!(read(Mode::Structured, &chunk(1, true, Mode::Extended, &Chunk::None)).is_err());
    assert!(read(Mode::Extended, &chunk(1, true, Mode::Structured, &Chunk::None)).is_err());
    assert!(read(Mode::Simple, &chunk(1, true, Mode::Structured, &Chunk::None)).is_err());
}

#[test]
fn block_status_comes_in_bounded_parts() {
    for mode in CHUNKED {
        let extents: Vec<Extent> = (0..5000).map(|n| Extent { len: n, flags: n % 4 }).collect();
        let extended = mode == Mode::Extended;
        let status =
            |context, extents: &[Extent]| Chunk::Status { context, extended, extents: extents.to_vec() };
        let bytes =
            [chunk(1, false, mode, &status(5, &extents)), chunk(1, true, mode, &status(6, &extents[..1]))];
        let (events, _) = replies(Command::BLOCK_STATUS, mode, &bytes.concat()).unwrap();
        let mut seen = Vec::new();
        for event in &events[..events.len() - 1] {
            let Event::Status { context, extents, .. } = event else { panic!("{event:?}") };
            seen.extend(extents.iter().map(|extent| (*context, *extent)));
        }
        let expected = extents.iter().map(|extent| (5, *extent)).chain([(6, extents[0])]);
        assert!(seen.into_iter().eq(expected));
        assert!(matches!(events.last(), Some(Event::Done { error: ErrorCode::NONE, .. })));
        let one = |is_last| chunk(1, is_last, mode, &status(6, &extents[..1]));
        let violation = replies(Command::BLOCK_STATUS, mode, &[one(false), one(true)].concat()).unwrap_err();
        assert!(violation.to_string().contains("of one context twice"), "{violation}");
    }
}

/// Both ends of a connection.
fn pair() -> (std::os::unix::net::UnixStream, std::os::unix::net::UnixStream) {
    std::os::unix::net::UnixStream::pair().unwrap()
}

/// A server of zeroes and a counter of bytes written: replies come in another order than the requests, in
/// groups of `group`. It reads no request while it sends, like one with a single thread.
fn serve(mut socket: std::os::unix::net::UnixStream, group: usize) {
    let mut waiting = Vec::new();
    loop {
        let mut head = [0; 28];
        if socket.read_exact(&mut head).is_err() {
            return;
        }
        let (request, _) = Request::decode(&head, Mode::Structured).unwrap();
        let mut payload = vec![0; request.payload_len(Mode::Structured) as usize];
        socket.read_exact(&mut payload).unwrap();
        waiting.push(request);
        if waiting.len() < group {
            continue;
        }
        for request in waiting.drain(..).rev() {
            let bytes = match request.command {
                Command::READ if request.offset == 13 << 20 => {
                    let error = Chunk::Error { error: ErrorCode::IO, message: "bad".into(), offset: None };
                    chunk(request.cookie, true, Mode::Structured, &error)
                }
                Command::READ => {
                    let data: Vec<u8> = (0..request.len).map(|at| pattern(request.offset + at)).collect();
                    let (first, second) = data.split_at(data.len() / 2);
                    let middle = request.offset + first.len() as u64;
                    [
                        chunk(
                            request.cookie,
                            false,
                            Mode::Structured,
                            &Chunk::Data { offset: middle, data: second },
                        ),
                        chunk(
                            request.cookie,
                            true,
                            Mode::Structured,
                            &Chunk::Data { offset: request.offset, data: first },
                        ),
                    ]
                    .concat()
                }
                _ => chunk(request.cookie, true, Mode::Structured, &Chunk::None),
            };
            if socket.write_all(&bytes).is_err() {
                return;
            }
        }
    }
}

fn pattern(at: u64) -> u8 {
    (at.wrapping_mul(2_654_435_761) >> 13) as u8
}

#[test]
fn threads_share_a_connection() {
    let (ours, theirs) = pair();
    let server = thread::spawn(move || serve(theirs, 2));
    let incoming = Plain(ours.try_clone().unwrap());
    let connection = Connection::new(incoming, ours.try_clone().unwrap(), Mode::Structured);
    thread::scope(|scope| {
        for thread in 0..4u64 {
            let connection = &connection;
            scope.spawn(move || {
                for round in 0..12u64 {
                    let (base, piece) = ((thread * 100 + round) << 24, 200_000u64);
                    let mut buf = vec![0; 4 * piece as usize];
                    let mut jobs = Vec::new();
                    for (index, part) in buf.chunks_mut(piece as usize).enumerate() {
                        let offset = base + index as u64 * piece;
                        jobs.push(Job::new(Command::READ, offset, piece, Transfer::Receive(part)));
                    }
                    connection.run(&mut jobs).unwrap();
                    assert!(buf.iter().enumerate().all(|(at, byte)| *byte == pattern(base + at as u64)));
                    let payload = vec![1; 300_000];
                    let write = |at| Job::new(Command::WRITE, at, 300_000, Transfer::Send(&payload));
                    connection.run(&mut [write(0), write(300_000)]).unwrap();
                }
            });
        }
    });
    ours.shutdown(std::net::Shutdown::Both).unwrap();
    server.join().unwrap();
}

#[test]
fn errors_of_the_server_and_of_the_connection() {
    let (ours, theirs) = pair();
    let server = thread::spawn(move || serve(theirs, 1));
    let incoming = Plain(ours.try_clone().unwrap());
    let connection = Connection::new(incoming, ours.try_clone().unwrap(), Mode::Structured);
    let read = |offset| {
        let mut buf = [0; 64];
        connection.run(&mut [Job::new(Command::READ, offset, 64, Transfer::Receive(&mut buf))])
    };
    assert!(matches!(read(13 << 20), Err(Failure::Server(ErrorCode::IO))));
    assert!(read(0).is_ok(), "the connection goes on");
    ours.shutdown(std::net::Shutdown::Both).unwrap();
    assert!(matches!(read(0), Err(Failure::Lost(_))));
    assert!(matches!(read(0), Err(Failure::Lost(_))));
    server.join().unwrap();
}
