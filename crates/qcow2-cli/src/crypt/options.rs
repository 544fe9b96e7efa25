//! How a new image is to be encrypted, from `-o`.

use super::{SystemRandom, ThreadTime};
use crate::args::Objects;
use crate::failure::Failure;
use crate::imageopts::ImageOptions;
use crate::persona;
use qcow2_core::{LuksArea, NewEncryption};
use qcow2_crypt::luks::{NewVolume, create};
use qcow2_crypt::{CipherAlg, CipherMode, HashAlg, IvGen, Secret};

/// The names of the options in one format: their order is that of [`QCOW2_NAMES`] everywhere.
pub(crate) type Names = [&'static str; 7];

/// In a qcow2 image.
pub(crate) const QCOW2_NAMES: Names = [
    "encrypt.key-secret",
    "encrypt.cipher-alg",
    "encrypt.cipher-mode",
    "encrypt.ivgen-alg",
    "encrypt.ivgen-hash-alg",
    "encrypt.hash-alg",
    "encrypt.iter-time",
];

/// Of a container.
pub(crate) const LUKS_NAMES: Names =
    ["key-secret", "cipher-alg", "cipher-mode", "ivgen-alg", "ivgen-hash-alg", "hash-alg", "iter-time"];

/// How a new image is encrypted, everything known but the key.
#[derive(Clone, Debug)]
pub(crate) enum NewCrypt {
    /// The old method.
    Aes,
    /// LUKS.
    Luks(NewVolume, Secret),
    /// The secret is not named: the option that would name it.
    NoSecret(&'static str),
}

impl NewCrypt {
    /// Bytes of the header that it needs.
    pub(crate) fn area_len(&self) -> u64 {
        match self {
            Self::Aes | Self::NoSecret(_) => 0,
            Self::Luks(volume, _) => volume.area_len(),
        }
    }

    /// The same, or the complaint that the secret is not named.
    pub(crate) fn with_secret(self) -> Result<Self, Failure> {
        match self {
            Self::NoSecret(name) => Err(no_secret(name)),
            other => Ok(other),
        }
    }

    /// Makes the key and the header; this is what takes its time. Errors: also that the secret is not named.
    pub(crate) fn make(&self) -> Result<NewEncryption, Failure> {
        match self {
            Self::NoSecret(name) => Err(no_secret(name)),
            Self::Aes => Ok(NewEncryption::Aes),
            Self::Luks(volume, password) => {
                let area = create(volume, password, &mut SystemRandom, &ThreadTime::start())
                    .map_err(|error| Failure::new(persona::crypt(&error)))?;
                Ok(NewEncryption::Luks(LuksArea(area.into())))
            }
        }
    }
}

/// What `options` say under `names`, the format being `format`. Errors: in QEMU's words, in its order.
pub(crate) fn read_options(
    options: &ImageOptions,
    format: &str,
    names: &Names,
    objects: &Objects,
) -> Result<NewCrypt, Failure> {
    let [secret_name, alg, mode, ivgen, ivgen_hash, hash, iter_time] = *names;
    if format == "aes" {
        let given = |name: &&&str| options.text(name).is_some() || options.number(name).is_some();
        if let Some(name) = names[1..].iter().find(given) {
            return Err(Failure::new(format!("Parameter '{name}' is unexpected")));
        }
        // Looked up now, so that a missing one is told before anything is made.
        return Ok(match secret(options, secret_name, objects)? {
            Some(_) => NewCrypt::Aes,
            None => NewCrypt::NoSecret(secret_name),
        });
    }
    let mut volume = NewVolume::default();
    if let Some(found) = choice(options, alg, CipherAlg::from_name)? {
        volume.spec.alg = found;
    }
    if let Some(found) = choice(options, mode, CipherMode::from_name)? {
        volume.spec.mode = found;
    }
    if let Some(found) = choice(options, ivgen, IvGen::from_name)? {
        volume.spec.ivgen = found;
    }
    volume.spec.ivgen_hash = choice(options, ivgen_hash, HashAlg::from_name)?;
    if let Some(found) = choice(options, hash, HashAlg::from_name)? {
        volume.hash = found;
    }
    volume.iter_time_ms = options.number(iter_time).unwrap_or(volume.iter_time_ms);
    let Some(password) = secret(options, secret_name, objects)? else {
        return Ok(NewCrypt::NoSecret(secret_name));
    };
    volume.spec.check().map_err(|error| Failure::new(not_together(&volume, &persona::crypt(&error))))?;
    Ok(NewCrypt::Luks(volume, password))
}

/// One of several choices. QEMU's complaint leaves `encrypt.` out.
fn choice<T>(
    options: &ImageOptions,
    name: &str,
    parse: impl Fn(&str) -> Option<T>,
) -> Result<Option<T>, Failure> {
    let Some(text) = options.text(name) else { return Ok(None) };
    let short = name.strip_prefix("encrypt.").unwrap_or(name);
    let no_such = || Failure::new(format!("Parameter '{short}' does not accept value '{text}'"));
    parse(text).map(Some).ok_or_else(no_such)
}

/// The secret that the option `name` names, if it is given.
fn secret(options: &ImageOptions, name: &str, objects: &Objects) -> Result<Option<Secret>, Failure> {
    options.text(name).map(|id| objects.secret(id)).transpose()
}

fn no_secret(name: &str) -> Failure {
    Failure::new(format!("Parameter '{name}' is required for cipher"))
}

/// QEMU's words for parts that do not go together.
fn not_together(volume: &NewVolume, ours: &str) -> String {
    let spec = &volume.spec;
    match spec.essiv_hash() {
        _ if spec.mode == CipherMode::Xts && spec.alg.block_len() != 16 => {
            format!("Unsupported cipher mode {}", spec.mode.name())
        }
        Some(_) if spec.alg.block_len() != 16 => {
            format!("Cipher {} not supported with essiv", spec.alg.name())
        }
        Some(hash) => {
            let family = match spec.alg.family() {
                "aes" => "AES",
                "serpent" => "Serpent",
                _ => "Twofish",
            };
            format!("No {family} cipher with key size {} available", hash.digest_len())
        }
        None => ours.to_owned(),
    }
}
