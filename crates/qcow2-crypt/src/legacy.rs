//! The old method: AES-128 in CBC mode, the sector's guest number as initialization vector, the password as
//! key.
//!
//! Nothing tells a wrong password from a right one: every password opens. Spec: "Data encryption", method 1.

use crate::error::CryptError;
use crate::secret::Secret;
use crate::sector::SectorCipher;
use crate::spec::{CipherAlg, CipherMode, CipherSpec, IvGen};
use qcow2_core::SectorNumbering;

/// Bytes of a password that count; shorter ones are filled up with zeroes.
pub const PASSWORD_LEN: usize = 16;

/// The cipher of an image with `password`.
pub fn cipher(password: &Secret) -> Result<SectorCipher, CryptError> {
    let mut key = Secret::zeroed(PASSWORD_LEN);
    let len = password.bytes().len().min(PASSWORD_LEN);
    key.bytes_mut()[..len].copy_from_slice(&password.bytes()[..len]);
    let spec =
        CipherSpec { alg: CipherAlg::Aes128, mode: CipherMode::Cbc, ivgen: IvGen::Plain64, ivgen_hash: None };
    SectorCipher::new(&spec, &key, SectorNumbering::Guest)
}
