//! From the greeting to the transmission phase.

use super::{MAX_OPTIONS, MAX_SKIPPED, Offer, Session, Tls};
use crate::proto::{
    DecodeError, Greeting, Info, InfoKind, MAX_OPTION_DATA, Mode, NameReply, OptionCode, OptionHead,
    OptionReply, OptionRequest, ReplyKind, decode_client_flags, handshake_flag,
};
use std::sync::Arc;

/// What follows from bytes of a client.
#[derive(Clone, Debug)]
pub enum Step {
    /// More bytes are needed.
    More,
    /// The client awaits TLS on the connection, then goes on with [`Handshake::secured`].
    StartTls,
    /// Requests follow.
    Ready(Session),
    /// The connection is over, for a reason that only a log wants.
    End(&'static str),
}

/// The handshake of one client.
#[derive(Debug)]
pub struct Handshake {
    offer: Arc<Offer>,
    state: State,
    is_secure: bool,
    is_fixed: bool,
    no_zeroes: bool,
    mode: Mode,
    /// The export whose meta contexts the client chose, and their ids.
    chosen: Option<(usize, Vec<u32>)>,
    options: u32,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Flags,
    Head,
    Data(OptionHead),
    /// So many bytes of an option that was refused are still to come.
    Skip(u32),
    Tls,
    Over,
}

impl Handshake {
    /// A handshake that begins with the greeting, which is appended to `out`.
    pub fn new(offer: Arc<Offer>, out: &mut Vec<u8>) -> Self {
        let flags = handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES;
        Greeting::Newstyle { flags }.encode(out);
        let (state, mode) = (State::Flags, Mode::Simple);
        let (is_secure, is_fixed, no_zeroes) = (false, false, false);
        Self { offer, state, is_secure, is_fixed, no_zeroes, mode, chosen: None, options: 0 }
    }

    /// How many bytes [`receive`](Self::receive) wants next: at most [`MAX_OPTION_DATA`], and 0 when the
    /// handshake is over or waits for TLS.
    pub fn need(&self) -> usize {
        match self.state {
            State::Flags => 4,
            State::Head => OptionHead::LEN,
            State::Data(head) => head.len as usize,
            State::Skip(left) => left.min(SKIP_STEP) as usize,
            State::Tls | State::Over => 0,
        }
    }

