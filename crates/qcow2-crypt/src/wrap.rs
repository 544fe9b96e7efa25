//! Encrypted passwords: AES-256 in CBC mode with PKCS #7 padding.

use crate::error::{CryptError, CryptErrorKind};
use crate::secret::Secret;
use aes::Aes256;
use cipher::{Block, BlockCipherDecrypt, KeyInit};

/// Decrypts `wrapped` with a 32-byte `key` and a 16-byte initialization vector. Errors: `InvalidOption` for
/// other lengths and for invalid padding.
pub fn unwrap(key: &Secret, iv: &[u8], wrapped: &Secret) -> Result<Secret, CryptError> {
    let cipher = Aes256::new_from_slice(key.bytes())
        .map_err(|_| CryptError::option(format!("key has {} bytes, 32 are needed", key.bytes().len())))?;
    if iv.len() != 16 {
        return Err(CryptError::option(format!(
            "initialization vector has {} bytes, 16 are needed",
            iv.len()
        )));
    }
    let (blocks, rest) = wrapped.bytes().as_chunks::<16>();
    if blocks.is_empty() || !rest.is_empty() {
        let len = wrapped.bytes().len();
        return Err(CryptError::option(format!(
            "wrapped secret has {len} bytes, whole blocks of 16 are needed"
        )));
    }
    let mut plain = Secret::zeroed(wrapped.bytes().len());
    let mut last: &[u8] = iv;
    for (out, block) in plain.bytes_mut().chunks_exact_mut(16).zip(blocks) {
        let mut state = Block::<Aes256>::from(*block);
        cipher.decrypt_block(&mut state);
        for ((out, state), last) in out.iter_mut().zip(state).zip(last) {
            *out = state ^ last;
        }
        last = block;
    }
    let fill = plain.bytes().last().copied().unwrap_or(0);
    let len = plain.bytes().len().saturating_sub(usize::from(fill));
    if !(1..=16).contains(&fill) || plain.bytes()[len..].iter().any(|&byte| byte != fill) {
        let message = "incorrect number of padding bytes found on decrypted data";
        return Err(CryptError::new(CryptErrorKind::InvalidOption, message));
    }
    Ok(Secret::new(plain.bytes()[..len].to_vec()))
}
