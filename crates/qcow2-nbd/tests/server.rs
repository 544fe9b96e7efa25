//! The server: every option's answer as a table, every request's verdict, and bytes of any kind.
#![allow(clippy::unwrap_used, reason = "a test may stop")]

mod common;

use common::{Memory, offer};
use qcow2_nbd::blocking::server::{Crew, Negotiated, Transmission, negotiate, transmit};
use qcow2_nbd::proto::*;
use qcow2_nbd::server::*;
use std::io::{self, Read, Write};
use std::sync::Arc;

const FIXED: u32 = 3;

/// Bytes of a client, and what the server answers.
struct Pipe<'a> {
    input: &'a [u8],
    output: Vec<u8>,
}

impl Read for Pipe<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.input.read(buf)
    }
}

impl Write for Pipe<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.output.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Runs a whole connection on the client's `bytes`; returns what the server sends.
fn answer(offer: Offer, bytes: &[u8]) -> Vec<u8> {
    let mut pipe = Pipe { input: bytes, output: Vec::new() };
    if let Ok(Negotiated::Session(session)) = negotiate(&mut pipe, Arc::new(offer)) {
        let (disk, crew) = (Memory::new(session.facts().size as usize), Crew::new(0));
        let with = Transmission { session: &session, disk: &disk, crew: &crew };
        let _ = transmit(pipe.input, &mut pipe.output, with);
    }
    pipe.output
}

/// Sends `options` and returns the replies: of each the option, its kind, and its data as text.
fn replies(offer: Offer, options: &[OptionRequest]) -> Vec<(u32, ReplyKind, String)> {
    let mut bytes = FIXED.to_be_bytes().to_vec();
    options.iter().for_each(|option| option.encode(&mut bytes));
    let output = answer(offer, &bytes);
    let mut rest = &output[Greeting::decode(&output).unwrap().1..];
    let mut replies = Vec::new();
    while !rest.is_empty() {
        let (head, len) = OptionReplyHead::decode(rest).unwrap();
        let data = &rest[len..len + head.len as usize];
        let text = match OptionReply::decode(head.kind, data).unwrap() {
            OptionReply::Ack => String::new(),
            OptionReply::Server { name, description } => format!("{name}: {description}"),
            OptionReply::Info(Info::Export { size, flags }) => format!("{size} {flags:#x}"),
            OptionReply::Info(info) => format!("{info:?}"),
            OptionReply::MetaContext { id, name } => format!("{id} {name}"),
            OptionReply::Error { message, .. } => message,
            other => panic!("{other:?}"),
        };
        replies.push((head.option.0, head.kind, text));
        rest = &rest[len + head.len as usize..];
    }
    replies
}

fn info(go: bool, export: &str, wanted: &[InfoKind]) -> OptionRequest {
    OptionRequest::Info { go, export: export.to_owned(), wanted: wanted.to_vec() }
}

fn contexts(set: bool, export: &str, queries: &[&str]) -> OptionRequest {
    let queries = queries.iter().map(|query| (*query).to_owned()).collect();
    OptionRequest::MetaContext { set, export: export.to_owned(), queries }
}

const STRUCTURED: OptionCode = OptionCode::STRUCTURED_REPLY;
const EXTENDED: OptionCode = OptionCode::EXTENDED_HEADERS;
const SIZES: &str = "BlockSizes(BlockSizes { minimum: 1, preferred: 4096, maximum: 33554432 })";

/// `options`: of the client; `expected`: kind and text of each reply.
#[track_caller]
fn check(options: &[OptionRequest], expected: &[(ReplyKind, &str)]) {
    let seen = replies(offer(), options);
    let seen: Vec<_> = seen.iter().map(|(_, kind, text)| (*kind, text.as_str())).collect();
    assert_eq!(seen, expected, "{options:?}");
}

