//! Derives the keys of all layers of an image from passwords.

use qcow2_core::format::CryptMethod;
use qcow2_core::{ClusterCipher, EncryptedLayer, Keyring, SectorNumbering, UnlockError};
use qcow2_crypt::luks::{IterationLimit, Volume};
use qcow2_crypt::{CryptError, Secret, legacy};
use std::fmt;
use std::sync::Arc;

/// A callback: returns the password of the layer with this name.
type Ask = Arc<dyn Fn(&str) -> Option<Vec<u8>> + Send + Sync>;

/// The passwords of an image and its backing files.
#[derive(Clone, Default)]
pub(crate) struct Passwords {
    /// Password of the image itself, if it differs from those of its backing files.
    top: Option<Secret>,
    /// Callback for all other passwords.
    ask: Option<Ask>,
}

impl Passwords {
    /// The same password for every encrypted layer.
    pub(crate) fn one(password: Vec<u8>) -> Self {
        let secret = Secret::new(password);
        Self::asking(move |_| Some(secret.bytes().to_vec()))
    }

    pub(crate) fn asking(ask: impl Fn(&str) -> Option<Vec<u8>> + Send + Sync + 'static) -> Self {
        Self { top: None, ask: Some(Arc::new(ask)) }
    }

    /// The same passwords, except `top` for the image itself.
    pub(crate) fn with_top(self, top: Option<Secret>) -> Self {
        Self { top, ..self }
    }

    /// A keyring with these passwords; `None` if there are none.
    pub(crate) fn keyring(&self) -> Option<Arc<dyn Keyring>> {
        let any = self.top.is_some() || self.ask.is_some();
        any.then(|| Arc::new(self.clone()) as Arc<dyn Keyring>)
    }

    fn of(&self, layer: &EncryptedLayer<'_>) -> Result<Secret, UnlockError> {
        let known = self.top.clone().filter(|_| layer.depth == 0);
        known.or_else(|| self.ask.as_ref()?(layer.name).map(Secret::new)).ok_or_else(|| {
            UnlockError::new(format!("there is no password for '{}'", layer.name.escape_debug()))
        })
    }
}

impl Keyring for Passwords {
    fn unlock(&self, layer: &EncryptedLayer<'_>) -> Result<Arc<dyn ClusterCipher>, UnlockError> {
        let failed = |error: CryptError| {
            UnlockError::new(format!("unlocking '{}'", layer.name.escape_debug())).with_source(error)
        };
        if layer.method == CryptMethod::Aes {
            return Ok(Arc::new(legacy::cipher(&self.of(layer)?).map_err(failed)?));
        }
        let at = layer.luks.map(|luks| luks.offset).unwrap_or_default();
        // Read the header first, so that nobody is prompted for the password of a volume that cannot be
        // opened.
        let volume = Volume::read(layer.storage, at).map_err(failed)?;
        let password = self.of(layer)?;
        let key = volume.unlock(layer.storage, at, &password, IterationLimit::default()).map_err(failed)?;
        Ok(Arc::new(volume.cipher(&key, SectorNumbering::Host).map_err(failed)?))
    }
}

impl fmt::Debug for Passwords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.keyring().is_some() { "Passwords(..)" } else { "Passwords(none)" })
    }
}
