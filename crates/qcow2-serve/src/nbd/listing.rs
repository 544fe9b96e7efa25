//! What another server offers: a client that asks and leaves.

use super::listener::Address;
use super::socket::Socket;
#[cfg(feature = "tls")]
use qcow2_io::NbdError;
use qcow2_io::NbdTls;
use qcow2_nbd::proto::{
    BlockSizes, DecodeError, Greeting, Info, InfoKind, MAX_OPTION_DATA, Mode, OptionCode, OptionReply,
    OptionReplyHead, OptionRequest, encode_client_flags, handshake_flag,
};
use std::fmt;
use std::io::{self, Read, Write};
use std::net::TcpStream;

/// An export of another server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// A text for people.
    pub description: Option<String>,
    /// Size in bytes and transmission flags, if the server has told them.
    pub export: Option<(u64, u16)>,
    /// Limits of a request's size, if the server has told them.
    pub sizes: Option<BlockSizes>,
    /// The headers that the server can.
    pub mode: Mode,
    /// Names of its meta contexts.
    pub contexts: Vec<String>,
}

/// Why there is no list.
#[derive(Debug)]
#[non_exhaustive]
pub enum ListError {
    /// Nobody listens there.
    Connect(Address, io::Error),
    /// The connection failed or ended.
    Io(io::Error),
    /// The server speaks another protocol, or breaks it.
    Protocol(DecodeError),
    /// The server refuses an option, with its text.
    Refused(OptionCode, String),
    /// There is no TLS with the server, for this reason.
    Tls(String),
}

impl fmt::Display for ListError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect(Address::Unix(path), error) => {
                write!(f, "cannot connect to {}: {error}", path.display())
            }
            Self::Connect(Address::Tcp { host, port }, error) => {
                write!(f, "cannot connect to {host}:{port}: {error}")
            }
            Self::Connect(Address::HandedOver(_), error) => error.fmt(f),
            Self::Io(error) => error.fmt(f),
            Self::Protocol(error) => error.fmt(f),
            Self::Tls(reason) => f.write_str(reason),
            Self::Refused(option, text) => write!(f, "the server refuses option {}: {text}", option.0),
        }
    }
}

impl std::error::Error for ListError {}

impl From<io::Error> for ListError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<DecodeError> for ListError {
    fn from(error: DecodeError) -> Self {
        Self::Protocol(error)
    }
}

/// Asks the server at `address` for its exports and what they are, over TLS if `tls` is given.
pub fn list(address: &Address, tls: Option<&NbdTls>) -> Result<Vec<Listed>, ListError> {
    let failed = |error| ListError::Connect(address.clone(), error);
    let socket = match address {
        Address::Tcp { host, port } => TcpStream::connect((host.as_str(), *port)).map(Socket::Tcp),
        #[cfg(unix)]
        Address::Unix(path) => std::os::unix::net::UnixStream::connect(path).map(Socket::Unix),
        #[cfg(not(unix))]
        Address::Unix(_) => Err(io::ErrorKind::Unsupported.into()),
        Address::HandedOver(_) => Err(io::ErrorKind::Unsupported.into()),
    };
    let socket = socket.map_err(failed)?;
    let mut stream = &socket;
    greet(&mut stream)?;
    let Some(tls) = tls else { return list_on(&mut stream) };
    ask(&mut stream, &OptionRequest::plain(OptionCode::STARTTLS), &mut |_| ())?;
    let host = match (&tls.hostname, address) {
        (Some(name), _) => Some(&**name),
        (None, Address::Tcp { host, .. }) => Some(&**host),
        (None, Address::Unix(_) | Address::HandedOver(_)) => None,
    };
    list_encrypted(&socket, tls, host)
}

#[cfg(feature = "tls")]
fn list_encrypted(socket: &Socket, tls: &NbdTls, host: Option<&str>) -> Result<Vec<Listed>, ListError> {
    let client =
        qcow2_nbd::tls::Client::new(&tls.credentials).map_err(|error| ListError::Tls(error.to_string()))?;
    let (mut reader, mut writer) = client
        .handshake(host, socket, socket)
        .map_err(|error| ListError::Tls(NbdError::from(error).to_string()))?;
    list_on(&mut Both { reader: &mut reader, writer: &mut writer })
}

#[cfg(not(feature = "tls"))]
fn list_encrypted(_: &Socket, _: &NbdTls, _: Option<&str>) -> Result<Vec<Listed>, ListError> {
    Err(ListError::Io(io::ErrorKind::Unsupported.into()))
}

/// The two halves of a connection.
#[cfg(feature = "tls")]
struct Both<'a, R, W> {
    reader: &'a mut R,
    writer: &'a mut W,
}

