//! XTS: block `j` of a sector is XORed with a mask before and after the cipher. The mask is the encrypted
//! sector number times x^j.
//!
//! The masks of a whole batch are computed first, so that the cipher sees one long run of blocks.

use super::{BATCH, Iv, SECTOR, SectorMode, blocks_of};
use cipher::typenum::U16;
use cipher::{Array, BlockCipherDecrypt, BlockCipherEncrypt, BlockSizeUser};

const BLOCKS: usize = SECTOR / 16;

/// Two keyed ciphers: one for the data, one for the tweak (the sector number).
pub(super) struct Xts<C> {
    data: C,
    tweak: C,
}

impl<C> Xts<C>
where
    C: BlockCipherEncrypt + BlockSizeUser<BlockSize = U16>,
{
    pub(super) fn new(data: C, tweak: C) -> Self {
        Self { data, tweak }
    }

    /// The masks of all blocks of all sectors in the batch.
    fn masks(&self, ivs: &mut [Iv]) -> [[u128; BLOCKS]; BATCH] {
        self.tweak.encrypt_blocks(Array::cast_slice_from_core_mut(ivs));
        let mut masks = [[0; BLOCKS]; BATCH];
        for (row, iv) in masks.iter_mut().zip(ivs) {
            let mut mask = u128::from_le_bytes(*iv);
            for place in row.iter_mut() {
                *place = mask;
                mask = times_x(mask);
            }
        }
        masks
    }
}

impl<C> SectorMode for Xts<C>
where
    C: BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser<BlockSize = U16> + Send + Sync,
{
    fn encrypt(&self, ivs: &mut [Iv], data: &mut [u8]) {
        let masks = self.masks(ivs);
        apply(&masks, data);
        self.data.encrypt_blocks(blocks_of::<C>(data));
        apply(&masks, data);
    }

    fn decrypt(&self, ivs: &mut [Iv], data: &mut [u8]) {
        let masks = self.masks(ivs);
        apply(&masks, data);
        self.data.decrypt_blocks(blocks_of::<C>(data));
        apply(&masks, data);
    }
}

fn apply(masks: &[[u128; BLOCKS]; BATCH], data: &mut [u8]) {
    for (block, mask) in data.as_chunks_mut::<16>().0.iter_mut().zip(masks.as_flattened()) {
        *block = (u128::from_le_bytes(*block) ^ mask).to_le_bytes();
    }
}

/// Multiplies by x in GF(2^128): a shift, then a reduction by the polynomial if a bit is carried out.
fn times_x(mask: u128) -> u128 {
    let carry = (mask.cast_signed() >> 127).cast_unsigned() & 0x87;
    (mask << 1) ^ carry
}
