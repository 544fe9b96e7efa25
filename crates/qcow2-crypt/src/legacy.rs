//! The legacy method: AES-128-CBC. The password itself is the key, the guest sector number the initialization
//! vector.
//!
//! A wrong password cannot be detected: every password is accepted, and a wrong one decrypts to garbage.
//! Spec: "Data encryption", method 1.

use crate::error::CryptError;
use crate::secret::Secret;
use crate::sector::SectorCipher;
use crate::spec::{CipherAlg, CipherMode, CipherSpec, IvGen};
use qcow2_core::SectorNumbering;

/// Significant bytes of the password. A shorter one is padded with zeroes, the rest of a longer one is
/// ignored.
pub const PASSWORD_LEN: usize = 16;

/// The cipher of an image with `password`. Errors: none in practice; the key length is always valid.
pub fn cipher(password: &Secret) -> Result<SectorCipher, CryptError> {
    let mut key = Secret::zeroed(PASSWORD_LEN);
    let len = password.bytes().len().min(PASSWORD_LEN);
    key.bytes_mut()[..len].copy_from_slice(&password.bytes()[..len]);
    let spec =
        CipherSpec { alg: CipherAlg::Aes128, mode: CipherMode::Cbc, ivgen: IvGen::Plain64, ivgen_hash: None };
    SectorCipher::new(&spec, &key, SectorNumbering::Guest)
}
