//! TLS that clients must speak, and who of them may stay.

use qcow2_blockdev::{Authorization, Secrets, TlsEndpoint, TlsObject};
use qcow2_io::{NbdTls, TlsCredentials, TlsCredentialsError};
use std::fmt;
use std::sync::Arc;

/// What a client must prove before it is told anything.
#[derive(Clone, Debug)]
pub struct Security {
    #[cfg(feature = "tls")]
    server: qcow2_nbd::tls::Server,
    #[cfg_attr(not(feature = "tls"), allow(dead_code, reason = "there is no security then"))]
    access: Access,
}

/// Whom of the clients that have proved who they are.
#[derive(Clone, Debug, Default)]
pub enum Access {
    /// All of them.
    #[default]
    Anybody,
    /// Those whose certificates have a subject that is allowed.
    Named(Arc<Authorization>),
    /// None.
    Nobody,
}

impl Access {
    /// Whether a client whose certificate has this subject may stay.
    #[cfg_attr(not(feature = "tls"), allow(dead_code, reason = "nobody has a certificate"))]
    fn allows(&self, name: Option<&str>) -> bool {
        match (self, name) {
            (Self::Anybody, _) => true,
            (Self::Named(authorization), Some(name)) => authorization.allows(name),
            (Self::Named(_) | Self::Nobody, _) => false,
        }
    }
}

impl Security {
    /// Clients get an encrypted connection to a server with `credentials`, and any of them may stay that the
    /// credentials let in. Errors: what is wrong with them, or a program that is built without TLS.
    pub fn new(credentials: &TlsCredentials) -> Result<Self, TlsCredentialsError> {
        let access = Access::Anybody;
        #[cfg(feature = "tls")]
        return Ok(Self { server: qcow2_nbd::tls::Server::new(credentials)?, access });
        #[cfg(not(feature = "tls"))]
        {
            let _ = (credentials, access);
            Err(TlsCredentialsError::Unsupported)
        }
    }

    /// The same for fewer clients.
    #[must_use]
    pub fn with_access(mut self, access: Access) -> Self {
        self.access = access;
        self
    }
}

/// Objects that options name. The default names none.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct TlsNames {
    /// Credentials.
    pub credentials: Option<String>,
    /// Who may connect.
    pub authorization: Option<String>,
    /// The name that a server's certificate must be for.
    pub hostname: Option<String>,
    /// As qemu-nbd has it: where there is no such authorization nobody may connect, and where clients prove
    /// nothing none is asked for. Otherwise both are errors.
    pub is_lax: bool,
}

/// Why there is no TLS. `Display` uses QEMU's text where QEMU has one.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SecurityError {
    /// No credentials have this name.
    NoCredentials(String),
    /// Something else has it.
    NotCredentials(String),
    /// They are for the other end.
    OtherEnd(TlsEndpoint),
    /// Algorithms that cannot be chosen.
    Priority(String),
    /// They are of no use.
    Unusable(TlsCredentialsError),
    /// No authorization has this name.
    NoAuthorization(String),
    /// Clients prove nothing that it could go by.
    Unverified,
}

impl fmt::Display for SecurityError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoCredentials(id) => write!(f, "No TLS credentials with id '{id}'"),
            Self::NotCredentials(id) => write!(f, "Object with id '{id}' is not TLS credentials"),
            Self::OtherEnd(TlsEndpoint::Client) => {
                f.write_str("Expected TLS credentials for a server endpoint")
            }
            Self::OtherEnd(TlsEndpoint::Server) => {
                f.write_str("Expected TLS credentials for a client endpoint")
            }
            Self::Priority(priority) => {
                write!(f, "The TLS priority '{priority}' is not supported, only NORMAL is")
            }
            Self::Unusable(error) => error.fmt(f),
            Self::NoAuthorization(id) => write!(f, "No authorization with id '{id}'"),
            Self::Unverified => f.write_str(
                "Authorization needs verify-peer=on: without it clients have no certificates to go by",
            ),
        }
    }
}

impl std::error::Error for SecurityError {}

impl TlsNames {
    /// What a server wants of its clients. `None`: the options name no credentials.
    pub fn server(&self, objects: &Secrets) -> Result<Option<Security>, SecurityError> {
        let Some(object) = self.object(objects, TlsEndpoint::Server)? else { return Ok(None) };
        let security = Security::new(&object.credentials).map_err(SecurityError::Unusable)?;
        let Some(id) = &self.authorization else { return Ok(Some(security)) };
        match object.credentials.verify_peer {
            true => {}
            false if self.is_lax => return Ok(Some(security)),
            false => return Err(SecurityError::Unverified),
        }
        let access = match objects.authorization(id) {
            Some(authorization) => Access::Named(authorization),
            None if self.is_lax => Access::Nobody,
            None => return Err(SecurityError::NoAuthorization(id.clone())),
        };
        Ok(Some(security.with_access(access)))
    }

    /// What a client begins with. `None`: the options name no credentials.
    pub fn client(&self, objects: &Secrets) -> Result<Option<NbdTls>, SecurityError> {
        let Some(object) = self.object(objects, TlsEndpoint::Client)? else { return Ok(None) };
        let mut tls = NbdTls::new(object.credentials.clone());
        tls.hostname.clone_from(&self.hostname);
        Ok(Some(tls))
    }

    fn object(&self, objects: &Secrets, end: TlsEndpoint) -> Result<Option<Arc<TlsObject>>, SecurityError> {
        let Some(id) = &self.credentials else { return Ok(None) };
        let missing = || match objects.has(id) {
            true => SecurityError::NotCredentials(id.clone()),
            false => SecurityError::NoCredentials(id.clone()),
        };
        let object = objects.tls(id).ok_or_else(missing)?;
        if object.endpoint != end {
            return Err(SecurityError::OtherEnd(object.endpoint));
        }
        match object.other_priority() {
            Some(priority) => Err(SecurityError::Priority(priority.to_owned())),
            None => Ok(Some(object)),
        }
    }
}

#[cfg(feature = "tls")]
mod encrypted {
    use super::Security;
    use qcow2_nbd::tls::{TlsError, TlsReader, TlsWriter};
    use std::io::{self, Read, Write};

    /// Both halves of an encrypted connection.
    pub(in crate::nbd) struct Encrypted<R, W: Write> {
        pub(in crate::nbd) reader: TlsReader<R>,
        pub(in crate::nbd) writer: TlsWriter<W>,
    }

    impl Security {
        /// Runs the handshake of TLS. Errors: it failed, or the client may not stay.
        pub(in crate::nbd) fn establish<R: Read, W: Write>(
            &self,
            incoming: R,
            outgoing: W,
        ) -> io::Result<Encrypted<R, W>> {
            let failed = |error| match error {
                TlsError::Io(error) => error,
                error => io::Error::new(io::ErrorKind::PermissionDenied, error.to_string()),
            };
            let (reader, writer) = self.server.handshake(incoming, outgoing).map_err(failed)?;
            match self.access.allows(reader.peer_name().as_deref()) {
                true => Ok(Encrypted { reader, writer }),
                false => Err(io::ErrorKind::PermissionDenied.into()),
            }
        }
    }

    impl<R: Read, W: Write> Read for Encrypted<R, W> {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            self.reader.read(buf)
        }
    }

    impl<R, W: Write> Write for Encrypted<R, W> {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            self.writer.write(buf)
        }

        fn flush(&mut self) -> io::Result<()> {
            self.writer.flush()
        }
    }
}
