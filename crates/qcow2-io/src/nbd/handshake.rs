//! Connecting to an NBD server and negotiating the export, before the first request.

use super::stream::Stream;
use super::wire::{long, nonsense, word};
use crate::error::OsError;
use qcow2_core::format::text::bytes_of;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::path::PathBuf;
use std::time::Duration;

/// Address of an NBD server.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NbdAddress {
    /// Path of a Unix socket.
    Unix(PathBuf),
    /// A TCP host and port; the port is a decimal number.
    Tcp {
        /// Host name or IP address.
        host: String,
        /// Port number.
        port: String,
    },
}

impl fmt::Display for NbdAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => path.display().fmt(f),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

/// Why the export could not be opened. `Display` uses QEMU's text where QEMU has one.
#[derive(Debug)]
pub struct NbdError {
    message: String,
    server: Option<String>,
    code: Option<i32>,
}

impl NbdError {
    pub(super) fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), server: None, code: None }
    }

    pub(super) fn with_code(mut self, code: i32) -> Self {
        self.code = Some(code);
        self
    }

    /// The message the server sent with its refusal, if any.
    pub fn server_message(&self) -> Option<&str> {
        self.server.as_deref()
    }

    /// The operating system's error number, if there was one.
    pub fn os_code(&self) -> Option<i32> {
        self.code
    }
}

impl From<io::Error> for NbdError {
    fn from(error: io::Error) -> Self {
        let text = match error.kind() {
            io::ErrorKind::TimedOut => error.to_string(),
            io::ErrorKind::UnexpectedEof => {
                "Failed to read data: Unexpected end-of-file before all data were read".into()
            }
            _ => OsError::new(error).to_string(),
        };
        Self::new(text)
    }
}

impl fmt::Display for NbdError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for NbdError {}

impl NbdAddress {
    /// `timeout`: how long connecting may take, to each address that the host has.
    pub(super) fn connect(&self, timeout: Option<Duration>) -> Result<Stream, NbdError> {
        let failed = |error: io::Error| {
            let code = error.raw_os_error();
            let text = format!("Failed to connect to '{self}': {}", OsError::new(error));
            code.into_iter().fold(NbdError::new(text), NbdError::with_code)
        };
        match self {
            Self::Unix(path) if path.as_os_str().is_empty() => {
                Err(failed(io::Error::from_raw_os_error(CONNECTION_REFUSED)))
            }
            Self::Unix(path) => connect_unix(path, timeout).map_err(failed),
            Self::Tcp { host, port } => {
                let addresses = self.resolve(host, port)?;
                connect_tcp(&addresses, timeout).map_err(failed)
            }
        }
    }

    /// Resolves `host` and `port` to socket addresses.
    fn resolve(&self, host: &str, port: &str) -> Result<Vec<SocketAddr>, NbdError> {
        let unknown = |why: &str| NbdError::new(format!("address resolution failed for {self}: {why}"));
        let number = port.parse::<u16>().map_err(|_| unknown("Servname not supported for ai_socktype"))?;
        let addresses = (host, number).to_socket_addrs().map_err(|error| {
            let text = OsError::new(error).to_string();
            unknown(text.strip_prefix("failed to lookup address information: ").unwrap_or(&text))
        })?;
        Ok(addresses.collect())
    }
}

/// `ECONNREFUSED`, the error when a name resolves to no address.
const CONNECTION_REFUSED: i32 = 111;

#[cfg(unix)]
fn connect_unix(path: &std::path::Path, timeout: Option<Duration>) -> io::Result<Stream> {
    Ok(Stream::new(std::os::unix::net::UnixStream::connect(path)?, timeout))
}

#[cfg(not(unix))]
fn connect_unix(_path: &std::path::Path, _timeout: Option<Duration>) -> io::Result<Stream> {
    Err(io::ErrorKind::Unsupported.into())
}

