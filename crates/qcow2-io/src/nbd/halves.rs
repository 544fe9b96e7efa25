//! The two halves of a connection, encrypted or not.

use super::NbdError;
use super::stream::{Sending, Stream};
use qcow2_nbd::blocking::Incoming;
#[cfg(feature = "tls")]
use qcow2_nbd::tls::{Client, TlsError, TlsReader, TlsWriter};
use qcow2_nbd::tls::{Credentials, CredentialsError};
use std::io::{self, Read, Write};
use std::time::Duration;

/// How a connection is encrypted.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct NbdTls {
    /// Certificates and key.
    pub credentials: Credentials,
    /// The name that the server's certificate must be for; `None`: the host that is connected to, which a
    /// Unix socket does not have.
    pub hostname: Option<String>,
}

impl NbdTls {
    /// For the host that is connected to.
    pub fn new(credentials: Credentials) -> Self {
        Self { credentials, hostname: None }
    }

    /// Checks that a client or a server could use `credentials`. Errors: what is wrong with them, or a
    /// program that is built without TLS.
    pub fn check(credentials: &Credentials) -> Result<(), CredentialsError> {
        #[cfg(feature = "tls")]
        return Client::new(credentials).map(|_| ());
        #[cfg(not(feature = "tls"))]
        {
            let _ = credentials;
            Err(CredentialsError::Unsupported)
        }
    }
}

/// The half that is read.
pub(super) enum Receiving {
    Plain(Stream),
    #[cfg(feature = "tls")]
    Encrypted(TlsReader<Stream>),
}

/// The half that is written.
pub(super) enum Outgoing {
    Plain(Sending),
    #[cfg(feature = "tls")]
    Encrypted(TlsWriter<Sending>),
}

/// Both halves.
pub(super) struct Halves {
    pub(super) incoming: Receiving,
    pub(super) outgoing: Outgoing,
    /// Whether both can be used at the same time.
    pub(super) at_once: bool,
}

impl Halves {
    pub(super) fn plain(stream: Stream) -> io::Result<Self> {
        let (incoming, outgoing, at_once) = stream.split()?;
        Ok(Self { incoming: Receiving::Plain(incoming), outgoing: Outgoing::Plain(outgoing), at_once })
    }

    /// Runs the handshake of TLS on `stream`, within the time of one answer.
    #[cfg(feature = "tls")]
    pub(super) fn encrypted(stream: Stream, tls: &NbdTls) -> Result<Self, NbdError> {
        let client = Client::new(&tls.credentials).map_err(|error| NbdError::new(error.to_string()))?;
        let (mut incoming, outgoing, at_once) = stream.split()?;
        incoming.begin();
        let (incoming, outgoing) = client.handshake(tls.hostname.as_deref(), incoming, outgoing)?;
        let (incoming, outgoing) = (Receiving::Encrypted(incoming), Outgoing::Encrypted(outgoing));
        Ok(Self { incoming, outgoing, at_once })
    }

    #[cfg(not(feature = "tls"))]
    pub(super) fn encrypted(_stream: Stream, _tls: &NbdTls) -> Result<Self, NbdError> {
        Err(NbdError::new(CredentialsError::Unsupported.to_string()))
    }

    /// Sets another time for each answer.
    pub(super) fn set_timeout(&mut self, timeout: Option<Duration>) {
        match &mut self.incoming {
            Receiving::Plain(stream) => stream.set_timeout(timeout),
            #[cfg(feature = "tls")]
            Receiving::Encrypted(reader) => reader.get_mut().set_timeout(timeout),
        }
        match &mut self.outgoing {
            Outgoing::Plain(sending) => sending.set_timeout(timeout),
            #[cfg(feature = "tls")]
            Outgoing::Encrypted(writer) => writer.get_mut().set_timeout(timeout),
        }
    }
}

impl Read for Halves {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.incoming.read(buf)
    }
}

impl Write for Halves {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.outgoing.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.outgoing.flush()
    }
}

impl Read for Receiving {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.read(buf),
            #[cfg(feature = "tls")]
            Self::Encrypted(reader) => reader.read(buf),
        }
    }
}

impl Incoming for Receiving {
    fn begin(&mut self) {
        match self {
            Self::Plain(stream) => stream.begin(),
            #[cfg(feature = "tls")]
            Self::Encrypted(reader) => reader.begin(),
        }
    }
}

impl Write for Outgoing {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(sending) => sending.write(buf),
            #[cfg(feature = "tls")]
            Self::Encrypted(writer) => writer.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(sending) => sending.flush(),
            #[cfg(feature = "tls")]
            Self::Encrypted(writer) => writer.flush(),
        }
    }
}

/// QEMU's words.
#[cfg(feature = "tls")]
impl From<TlsError> for NbdError {
    fn from(error: TlsError) -> Self {
        Self::new(match error {
            TlsError::Io(error) if error.kind() == io::ErrorKind::TimedOut => return error.into(),
            TlsError::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                "TLS handshake failed: The TLS connection was non-properly terminated.".to_owned()
            }
            TlsError::UnknownIssuer => "The certificate hasn't got a known issuer".to_owned(),
            TlsError::WrongName(name) => format!("Certificate does not match the hostname {name}"),
            TlsError::NoName => "No hostname for certificate validation".to_owned(),
            TlsError::Expired | TlsError::NotValidYet => "The certificate is not trusted".to_owned(),
            error => format!("TLS handshake failed: {error}"),
        })
    }
}