#[test]
fn each_option_has_its_answer() {
    let plain = OptionRequest::plain;
    let with_data = |option| OptionRequest::Other { option, data: vec![1] };
    let (ack, invalid) = (ReplyKind::ACK, ReplyKind::INVALID);
    check(
        &[plain(OptionCode::LIST)],
        &[(ReplyKind::SERVER, "disk: a disk"), (ReplyKind::SERVER, ": "), (ack, "")],
    );
    check(&[with_data(OptionCode::LIST)], &[(invalid, "the option takes no data")]);
    check(&[plain(OptionCode(99))], &[(ReplyKind::UNSUPPORTED, "unknown option")]);
    check(&[plain(OptionCode::STARTTLS)], &[(ReplyKind::POLICY, "TLS is not configured")]);
    check(&[plain(STRUCTURED)], &[(ack, "")]);
    check(
        &[plain(STRUCTURED), plain(STRUCTURED)],
        &[(ack, ""), (invalid, "the option is negotiated already")],
    );
    check(&[with_data(STRUCTURED)], &[(invalid, "the option takes no data")]);
    check(&[plain(STRUCTURED), plain(EXTENDED)], &[(ack, ""), (ack, "")]);
    check(
        &[plain(EXTENDED), plain(STRUCTURED)],
        &[(ack, ""), (ReplyKind::EXTENDED_HEADERS_REQUIRED, "extended headers are negotiated already")],
    );
    check(&[plain(EXTENDED), plain(EXTENDED)], &[(ack, ""), (invalid, "the option is negotiated already")]);
    check(&[plain(OptionCode::ABORT), plain(OptionCode::LIST)], &[(ack, "")]);
    check(&[info(false, "none", &[])], &[(ReplyKind::UNKNOWN, "there is no export 'none'")]);
    check(
        &[info(false, "disk", &[InfoKind::NAME])],
        &[
            (ReplyKind::INFO, "Name(\"disk\")"),
            (ReplyKind::INFO, "Description(\"a disk\")"),
            (ReplyKind::INFO, SIZES),
            (ReplyKind::INFO, "65536 0xc6d"),
            (ack, ""),
        ],
    );
    // With headers that have it, the flag DF.
    check(
        &[plain(STRUCTURED), info(true, "", &[])],
        &[(ack, ""), (ReplyKind::INFO, SIZES), (ReplyKind::INFO, "4096 0x83"), (ack, "")],
    );
}

#[test]
fn each_query_finds_its_contexts() {
    let (ack, found) = (ReplyKind::ACK, ReplyKind::META_CONTEXT);
    let listed = |queries: &[&str], expected: &[&str]| {
        let expected: Vec<_> = expected.iter().map(|name| (found, *name)).chain([(ack, "")]).collect();
        check(&[contexts(false, "disk", queries)], &expected);
    };
    let all = ["0 base:allocation", "0 qemu:dirty-bitmap:b"];
    listed(&[], &all);
    listed(&["base:"], &all[..1]);
    listed(&["qemu:"], &all[1..]);
    listed(&["qemu:dirty-bitmap:"], &all[1..]);
    listed(&["qemu:dirty-bitmap:b", "base:allocation", "base:"], &all);
    listed(&["bas", "other:", ""], &[]);
    let structured = OptionRequest::plain(STRUCTURED);
    let set = |queries: &[&str], expected: &[&str]| {
        let replies: Vec<_> = expected.iter().map(|name| (found, *name)).chain([(ack, "")]).collect();
        check(&[structured.clone(), contexts(true, "disk", queries)], &[&[(ack, "")], &replies[..]].concat());
    };
    set(&["qemu:dirty-bitmap:b"], &["1 qemu:dirty-bitmap:b"]);
    set(&["base:", "qemu:"], &[]);
    set(&[], &[]);
    let none = (ReplyKind::UNKNOWN, "there is no export 'none'");
    check(&[structured.clone(), contexts(true, "none", &["base:"])], &[(ack, ""), none]);
    let text = "structured replies are not negotiated";
    check(&[contexts(true, "disk", &["base:allocation"])], &[(ReplyKind::INVALID, text)]);
}

