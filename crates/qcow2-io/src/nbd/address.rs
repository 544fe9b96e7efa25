//! The address of an NBD server, connecting to it, and why there is no export.

use super::stream::Stream;
use crate::error::OsError;
use qcow2_nbd::blocking::NegotiateError;
use qcow2_nbd::client::HandshakeFailure;
use qcow2_nbd::proto::{OptionCode, ReplyKind};
use std::fmt;
use std::io;
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
    /// The connection failed, not the export: another attempt may succeed.
    temporary: bool,
    needs_tls: bool,
}

impl NbdError {
    pub(super) fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), server: None, code: None, temporary: false, needs_tls: false }
    }

    pub(super) fn with_code(mut self, code: i32) -> Self {
        self.code = Some(code);
        self
    }

    pub(super) fn is_temporary(&self) -> bool {
        self.temporary
    }

    pub(super) fn temporary(self) -> Self {
        Self { temporary: true, ..self }
    }

    /// The message the server sent with its refusal, if any.
    pub fn server_message(&self) -> Option<&str> {
        self.server.as_deref()
    }

    /// True if the server refuses connections that are not encrypted.
    pub fn needs_tls(&self) -> bool {
        self.needs_tls
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
        Self::new(text).temporary()
    }
}

impl From<NegotiateError> for NbdError {
    fn from(error: NegotiateError) -> Self {
        let handshake = match error {
            NegotiateError::Io(error) => return error.into(),
            NegotiateError::Handshake(error) => error,
            error => return Self::new(error.to_string()),
        };
        match handshake.failure() {
            HandshakeFailure::NotNbd => Self::new("Bad server magic received"),
            HandshakeFailure::NoNames => Self::new("Server does not support non-empty export names"),
            HandshakeFailure::NoSize => Self::new("broken server omitted INFO_EXPORT"),
            HandshakeFailure::Refused { option, kind, message } => refusal(*option, *kind, message),
            _ => Self::new(handshake.to_string()),
        }
    }
}

fn refusal(option: OptionCode, kind: ReplyKind, text: &str) -> NbdError {
    let name = match option {
        OptionCode::STARTTLS => "starttls",
        OptionCode::GO => "go",
        OptionCode::STRUCTURED_REPLY => "structured reply",
        OptionCode::SET_META_CONTEXT => "set meta context",
        OptionCode::EXTENDED_HEADERS => "extended headers",
        _ => "<unknown>",
    };
    let option = format!("option {} ({name})", option.0);
    let message = match kind {
        ReplyKind::TLS_REQUIRED => format!("TLS negotiation required before {option}"),
        ReplyKind::UNKNOWN => "Requested export not available".to_owned(),
        ReplyKind::POLICY => format!("Denied by server for {option}"),
        ReplyKind::BLOCK_SIZE_REQUIRED => format!("Server requires INFO_BLOCK_SIZE for {option}"),
        _ => format!("Unsupported reply to {option}"),
    };
    let server = Some(text.to_owned()).filter(|text| !text.is_empty());
    NbdError { server, needs_tls: kind == ReplyKind::TLS_REQUIRED, ..NbdError::new(message) }
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
            code.into_iter().fold(NbdError::new(text).temporary(), NbdError::with_code)
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
