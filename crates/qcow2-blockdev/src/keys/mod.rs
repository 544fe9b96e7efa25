//! Secrets, and the keyring that finds those of each layer.

mod authz;
mod keyring;
mod object;
mod secrets;
mod slots;
mod tls;

pub use authz::{Authorization, AuthorizationError};
pub use keyring::{KeyError, Keys, LayerKey};
pub use secrets::{AskPassword, NoSecret, SecretError, Secrets};
pub use slots::{SlotChange, SlotError, SlotOptions};
pub use tls::{TlsEndpoint, TlsObject, TlsObjectError};