#[test]
fn tls_comes_first_where_it_is_required() {
    let offer = || {
        let mut offer = offer();
        offer.tls = Tls::Required;
        offer
    };
    let kinds = |options: &[OptionRequest]| -> Vec<ReplyKind> {
        replies(offer(), options).into_iter().map(|(_, kind, _)| kind).collect()
    };
    let plain = OptionRequest::plain;
    assert_eq!(kinds(&[plain(OptionCode::LIST)]), [ReplyKind::TLS_REQUIRED]);
    assert_eq!(kinds(&[info(true, "disk", &[])]), [ReplyKind::TLS_REQUIRED]);
    assert_eq!(kinds(&[OptionRequest::ExportName("disk".to_owned())]), []);
    assert_eq!(kinds(&[plain(OptionCode::ABORT)]), [ReplyKind::ACK]);
    let mut out = Vec::new();
    let mut handshake = Handshake::new(Arc::new(offer()), &mut out);
    let send = |handshake: &mut Handshake, option: OptionRequest| {
        let (mut bytes, mut out) = (Vec::new(), Vec::new());
        option.encode(&mut bytes);
        let mut step = Step::More;
        while matches!(step, Step::More) && !bytes.is_empty() {
            let rest = bytes.split_off(handshake.need());
            step = handshake.receive(&bytes, &mut out);
            bytes = rest;
        }
        (step, OptionReplyHead::decode(&out).map(|(head, _)| head.kind))
    };
    assert!(matches!(handshake.receive(&FIXED.to_be_bytes(), &mut out), Step::More));
    let (step, kind) = send(&mut handshake, plain(OptionCode::STARTTLS));
    assert!(matches!(step, Step::StartTls) && kind == Ok(ReplyKind::ACK) && handshake.need() == 0);
    handshake.secured();
    assert_eq!(send(&mut handshake, plain(OptionCode::STARTTLS)).1, Ok(ReplyKind::INVALID));
    assert_eq!(send(&mut handshake, plain(STRUCTURED)).1, Ok(ReplyKind::ACK));
    assert!(matches!(send(&mut handshake, info(true, "disk", &[])).0, Step::Ready(_)));
}

#[test]
fn clients_without_end_or_measure_are_answered_or_dropped() {
    let client = |bytes: &[u8]| answer(offer(), &[&FIXED.to_be_bytes(), bytes].concat());
    let head = |option: OptionCode, len: u32| {
        let mut bytes = Vec::new();
        OptionHead { option, len }.encode(&mut bytes);
        bytes
    };
    // A name of 4 GiB: the end, before any of it is read.
    let dropped = client(&head(OptionCode::GO, u32::MAX));
    assert_eq!(dropped.len(), 18);
    // An option that is too long but not absurd: an answer, and the handshake goes on behind it.
    let len = MAX_OPTION_DATA + 1;
    let list = head(OptionCode::LIST, 0);
    let answered = client(&[head(OptionCode::GO, len), vec![7; len as usize], list.clone()].concat());
    let (first, taken) = OptionReplyHead::decode(&answered[18..]).unwrap();
    assert_eq!(first.kind, ReplyKind::TOO_BIG);
    let (second, _) = OptionReplyHead::decode(&answered[18 + taken + first.len as usize..]).unwrap();
    assert_eq!((second.option, second.kind), (OptionCode::LIST, ReplyKind::SERVER));
    // Options for ever.
    let acks = client(&head(OptionCode(77), 0).repeat(MAX_OPTIONS as usize * 2));
    assert_eq!(acks.len(), 18 + (20 + "unknown option".len()) * MAX_OPTIONS as usize);
    // Flags that were not offered; a client that is not fixed; another protocol.
    assert_eq!(answer(offer(), &[&4u32.to_be_bytes()[..], &list].concat()).len(), 18);
    assert_eq!(answer(offer(), &[&0u32.to_be_bytes()[..], &list].concat()).len(), 18);
    assert_eq!(client(b"GET / HTTP/1.1\r\n").len(), 18);
}

