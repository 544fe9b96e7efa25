//! Hash functions and PBKDF2, selected at run time.

use crate::spec::HashAlg;
use pbkdf2::pbkdf2_hmac;
use sha2::Digest;

/// Evaluates `$call` with `$d` bound to the type of hash `$alg`.
macro_rules! with_hash {
    ($alg:expr, $d:ident => $call:expr) => {
        match $alg {
            HashAlg::Md5 => {
                type $d = md5::Md5;
                $call
            }
            HashAlg::Sha1 => {
                type $d = sha1::Sha1;
                $call
            }
            HashAlg::Sha224 => {
                type $d = sha2::Sha224;
                $call
            }
            HashAlg::Sha256 => {
                type $d = sha2::Sha256;
                $call
            }
            HashAlg::Sha384 => {
                type $d = sha2::Sha384;
                $call
            }
            HashAlg::Sha512 => {
                type $d = sha2::Sha512;
                $call
            }
            HashAlg::Ripemd160 => {
                type $d = ripemd::Ripemd160;
                $call
            }
            HashAlg::Sm3 => {
                type $d = sm3::Sm3;
                $call
            }
        }
    };
}

impl HashAlg {
    /// The digest of the concatenated `parts`, in the first [`digest_len`](Self::digest_len) bytes.
    pub(crate) fn digest(self, parts: &[&[u8]]) -> [u8; 64] {
        let mut out = [0; 64];
        with_hash!(self, D => {
            let mut hash = D::new();
            for part in parts {
                hash.update(part);
            }
            out[..self.digest_len()].copy_from_slice(&hash.finalize());
        });
        out
    }

    /// PBKDF2 with HMAC of this hash. Fills `out`.
    pub(crate) fn derive(self, password: &[u8], salt: &[u8], iterations: u32, out: &mut [u8]) {
        with_hash!(self, D => pbkdf2_hmac::<D>(password, salt, iterations, out));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    #[test]
    fn known_digests() {
        for (alg, wanted) in [
            (HashAlg::Md5, "900150983cd24fb0d6963f7d28e17f72"),
            (HashAlg::Sha1, "a9993e364706816aba3e25717850c26c9cd0d89d"),
            (HashAlg::Ripemd160, "8eb208f7e05d987a9b044a8e98c6b087f15a0bfc"),
            (HashAlg::Sm3, "66c7f0f462eeedd9d1f2d46bdc10e4e24167c4875cf2f7a2297da02b8f4ba8e0"),
            (HashAlg::Sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        ] {
            assert_eq!(hex(&alg.digest(&[b"a", b"bc"])[..alg.digest_len()]), wanted, "{alg:?}");
        }
    }

    /// RFC 6070.
    #[test]
    fn known_derivation() {
        let mut out = [0; 25];
        let (password, salt) = (b"passwordPASSWORDpassword", b"saltSALTsaltSALTsaltSALTsaltSALTsalt");
        HashAlg::Sha1.derive(password, salt, 4096, &mut out);
        assert_eq!(hex(&out), "3d2eec4fe41c849b80c8d83662c0e44a8b291a964cf2f07038");
    }
}
