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
    /// Whether no password is wanted: nothing is read.
    sealed: bool,
}

impl Keys {
    /// `layers`: what the options say of each layer, from the top.
    pub(crate) fn new(layers: Vec<LayerKey>, objects: &Objects) -> Self {
        Self { layers, objects: objects.clone(), sealed: false }
    }

    /// None, for layers that are opened to learn their size and not their content.
    pub(crate) fn sealed() -> Self {
        Self { sealed: true, ..Self::new(Vec::new(), &Objects::default()) }
    }

    /// The same for an overlay on all this, which has none.
    pub(crate) fn above(&self) -> Self {
        let top = std::iter::once(LayerKey::default());
        Self { layers: top.chain(self.layers.iter().cloned()).collect(), ..self.clone() }
    }

    /// The passwords of what lies below.
    pub(crate) fn below(&self) -> Self {
        Self { layers: self.layers.iter().skip(1).cloned().collect(), ..self.clone() }
    }

    /// Whether the options of the layer at `depth` name a secret.
    fn names_secret(&self, depth: usize) -> bool {
        self.layers.get(depth).is_some_and(|key| key.secret.is_some())
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
        let volume = match layer.method {
            CryptMethod::Luks => Some(Volume::read(layer.storage, at)),
            _ => None,
        };
        if self.sealed {
            volume.transpose().map_err(failed)?;
            return Ok(Arc::new(Sealed));
        }
        // Nobody is asked for the password of a volume that cannot be opened.
        let readable = !matches!(volume, Some(Err(_)));
        let password = match readable || self.names_secret(layer.depth) || !prompt::is_possible() {
            true => Some(self.password(layer.depth, layer.name, container).map_err(UnlockError::new)?),
            false => None,
        };
        let volume = volume.transpose().map_err(failed)?;
        let password = password.ok_or_else(|| UnlockError::new(missing(container)))?;
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

/// Stands where a cipher would, for a disk that is never read.
struct Sealed;

impl ClusterCipher for Sealed {
    fn numbering(&self) -> SectorNumbering {
        SectorNumbering::Host
    }

    fn encrypt(&self, _first_sector: u64, _data: &mut [u8]) {}

    fn decrypt(&self, _first_sector: u64, _data: &mut [u8]) {}
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
