//! The anti-forensic splitter: spreads a key over many stripes, all of which are needed to recover it. Wiping
//! any stripe wipes the key.

use crate::spec::HashAlg;

/// Computes the last of `stripes` such that [`merge`] gives `key`. `stripes`: random bytes, a multiple of the
/// key length.
pub(super) fn split(hash: HashAlg, key: &[u8], stripes: &mut [u8]) {
    let last = stripes.len() - key.len();
    let (random, last) = stripes.split_at_mut(last);
    let mut mixed = mix(hash, random, key.len());
    for ((place, mixed), key) in last.iter_mut().zip(&mixed).zip(key) {
        *place = mixed ^ key;
    }
    zeroize::Zeroize::zeroize(&mut mixed);
}

/// Recovers the key from `stripes` into `key`.
pub(super) fn merge(hash: HashAlg, stripes: &[u8], key: &mut [u8]) {
    let (random, last) = stripes.split_at(stripes.len() - key.len());
    let mut mixed = mix(hash, random, key.len());
    for ((place, mixed), last) in key.iter_mut().zip(&mixed).zip(last) {
        *place = mixed ^ last;
    }
    zeroize::Zeroize::zeroize(&mut mixed);
}

/// Hash chain over all stripes but the last.
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

/// Replaces each digest-sized piece of `state` with the hash of its big-endian number and itself.
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
    fn split_and_merge_round_trip() {
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