#[test]
fn the_old_way_to_an_export() {
    let named = |flags: u32, name: &str| {
        let mut bytes = flags.to_be_bytes().to_vec();
        OptionRequest::ExportName(name.to_owned()).encode(&mut bytes);
        answer(offer(), &bytes)[18..].to_vec()
    };
    let (reply, len) = NameReply::decode(&named(3, "disk"), true).unwrap();
    assert_eq!((reply.size, reply.flags, len), (65536, 0xc6d, 10));
    assert_eq!(named(0, "").len(), NameReply::len(false));
    assert_eq!(named(3, "none"), [0; 0]);
}

/// Errors of requests, in the session that `options` lead to.
#[track_caller]
fn verdict(export: &str, mode: Mode, request: Request, expected: Result<Work, ErrorCode>) {
    let mut bytes = FIXED.to_be_bytes().to_vec();
    match mode {
        Mode::Simple => {}
        Mode::Structured => OptionRequest::plain(STRUCTURED).encode(&mut bytes),
        Mode::Extended => OptionRequest::plain(EXTENDED).encode(&mut bytes),
    }
    if mode != Mode::Simple {
        contexts(true, export, &["base:allocation"]).encode(&mut bytes);
    }
    info(true, export, &[]).encode(&mut bytes);
    let mut pipe = Pipe { input: &bytes, output: Vec::new() };
    let Ok(Negotiated::Session(session)) = negotiate(&mut pipe, Arc::new(offer())) else { panic!() };
    assert_eq!(session.mode(), mode);
    assert_eq!(session.judge(&request).map_err(|refusal| refusal.error), expected, "{request:?}");
}

#[test]
fn each_request_has_its_verdict() {
    use command_flag::{DF, FAST_ZERO, FUA, NO_HOLE, PAYLOAD_LEN, REQ_ONE};
    let request = |command, flags, offset, len| Request { command, flags, cookie: 1, offset, len };
    let (read, write) = (Command::READ, Command::WRITE);
    let (zero, status) = (Command::WRITE_ZEROES, Command::BLOCK_STATUS);
    let (simple, structured, extended) = (Mode::Simple, Mode::Structured, Mode::Extended);
    let invalid = Err(ErrorCode::INVALID);
    let check = |mode, (command, flags, offset, len), expected| {
        verdict("disk", mode, request(command, flags, offset, len), expected);
    };
    check(simple, (read, 0, 0, 65536), Ok(Work::Read { whole: false }));
    check(simple, (read, FUA, 65536, 0), Ok(Work::Read { whole: false }));
    check(simple, (read, 0, 65535, 2), invalid);
    check(simple, (read, 0, u64::MAX, 2), invalid);
    check(simple, (read, DF, 0, 512), invalid);
    check(structured, (read, DF, 0, 512), Ok(Work::Read { whole: true }));
    check(simple, (write, FUA, 65535, 1), Ok(Work::Write));
    check(simple, (write, 0, 65535, 2), Err(ErrorCode::NO_SPACE));
    check(simple, (write, PAYLOAD_LEN, 0, 2), invalid);
    check(extended, (write, PAYLOAD_LEN, 0, 2), Ok(Work::Write));
    check(simple, (zero, NO_HOLE, 0, 2), Ok(Work::WriteZeroes { no_hole: true, fast: false }));
    check(simple, (zero, FAST_ZERO, 0, 2), Ok(Work::WriteZeroes { no_hole: false, fast: true }));
    check(extended, (zero, 0, 1, u64::MAX), Err(ErrorCode::NO_SPACE));
    check(simple, (Command::TRIM, 0, 0, 65537), invalid);
    check(simple, (Command::FLUSH, 0, 1, 1 << 40), Ok(Work::Flush));
    check(simple, (Command::FLUSH, DF, 0, 0), invalid);
    check(simple, (Command::DISCONNECT, 0xffff, 1, 1), Ok(Work::Disconnect));
    check(simple, (Command(8), 0, 0, 1), invalid);
    check(simple, (Command(20), 0, 0, 1), invalid);
    check(simple, (status, 0, 0, 1), invalid);
    check(structured, (status, REQ_ONE, 0, 1), Ok(Work::BlockStatus { one: true }));
    check(structured, (status, 0, 0, 0), invalid);
    // The other export is read-only and has neither trims nor zeroes.
    verdict("", structured, request(write, 0, 0, 1), Err(ErrorCode::PERM));
    verdict("", structured, request(zero, 0, 0, 1), invalid);
    verdict("", structured, request(Command::TRIM, 0, 0, 1), invalid);
    verdict("", structured, request(Command::CACHE, 0, 0, 1), invalid);
    verdict("", structured, request(status, 0, 0, 1), invalid);
}

