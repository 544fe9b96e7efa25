//! Passwords for the layers of an image: each layer's options name its secret.

use super::secrets::{NoSecret, Secrets};
use crate::driver::KEY_OPTIONS;
use crate::tree::{Backing, Node, Options};
use qcow2_core::format::CryptMethod;
use qcow2_core::{ClusterCipher, EncryptedLayer, HostOffset, Keyring, SectorNumbering, UnlockError};
use qcow2_crypt::luks::{IterationLimit, Volume};
use qcow2_crypt::{CryptError, Secret, legacy};
use std::error::Error;
use std::fmt;
use std::sync::Arc;

/// What the options of one layer say: the secret, and how much work its header may ask for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LayerKey {
    /// The identifier of the secret.
    pub secret: Option<String>,
    /// The limit of iterations, as it was typed.
    pub max_iterations: Option<String>,
}

/// Why a layer stays locked.
#[derive(Debug)]
#[non_exhaustive]
pub enum KeyError {
    /// The options name a secret that there is not, or that is no password.
    NoSecret(NoSecret),
    /// No option names the secret, and nobody can be asked.
    NotNamed {
        /// Whether it is that of a LUKS container, not of a qcow2 image.
        container: bool,
    },
    /// The limit of iterations is not a number.
    BadLimit(String),
    /// The password does not fit, or the header is damaged.
    Crypt(CryptError),
}

impl fmt::Display for KeyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSecret(error) => error.fmt(f),
            Self::NotNamed { .. } => f.write_str("no option names the secret of the layer"),
            Self::BadLimit(text) => write!(f, "option 'max-iterations' takes a number, not '{text}'"),
            Self::Crypt(error) => error.fmt(f),
        }
    }
}

impl Error for KeyError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Crypt(error) => error.source(),
            _ => None,
        }
    }
}

/// The keyring of a chain: each layer's options name its secret; where they name none, somebody may be asked.
#[derive(Clone, Debug)]
pub struct Keys {
    layers: Vec<LayerKey>,
    secrets: Secrets,
    /// Whether no password is wanted: nothing is read.
    sealed: bool,
}

impl Keys {
    /// `layers`: what the options say of each layer, from the top.
    pub fn new(layers: Vec<LayerKey>, secrets: &Secrets) -> Self {
        Self { layers, secrets: secrets.clone(), sealed: false }
    }

    /// Those of the layers that `top` and the options for its backing files describe.
    pub(crate) fn of(top: &Node, secrets: &Secrets) -> Self {
        let below = top.backing.layers().filter_map(|layer| match layer {
            Backing::Given(options) => Some(options),
            Backing::AsNamed | Backing::Nothing | Backing::Empty => None,
        });
        let key = |options: &Options| {
            let option = |key: &str| options.text(&format!("encrypt.{key}")).or_else(|| options.text(key));
            LayerKey { secret: option(KEY_OPTIONS[0]), max_iterations: option(KEY_OPTIONS[1]) }
        };
        let layers = std::iter::once(key(&top.options)).chain(below.map(|options| key(&options))).collect();
        Self::new(layers, secrets)
    }

    /// None, for layers that are opened to learn their size and not their content.
    pub fn sealed() -> Self {
        Self { sealed: true, ..Self::new(Vec::new(), &Secrets::default()) }
    }

    /// All secrets, whatever layer they belong to.
    pub(crate) fn secrets(&self) -> &Secrets {
        &self.secrets
    }

    /// The same for an overlay on all this, which has none.
    pub fn above(&self) -> Self {
        let top = std::iter::once(LayerKey::default());
        Self { layers: top.chain(self.layers.iter().cloned()).collect(), ..self.clone() }
    }

    /// The passwords of what lies below.
    pub fn below(&self) -> Self {
        Self { layers: self.layers.iter().skip(1).cloned().collect(), ..self.clone() }
    }

    /// Whether the options of the layer at `depth` name a secret.
    fn names_secret(&self, depth: usize) -> bool {
        self.layers.get(depth).is_some_and(|key| key.secret.is_some())
    }

    /// The password of the layer at `depth`, called `name`. `container`: the layer is a LUKS container.
    pub fn password(&self, depth: usize, name: &str, container: bool) -> Result<Secret, KeyError> {
        match self.layers.get(depth).and_then(|key| key.secret.as_ref()) {
            Some(id) => self.secrets.password(id).map_err(KeyError::NoSecret),
            None => self.secrets.ask(name).ok_or(KeyError::NotNamed { container }),
        }
    }

    /// How much work the header of the layer at `depth` may ask for.
    pub fn limit(&self, depth: usize) -> Result<IterationLimit, KeyError> {
        match self.layers.get(depth).and_then(|key| key.max_iterations.as_ref()) {
            None => Ok(IterationLimit::default()),
            Some(text) => text.parse().map(IterationLimit).map_err(|_| KeyError::BadLimit(text.clone())),
        }
    }
}

impl Keyring for Keys {
    fn unlock(&self, layer: &EncryptedLayer<'_>) -> Result<Arc<dyn ClusterCipher>, UnlockError> {
        self.cipher(layer).map_err(|error| UnlockError::new("the layer stays locked").with_source(error))
    }
}

impl Keys {
    fn cipher(&self, layer: &EncryptedLayer<'_>) -> Result<Arc<dyn ClusterCipher>, KeyError> {
        let at = layer.luks.map_or(HostOffset::default(), |luks| luks.offset);
        let container = layer.method == CryptMethod::Luks && at == HostOffset::default();
        let volume = match layer.method {
            CryptMethod::Luks => Some(Volume::read(layer.storage, at)),
            _ => None,
        };
        if self.sealed {
            volume.transpose().map_err(KeyError::Crypt)?;
            return Ok(Arc::new(Sealed));
        }
        // Nobody is asked for the password of a volume that cannot be opened.
        let readable = !matches!(volume, Some(Err(_)));
        let password = match readable || self.names_secret(layer.depth) || !self.secrets.can_ask() {
            true => Some(self.password(layer.depth, layer.name, container)?),
            false => None,
        };
        let volume = volume.transpose().map_err(KeyError::Crypt)?;
        let password = password.ok_or(KeyError::NotNamed { container })?;
        let Some(volume) = volume else {
            return Ok(Arc::new(legacy::cipher(&password).map_err(KeyError::Crypt)?));
        };
        let limit = self.limit(layer.depth)?;
        let key = volume.unlock(layer.storage, at, &password, limit);
        let key = key.inspect_err(|_| self.secrets.forget(layer.name)).map_err(KeyError::Crypt)?;
        // A container counts sectors from its payload, which is where its disk begins.
        Ok(Arc::new(volume.cipher(&key, SectorNumbering::Host).map_err(KeyError::Crypt)?))
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