#[cfg(feature = "tls")]
impl<R: Read, W> Read for Both<'_, R, W> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.reader.read(buf)
    }
}

#[cfg(feature = "tls")]
impl<R, W: Write> Write for Both<'_, R, W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.writer.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
}

/// Answers the server's greeting.
fn greet(stream: &mut (impl Read + Write)) -> Result<(), ListError> {
    let mut greeting = [0; GREETING];
    stream.read_exact(&mut greeting)?;
    let Greeting::Newstyle { flags } = Greeting::decode(&greeting)?.0 else {
        return Err(DecodeError::Invalid("an old-style server has no list").into());
    };
    let mut out = Vec::new();
    let known = handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES;
    encode_client_flags(u32::from(flags & known), &mut out);
    Ok(stream.write_all(&out)?)
}

fn list_on(stream: &mut (impl Read + Write)) -> Result<Vec<Listed>, ListError> {
    let mode = negotiate_mode(stream)?;
    let mut exports = Vec::new();
    ask(stream, &OptionRequest::plain(OptionCode::LIST), &mut |reply| {
        if let OptionReply::Server { name, description } = reply {
            let description = Some(description).filter(|text| !text.is_empty());
            exports.push(Listed { name, description, mode, ..Listed::default() });
        }
    })?;
    for export in &mut exports {
        describe(stream, export)?;
    }
    let mut out = Vec::new();
    OptionRequest::plain(OptionCode::ABORT).encode(&mut out);
    // The answer to a farewell is of no use.
    let _ = stream.write_all(&out);
    Ok(exports)
}

/// The best headers that the server can.
fn negotiate_mode(stream: &mut (impl Read + Write)) -> Result<Mode, ListError> {
    let options =
        [(OptionCode::EXTENDED_HEADERS, Mode::Extended), (OptionCode::STRUCTURED_REPLY, Mode::Structured)];
    for (option, mode) in options {
        match ask(stream, &OptionRequest::plain(option), &mut |_| ()) {
            Ok(()) => return Ok(mode),
            Err(ListError::Refused(..)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Mode::Simple)
}

/// Adds what the server tells of an export; what it refuses stays unknown.
fn describe(stream: &mut (impl Read + Write), export: &mut Listed) -> Result<(), ListError> {
    let name = export.name.clone();
    let request = OptionRequest::Info { go: false, export: name.clone(), wanted: vec![InfoKind::BLOCK_SIZE] };
    let told = ask(stream, &request, &mut |reply| match reply {
        OptionReply::Info(Info::Export { size, flags }) => export.export = Some((size, flags)),
        OptionReply::Info(Info::Description(text)) => export.description = Some(text),
        OptionReply::Info(Info::BlockSizes(sizes)) => export.sizes = Some(sizes),
        _ => {}
    });
    match told {
        Err(ListError::Refused(..)) => return Ok(()),
        told => told?,
    }
    if export.mode == Mode::Simple {
        return Ok(());
    }
    let request = OptionRequest::MetaContext { set: false, export: name, queries: Vec::new() };
    let told = ask(stream, &request, &mut |reply| {
        if let OptionReply::MetaContext { name, .. } = reply {
            export.contexts.push(name);
        }
    });
    match told {
        Err(ListError::Refused(..)) => Ok(()),
        told => told,
    }
}

/// Sends an option and calls `take` with each reply before the last one. Errors: a refusal too.
fn ask(
    stream: &mut (impl Read + Write),
    request: &OptionRequest,
    take: &mut dyn FnMut(OptionReply),
) -> Result<(), ListError> {
    let mut bytes = Vec::new();
    request.encode(&mut bytes);
    stream.write_all(&bytes)?;
    for _ in 0..MAX_REPLIES {
        let mut head = [0; OptionReplyHead::LEN];
        stream.read_exact(&mut head)?;
        let (head, _) = OptionReplyHead::decode(&head)?;
        if head.option != request.option() || head.len > MAX_OPTION_DATA {
            return Err(DecodeError::Invalid("a reply to another option, or one without measure").into());
        }
        bytes.resize(head.len as usize, 0);
        stream.read_exact(&mut bytes)?;
        match OptionReply::decode(head.kind, &bytes)? {
            OptionReply::Ack => return Ok(()),
            OptionReply::Error { message, .. } => return Err(ListError::Refused(head.option, message)),
            reply => take(reply),
        }
    }
    Err(DecodeError::Invalid("replies without end").into())
}

/// Bytes of a newstyle greeting.
const GREETING: usize = 18;
/// Replies to one option, at most; each is at most [`MAX_OPTION_DATA`] long.
const MAX_REPLIES: usize = 4096;
