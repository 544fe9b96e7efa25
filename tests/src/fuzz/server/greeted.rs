//! The handshake: what each option may be answered, and what follows for the requests.

use qcow2_nbd::proto::{
    Greeting, Info, MAX_OPTION_DATA, Mode, NameReply, OptionCode, OptionHead, OptionReply, OptionReplyHead,
    OptionRequest, ReplyKind, decode_client_flags, handshake_flag,
};
use qcow2_nbd::server::{MAX_OPTIONS, MAX_SKIPPED, Offer};

/// Position of the export, headers, meta contexts.
pub(super) type Agreed = (usize, Mode, Vec<u32>);

/// Follows the options in `input` and the replies in `output`, and takes both off. `None`: the connection
/// ends without an export.
pub(super) fn follow(offer: &Offer, input: &mut &[u8], output: &mut &[u8]) -> Option<Agreed> {
    let (greeting, len) = Greeting::decode(output).expect("a greeting");
    assert!(matches!(greeting, Greeting::Newstyle { flags: 3 }));
    take(output, len);
    let (flags, len) = decode_client_flags(input).ok()?;
    take(input, len);
    if flags & !3 != 0 {
        return None;
    }
    let is_fixed = flags & u32::from(handshake_flag::FIXED_NEWSTYLE) != 0;
    let no_zeroes = flags & u32::from(handshake_flag::NO_ZEROES) != 0;
    let (mut mode, mut chosen) = (Mode::Simple, None);
    for _ in 0..MAX_OPTIONS {
        let (head, len) = OptionHead::decode(input).ok()?;
        take(input, len);
        if head.len > MAX_OPTION_DATA {
            if head.len > MAX_SKIPPED || !is_fixed || head.option == OptionCode::EXPORT_NAME {
                return None;
            }
            assert_eq!(replies(head.option, output).last().map(OptionReply::kind), Some(ReplyKind::TOO_BIG));
            take(input, input.len().min(head.len as usize));
            continue;
        }
        let data = take(input, head.len as usize)?;
        let request = OptionRequest::decode(head.option, data).ok();
        if head.option == OptionCode::EXPORT_NAME {
            let Some(OptionRequest::ExportName(name)) = request else { return None };
            let (export, facts) = offer.exports.iter().enumerate().find(|(_, facts)| facts.name == name)?;
            let (reply, len) = NameReply::decode(output, no_zeroes).expect("the export that was named");
            assert_eq!(reply.size, facts.size);
            take(output, len);
            return Some((export, mode, contexts(chosen, export)));
        }
        if head.option == OptionCode::ABORT {
            assert_eq!(replies(head.option, output), [OptionReply::Ack]);
            return None;
        }
        if !is_fixed {
            return None;
        }
        let replies = replies(head.option, output);
        let is_accepted = replies.last() == Some(&OptionReply::Ack);
        let request = request.filter(|_| is_accepted);
        assert!(request.is_some() || !is_accepted, "an option that cannot be read was accepted");
        match (head.option, request) {
            (OptionCode::STRUCTURED_REPLY, Some(_)) => mode = Mode::Structured,
            (OptionCode::EXTENDED_HEADERS, Some(_)) => mode = Mode::Extended,
            (OptionCode::SET_META_CONTEXT, None) => chosen = None,
            (_, Some(OptionRequest::MetaContext { set: true, export, queries })) => {
                chosen = Some((position(offer, &export), ids(offer, &export, &queries, &replies)));
            }
            (_, Some(OptionRequest::Info { go, export, .. })) => {
                let index = position(offer, &export);
                let has_size = |reply: &OptionReply| {
                    let size = offer.exports[index].size;
                    matches!(reply, OptionReply::Info(Info::Export { size: told, .. }) if *told == size)
                };
                assert!(replies.iter().any(has_size), "an export without its size: {replies:?}");
                if go {
                    return Some((index, mode, contexts(chosen, index)));
                }
            }
            _ => {}
        }
    }
    None
}

/// All replies to an option. The last is an acknowledgement or a refusal; those before fit the option.
fn replies(option: OptionCode, output: &mut &[u8]) -> Vec<OptionReply> {
    let mut replies = Vec::new();
    loop {
        let (head, len) = OptionReplyHead::decode(output).expect("a reply to the option");
        take(output, len);
        assert_eq!(head.option, option);
        let data = take(output, head.len as usize).expect("a reply with all its data");
        let reply = OptionReply::decode(head.kind, data).expect("data that fits the reply");
        let is_last = head.kind == ReplyKind::ACK || head.kind.is_error();
        let fits = match option {
            OptionCode::LIST => head.kind == ReplyKind::SERVER,
            OptionCode::INFO | OptionCode::GO => head.kind == ReplyKind::INFO,
            OptionCode::SET_META_CONTEXT | OptionCode::LIST_META_CONTEXT => {
                head.kind == ReplyKind::META_CONTEXT
            }
            _ => false,
        };
        assert!(is_last || fits, "{option:?} is answered with {reply:?}");
        replies.push(reply);
        if is_last {
            return replies;
        }
    }
}

/// The ids that a selection was told: of the contexts that were asked for, each once.
fn ids(offer: &Offer, export: &str, queries: &[String], replies: &[OptionReply]) -> Vec<u32> {
    let known = &offer.exports[position(offer, export)].contexts;
    let told: Vec<(u32, &str)> = replies
        .iter()
        .filter_map(|reply| match reply {
            OptionReply::MetaContext { id, name } => Some((*id, name.as_str())),
            _ => None,
        })
        .collect();
    let asked = (0u32..).zip(known).filter(|(_, name)| queries.contains(name));
    let expected: Vec<(u32, &str)> = asked.map(|(id, name)| (id, name.as_str())).collect();
    assert_eq!(told, expected);
    told.into_iter().map(|(id, _)| id).collect()
}

fn position(offer: &Offer, name: &str) -> usize {
    let found = offer.exports.iter().position(|facts| facts.name == name);
    found.expect("only what exists is accepted")
}

/// Contexts that were chosen for another export do not count.
fn contexts(chosen: Option<(usize, Vec<u32>)>, export: usize) -> Vec<u32> {
    chosen.filter(|(of, _)| *of == export).map(|(_, ids)| ids).unwrap_or_default()
}

fn take<'a>(bytes: &mut &'a [u8], len: usize) -> Option<&'a [u8]> {
    let (taken, rest) = bytes.split_at_checked(len)?;
    *bytes = rest;
    Some(taken)
}
