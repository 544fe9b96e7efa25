//! The transmission phase: the reply of each request, and what it has done to the disk.

use super::disk::{Model, Recorded, flags_of, is_bad};
use qcow2_nbd::blocking::server::PIECE;
use qcow2_nbd::client::{Event, Need, Requests};
use qcow2_nbd::proto::{
    Command, DEFAULT_MAX_PAYLOAD, ErrorCode, Extent, Mode, ReplyHead, Request, command_flag,
    transmission_flag,
};
use qcow2_nbd::server::{MAX_STATUS_EXTENTS, Session};
use std::io;
use std::sync::atomic::Ordering;

/// What a client hears of a request.
struct Reply {
    error: ErrorCode,
    data: Vec<u8>,
    /// Of each meta context.
    extents: Vec<(u32, Vec<Extent>)>,
}

/// Compares the requests in `input` with the replies in `output`, with `disk` and with how the connection
/// `ended`.
pub(super) fn check(
    session: &Session,
    disk: &Recorded,
    (mut input, mut output): (&[u8], &[u8]),
    ended: &io::Result<()>,
) {
    let (mode, size) = (session.mode(), session.facts().size);
    let most = u64::from(session.facts().sizes.maximum.min(DEFAULT_MAX_PAYLOAD));
    let (mut model, mut flushes) = (Model::new(size), 0);
    let is_in_order = loop {
        let Ok((request, len)) = Request::decode(input, mode) else { break input.is_empty() };
        input = &input[len..];
        let payload = match request.command {
            Command::WRITE => request.len,
            _ => request.payload_len(mode),
        };
        if payload > most {
            break false;
        }
        if request.command == Command::DISCONNECT {
            break true;
        }
        let Some((payload, rest)) = input.split_at_checked(payload as usize) else {
            if may_succeed(session, &request) {
                model.fail(&request);
            }
            break false;
        };
        input = rest;
        let is_cut = mode == Mode::Simple && request.len > PIECE as u64 && is_bad_for(session, &request);
        let Some(reply) = read_reply(mode, &request, &mut output) else {
            assert!(is_cut, "{request:?} has no reply");
            output = &[];
            break false;
        };
        compare(session, &request, &reply, &model);
        let is_done = reply.error == ErrorCode::NONE;
        let changes = [Command::WRITE, Command::TRIM, Command::WRITE_ZEROES].contains(&request.command);
        if is_done && changes {
            model.change(&request, payload);
        } else if changes && is_inside(size, &request) {
            model.fail(&request);
        }
        let is_durable = changes && request.len > 0 && request.flags & command_flag::FUA != 0;
        flushes += u64::from(is_done && (is_durable || request.command == Command::FLUSH));
    };
    assert!(output.is_empty(), "{} bytes that belong to no reply", output.len());
    assert_eq!(ended.is_ok(), is_in_order, "{ended:?}");
    assert!(disk.flushes.load(Ordering::Relaxed) >= flushes, "{flushes} flushes were acknowledged");
    model.compare(0, &disk.to_vec());
}

fn is_inside(size: u64, request: &Request) -> bool {
    request.offset.checked_add(request.len).is_some_and(|end| end <= size)
}

fn is_bad_for(session: &Session, request: &Request) -> bool {
    is_bad(session.facts().size, request.offset, request.len)
}

/// True if the protocol and the export allow the request.
fn may_succeed(session: &Session, request: &Request) -> bool {
    let facts = session.facts();
    let is_inside = is_inside(facts.size, request);
    let has = |flag: u16| facts.flags & flag != 0;
    let may_change = is_inside && !has(transmission_flag::READ_ONLY);
    match request.command {
        Command::READ => is_inside && request.len <= u64::from(facts.sizes.maximum),
        Command::WRITE => may_change,
        Command::FLUSH => true,
        Command::TRIM => may_change && has(transmission_flag::SEND_TRIM),
        Command::WRITE_ZEROES => may_change && has(transmission_flag::SEND_WRITE_ZEROES),
        Command::CACHE => is_inside && has(transmission_flag::SEND_CACHE),
        Command::BLOCK_STATUS => is_inside && request.len > 0 && !session.contexts().is_empty(),
        _ => false,
    }
}

