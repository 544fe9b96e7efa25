//! How a new image is encrypted.

use super::failure::CreateFailureKind;
use super::options::{NewOptions, no_such};
use super::table::DETACHED_HEADER;
use crate::keys::Secrets;
use qcow2_core::{ImageFormat, LuksArea, NewEncryption};
use qcow2_crypt::luks::{NewVolume, create};
use qcow2_crypt::{CipherAlg, CipherMode, HashAlg, IvGen, Secret};
use qcow2_io::{ThreadClock, random_bytes};

/// How a new image is encrypted, everything known but the key.
#[derive(Clone, Debug)]
pub(super) enum Encryption {
    /// The old method.
    Aes,
    /// LUKS.
    Luks(NewVolume, Secret),
    /// The secret is not named: the option that would name it.
    NoSecret(&'static str),
}

type Names = [&'static str; 7];

/// The names of the options in a qcow2 image.
const QCOW2: Names = [
    "encrypt.key-secret",
    "encrypt.cipher-alg",
    "encrypt.cipher-mode",
    "encrypt.ivgen-alg",
    "encrypt.ivgen-hash-alg",
    "encrypt.hash-alg",
    "encrypt.iter-time",
];

/// The same in a container.
const CONTAINER: Names =
    ["key-secret", "cipher-alg", "cipher-mode", "ivgen-alg", "ivgen-hash-alg", "hash-alg", "iter-time"];

impl Encryption {
    /// That of a qcow2 image, if it is encrypted. Errors: everything but a secret that is not named, which
    /// QEMU refuses last.
    pub(super) fn of_image(
        options: &NewOptions,
        secrets: &Secrets,
    ) -> Result<Option<Self>, CreateFailureKind> {
        let format = match options.text("encrypt.format") {
            Some(_) if options.given("encryption") => return Err(CreateFailureKind::EncryptedTwice),
            Some(format @ ("luks" | "aes")) => format,
            Some(other) => return Err(no_such("encrypt.format", other).into()),
            None if options.switch("encryption") => "aes",
            None if QCOW2.iter().any(|name| options.given(name)) => {
                return Err(CreateFailureKind::NoEncryptFormat);
            }
            None => return Ok(None),
        };
        match format {
            "aes" => aes(options, secrets).map(Some),
            _ => luks(options, &QCOW2, secrets).map(Some),
        }
    }

    /// That of a container.
    pub(super) fn of_container(options: &NewOptions, secrets: &Secrets) -> Result<Self, CreateFailureKind> {
        luks(options, &CONTAINER, secrets)?.with_secret()
    }

    /// Bytes of the header that it needs.
    pub(super) fn area_len(&self) -> u64 {
        match self {
            Self::Aes | Self::NoSecret(_) => 0,
            Self::Luks(volume, _) => volume.area_len(),
        }
    }

    /// Makes the key and the header; this is what takes its time.
    pub(super) fn make(&self) -> Result<NewEncryption, CreateFailureKind> {
        match self {
            Self::NoSecret(name) => Err(CreateFailureKind::SecretNotNamed(name)),
            Self::Aes => Ok(NewEncryption::Aes),
            Self::Luks(volume, password) => {
                let clock = ThreadClock::start();
                let area = create(volume, password, &mut random_bytes, &|| clock.now());
                Ok(NewEncryption::Luks(LuksArea(area.map_err(CreateFailureKind::Crypt)?.into())))
            }
        }
    }

    fn with_secret(self) -> Result<Self, CreateFailureKind> {
        match self {
            Self::NoSecret(name) => Err(CreateFailureKind::SecretNotNamed(name)),
            other => Ok(other),
        }
    }
}

impl NewOptions {
    /// Bytes of the LUKS header that the new image will have; 0: it has none. Errors: as
    /// [`create`](super::create()), for the options of encryption.
    pub fn luks_header_len(&self, secrets: &Secrets) -> Result<u64, super::CreateFailure> {
        let encryption = match self.format() {
            ImageFormat::Luks => luks(self, &CONTAINER, secrets),
            _ if self.text("encrypt.format") == Some("luks") => luks(self, &QCOW2, secrets),
            _ => return Ok(0),
        };
        let encryption = encryption.and_then(Encryption::with_secret);
        Ok(encryption.map_err(|kind| super::CreateFailure::new(self.format(), kind))?.area_len())
    }
}

fn aes(options: &NewOptions, secrets: &Secrets) -> Result<Encryption, CreateFailureKind> {
    let given = |name: &&&str| options.text(name).is_some() || options.number(name).is_some();
    if let Some(name) = QCOW2[1..].iter().find(given) {
        return Err(CreateFailureKind::NotWithAes(name));
    }
    // Looked up now, so that a missing one is refused before anything is made.
    Ok(match secret(options, QCOW2[0], secrets)? {
        Some(_) => Encryption::Aes,
        None => Encryption::NoSecret(QCOW2[0]),
    })
}

/// What `options` say under `names`, in QEMU's order.
fn luks(options: &NewOptions, names: &Names, secrets: &Secrets) -> Result<Encryption, CreateFailureKind> {
    let [secret_name, alg, mode, ivgen, ivgen_hash, hash, iter_time] = *names;
    let mut volume = NewVolume::default();
    let spec = &mut volume.spec;
    spec.alg = choice(options, alg, CipherAlg::from_name)?.unwrap_or(spec.alg);
    spec.mode = choice(options, mode, CipherMode::from_name)?.unwrap_or(spec.mode);
    spec.ivgen = choice(options, ivgen, IvGen::from_name)?.unwrap_or(spec.ivgen);
    spec.ivgen_hash = choice(options, ivgen_hash, HashAlg::from_name)?;
    volume.hash = choice(options, hash, HashAlg::from_name)?.unwrap_or(volume.hash);
    volume.iter_time_ms = options.number(iter_time).unwrap_or(volume.iter_time_ms);
    if options.given(DETACHED_HEADER) {
        return Err(CreateFailureKind::DetachedHeader);
    }
    let Some(password) = secret(options, secret_name, secrets)? else {
        return Ok(Encryption::NoSecret(secret_name));
    };
    let spec = volume.spec;
    spec.check().map_err(|error| CreateFailureKind::Cipher { spec, error })?;
    Ok(Encryption::Luks(volume, password))
}

/// One of several choices.
fn choice<T>(
    options: &NewOptions,
    name: &str,
    parse: impl Fn(&str) -> Option<T>,
) -> Result<Option<T>, CreateFailureKind> {
    let Some(text) = options.text(name) else { return Ok(None) };
    Ok(Some(parse(text).ok_or_else(|| no_such(name, text))?))
}

/// The secret that the option `name` names, if it is given.
fn secret(options: &NewOptions, name: &str, secrets: &Secrets) -> Result<Option<Secret>, CreateFailureKind> {
    let Some(id) = options.text(name) else { return Ok(None) };
    secrets.password(id).map(Some).map_err(CreateFailureKind::NoSecret)
}
