//! Clients and servers: who begins sessions.

use super::session::{TlsReader, TlsWriter, handshake};
use super::verify::PeerCheck;
use super::{Credentials, CredentialsError, Identity, TlsError};
use rustls::client::Resumption;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{
    CertificateError, ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection,
};
use std::fmt;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

/// Clients with the same credentials.
#[derive(Clone)]
pub struct Client {
    config: Arc<ClientConfig>,
    verify_peer: bool,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("verify_peer", &self.verify_peer).finish_non_exhaustive()
    }
}

impl Client {
    /// Reads `credentials`. Errors: what is wrong with them.
    pub fn new(credentials: &Credentials) -> Result<Self, CredentialsError> {
        let provider = Arc::new(ring::default_provider());
        let roots = authorities(credentials)?;
        let check = PeerCheck {
            roots: credentials.verify_peer.then_some(roots),
            algorithms: provider.signature_verification_algorithms,
        };
        let check: Arc<dyn ServerCertVerifier> = Arc::new(check);
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(check);
        let mut config = match &credentials.identity {
            None => builder.with_no_client_auth(),
            Some(identity) => {
                let (certificates, key) = identity.read()?;
                builder.with_client_auth_cert(certificates, key)?
            }
        };
        config.resumption = Resumption::disabled();
        Ok(Self { config: Arc::new(config), verify_peer: credentials.verify_peer })
    }

    /// Runs the handshake of a client. `name`: the host name or IP address that the server's certificate must
    /// be for; needed if the peer is verified. Errors: the connection failed, or one end refused the other;
    /// with TLS 1.3 a server's refusal may come with the first read only.
    pub fn handshake<R: Read, W: Write>(
        &self,
        name: Option<&str>,
        incoming: R,
        outgoing: W,
    ) -> Result<(TlsReader<R>, TlsWriter<W>), TlsError> {
        let server = match name {
            Some(name) => ServerName::try_from(name.to_owned()).ok(),
            None => None,
        };
        let server = match server {
            Some(server) => server,
            None if self.verify_peer => {
                return Err(name.map_or(TlsError::NoName, |name| TlsError::WrongName(name.to_owned())));
            }
            // Nothing looks at it, and the server is not told.
            None => ServerName::from(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
        };
        let name = name.unwrap_or_default();
        let session =
            ClientConnection::new(self.config.clone(), server).map_err(|error| TlsError::of(&error, name))?;
        handshake(session.into(), name, incoming, outgoing)
    }
}

/// Servers with the same credentials.
#[derive(Clone)]
pub struct Server {
    config: Arc<ServerConfig>,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").finish_non_exhaustive()
    }
}

impl Server {
    /// Reads `credentials`, which must have an identity. Errors: what is wrong with them.
    pub fn new(credentials: &Credentials) -> Result<Self, CredentialsError> {
        let provider = Arc::new(ring::default_provider());
        let roots = authorities(credentials)?;
        let identity = credentials.identity.as_ref().ok_or(CredentialsError::NoIdentity)?;
        let (certificates, key) = identity.read()?;
        let builder =
            ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
        let builder = match credentials.verify_peer {
            false => builder.with_no_client_auth(),
            true => builder.with_client_cert_verifier(client_check(roots, provider)?),
        };
        let mut config = builder.with_single_cert(certificates, key)?;
        // Nobody resumes a session.
        config.send_tls13_tickets = 0;
        Ok(Self { config: Arc::new(config) })
    }

    /// Runs the handshake of a server. Errors: the connection failed, or one end refused the other.
    pub fn handshake<R: Read, W: Write>(
        &self,
        incoming: R,
        outgoing: W,
    ) -> Result<(TlsReader<R>, TlsWriter<W>), TlsError> {
        let session = ServerConnection::new(self.config.clone()).map_err(|error| TlsError::of(&error, ""))?;
        handshake(session.into(), "", incoming, outgoing)
    }
}

fn client_check(
    roots: RootCertStore,
    provider: Arc<CryptoProvider>,
) -> Result<Arc<dyn rustls::server::danger::ClientCertVerifier>, CredentialsError> {
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
        .build()
        .map_err(|error| CredentialsError::Other(error.to_string()))
}

fn authorities(credentials: &Credentials) -> Result<RootCertStore, CredentialsError> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&credentials.authorities) {
        let certificate = certificate.map_err(|_| CredentialsError::Authorities)?;
        roots.add(certificate).map_err(|_| CredentialsError::Authorities)?;
    }
    if roots.is_empty() { Err(CredentialsError::Authorities) } else { Ok(roots) }
}

impl Identity {
    fn read(&self) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), CredentialsError> {
        let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&self.certificate).collect();
        let certificates = certificates.map_err(|_| CredentialsError::Certificate)?;
        if certificates.is_empty() {
            return Err(CredentialsError::Certificate);
        }
        let key = PrivateKeyDer::from_pem_slice(&self.key).map_err(|_| CredentialsError::Key)?;
        Ok((certificates, key))
    }
}

impl From<rustls::Error> for CredentialsError {
    fn from(error: rustls::Error) -> Self {
        match error {
            rustls::Error::InconsistentKeys(_) => Self::KeyMismatch,
            // What the provider cannot use as a key.
            rustls::Error::General(_) => Self::Key,
            rustls::Error::InvalidCertificate(_) => Self::Certificate,
            other => Self::Other(other.to_string()),
        }
    }
}

impl TlsError {
    /// `name`: whom the certificate had to be for.
    pub(super) fn of(error: &rustls::Error, name: &str) -> Self {
        use CertificateError as E;
        let rustls::Error::InvalidCertificate(certificate) = error else {
            return Self::Failed(error.to_string());
        };
        match certificate {
            E::UnknownIssuer => Self::UnknownIssuer,
            E::NotValidForName | E::NotValidForNameContext { .. } => Self::WrongName(name.to_owned()),
            E::Expired | E::ExpiredContext { .. } => Self::Expired,
            E::NotValidYet | E::NotValidYetContext { .. } => Self::NotValidYet,
            _ => Self::Failed(error.to_string()),
        }
    }
}
