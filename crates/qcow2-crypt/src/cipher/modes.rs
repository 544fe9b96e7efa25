//! CBC, CTR and ECB over sectors.

use super::{BATCH, Iv, SECTOR, SectorMode, blocks_of};
use cipher::{Block, BlockCipherDecrypt, BlockCipherEncrypt, BlockSizeUser};

/// CBC: each block is XORed with the previous ciphertext block, the first one with the initialization vector.
pub(super) struct Cbc<C>(pub(super) C);

/// CTR: the data is XORed with the encrypted counter. The initialization vector is its start value,
/// big-endian.
pub(super) struct Ctr<C>(pub(super) C);

/// ECB: each block is encrypted independently.
pub(super) struct Ecb<C>(pub(super) C);

impl<C: BlockCipherEncrypt + BlockCipherDecrypt + Send + Sync> SectorMode for Cbc<C> {
    /// CBC encryption is sequential within a sector but independent between sectors. So the batch encrypts
    /// block `i` of all its sectors at once.
    fn encrypt(&self, ivs: &mut [Iv], data: &mut [u8]) {
        let size = C::block_size();
        let mut row: [Block<C>; BATCH] = core::array::from_fn(|_| Block::<C>::default());
        let row = &mut row[..ivs.len().min(BATCH)];
        for (last, iv) in row.iter_mut().zip(ivs.iter()) {
            last.copy_from_slice(&iv[..size]);
        }
        for at in (0..SECTOR).step_by(size) {
            for (last, sector) in row.iter_mut().zip(data.chunks_exact(SECTOR)) {
                xor(last, &sector[at..at + size]);
            }
            self.0.encrypt_blocks(row);
            for (last, sector) in row.iter().zip(data.chunks_exact_mut(SECTOR)) {
                sector[at..at + size].copy_from_slice(last);
            }
        }
    }

    fn decrypt(&self, ivs: &mut [Iv], data: &mut [u8]) {
        let size = C::block_size();
        let mut cipher = [0; BATCH * SECTOR];
        let cipher = &mut cipher[..data.len()];
        cipher.copy_from_slice(data);
        self.0.decrypt_blocks(blocks_of::<C>(data));
        for ((plain, cipher), iv) in
            data.chunks_exact_mut(SECTOR).zip(cipher.chunks_exact(SECTOR)).zip(ivs.iter())
        {
            xor(&mut plain[..size], &iv[..size]);
            xor(&mut plain[size..], &cipher[..SECTOR - size]);
        }
    }
}

impl<C: BlockCipherEncrypt + Send + Sync> SectorMode for Ctr<C> {
    fn encrypt(&self, ivs: &mut [Iv], data: &mut [u8]) {
        let size = C::block_size();
        let mut stream = [0; BATCH * SECTOR];
        let stream = &mut stream[..data.len()];
        for (sector, iv) in stream.chunks_exact_mut(SECTOR).zip(ivs.iter()) {
            let mut counter = start_of_counter(&iv[..size]);
            for block in sector.chunks_exact_mut(size) {
                block.copy_from_slice(&counter.to_be_bytes()[16 - size..]);
                counter = counter.wrapping_add(1);
            }
        }
        self.0.encrypt_blocks(blocks_of::<C>(stream));
        xor(data, stream);
    }

    fn decrypt(&self, ivs: &mut [Iv], data: &mut [u8]) {
        self.encrypt(ivs, data);
    }
}

impl<C: BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser + Send + Sync> SectorMode for Ecb<C> {
    fn encrypt(&self, _ivs: &mut [Iv], data: &mut [u8]) {
        self.0.encrypt_blocks(blocks_of::<C>(data));
    }

    fn decrypt(&self, _ivs: &mut [Iv], data: &mut [u8]) {
        self.0.decrypt_blocks(blocks_of::<C>(data));
    }
}

fn start_of_counter(iv: &[u8]) -> u128 {
    iv.iter().fold(0, |counter, &byte| counter << 8 | u128::from(byte))
}

fn xor(into: &mut [u8], with: &[u8]) {
    for (a, b) in into.iter_mut().zip(with) {
        *a ^= b;
    }
}
