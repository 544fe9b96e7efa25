//! Encryption of sectors: IV generator, mode and sector numbering.

use crate::cipher::{BATCH, BlockEncrypt, Iv, SECTOR, SectorMode, block_cipher, sector_mode};
use crate::error::CryptError;
use crate::secret::Secret;
use crate::spec::{CipherSpec, IvGen};
use qcow2_core::{ClusterCipher, SectorNumbering};
use std::fmt;

/// A keyed cipher for sectors. The key schedule is wiped when it is dropped.
pub struct SectorCipher {
    mode: Box<dyn SectorMode>,
    ivgen: IvGen,
    essiv: Option<Box<dyn BlockEncrypt>>,
    numbering: SectorNumbering,
}

impl SectorCipher {
    /// The cipher described by `spec`, with `key`. Errors: `InvalidOption` for an incompatible `spec` or a
    /// key of the wrong length.
    pub fn new(spec: &CipherSpec, key: &Secret, numbering: SectorNumbering) -> Result<Self, CryptError> {
        spec.check()?;
        let essiv = match spec.essiv_hash() {
            Some(hash) => {
                let salt = Secret::new(hash.digest(&[key.bytes()])[..hash.digest_len()].to_vec());
                Some(block_cipher(spec.alg.family(), salt.bytes())?)
            }
            None => None,
        };
        let mode = sector_mode(spec.alg, spec.mode, key.bytes())?;
        Ok(Self { mode, ivgen: spec.ivgen, essiv, numbering })
    }

    /// Encrypts whole sectors in place. `data`: a multiple of 512 bytes; its first sector has number
    /// `first_sector`.
    pub fn encrypt_sectors(&self, first_sector: u64, data: &mut [u8]) {
        self.batches(first_sector, data, |ivs, data| self.mode.encrypt(ivs, data));
    }

    /// Decrypts whole sectors in place; the inverse of [`encrypt_sectors`](Self::encrypt_sectors).
    pub fn decrypt_sectors(&self, first_sector: u64, data: &mut [u8]) {
        self.batches(first_sector, data, |ivs, data| self.mode.decrypt(ivs, data));
    }

    fn batches(&self, first_sector: u64, data: &mut [u8], run: impl Fn(&mut [Iv], &mut [u8])) {
        debug_assert!(data.len().is_multiple_of(SECTOR));
        let mut number = first_sector;
        for batch in data.chunks_mut(BATCH * SECTOR) {
            let mut ivs = [[0; 16]; BATCH];
            let ivs = &mut ivs[..batch.len() / SECTOR];
            for iv in ivs.iter_mut() {
                iv[..8].copy_from_slice(&number.to_le_bytes());
                if self.ivgen == IvGen::Plain {
                    iv[4..8].fill(0);
                }
                number = number.wrapping_add(1);
            }
            if let Some(essiv) = &self.essiv {
                essiv.encrypt_blocks(ivs);
            }
            run(ivs, batch);
        }
    }
}

impl ClusterCipher for SectorCipher {
    fn numbering(&self) -> SectorNumbering {
        self.numbering
    }

    fn encrypt(&self, first_sector: u64, data: &mut [u8]) {
        self.encrypt_sectors(first_sector, data);
    }

    fn decrypt(&self, first_sector: u64, data: &mut [u8]) {
        self.decrypt_sectors(first_sector, data);
    }
}

impl fmt::Debug for SectorCipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SectorCipher").field("ivgen", &self.ivgen).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{CipherAlg, CipherMode, HashAlg};

    fn cipher(spec: CipherSpec) -> SectorCipher {
        let key: Vec<u8> = (0..spec.key_len()).map(|i| (i * 7 + 1) as u8).collect();
        SectorCipher::new(&spec, &Secret::new(key), SectorNumbering::Host).unwrap()
    }

    fn specs() -> Vec<CipherSpec> {
        let mut specs = Vec::new();
        for name in ["aes-128", "aes-192", "aes-256", "serpent-192", "twofish-256", "cast5-128"] {
            for mode in [CipherMode::Xts, CipherMode::Cbc, CipherMode::Ctr, CipherMode::Ecb] {
                for ivgen in [IvGen::Plain, IvGen::Plain64, IvGen::Essiv] {
                    let alg = CipherAlg::from_name(name).unwrap();
                    let spec = CipherSpec { alg, mode, ivgen, ivgen_hash: None };
                    specs.extend(spec.check().is_ok().then_some(spec));
                }
            }
        }
        specs
    }

    /// IEEE 1619, vector 10: AES-256, sector number 0xff.
    #[test]
    fn encrypts_the_ieee_1619_vector() {
        let key: Vec<u8> = [
            "2718281828459045235360287471352662497757247093699959574966967627",
            "3141592653589793238462643383279502884197169399375105820974944592",
        ]
        .concat()
        .as_bytes()
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect();
        let spec = CipherSpec::default();
        let cipher = SectorCipher::new(&spec, &Secret::new(key), SectorNumbering::Host).unwrap();
        let mut data: Vec<u8> = (0..512).map(|i| i as u8).collect();
        cipher.encrypt_sectors(0xff, &mut data);
        assert_eq!(data[..16], *b"\x1c\x3b\x3a\x10\x2f\x77\x03\x86\xe4\x83\x6c\x99\xe3\x70\xcf\x9b");
        assert_eq!(&data[496..], b"\xc4\xf3\x6f\xfd\xa9\xfc\xea\x70\xb9\xc6\xe6\x93\xe1\x48\xc1\x51");
    }

    #[test]
    fn batches_of_any_size_round_trip() {
        for spec in specs() {
            let cipher = cipher(spec);
            let plain: Vec<u8> = (0..512 * 37).map(|i| (i * i / 5) as u8).collect();
            let mut all = plain.clone();
            cipher.encrypt_sectors(u32::MAX as u64 - 3, &mut all);
            assert_ne!(all, plain, "{spec:?}");
            let mut pieces = plain.clone();
            let (mut at, mut number) = (0, u32::MAX as u64 - 3);
            for sectors in [1, 2, 15, 16, 3] {
                cipher.encrypt_sectors(number, &mut pieces[at..at + sectors * 512]);
                (at, number) = (at + sectors * 512, number + sectors as u64);
            }
            assert!(all == pieces, "{spec:?}");
            cipher.decrypt_sectors(u32::MAX as u64 - 3, &mut all);
            assert!(all == plain, "{spec:?}");
        }
    }

    #[test]
    fn ciphertext_depends_on_the_sector_number() {
        for spec in specs().into_iter().filter(|spec| spec.mode != CipherMode::Ecb) {
            let cipher = cipher(spec);
            let mut data = vec![0; 1024];
            cipher.encrypt_sectors(0, &mut data);
            assert_ne!(data[..512], data[512..], "{spec:?}");
            let mut far = vec![0; 512];
            cipher.encrypt_sectors(1 << 32, &mut far);
            assert_eq!(far == data[..512], spec.ivgen == IvGen::Plain, "{spec:?}");
        }
    }

    #[test]
    fn wrong_key_length_is_refused() {
        let spec =
            CipherSpec { ivgen: IvGen::Essiv, ivgen_hash: Some(HashAlg::Md5), ..CipherSpec::default() };
        for len in [0, 32, 63, 65] {
            assert!(SectorCipher::new(&spec, &Secret::new(vec![1; len]), SectorNumbering::Host).is_err());
        }
    }
}
