//! Secrets, and the keyring that finds those of each layer.

mod keyring;
mod secrets;

pub use keyring::{KeyError, Keys, LayerKey};
pub use secrets::{AskPassword, SecretError, Secrets};
