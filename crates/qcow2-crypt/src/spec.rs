//! Ciphers, modes, IV generators and hashes by name: those that QEMU 10.0 can create.

use crate::error::CryptError;

/// A block cipher with its key length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are self-explanatory")]
pub enum CipherAlg {
    Aes128,
    Aes192,
    Aes256,
    Cast5,
    Serpent128,
    Serpent192,
    Serpent256,
    Twofish128,
    Twofish192,
    Twofish256,
}

/// Mode of operation within a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CipherMode {
    /// Blocks are encrypted independently.
    Ecb,
    /// Each block is chained to the previous ciphertext block.
    Cbc,
    /// Two keys; each block has its own tweak.
    Xts,
    /// The data is XORed with an encrypted counter.
    Ctr,
}

/// How the sector number becomes an initialization vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IvGen {
    /// The low 32 bits, little-endian.
    Plain,
    /// All 64 bits, little-endian.
    Plain64,
    /// All 64 bits, encrypted under a hash of the master key.
    Essiv,
}

/// A hash function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are self-explanatory")]
pub enum HashAlg {
    Md5,
    Sha1,
    Sha224,
    Sha256,
    Sha384,
    Sha512,
    Ripemd160,
    Sm3,
}

/// Cipher, mode and IV generator of a volume. Start from the default, which is QEMU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CipherSpec {
    /// The cipher.
    pub alg: CipherAlg,
    /// Its mode.
    pub mode: CipherMode,
    /// The IV generator.
    pub ivgen: IvGen,
    /// The IV generator's hash; only used with [`IvGen::Essiv`].
    pub ivgen_hash: Option<HashAlg>,
}

impl Default for CipherSpec {
    fn default() -> Self {
        Self { alg: CipherAlg::Aes256, mode: CipherMode::Xts, ivgen: IvGen::Plain64, ivgen_hash: None }
    }
}

const CIPHERS: [(CipherAlg, &str, &str, usize); 10] = [
    (CipherAlg::Aes128, "aes-128", "aes", 16),
    (CipherAlg::Aes192, "aes-192", "aes", 24),
    (CipherAlg::Aes256, "aes-256", "aes", 32),
    (CipherAlg::Cast5, "cast5-128", "cast5", 16),
    (CipherAlg::Serpent128, "serpent-128", "serpent", 16),
    (CipherAlg::Serpent192, "serpent-192", "serpent", 24),
    (CipherAlg::Serpent256, "serpent-256", "serpent", 32),
    (CipherAlg::Twofish128, "twofish-128", "twofish", 16),
    (CipherAlg::Twofish192, "twofish-192", "twofish", 24),
    (CipherAlg::Twofish256, "twofish-256", "twofish", 32),
];

const MODES: [(CipherMode, &str); 4] =
    [(CipherMode::Ecb, "ecb"), (CipherMode::Cbc, "cbc"), (CipherMode::Xts, "xts"), (CipherMode::Ctr, "ctr")];

const IV_GENERATORS: [(IvGen, &str); 3] =
    [(IvGen::Plain, "plain"), (IvGen::Plain64, "plain64"), (IvGen::Essiv, "essiv")];

const HASHES: [(HashAlg, &str, usize); 8] = [
    (HashAlg::Md5, "md5", 16),
    (HashAlg::Sha1, "sha1", 20),
    (HashAlg::Sha224, "sha224", 28),
    (HashAlg::Sha256, "sha256", 32),
    (HashAlg::Sha384, "sha384", 48),
    (HashAlg::Sha512, "sha512", 64),
    (HashAlg::Ripemd160, "ripemd160", 20),
    (HashAlg::Sm3, "sm3", 32),
];

impl CipherAlg {
    /// The cipher with this name in QEMU's options, such as `aes-256`.
    pub fn from_name(name: &str) -> Option<Self> {
        CIPHERS.iter().find(|row| row.1 == name).map(|row| row.0)
    }

    /// The cipher of `family`, such as `aes`, with a key of `key_len` bytes.
    pub fn from_family(family: &str, key_len: usize) -> Option<Self> {
        CIPHERS.iter().find(|row| row.2 == family && row.3 == key_len).map(|row| row.0)
    }

    /// The name in QEMU's options.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// The name in a LUKS header, without the key length.
    pub fn family(self) -> &'static str {
        self.row().2
    }

    /// Key length in bytes.
    pub fn key_len(self) -> usize {
        self.row().3
    }

    /// Block length in bytes.
    pub fn block_len(self) -> usize {
        if self == Self::Cast5 { 8 } else { 16 }
    }

    fn row(self) -> &'static (Self, &'static str, &'static str, usize) {
        CIPHERS.iter().find(|row| row.0 == self).unwrap_or(&CIPHERS[2])
    }
}

impl CipherMode {
    /// The mode with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        MODES.iter().find(|row| row.1 == name).map(|row| row.0)
    }

    /// The mode's name.
    pub fn name(self) -> &'static str {
        MODES.iter().find(|row| row.0 == self).map_or("", |row| row.1)
    }
}

impl IvGen {
    /// The IV generator with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        IV_GENERATORS.iter().find(|row| row.1 == name).map(|row| row.0)
    }

    /// The IV generator's name.
    pub fn name(self) -> &'static str {
        IV_GENERATORS.iter().find(|row| row.0 == self).map_or("", |row| row.1)
    }
}

impl HashAlg {
    /// The hash with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        HASHES.iter().find(|row| row.1 == name).map(|row| row.0)
    }

    /// The hash's name.
    pub fn name(self) -> &'static str {
        HASHES.iter().find(|row| row.0 == self).map_or("", |row| row.1)
    }

    /// Digest length in bytes.
    pub fn digest_len(self) -> usize {
        HASHES.iter().find(|row| row.0 == self).map_or(0, |row| row.2)
    }
}