    /// Takes as many bytes as [`need`](Self::need) says and appends the replies to `out`.
    pub fn receive(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Step {
        let step = match self.state {
            State::Flags => self.flags(bytes),
            State::Head => match OptionHead::decode(bytes) {
                Ok((head, _)) => self.head(head, out),
                Err(DecodeError::Invalid(what)) => Step::End(what),
                Err(_) => Step::End("an option that is cut short"),
            },
            State::Data(head) => {
                self.state = State::Head;
                self.option(head, bytes, out)
            }
            State::Skip(left) => {
                let left = left.saturating_sub(bytes.len() as u32);
                self.state = if left == 0 { State::Head } else { State::Skip(left) };
                Step::More
            }
            State::Tls | State::Over => Step::End("bytes that nobody awaits"),
        };
        match step {
            Step::End(_) | Step::Ready(_) => self.state = State::Over,
            Step::StartTls => self.state = State::Tls,
            Step::More => {}
        }
        step
    }

    /// TLS is established. What was negotiated before it is forgotten.
    pub fn secured(&mut self) {
        (self.state, self.is_secure) = (State::Head, true);
        (self.mode, self.chosen) = (Mode::Simple, None);
    }

    fn flags(&mut self, bytes: &[u8]) -> Step {
        let Ok((flags, _)) = decode_client_flags(bytes) else {
            return Step::End("flags that are cut short");
        };
        let (fixed, no_zeroes) =
            (u32::from(handshake_flag::FIXED_NEWSTYLE), u32::from(handshake_flag::NO_ZEROES));
        if flags & !(fixed | no_zeroes) != 0 {
            return Step::End("flags that were not offered");
        }
        (self.is_fixed, self.no_zeroes) = (flags & fixed != 0, flags & no_zeroes != 0);
        self.state = State::Head;
        Step::More
    }

    fn head(&mut self, head: OptionHead, out: &mut Vec<u8>) -> Step {
        self.options += 1;
        if self.options > MAX_OPTIONS {
            return Step::End("options without end");
        }
        if head.len > MAX_OPTION_DATA {
            // Only a fixed newstyle client understands a refusal, and EXPORT_NAME has none.
            if head.len > MAX_SKIPPED || !self.is_fixed || head.option == OptionCode::EXPORT_NAME {
                return Step::End("an option that is too long");
            }
            self.state = State::Skip(head.len);
            return refuse(head.option, ReplyKind::TOO_BIG, "the option is too long", out);
        }
        match head.len {
            0 => self.option(head, &[], out),
            _ => {
                self.state = State::Data(head);
                Step::More
            }
        }
    }

    /// Answers an option with all its data.
    fn option(&mut self, head: OptionHead, data: &[u8], out: &mut Vec<u8>) -> Step {
        let option = head.option;
        let lacks_tls = self.offer.tls == Tls::Required && !self.is_secure;
        if option == OptionCode::EXPORT_NAME {
            return if lacks_tls { Step::End("an export before TLS") } else { self.export_name(data, out) };
        }
        if option == OptionCode::ABORT {
            OptionReply::Ack.encode(option, out);
            return Step::End("the client has aborted");
        }
        if !self.is_fixed {
            return Step::End("an option of a client that understands no reply");
        }
        if option == OptionCode::STARTTLS {
            return self.start_tls(data, out);
        }
        if lacks_tls {
            return refuse(option, ReplyKind::TLS_REQUIRED, "TLS is required", out);
        }
        let takes_none =
            [OptionCode::LIST, OptionCode::STRUCTURED_REPLY, OptionCode::EXTENDED_HEADERS].contains(&option);
        if takes_none && !data.is_empty() {
            return refuse(option, ReplyKind::INVALID, "the option takes no data", out);
        }
        match OptionRequest::decode(option, data) {
            Err(error) => refuse(option, ReplyKind::INVALID, &error.to_string(), out),
            Ok(OptionRequest::Info { go, export, wanted }) => self.info(go, &export, &wanted, out),
            Ok(OptionRequest::MetaContext { set, export, queries }) => {
                self.meta_context(set, &export, &queries, out)
            }
            Ok(_) => match option {
                OptionCode::LIST => self.list(out),
                OptionCode::STRUCTURED_REPLY | OptionCode::EXTENDED_HEADERS => self.headers(option, out),
                _ => refuse(option, ReplyKind::UNSUPPORTED, "unknown option", out),
            },
        }
    }

    fn start_tls(&mut self, data: &[u8], out: &mut Vec<u8>) -> Step {
        let option = OptionCode::STARTTLS;
        if self.offer.tls == Tls::None {
            return refuse(option, ReplyKind::POLICY, "TLS is not configured", out);
        }
        if self.is_secure || !data.is_empty() {
            let what = if self.is_secure { "TLS is established already" } else { "the option takes no data" };
            return refuse(option, ReplyKind::INVALID, what, out);
        }
        OptionReply::Ack.encode(option, out);
        Step::StartTls
    }

    fn list(&self, out: &mut Vec<u8>) -> Step {
        for facts in &self.offer.exports {
            let (name, description) = (facts.name.clone(), facts.description.clone());
            OptionReply::Server { name, description }.encode(OptionCode::LIST, out);
        }
        OptionReply::Ack.encode(OptionCode::LIST, out);
        Step::More
    }

    fn headers(&mut self, option: OptionCode, out: &mut Vec<u8>) -> Step {
        let is_extended = option == OptionCode::EXTENDED_HEADERS;
        match (self.mode, is_extended) {
            (Mode::Extended, false) => {
                let what = "extended headers are negotiated already";
                return refuse(option, ReplyKind::EXTENDED_HEADERS_REQUIRED, what, out);
            }
            (Mode::Extended, true) | (Mode::Structured, false) => {
                return refuse(option, ReplyKind::INVALID, "the option is negotiated already", out);
            }
            (_, true) => self.mode = Mode::Extended,
            (_, false) => self.mode = Mode::Structured,
        }
        OptionReply::Ack.encode(option, out);
        Step::More
    }

    fn export_name(&mut self, data: &[u8], out: &mut Vec<u8>) -> Step {
        let name = match OptionRequest::decode(OptionCode::EXPORT_NAME, data) {
            Ok(OptionRequest::ExportName(name)) => name,
            _ => return Step::End("a name that is none"),
        };
        let Some(index) = self.offer.find(&name) else {
            return Step::End("a name of no export");
        };
        let session = self.session(index);
        NameReply { size: session.facts().size, flags: session.flags() }.encode(self.no_zeroes, out);
        Step::Ready(session)
    }

    fn info(&mut self, go: bool, export: &str, wanted: &[InfoKind], out: &mut Vec<u8>) -> Step {
        let option = if go { OptionCode::GO } else { OptionCode::INFO };
        let Some(index) = self.offer.find(export) else {
            return refuse_unknown(option, export, out);
        };
        let session = self.session(index);
        let facts = session.facts();
        let mut reply = |info| OptionReply::Info(info).encode(option, out);
        if wanted.contains(&InfoKind::NAME) {
            reply(Info::Name(facts.name.clone()));
        }
        if !facts.description.is_empty() {
            reply(Info::Description(facts.description.clone()));
        }
        reply(Info::BlockSizes(facts.sizes));
        reply(Info::Export { size: facts.size, flags: session.flags() });
        OptionReply::Ack.encode(option, out);
        if go { Step::Ready(session) } else { Step::More }
    }

    fn meta_context(&mut self, set: bool, export: &str, queries: &[String], out: &mut Vec<u8>) -> Step {
        let option = if set { OptionCode::SET_META_CONTEXT } else { OptionCode::LIST_META_CONTEXT };
        if set {
            // A refused selection also ends the one before it.
            self.chosen = None;
            if self.mode == Mode::Simple {
                return refuse(option, ReplyKind::INVALID, "structured replies are not negotiated", out);
            }
        }
        let Some(index) = self.offer.find(export) else {
            return refuse_unknown(option, export, out);
        };
        let facts = Arc::clone(&self.offer.exports[index]);
        let mut ids = Vec::new();
        for (id, name) in (0u32..).zip(&facts.contexts) {
            // A list takes the beginnings of names too, up to a colon.
            let is_asked = |query: &String| {
                query == name || !set && query.ends_with(':') && name.starts_with(query.as_str())
            };
            if queries.iter().any(is_asked) || !set && queries.is_empty() {
                let name = name.clone();
                OptionReply::MetaContext { id: if set { id } else { 0 }, name }.encode(option, out);
                ids.push(id);
            }
        }
        if set {
            self.chosen = Some((index, ids));
        }
        OptionReply::Ack.encode(option, out);
        Step::More
    }

    /// The session with the export at `index`. Contexts that were chosen for another one do not count.
    fn session(&self, index: usize) -> Session {
        let ids = self.chosen.as_ref().filter(|(chosen, _)| *chosen == index).map(|(_, ids)| ids.clone());
        Session::new(index, Arc::clone(&self.offer.exports[index]), self.mode, ids.unwrap_or_default())
    }
}

fn refuse(option: OptionCode, kind: ReplyKind, message: &str, out: &mut Vec<u8>) -> Step {
    OptionReply::Error { kind, message: message.to_owned() }.encode(option, out);
    Step::More
}

fn refuse_unknown(option: OptionCode, export: &str, out: &mut Vec<u8>) -> Step {
    // The name is at most 4096 bytes long, and the whole message is cut to that.
    refuse(option, ReplyKind::UNKNOWN, &format!("there is no export '{export}'"), out)
}

/// Bytes that are dropped at once.
const SKIP_STEP: u32 = 4096;
