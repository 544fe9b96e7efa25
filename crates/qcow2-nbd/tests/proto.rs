//! Every message reads back as it was written, and any bytes are read without a panic.
#![allow(clippy::unwrap_used, reason = "a test may stop")]

use qcow2_nbd::proto::*;
use std::fmt::Debug;

fn check<T: PartialEq + Debug>(
    value: &T,
    encode: impl Fn(&T, &mut Vec<u8>),
    decode: impl Fn(&[u8]) -> Decoded<T>,
) {
    let mut bytes = Vec::new();
    encode(value, &mut bytes);
    let len = bytes.len();
    for short in 0..len {
        match decode(&bytes[..short]) {
            Err(DecodeError::Short(needed)) => assert!(needed > short && needed <= len, "{needed} of {len}"),
            other => panic!("{value:?} at {short}: {other:?}"),
        }
    }
    // What follows is not looked at.
    bytes.extend([7; 3]);
    assert_eq!(decode(&bytes).unwrap(), (decode(&bytes[..len]).unwrap().0, len));
    assert_eq!(&decode(&bytes).unwrap().0, value);
}

#[test]
fn heads_read_back() {
    for greeting in [Greeting::Newstyle { flags: 3 }, Greeting::OldStyle { size: 1 << 40, flags: 5 }] {
        check(&greeting, Greeting::encode, Greeting::decode);
    }
    check(&3, |flags, out| encode_client_flags(*flags, out), decode_client_flags);
    for no_zeroes in [false, true] {
        let reply = NameReply { size: 99, flags: 0x1ff };
        check(&reply, |reply, out| reply.encode(no_zeroes, out), |bytes| NameReply::decode(bytes, no_zeroes));
    }
    check(&OptionHead { option: OptionCode::GO, len: 77 }, OptionHead::encode, OptionHead::decode);
    let head = OptionReplyHead { option: OptionCode::LIST, kind: ReplyKind::SERVER, len: 9 };
    check(&head, OptionReplyHead::encode, OptionReplyHead::decode);
    for mode in [Mode::Simple, Mode::Structured, Mode::Extended] {
        let len = if mode == Mode::Extended { 1 << 40 } else { 0xffff_ffff };
        let request = Request { command: Command::TRIM, flags: 3, cookie: u64::MAX, offset: 5, len };
        check(&request, |r, out| r.encode(mode, out).unwrap(), |bytes| Request::decode(bytes, mode));
        let long = Request { len: 1 << 32, ..request };
        assert_eq!(long.encode(mode, &mut Vec::new()).is_ok(), mode == Mode::Extended);
        let write = Request { command: Command::WRITE, flags: command_flag::PAYLOAD_LEN, len: 8, ..request };
        assert_eq!(
            (write.payload_len(mode), Request { flags: 0, len: 8, ..request }.payload_len(mode)),
            (8, 0)
        );
    }
    let chunk = |offset, len| {
        let (flags, kind) = (chunk_flag::DONE, ChunkKind::OFFSET_DATA);
        ReplyHead::Chunk { flags, kind, cookie: 9, offset, len }
    };
    for head in [
        ReplyHead::Simple { error: ErrorCode::NO_SPACE, cookie: 8 },
        chunk(None, 0xffff_ffff),
        chunk(Some(77), 1 << 33),
    ] {
        check(&head, |head, out| head.encode(out).unwrap(), ReplyHead::decode);
    }
    assert!(chunk(None, 1 << 32).encode(&mut Vec::new()).is_err());
}

#[test]
fn options_read_back() {
    let export = "ex\u{e4}".to_owned();
    let queries = vec!["base:allocation".to_owned(), String::new()];
    for request in [
        OptionRequest::ExportName(export.clone()),
        OptionRequest::Info { go: true, export: export.clone(), wanted: vec![InfoKind::BLOCK_SIZE] },
        OptionRequest::Info { go: false, export: export.clone(), wanted: vec![] },
        OptionRequest::MetaContext { set: true, export: export.clone(), queries: queries.clone() },
        OptionRequest::MetaContext { set: false, export: export.clone(), queries },
        OptionRequest::plain(OptionCode::STARTTLS),
        OptionRequest::Other { option: OptionCode(99), data: vec![1, 2] },
    ] {
        let mut bytes = Vec::new();
        request.encode(&mut bytes);
        let (head, len) = OptionHead::decode(&bytes).unwrap();
        assert_eq!((head.option, head.len as usize), (request.option(), bytes.len() - len));
        assert_eq!(OptionRequest::decode(head.option, &bytes[len..]), Ok(request));
    }
    for reply in [
        OptionReply::Ack,
        OptionReply::Server { name: "a".into(), description: "b c".into() },
        OptionReply::Info(Info::Export { size: 1 << 50, flags: 0x8000 }),
        OptionReply::Info(Info::Name("n".into())),
        OptionReply::Info(Info::Description("d".into())),
        OptionReply::Info(Info::BlockSizes(BlockSizes { minimum: 1, preferred: 2, maximum: 3 })),
        OptionReply::Info(Info::Other(InfoKind(77), vec![4])),
        OptionReply::MetaContext { id: 3, name: "qemu:dirty-bitmap:b".into() },
        OptionReply::Error { kind: ReplyKind::UNKNOWN, message: "no such export".into() },
        OptionReply::Other(ReplyKind(70), vec![5, 6]),
    ] {
        let mut bytes = Vec::new();
        reply.encode(OptionCode::GO, &mut bytes);
        let (head, len) = OptionReplyHead::decode(&bytes).unwrap();
        assert_eq!((head.kind, head.len as usize), (reply.kind(), bytes.len() - len));
        assert_eq!(OptionReply::decode(head.kind, &bytes[len..]), Ok(reply));
    }
}