impl CipherSpec {
    /// Length of the master key in bytes. XTS uses two cipher keys.
    pub fn key_len(&self) -> usize {
        self.alg.key_len() * if self.mode == CipherMode::Xts { 2 } else { 1 }
    }

    /// The hash of the ESSIV generator; `None` for the other generators.
    pub fn essiv_hash(&self) -> Option<HashAlg> {
        (self.ivgen == IvGen::Essiv).then(|| self.ivgen_hash.unwrap_or(HashAlg::Sha256))
    }

    /// Mode and IV generator as in a LUKS header: `xts-plain64`, `cbc-essiv:sha256`.
    pub fn mode_text(&self) -> String {
        let base = format!("{}-{}", self.mode.name(), self.ivgen.name());
        match self.essiv_hash().or(self.ivgen_hash) {
            Some(hash) => format!("{base}:{}", hash.name()),
            None => base,
        }
    }

    /// Parses the names and the key length of a LUKS header. Errors: `Unsupported` for unknown names;
    /// `Damaged` for ESSIV without a hash; `InvalidOption` for an incompatible combination.
    pub fn parse(cipher: &str, mode: &str, key_len: usize) -> Result<Self, CryptError> {
        let unknown =
            |what: &str, name: &str| CryptError::unsupported(format!("{what} '{name}' is not known"));
        let (mode_name, ivgen) = mode.split_once('-').ok_or_else(|| unknown("cipher mode", mode))?;
        let (ivgen_name, hash) =
            ivgen.split_once(':').map_or((ivgen, None), |(name, hash)| (name, Some(hash)));
        let mode = CipherMode::from_name(mode_name).ok_or_else(|| unknown("cipher mode", mode_name))?;
        let ivgen = IvGen::from_name(ivgen_name).ok_or_else(|| unknown("iv generator", ivgen_name))?;
        let hash = hash
            .map(|name| HashAlg::from_name(name).ok_or_else(|| unknown("iv generator hash", name)))
            .transpose()?;
        if ivgen == IvGen::Essiv && hash.is_none() {
            return Err(CryptError::damaged("iv generator 'essiv' names no hash"));
        }
        let (keys, odd) = if mode == CipherMode::Xts { (key_len / 2, key_len % 2) } else { (key_len, 0) };
        let alg = CipherAlg::from_family(cipher, keys).filter(|_| odd == 0);
        let alg = alg.ok_or_else(|| {
            unknown("cipher", &format!("{cipher}' with a key of {key_len} bytes, '{mode_name}"))
        })?;
        let spec = Self { alg, mode, ivgen, ivgen_hash: hash };
        spec.check()?;
        Ok(spec)
    }

    /// Checks that the parts can be combined. Errors: `InvalidOption`.
    pub fn check(&self) -> Result<(), CryptError> {
        if self.mode == CipherMode::Xts && self.alg.block_len() != 16 {
            return Err(CryptError::option(format!(
                "cipher mode xts needs blocks of 16 bytes, {} has 8",
                self.alg.name()
            )));
        }
        if let Some(hash) = self.essiv_hash()
            && (self.alg.block_len() != 16
                || CipherAlg::from_family(self.alg.family(), hash.digest_len()).is_none())
        {
            let (family, len) = (self.alg.family(), hash.digest_len());
            let message = format!(
                "iv generator essiv with {}: no {family} cipher has a key of {len} bytes",
                hash.name()
            );
            return Err(CryptError::option(message));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for (alg, name, family, len) in CIPHERS {
            assert_eq!(CipherAlg::from_name(name), Some(alg));
            assert_eq!((alg.name(), alg.family(), alg.key_len()), (name, family, len));
        }
        for (hash, name, len) in HASHES {
            assert_eq!((HashAlg::from_name(name), hash.name(), hash.digest_len()), (Some(hash), name, len));
        }
        for (alg, _, family, _) in CIPHERS {
            for (mode, _) in MODES {
                for (ivgen, _) in IV_GENERATORS {
                    let hash = (ivgen == IvGen::Essiv).then_some(HashAlg::Sha256);
                    let spec = CipherSpec { alg, mode, ivgen, ivgen_hash: hash };
                    let parsed = CipherSpec::parse(family, &spec.mode_text(), spec.key_len()).ok();
                    assert_eq!(parsed, spec.check().is_ok().then_some(spec), "{spec:?}");
                }
            }
        }
    }

    #[test]
    fn incompatible_combinations_are_refused() {
        let parse = |cipher: &str, mode: &str, len| {
            CipherSpec::parse(cipher, mode, len).map(|_| ()).map_err(|e| e.to_string())
        };
        assert!(parse("aes", "xts-plain64", 64).is_ok());
        assert!(parse("aes", "xts-plain64:sha1", 64).is_ok());
        for (cipher, mode, len) in [
            ("aes", "xts-plain64", 63),
            ("aes", "xts-plain64", 65),
            ("aes", "xts", 64),
            ("aes", "cbc-essiv", 32),
            ("aes", "cbc-essiv:sha1", 32),
            ("cast5", "xts-plain64", 32),
            ("cast5", "cbc-essiv:sha256", 16),
            ("des", "cbc-plain", 8),
            ("aes", "cbc-benbi", 32),
            ("aes", "lrw-plain", 32),
        ] {
            assert!(parse(cipher, mode, len).is_err(), "{cipher} {mode} {len}");
        }
    }
}
