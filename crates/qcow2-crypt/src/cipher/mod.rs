//! Modes of operation over whole sectors, in batches that keep the CPU's parallel cipher instructions busy.

mod modes;
mod xts;

use crate::error::CryptError;
use crate::spec::{CipherAlg, CipherMode};
use aes::{Aes128, Aes192, Aes256};
use cast5::Cast5;
use cipher::typenum::U16;
use cipher::{Array, Block, BlockCipherDecrypt, BlockCipherEncrypt, BlockSizeUser, KeyInit};
use modes::{Cbc, Ctr, Ecb};
use serpent::Serpent;
use twofish::Twofish;
use xts::Xts;

/// Sector size in bytes.
pub(crate) const SECTOR: usize = 512;
/// Sectors per batch. That is 512 blocks of 16 bytes: enough that few blocks are left over, however many the
/// cipher processes in parallel, and small enough that data and masks stay in the L1 data cache.
pub(crate) const BATCH: usize = 16;

/// An initialization vector. Ciphers with 8-byte blocks use the first half.
pub(crate) type Iv = [u8; 16];

/// A keyed cipher in one mode. `ivs`: one per sector, at most [`BATCH`]; overwritten. `data`: as many
/// sectors.
pub(crate) trait SectorMode: Send + Sync {
    fn encrypt(&self, ivs: &mut [Iv], data: &mut [u8]);
    fn decrypt(&self, ivs: &mut [Iv], data: &mut [u8]);
}

/// Encrypts single blocks of 16 bytes, for ESSIV.
pub(crate) trait BlockEncrypt: Send + Sync {
    fn encrypt_blocks(&self, blocks: &mut [Iv]);
}

struct Blocks<C>(C);

impl<C> BlockEncrypt for Blocks<C>
where
    C: BlockCipherEncrypt + BlockSizeUser<BlockSize = U16> + Send + Sync,
{
    fn encrypt_blocks(&self, blocks: &mut [Iv]) {
        self.0.encrypt_blocks(Array::cast_slice_from_core_mut(blocks));
    }
}

/// Evaluates `$call` (or `$small` for 8-byte blocks) with `$c` bound to the type of cipher `$alg`.
macro_rules! with_cipher {
    ($alg:expr, $c:ident => $call:expr, 8 => $small:expr) => {
        match $alg {
            CipherAlg::Aes128 => {
                type $c = Aes128;
                $call
            }
            CipherAlg::Aes192 => {
                type $c = Aes192;
                $call
            }
            CipherAlg::Aes256 => {
                type $c = Aes256;
                $call
            }
            CipherAlg::Serpent128 | CipherAlg::Serpent192 | CipherAlg::Serpent256 => {
                type $c = Serpent;
                $call
            }
            CipherAlg::Twofish128 | CipherAlg::Twofish192 | CipherAlg::Twofish256 => {
                type $c = Twofish;
                $call
            }
            CipherAlg::Cast5 => {
                type $c = Cast5;
                $small
            }
        }
    };
}

/// The cipher `alg` in `mode` with `key`. Errors: `InvalidOption` for a key of the wrong length, or XTS with
/// 8-byte blocks.
pub(crate) fn sector_mode(
    alg: CipherAlg,
    mode: CipherMode,
    key: &[u8],
) -> Result<Box<dyn SectorMode>, CryptError> {
    let wanted = alg.key_len() * if mode == CipherMode::Xts { 2 } else { 1 };
    if key.len() != wanted {
        let message = format!("key of {} bytes, {} {} needs {wanted}", key.len(), alg.name(), mode.name());
        return Err(CryptError::option(message));
    }
    if mode == CipherMode::Xts {
        let (data, tweak) = key.split_at(alg.key_len());
        return with_cipher!(
            alg,
            C => Ok(Box::new(Xts::<C>::new(keyed(data)?, keyed(tweak)?))),
            8 => {
                let _: Option<C> = None;
                Err(CryptError::option("cipher mode xts needs blocks of 16 bytes"))
            }
        );
    }
    with_cipher!(alg, C => Ok(simple_mode::<C>(mode, key)?), 8 => Ok(simple_mode::<C>(mode, key)?))
}

fn simple_mode<C>(mode: CipherMode, key: &[u8]) -> Result<Box<dyn SectorMode>, CryptError>
where
    C: BlockCipherEncrypt + BlockCipherDecrypt + KeyInit + Send + Sync + 'static,
{
    let cipher: C = keyed(key)?;
    Ok(match mode {
        CipherMode::Cbc => Box::new(Cbc(cipher)),
        CipherMode::Ctr => Box::new(Ctr(cipher)),
        CipherMode::Ecb | CipherMode::Xts => Box::new(Ecb(cipher)),
    })
}

/// The cipher of `family` whose key length is that of `key`, for single blocks. Errors: `InvalidOption` if
/// there is none.
pub(crate) fn block_cipher(family: &str, key: &[u8]) -> Result<Box<dyn BlockEncrypt>, CryptError> {
    let none = || CryptError::option(format!("no {family} cipher has a key of {} bytes", key.len()));
    let alg = CipherAlg::from_family(family, key.len()).ok_or_else(none)?;
    with_cipher!(
        alg,
        C => Ok(Box::new(Blocks(keyed::<C>(key)?))),
        8 => {
            let _: Option<C> = None;
            Err(none())
        }
    )
}

fn keyed<C: KeyInit>(key: &[u8]) -> Result<C, CryptError> {
    C::new_from_slice(key)
        .map_err(|_| CryptError::option(format!("no cipher for a key of {} bytes", key.len())))
}

/// `data` as blocks of cipher `C`.
fn blocks_of<C: BlockSizeUser>(data: &mut [u8]) -> &mut [Block<C>] {
    Array::slice_as_chunks_mut(data).0
}