#[test]
fn payloads_read_back() {
    let extents = vec![Extent { len: 512, flags: 3 }, Extent { len: 0xffff_ffff, flags: 0 }];
    for chunk in [
        Chunk::None,
        Chunk::Data { offset: 9, data: &[1, 2, 3] },
        Chunk::Hole { offset: 1 << 40, len: 77 },
        Chunk::Status { context: 4, extended: false, extents: extents.clone() },
        Chunk::Status { context: 4, extended: true, extents },
        Chunk::Error { error: ErrorCode::IO, message: "broken".into(), offset: None },
        Chunk::Error { error: ErrorCode::IO, message: String::new(), offset: Some(5) },
        Chunk::Other(ChunkKind(99), &[1]),
    ] {
        let mut bytes = Vec::new();
        chunk.encode(&mut bytes).unwrap();
        assert_eq!(Chunk::decode(chunk.kind(), &bytes).as_ref(), Ok(&chunk));
        bytes.push(0);
        assert_ne!(Chunk::decode(chunk.kind(), &bytes), Ok(chunk));
    }
    let long =
        Chunk::Status { context: 0, extended: false, extents: vec![Extent { len: 1 << 32, flags: 0 }] };
    assert!(long.encode(&mut Vec::new()).is_err());
}

#[test]
fn strings_end_at_their_limit() {
    let long = "\u{e4}".repeat(3000);
    let mut bytes = Vec::new();
    OptionRequest::ExportName(long).encode(&mut bytes);
    assert_eq!(bytes.len(), OptionHead::LEN + MAX_STRING);
    assert!(OptionRequest::decode(OptionCode::EXPORT_NAME, &[b'a'; MAX_STRING + 1]).is_err());
}

/// Bytes from a seed, many of them small numbers and the protocol's own beginnings.
fn noise(seed: &mut u64) -> Vec<u8> {
    let mut next = || {
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*seed >> 33) as u32
    };
    let magics: [&[u8]; 6] = [
        b"NBDMAGICIHAVEOPT",
        b"IHAVEOPT",
        &0x0003_e889_0455_65a9_u64.to_be_bytes(),
        &0x6744_6698_u32.to_be_bytes(),
        &0x668e_33ef_u32.to_be_bytes(),
        &0x6e8a_278c_u32.to_be_bytes(),
    ];
    let mut bytes = match next() % 3 {
        0 => magics[next() as usize % 6].to_vec(),
        _ => Vec::new(),
    };
    for _ in 0..next() % 60 {
        bytes.push(if next() % 3 == 0 { next() as u8 } else { (next() % 3) as u8 });
    }
    bytes
}

#[test]
fn any_bytes_are_read() {
    let mut seed = 1;
    for _ in 0..60_000 {
        let bytes = noise(&mut seed);
        let _ = (Greeting::decode(&bytes), decode_client_flags(&bytes), OptionHead::decode(&bytes));
        let _ =
            (OptionReplyHead::decode(&bytes), ReplyHead::decode(&bytes), NameReply::decode(&bytes, false));
        for code in 0..12 {
            let _ = OptionRequest::decode(OptionCode(code), &bytes);
            let _ = OptionReply::decode(ReplyKind(code), &bytes);
            let _ = OptionReply::decode(ReplyKind(1 << 31 | code), &bytes);
            let _ = Chunk::decode(ChunkKind(code as u16), &bytes);
            let _ = Chunk::decode(ChunkKind(1 << 15 | code as u16), &bytes);
        }
        for mode in [Mode::Simple, Mode::Structured, Mode::Extended] {
            let _ = Request::decode(&bytes, mode);
        }
        let _ = (Extent::decode(&bytes, false), Extent::decode(&bytes, true));
    }
}

/// Names are any bytes; text that stands for them goes out as these bytes and comes back as this text.
#[test]
fn names_of_any_bytes() {
    let name = "a\u{10feff}\u{e9}\u{10fefe}".to_owned();
    let mut sent = Vec::new();
    OptionRequest::ExportName(name.clone()).encode(&mut sent);
    assert_eq!(&sent[OptionHead::LEN..], b"a\xff\xc3\xa9\xfe");
    let export = name.clone();
    for request in [
        OptionRequest::ExportName(name.clone()),
        OptionRequest::Info { go: true, export: export.clone(), wanted: vec![] },
        OptionRequest::MetaContext { set: true, export, queries: vec![name.clone()] },
    ] {
        let mut sent = Vec::new();
        request.encode(&mut sent);
        assert_eq!(OptionRequest::decode(request.option(), &sent[OptionHead::LEN..]), Ok(request));
    }
    for reply in [
        OptionReply::Server { name: name.clone(), description: name.clone() },
        OptionReply::MetaContext { id: 7, name: name.clone() },
        OptionReply::Info(Info::Name(name.clone())),
    ] {
        let mut sent = Vec::new();
        reply.encode(OptionCode::LIST, &mut sent);
        assert_eq!(OptionReply::decode(reply.kind(), &sent[OptionReplyHead::LEN..]), Ok(reply));
    }
    // The longest name there is, and one byte more: four bytes of text each.
    for (len, sent_len) in [(MAX_STRING, MAX_STRING), (MAX_STRING + 1, MAX_STRING / 4)] {
        let mut sent = Vec::new();
        OptionRequest::ExportName("\u{10feff}".repeat(len)).encode(&mut sent);
        assert_eq!(sent.len() - OptionHead::LEN, sent_len);
    }
}
