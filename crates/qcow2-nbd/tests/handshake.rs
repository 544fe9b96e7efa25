//! Every path of the handshake, against servers that are a script in memory.
#![allow(clippy::unwrap_used, reason = "a test may stop")]

use qcow2_nbd::client::*;
use qcow2_nbd::proto::*;

/// A server: what it sends at first, and what it answers to each option. An option without an answer must not
/// be sent; `None` ends the script.
struct Script {
    greeting: Greeting,
    answers: Vec<(OptionCode, Vec<OptionReply>)>,
    by_name: Option<NameReply>,
}

type Outcome = Result<(Step, Vec<OptionCode>), HandshakeFailure>;

impl Script {
    fn new(answers: Vec<(OptionCode, Vec<OptionReply>)>) -> Self {
        let flags = handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES;
        Self { greeting: Greeting::Newstyle { flags }, answers, by_name: None }
    }

    /// Runs the client; returns its last step, and the options that it sent.
    fn run(self, negotiation: Negotiation) -> Outcome {
        let mut sent = Vec::new();
        let mut pending = Vec::new();
        self.greeting.encode(&mut pending);
        let mut answers = self.answers.into_iter();
        let mut handshake = Handshake::new(negotiation);
        let (mut out, mut step) = (Vec::new(), handshake.start());
        let mut flags = None;
        loop {
            step = match step {
                Step::Receive(len) => {
                    assert!(pending.len() >= len, "the client waits for {len} bytes, {} come", pending.len());
                    let bytes: Vec<u8> = pending.drain(..len).collect();
                    handshake.receive(&bytes, &mut out).map_err(|error| error.failure().clone())?
                }
                Step::StartTls => handshake.secured(&mut out),
                step => return Ok((step, sent)),
            };
            if !out.is_empty() && flags.is_none() {
                let (given, len) = decode_client_flags(&out).unwrap();
                flags = Some(given);
                out.drain(..len);
            }
            while !out.is_empty() {
                let (head, len) = OptionHead::decode(&out).unwrap();
                let end = len + head.len as usize;
                OptionRequest::decode(head.option, &out[len..end]).unwrap();
                out.drain(..end);
                sent.push(head.option);
                match (head.option, self.by_name) {
                    (OptionCode::ABORT, _) => {}
                    (OptionCode::EXPORT_NAME, Some(reply)) => {
                        reply
                            .encode(flags.unwrap() & u32::from(handshake_flag::NO_ZEROES) != 0, &mut pending);
                    }
                    (option, _) => {
                        let (expected, replies) = answers.next().expect("an option that the script lacks");
                        assert_eq!(option, expected);
                        replies.iter().for_each(|reply| reply.encode(option, &mut pending));
                    }
                }
            }
        }
    }
}

const ALL: [OptionCode; 2] = [OptionCode::EXTENDED_HEADERS, OptionCode::SET_META_CONTEXT];

fn no(kind: ReplyKind) -> Vec<OptionReply> {
    vec![OptionReply::Error { kind, message: "no".into() }]
}

fn size() -> Vec<OptionReply> {
    vec![OptionReply::Info(Info::Export { size: 4096, flags: 0x49 }), OptionReply::Ack]
}

fn context() -> Vec<OptionReply> {
    vec![
        OptionReply::MetaContext { id: 7, name: "base:allocation".into() },
        OptionReply::MetaContext { id: 8, name: "not:asked".into() },
        OptionReply::Ack,
    ]
}

