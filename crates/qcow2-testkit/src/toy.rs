//! A toy cipher for tests, without secrecy: data read without it, or with a wrong sector number, is noise.

use qcow2_core::{ClusterCipher, EncryptedLayer, Keyring, SectorNumbering, UnlockError};
use std::sync::Arc;

/// Combines each sector with noise derived from its number.
#[derive(Clone, Copy, Debug)]
pub struct ToyCipher(pub SectorNumbering);

impl ToyCipher {
    fn cover(first_sector: u64, data: &mut [u8]) {
        for (number, sector) in (first_sector..).zip(data.chunks_mut(512)) {
            assert_eq!(sector.len(), 512, "part of a sector");
            let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            for word in sector.as_chunks_mut::<8>().0 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                *word = (u64::from_le_bytes(*word) ^ state).to_le_bytes();
            }
        }
    }
}

impl ClusterCipher for ToyCipher {
    fn numbering(&self) -> SectorNumbering {
        self.0
    }

    fn encrypt(&self, first_sector: u64, data: &mut [u8]) {
        Self::cover(first_sector, data);
    }

    fn decrypt(&self, first_sector: u64, data: &mut [u8]) {
        Self::cover(first_sector, data);
    }
}

/// Gives every layer a [`ToyCipher`].
#[derive(Clone, Copy, Debug)]
pub struct ToyKeyring(pub SectorNumbering);

impl Keyring for ToyKeyring {
    fn unlock(&self, _layer: &EncryptedLayer<'_>) -> Result<Arc<dyn ClusterCipher>, UnlockError> {
        Ok(Arc::new(ToyCipher(self.0)))
    }
}
