//! What an end of a connection proves itself with, and whom it trusts.

use std::fmt;

/// A certificate and its key.
#[derive(Clone)]
pub struct Identity {
    /// The certificate, and those between it and an authority, as PEM.
    pub certificate: Vec<u8>,
    /// Its private key, not encrypted, as PEM.
    pub key: Vec<u8>,
}

/// Certificates and key of one end.
#[derive(Clone)]
#[non_exhaustive]
pub struct Credentials {
    /// Certificates of the authorities that are trusted, as PEM; at least one.
    pub authorities: Vec<u8>,
    /// What this end proves itself with. A server needs it; a client, only for servers that ask for it.
    pub identity: Option<Identity>,
    /// Whether the peer must have a certificate of one of the authorities, and a server one for its name.
    pub verify_peer: bool,
}

impl Credentials {
    /// The peer is verified; `identity` is still missing.
    pub fn new(authorities: Vec<u8>) -> Self {
        Self { authorities, identity: None, verify_peer: true }
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // No key is shown.
        f.debug_struct("Credentials").field("verify_peer", &self.verify_peer).finish_non_exhaustive()
    }
}

/// Why credentials are of no use.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CredentialsError {
    /// The authorities have no certificate that can be read.
    Authorities,
    /// The identity has no certificate that can be read.
    Certificate,
    /// The identity has no key that can be read; an encrypted one cannot.
    Key,
    /// The key is another certificate's.
    KeyMismatch,
    /// A server without an identity.
    NoIdentity,
    /// The program is built without TLS.
    Unsupported,
    /// Anything else; the text tells what.
    Other(String),
}

impl fmt::Display for CredentialsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Authorities => "there is no authority's certificate that can be read",
            Self::Certificate => "there is no certificate that can be read",
            Self::Key => "there is no private key that can be read",
            Self::KeyMismatch => "the private key is not the certificate's",
            Self::NoIdentity => "a server needs a certificate",
            Self::Unsupported => "this program is built without TLS",
            Self::Other(reason) => reason,
        })
    }
}

impl std::error::Error for CredentialsError {}
