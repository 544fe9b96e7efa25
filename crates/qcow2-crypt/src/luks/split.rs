//! The anti-forensic splitter: a key spread over many stripes, all of which are needed to have it back, so
//! that wiping any of them wipes the key.

use crate::spec::HashAlg;

/// Makes the last stripe of `stripes` such that [`merge`] gives `key`. `stripes`: random bytes, a multiple of
/// the key's length.
pub(super) fn split(hash: HashAlg, key: &[u8], stripes: &mut [u8]) {
    let last = stripes.len() - key.len();
    let (random, last) = stripes.split_at_mut(last);
    let mut mixed = mix(hash, random, key.len());
    for ((place, mixed), key) in last.iter_mut().zip(&mixed).zip(key) {
        *place = mixed ^ key;
    }
    zeroize::Zeroize::zeroize(&mut mixed);
}

/// The key that `stripes` hold, into `key`.
pub(super) fn merge(hash: HashAlg, stripes: &[u8], key: &mut [u8]) {
    let (random, last) = stripes.split_at(stripes.len() - key.len());
    let mut mixed = mix(hash, random, key.len());
    for ((place, mixed), last) in key.iter_mut().zip(&mixed).zip(last) {
        *place = mixed ^ last;
    }
    zeroize::Zeroize::zeroize(&mut mixed);
}

/// All stripes but the last, each mixed into the hash of those before.
fn mix(hash: HashAlg, stripes: &[u8], len: usize) -> Vec<u8> {
    let mut state = vec![0; len];
    for stripe in stripes.chunks_exact(len) {
        for (byte, stripe) in state.iter_mut().zip(stripe) {
            *byte ^= stripe;
        }
        diffuse(hash, &mut state);
    }
    state
}

/// Replaces each piece of `state`, as long as a digest, by the digest of its number and itself.
fn diffuse(hash: HashAlg, state: &mut [u8]) {
    for (number, piece) in (0u32..).zip(state.chunks_mut(hash.digest_len())) {
        let digest = hash.digest(&[&number.to_be_bytes(), piece]);
        let len = piece.len();
        piece.copy_from_slice(&digest[..len]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_split_is_merged() {
        for hash in [HashAlg::Md5, HashAlg::Sha1, HashAlg::Sha256, HashAlg::Sha512] {
            for len in [16, 24, 32, 64] {
                let key: Vec<u8> = (0..len).map(|i| i as u8).collect();
                let mut stripes: Vec<u8> = (0..len * 50).map(|i| (i * 31 % 251) as u8).collect();
                split(hash, &key, &mut stripes);
                let mut merged = vec![0; len];
                merge(hash, &stripes, &mut merged);
                assert_eq!(merged, key);
                stripes[17] ^= 1;
                merge(hash, &stripes, &mut merged);
                assert_ne!(merged, key);
            }
        }
    }
}