fn connect_tcp(addresses: &[SocketAddr], timeout: Option<Duration>) -> io::Result<Stream> {
    let mut last = io::Error::from_raw_os_error(CONNECTION_REFUSED);
    for address in addresses {
        let connected = match timeout {
            Some(timeout) => TcpStream::connect_timeout(address, timeout),
            None => TcpStream::connect(address),
        };
        match connected {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(Stream::new(stream, timeout));
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Result of the negotiation.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Agreed {
    pub(super) size: u64,
    pub(super) flags: u16,
    pub(super) structured: bool,
    /// Id of the meta context `base:allocation`, if the server has it.
    pub(super) allocation: Option<u32>,
}

/// Runs the fixed newstyle handshake and selects `export`.
pub(super) fn agree(stream: &mut Stream, export: &str) -> Result<Agreed, NbdError> {
    stream.begin();
    if long(stream)? != GREETING || long(stream)? != OPTION_MAGIC {
        return Err(NbdError::new("Bad server magic received"));
    }
    let server = half(stream)?;
    if server & FIXED_NEWSTYLE == 0 {
        return Err(NbdError::new("Server does not support export names"));
    }
    let client = u32::from(server & (FIXED_NEWSTYLE | NO_ZEROES));
    stream.write_all(&client.to_be_bytes())?;
    let structured = ask(stream, STRUCTURED_REPLY, &[], |_, _| Ok(()))?.is_ok();
    let mut allocation = None;
    if structured {
        let mut request = name(export);
        request.extend(1u32.to_be_bytes());
        request.extend(name(ALLOCATION));
        // A refusal is no error: block status is then never requested.
        let _ = ask(stream, SET_META_CONTEXT, &request, |kind, data| {
            if kind == REP_META_CONTEXT && data.get(4..) == Some(ALLOCATION.as_bytes()) {
                allocation = data.first_chunk().map(|id| u32::from_be_bytes(*id));
            }
            Ok(())
        })?;
    }
    let mut request = name(export);
    request.extend(0u16.to_be_bytes());
    let mut told = None;
    let answer = ask(stream, GO, &request, |kind, data| {
        if kind == REP_INFO && data.len() == 12 && data.starts_with(&[0, 0]) {
            let (size, flags) = data[2..].split_at(8);
            let bytes = |part: &[u8]| part.iter().fold(0u64, |sum, &byte| sum << 8 | u64::from(byte));
            told = Some((bytes(size), bytes(flags) as u16));
        }
        Ok(())
    })?;
    answer?;
    let (size, flags) = told.ok_or_else(|| NbdError::new("broken server omitted INFO_EXPORT"))?;
    if size > i64::MAX as u64 {
        return Err(NbdError::new("NBD server's disk is larger than 2^63 - 1 bytes"));
    }
    Ok(Agreed { size, flags, structured, allocation })
}

/// Sends an option and handles every reply up to the final one. The inner error is the server's refusal.
fn ask(
    stream: &mut Stream,
    option: u32,
    data: &[u8],
    mut reply: impl FnMut(u32, &[u8]) -> io::Result<()>,
) -> Result<Result<(), NbdError>, NbdError> {
    let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    stream.write_all(&bytes)?;
    stream.flush()?;
    for _ in 0..MAX_REPLIES {
        if long(stream)? != REPLY_MAGIC || word(stream)? != option {
            return Err(nonsense("no reply to the option").into());
        }
        let (kind, len) = (word(stream)?, word(stream)?);
        if len > MAX_REPLY {
            return Err(nonsense("a reply that is too long").into());
        }
        let mut payload = vec![0; len as usize];
        stream.read_exact(&mut payload)?;
        match kind {
            REP_ACK => return Ok(Ok(())),
            kind if kind & REP_ERROR != 0 => return Ok(Err(refusal(kind, &payload))),
            kind => reply(kind, &payload)?,
        }
    }
    Err(nonsense("replies without end").into())
}

fn refusal(kind: u32, payload: &[u8]) -> NbdError {
    let message = match kind & !REP_ERROR {
        5 => "TLS negotiation required before option 7 (go)",
        6 => "Requested export not available",
        2 => "Denied by server for option 7 (go)",
        8 => "Server requires INFO_BLOCK_SIZE for option 7 (go)",
        _ => "Unsupported reply to option 7 (go)",
    };
    let text = String::from_utf8_lossy(payload).into_owned();
    NbdError { server: Some(text).filter(|text| !text.is_empty()), ..NbdError::new(message) }
}

/// A 32-bit length followed by the bytes of a name.
fn name(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u32).to_be_bytes().to_vec();
    bytes.extend(&*bytes_of(text));
    bytes
}

fn half(from: &mut Stream) -> io::Result<u16> {
    let mut bytes = [0; 2];
    from.read_exact(&mut bytes)?;
    Ok(u16::from_be_bytes(bytes))
}

const GREETING: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const FIXED_NEWSTYLE: u16 = 1;
const NO_ZEROES: u16 = 2;
const GO: u32 = 7;
const STRUCTURED_REPLY: u32 = 8;
const SET_META_CONTEXT: u32 = 10;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_META_CONTEXT: u32 = 4;
const REP_ERROR: u32 = 1 << 31;
const ALLOCATION: &str = "base:allocation";
/// The longest option reply accepted, and how many of them; real servers stay far below both.
const MAX_REPLY: u32 = 64 << 10;
const MAX_REPLIES: usize = 1000;