fn compare(session: &Session, request: &Request, reply: &Reply, model: &Model) {
    let is_failing = is_bad_for(session, request) && request.command != Command::FLUSH;
    let may = may_succeed(session, request) && !is_failing;
    let is_done = reply.error == ErrorCode::NONE;
    assert!(may || !is_done, "{request:?} succeeds");
    let payload = if session.mode() == Mode::Extended && request.command == Command::WRITE {
        command_flag::PAYLOAD_LEN
    } else {
        0
    };
    let is_plain = request.flags & !(command_flag::FUA | payload) == 0;
    assert!(is_done || !(may && is_plain), "{request:?} fails: {:?}", reply.error);
    if !is_done {
        return;
    }
    match request.command {
        Command::READ => model.compare(request.offset, &reply.data),
        Command::BLOCK_STATUS => {
            let told: Vec<u32> = reply.extents.iter().map(|(context, _)| *context).collect();
            assert_eq!(told, session.contexts());
            for (context, extents) in &reply.extents {
                compare_extents(request, *context, extents, model);
            }
        }
        _ => assert!(reply.extents.is_empty()),
    }
}

fn compare_extents(request: &Request, context: u32, extents: &[Extent], model: &Model) {
    let is_one = request.flags & command_flag::REQ_ONE != 0;
    let most = if is_one { 1 } else { MAX_STATUS_EXTENTS };
    assert!((1..=most).contains(&extents.len()), "{} extents", extents.len());
    let mut bytes = model.bytes(request);
    for extent in extents {
        let parted = bytes.split_at_checked(extent.len as usize);
        let (part, rest) = parted.expect("extents end inside the request");
        assert!(!part.is_empty() && part.iter().all(|byte| flags_of(context, *byte) == extent.flags));
        bytes = rest;
    }
    assert!(bytes.is_empty() || extents.len() == most, "{} bytes without status", bytes.len());
}

/// Takes the reply of `request` off `output`. `None` if it is not there, or is cut short.
fn read_reply(mode: Mode, request: &Request, output: &mut &[u8]) -> Option<Reply> {
    let (mut client, mut sent) = (Requests::new(mode), Vec::new());
    let cookie = client.submit(*request, &mut sent).expect("a length that was read can be sent");
    let is_read = request.command == Command::READ;
    // A read that is longer than the disk is refused.
    let mut data = Vec::new();
    let mut extents: Vec<(u32, Vec<Extent>)> = Vec::new();
    loop {
        let mut part = Vec::new();
        let (head, len) = ReplyHead::decode(output).ok()?;
        assert_eq!(head.cookie(), request.cookie, "the reply of another request");
        let payload = match head {
            ReplyHead::Chunk { len, .. } => len,
            ReplyHead::Simple { error: ErrorCode::NONE, .. } if is_read => request.len,
            ReplyHead::Simple { .. } => 0,
        };
        let payload = output[len..].get(..usize::try_from(payload).ok()?)?;
        // The client has cookies of its own.
        let named = match head {
            ReplyHead::Chunk { flags, kind, offset, len, .. } => {
                assert!(offset.is_none_or(|offset| offset == request.offset), "{head:?}");
                ReplyHead::Chunk { flags, kind, cookie, offset, len }
            }
            ReplyHead::Simple { error, .. } => ReplyHead::Simple { error, cookie },
        };
        named.encode(&mut part).expect("a head that was read");
        part.extend_from_slice(payload);
        *output = &output[len + payload.len()..];
        let mut rest = &*part;
        while let Some(event) = next(&mut client, &mut rest, request.len, &mut data) {
            match event {
                Event::Hole { start, len, .. } => {
                    data.resize(request.len as usize, 0x5a);
                    data[start as usize..(start + len) as usize].fill(0);
                }
                Event::Status { context, extents: more, .. } => match extents.last_mut() {
                    Some((last, told)) if *last == context => told.extend(more),
                    _ => extents.push((context, more)),
                },
                Event::Done { error, .. } => {
                    assert!(rest.is_empty(), "{} bytes behind the last chunk", rest.len());
                    return Some(Reply { error, data, extents });
                }
            }
        }
        assert!(rest.is_empty(), "a chunk of another length than its payload has");
    }
}

/// Passes bytes on to the client until it tells something, or wants more than there are.
fn next(client: &mut Requests, rest: &mut &[u8], total: u64, data: &mut Vec<u8>) -> Option<Event> {
    loop {
        let (len, place) = match client.need() {
            Need::Bytes(len) => (len, None),
            Need::Data { start, len, .. } => (len as usize, Some(start as usize)),
        };
        let (bytes, left) = rest.split_at_checked(len)?;
        *rest = left;
        let event = match place {
            None => client.receive(bytes),
            Some(start) => {
                data.resize(total as usize, 0x5a);
                data[start..start + len].copy_from_slice(bytes);
                client.data_received()
            }
        };
        if let Some(event) = event.expect("a reply by the protocol") {
            return Some(event);
        }
    }
}