/// A whole request has its reply, even if the bytes behind it are cut short or are none.
#[test]
fn a_connection_that_breaks_has_the_replies_of_what_came_before() {
    let mut named = FIXED.to_be_bytes().to_vec();
    OptionRequest::ExportName("disk".to_owned()).encode(&mut named);
    let request = |command, cookie, len| {
        let mut bytes = Vec::new();
        let request = Request { command, flags: 0, cookie, offset: 0, len };
        request.encode(Mode::Simple, &mut bytes).unwrap();
        bytes
    };
    let whole = [request(Command::WRITE, 1, 2), vec![1, 2], request(Command::READ, 2, 3)].concat();
    let greeting = answer(offer(), &named).len();
    for broken in [
        vec![0x25],
        request(Command::WRITE, 3, 5),
        [request(Command::WRITE, 3, 5), vec![1; 4]].concat(),
        request(Command::WRITE, 3, u32::MAX.into()),
        vec![0; 28],
    ] {
        let output = answer(offer(), &[&named[..], &whole, &broken].concat());
        let head = |cookie| {
            let mut bytes = Vec::new();
            ReplyHead::Simple { error: ErrorCode::NONE, cookie }.encode(&mut bytes).unwrap();
            bytes
        };
        assert_eq!(output[greeting..], [head(1), head(2), vec![1, 2, 0]].concat(), "{broken:?}");
    }
}

/// What a client could send, valid for a while and then cut, changed or repeated.
#[test]
fn any_bytes_lead_to_replies_and_an_end() {
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = move |below: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % below
    };
    for _ in 0..4000 {
        let mut bytes = FIXED.to_be_bytes().to_vec();
        let mode = [Mode::Simple, Mode::Structured, Mode::Extended][random(3) as usize];
        match mode {
            Mode::Simple => {}
            Mode::Structured => OptionRequest::plain(STRUCTURED).encode(&mut bytes),
            Mode::Extended => OptionRequest::plain(EXTENDED).encode(&mut bytes),
        }
        contexts(true, "disk", &["base:allocation"]).encode(&mut bytes);
        info(true, "disk", &[]).encode(&mut bytes);
        for cookie in 0..random(20) {
            let command = Command(random(9) as u16);
            let len = if random(50) == 0 { random(1 << 32) } else { random(70_000) };
            let flags = if random(2) == 0 { 0 } else { random(64) as u16 };
            let request = Request { command, flags, cookie, offset: random(70_000), len };
            request.encode(mode, &mut bytes).unwrap();
            if command == Command::WRITE && random(20) > 0 {
                bytes.resize(bytes.len() + len.min(70_000) as usize, cookie as u8);
            }
        }
        for _ in 0..random(3) {
            let at = random(bytes.len() as u64) as usize;
            match random(3) {
                0 => bytes[at] ^= 1 << random(8),
                1 => bytes.truncate(at.max(4)),
                _ => bytes[at] = 0xff,
            }
        }
        let output = answer(offer(), &bytes);
        assert!(output.len() < 40 << 20, "{} bytes for {}", output.len(), bytes.len());
    }
}
