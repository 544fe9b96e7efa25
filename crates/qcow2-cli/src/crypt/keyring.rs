//! Passwords for the layers of an image: each layer's options name its secret.

use super::prompt;
use crate::args::Objects;
use qcow2_core::format::CryptMethod;
use qcow2_core::{ClusterCipher, EncryptedLayer, HostOffset, Keyring, SectorNumbering, UnlockError};
use qcow2_crypt::luks::{IterationLimit, Volume};
use qcow2_crypt::{CryptError, CryptErrorKind, Secret, legacy};
use std::sync::Arc;

/// What the options of one layer say: the secret, and how much work its header may ask for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct LayerKey {
    /// The identifier of the secret.
    pub(crate) secret: Option<String>,
    /// The limit of iterations, as it was typed.
    pub(crate) max_iterations: Option<String>,
}

/// The options that make a [`LayerKey`], without `encrypt.`.
pub(crate) const KEY_OPTIONS: [&str; 2] = ["key-secret", "max-iterations"];

/// Has the passwords of a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Keys {
    layers: Vec<LayerKey>,
    objects: Objects,
}

impl Keys {
    /// `layers`: what the options say of each layer, from the top.
    pub(crate) fn new(layers: Vec<LayerKey>, objects: &Objects) -> Self {
        Self { layers, objects: objects.clone() }
    }

    /// The same for an overlay on all this, which has none.
    pub(crate) fn above(&self) -> Self {
        let top = std::iter::once(LayerKey::default());
        Self { layers: top.chain(self.layers.iter().cloned()).collect(), objects: self.objects.clone() }
    }

    /// The passwords of what lies below.
    pub(crate) fn below(&self) -> Self {
        Self { layers: self.layers.iter().skip(1).cloned().collect(), objects: self.objects.clone() }
    }

    /// The password of the layer at `depth`, called `name`. Errors: the message.
    pub(crate) fn password(&self, depth: usize, name: &str, container: bool) -> Result<Secret, String> {
        match self.layers.get(depth).and_then(|key| key.secret.as_ref()) {
            Some(id) => self.objects.secret(id),
            None => prompt::ask(name).ok_or_else(|| missing(container)),
        }
    }

    /// How much work the header of the layer at `depth` may ask for. Errors: the message.
    pub(crate) fn limit(&self, depth: usize) -> Result<IterationLimit, String> {
        match self.layers.get(depth).and_then(|key| key.max_iterations.as_ref()) {
            None => Ok(IterationLimit::default()),
            Some(text) => text
                .parse()
                .map(IterationLimit)
                .map_err(|_| "Parameter 'max-iterations' expects a number".to_owned()),
        }
    }
}

impl Keyring for Keys {
    fn unlock(&self, layer: &EncryptedLayer<'_>) -> Result<Arc<dyn ClusterCipher>, UnlockError> {
        let failed = |error: CryptError| UnlockError::new(reason(&error)).with_source(error);
        let at = layer.luks.map_or(HostOffset::default(), |luks| luks.offset);
        let container = layer.method == CryptMethod::Luks && at == HostOffset::default();
        // The header first: a volume that cannot be opened needs no password.
        let volume = match layer.method {
            CryptMethod::Luks => Some(Volume::read(layer.storage, at).map_err(failed)?),
            _ => None,
        };
        let password = self.password(layer.depth, layer.name, container).map_err(UnlockError::new)?;
        let Some(volume) = volume else {
            return Ok(Arc::new(legacy::cipher(&password).map_err(failed)?));
        };
        let limit = self.limit(layer.depth).map_err(UnlockError::new)?;
        let key = volume.unlock(layer.storage, at, &password, limit);
        let key = key.inspect_err(|_| prompt::forget(layer.name)).map_err(failed)?;
        // A container counts sectors from its payload, which is where its disk begins.
        Ok(Arc::new(volume.cipher(&key, SectorNumbering::Host).map_err(failed)?))
    }
}

fn missing(container: bool) -> String {
    let prefix = if container { "" } else { "encrypt." };
    format!("Parameter '{prefix}key-secret' is required for cipher")
}

/// An error of keys in QEMU's words, where it has some.
pub(crate) fn reason(error: &CryptError) -> String {
    match error.kind() {
        CryptErrorKind::WrongPassword => "Invalid password, cannot unlock any keyslot".to_owned(),
        _ => {
            let text = crate::render::qemu_text::chain(error);
            let mut chars = text.chars();
            chars.next().map_or_else(String::new, |first| first.to_uppercase().chain(chars).collect())
        }
    }
}