fn export(outcome: Outcome) -> Export {
    match outcome {
        Ok((Step::Ready(export), _)) => export,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_modern_server_gives_all() {
    let sizes = BlockSizes { minimum: 512, preferred: 4096, maximum: 1 << 20 };
    let go = vec![
        OptionReply::Info(Info::Description("text".into())),
        OptionReply::Info(Info::BlockSizes(sizes)),
        OptionReply::Info(Info::Other(InfoKind(9), vec![1])),
        OptionReply::Info(Info::Export { size: 4096, flags: 0x49 }),
        OptionReply::Ack,
    ];
    let answers = vec![(ALL[0], vec![OptionReply::Ack]), (ALL[1], context()), (OptionCode::GO, go)];
    let export = export(Script::new(answers).run(Negotiation::default()));
    assert_eq!((export.size, export.flags, export.mode), (4096, 0x49, Mode::Extended));
    assert_eq!(export.context("base:allocation"), Some(7));
    assert_eq!((export.contexts.len(), export.block_sizes), (1, Some(sizes)));
    assert_eq!(export.description.as_deref(), Some("text"));
}

#[test]
fn what_a_server_refuses_is_done_without() {
    let unsupported = || no(ReplyKind::UNSUPPORTED);
    let structured = (OptionCode::STRUCTURED_REPLY, vec![OptionReply::Ack]);
    let answers = vec![
        (ALL[0], unsupported()),
        structured.clone(),
        (ALL[1], no(ReplyKind::POLICY)),
        (OptionCode::GO, size()),
    ];
    let seen = export(Script::new(answers).run(Negotiation::default()));
    assert_eq!((seen.mode, seen.contexts.len(), seen.block_sizes), (Mode::Structured, 0, None));
    let answers = vec![(ALL[0], unsupported()), (structured.0, unsupported()), (OptionCode::GO, size())];
    assert_eq!(export(Script::new(answers).run(Negotiation::default())).mode, Mode::Simple);
    let mut plain = Negotiation::default();
    (plain.extended, plain.structured) = (false, false);
    assert_eq!(export(Script::new(vec![(OptionCode::GO, size())]).run(plain)).size, 4096);
}

#[test]
fn older_servers_know_an_export_by_its_name_only() {
    let plain = || {
        let mut plain = Negotiation::with_export("x");
        (plain.extended, plain.structured) = (false, false);
        plain
    };
    let by_name = Some(NameReply { size: 99, flags: 1 });
    let go = vec![(OptionCode::GO, no(ReplyKind::UNSUPPORTED))];
    assert_eq!(export(Script { by_name, ..Script::new(go) }.run(plain())).size, 99);
    // Newstyle that is not fixed gets no other option.
    for flags in [0, handshake_flag::NO_ZEROES] {
        let greeting = Greeting::Newstyle { flags };
        let script = || Script { greeting, answers: vec![], by_name };
        let (step, sent) = script().run(Negotiation::with_export("x")).unwrap();
        assert_eq!(sent, [OptionCode::EXPORT_NAME]);
        assert!(matches!(step, Step::Ready(export) if export.size == 99 && export.mode == Mode::Simple));
        for (tls, goal) in [(true, Goal::Go), (false, Goal::List), (false, Goal::Info)] {
            let mut negotiation = Negotiation::default();
            (negotiation.tls, negotiation.goal) = (tls, goal);
            assert_eq!(script().run(negotiation), Err(HandshakeFailure::TooOld));
        }
    }
}

#[test]
fn an_old_style_server_has_one_export() {
    let script = || Script {
        greeting: Greeting::OldStyle { size: 77, flags: 0xffff_0003 },
        answers: vec![],
        by_name: None,
    };
    let seen = export(script().run(Negotiation::default()));
    assert_eq!((seen.size, seen.flags, seen.mode), (77, 3, Mode::Simple));
    assert_eq!(script().run(Negotiation::with_export("x")), Err(HandshakeFailure::NoNames));
    let mut negotiation = Negotiation::default();
    negotiation.tls = true;
    assert_eq!(script().run(negotiation), Err(HandshakeFailure::TooOld));
}

#[test]
fn lists_facts_and_tls() {
    let mut list = Negotiation::default();
    list.goal = Goal::List;
    let server = |name: &str| OptionReply::Server { name: name.into(), description: "d".into() };
    let replies = vec![server("a"), server("b"), OptionReply::Ack];
    let (step, sent) = Script::new(vec![(OptionCode::LIST, replies)]).run(list.clone()).unwrap();
    assert!(matches!(step, Step::Listed(names) if names.len() == 2 && names[1].name == "b"));
    assert_eq!(sent, [OptionCode::LIST, OptionCode::ABORT]);
    let refused = Script::new(vec![(OptionCode::LIST, no(ReplyKind::POLICY))]).run(list);
    assert!(matches!(refused, Err(HandshakeFailure::Refused { kind: ReplyKind::POLICY, .. })));

    let mut info = Negotiation::default();
    (info.goal, info.tls, info.extended, info.structured) = (Goal::Info, true, false, false);
    let tls = (OptionCode::STARTTLS, vec![OptionReply::Ack]);
    let (step, sent) = Script::new(vec![tls, (OptionCode::INFO, size())]).run(info.clone()).unwrap();
    assert!(matches!(step, Step::Ready(_)));
    assert_eq!(sent, [OptionCode::STARTTLS, OptionCode::INFO, OptionCode::ABORT]);
    let refused = Script::new(vec![(OptionCode::STARTTLS, no(ReplyKind::POLICY))]).run(info);
    assert!(matches!(refused, Err(HandshakeFailure::Refused { option: OptionCode::STARTTLS, .. })));
}

#[test]
fn every_refusal_of_an_export_is_told() {
    for kind in [
        ReplyKind::POLICY,
        ReplyKind::INVALID,
        ReplyKind::PLATFORM,
        ReplyKind::TLS_REQUIRED,
        ReplyKind::UNKNOWN,
        ReplyKind::SHUTDOWN,
        ReplyKind::BLOCK_SIZE_REQUIRED,
        ReplyKind::TOO_BIG,
        ReplyKind::EXTENDED_HEADERS_REQUIRED,
        ReplyKind(1 << 31 | 99),
    ] {
        let mut plain = Negotiation::default();
        (plain.extended, plain.structured) = (false, false);
        let option = OptionCode::GO;
        let outcome = Script::new(vec![(option, no(kind))]).run(plain);
        assert_eq!(outcome, Err(HandshakeFailure::Refused { option, kind, message: "no".into() }));
    }
    let kind = ReplyKind::SHUTDOWN;
    let outcome = Script::new(vec![(ALL[0], no(kind))]).run(Negotiation::default());
    assert!(matches!(outcome, Err(HandshakeFailure::Refused { kind: seen, .. }) if seen == kind));
    // A server that wants TLS says so at every option, and at last the export is refused.
    let options = [OptionCode::EXTENDED_HEADERS, OptionCode::STRUCTURED_REPLY, OptionCode::GO];
    let script = options.map(|option| (option, no(ReplyKind::TLS_REQUIRED)));
    let outcome = Script::new(script.to_vec()).run(Negotiation::default());
    let (kind, message) = (ReplyKind::TLS_REQUIRED, "no".into());
    assert_eq!(outcome, Err(HandshakeFailure::Refused { option: OptionCode::GO, kind, message }));
}

#[test]
fn what_breaks_the_protocol_is_refused() {
    let mut plain = Negotiation::default();
    (plain.extended, plain.structured) = (false, false);
    let go = |replies: Vec<OptionReply>| Script::new(vec![(OptionCode::GO, replies)]).run(plain.clone());
    assert_eq!(go(vec![OptionReply::Ack]), Err(HandshakeFailure::NoSize));
    for (minimum, preferred, maximum) in [
        (0, 4096, 4096),
        (3, 4096, 4096),
        (1 << 17, 1 << 17, 1 << 20),
        (512, 256, 4096),
        (4096, 4096, 5000),
        (512, 512, 256),
    ] {
        let sizes = Info::BlockSizes(BlockSizes { minimum, preferred, maximum });
        let outcome = go(vec![OptionReply::Info(sizes)]);
        assert!(matches!(outcome, Err(HandshakeFailure::Violation(_))), "{minimum} {preferred} {maximum}");
    }
    let endless = vec![OptionReply::Info(Info::Name("x".into())); 1001];
    let Err(HandshakeFailure::Violation(violation)) = go(endless) else { panic!("no violation") };
    assert_eq!(violation.to_string(), "the server sent replies without end");

    let mut handshake = Handshake::new(Negotiation::default());
    let seen = handshake.receive(b"SSH-2.0-OpenSSH_", &mut Vec::new()).unwrap_err();
    assert_eq!(seen.failure(), &HandshakeFailure::NotNbd);
    for (option, len) in [(OptionCode::LIST, 0), (OptionCode::EXTENDED_HEADERS, MAX_OPTION_DATA + 1)] {
        let mut handshake = Handshake::new(Negotiation::default());
        handshake.receive(b"NBDMAGICIHAVEOPT", &mut Vec::new()).unwrap();
        handshake.receive(&[0, 3], &mut Vec::new()).unwrap();
        let mut head = Vec::new();
        OptionReplyHead { option, kind: ReplyKind::ACK, len }.encode(&mut head);
        assert!(handshake.receive(&head, &mut Vec::new()).is_err(), "{option:?}");
        assert!(handshake.receive(&head, &mut Vec::new()).is_err(), "the handshake is over");
    }
}
