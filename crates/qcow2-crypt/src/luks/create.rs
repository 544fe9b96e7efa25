//! Creates a volume: a random master key, stored in slot 0.

use super::volume::{ALIGNMENT_SECTORS, MIN_ITERATIONS, SECTOR, STRIPES, material_len, seal};
use crate::error::CryptError;
use crate::random::{Random, Stopwatch};
use crate::secret::Secret;
use crate::spec::{CipherSpec, HashAlg};
use qcow2_format::crypt::{LUKS_HEADER_LEN, LUKS_KEY_SLOTS, LuksHeader, LuksSlot};
use std::time::Duration;

/// Parameters of a new volume. The defaults are QEMU's.
#[derive(Clone, Copy, Debug)]
pub struct NewVolume {
    /// Cipher, mode and IV generator.
    pub spec: CipherSpec,
    /// Hash for the key derivation.
    pub hash: HashAlg,
    /// Target time for one password attempt, in milliseconds of CPU time on this machine.
    pub iter_time_ms: u64,
}

impl Default for NewVolume {
    fn default() -> Self {
        Self { spec: CipherSpec::default(), hash: HashAlg::Sha256, iter_time_ms: 2000 }
    }
}

impl NewVolume {
    /// Size of the area before the payload in bytes. Needs no password, so `measure` can use it.
    pub fn area_len(&self) -> u64 {
        SECTOR * (ALIGNMENT_SECTORS + LUKS_KEY_SLOTS as u64 * slot_sectors(&self.spec))
    }
}

/// Creates the area of a new volume: header, key material of slot 0 under `password`, zeroes up to the
/// payload. Errors: `InvalidOption` for incompatible parameters or an iteration time that is too long;
/// `Random`.
pub fn create(
    volume: &NewVolume,
    password: &Secret,
    random: &mut dyn Random,
    watch: &dyn Stopwatch,
) -> Result<Vec<u8>, CryptError> {
    let NewVolume { spec, hash, iter_time_ms } = *volume;
    spec.check()?;
    let key_len = spec.key_len();
    let iterations = count_iterations(hash, key_len, iter_time_ms, watch)?;
    let digest_iterations = count_iterations(hash, 20, iter_time_ms / 8, watch)?;
    let mut key = Secret::zeroed(key_len);
    random.fill(key.bytes_mut())?;
    let mut header = blank_header(volume, random)?;
    header.digest_iterations = digest_iterations;
    random.fill(&mut header.digest_salt)?;
    hash.derive(key.bytes(), &header.digest_salt, digest_iterations, &mut header.digest);
    let material = fill_slot(&mut header.slots[0], (&spec, hash), (&key, password), iterations, random)?;
    let mut area = vec![0; volume.area_len() as usize];
    area[..LUKS_HEADER_LEN].copy_from_slice(&header.encode().map_err(impossible)?);
    let at = (ALIGNMENT_SECTORS * SECTOR) as usize;
    area[at..at + material.len()].copy_from_slice(&material);
    Ok(area)
}

/// Stores `key` under `password` in `slot`. Returns the key material to write.
pub(super) fn fill_slot(
    slot: &mut LuksSlot,
    (spec, hash): (&CipherSpec, HashAlg),
    (key, password): (&Secret, &Secret),
    iterations: u32,
    random: &mut dyn Random,
) -> Result<Vec<u8>, CryptError> {
    slot.enabled = true;
    slot.iterations = iterations;
    slot.stripes = STRIPES;
    random.fill(&mut slot.salt)?;
    let mut slot_key = Secret::zeroed(spec.key_len());
    hash.derive(password.bytes(), &slot.salt, iterations, slot_key.bytes_mut());
    seal(spec, hash, (key, &slot_key), random)
}

fn blank_header(volume: &NewVolume, random: &mut dyn Random) -> Result<LuksHeader, CryptError> {
    let sectors = slot_sectors(&volume.spec);
    let slot = |index: usize| LuksSlot {
        enabled: false,
        iterations: 0,
        salt: [0; 32],
        material_offset_sectors: (ALIGNMENT_SECTORS + index as u64 * sectors) as u32,
        stripes: STRIPES,
    };
    Ok(LuksHeader {
        cipher: volume.spec.alg.family().to_owned(),
        mode: volume.spec.mode_text(),
        hash: volume.hash.name().to_owned(),
        payload_offset_sectors: (volume.area_len() / SECTOR) as u32,
        key_bytes: volume.spec.key_len() as u32,
        digest: [0; 20],
        digest_salt: [0; 32],
        digest_iterations: 0,
        uuid: random_uuid(random)?,
        slots: std::array::from_fn(slot),
    })
}

fn slot_sectors(spec: &CipherSpec) -> u64 {
    (material_len(spec.key_len()) / SECTOR).next_multiple_of(ALIGNMENT_SECTORS)
}

/// A random (version 4) UUID.
fn random_uuid(random: &mut dyn Random) -> Result<String, CryptError> {
    let mut bytes = [0; 16];
    random.fill(&mut bytes)?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let mut text = String::with_capacity(36);
    for (index, byte) in bytes.iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    Ok(text)
}

/// Number of PBKDF2 rounds of `hash` for `key_len` bytes that take `millis` milliseconds on this machine; at
/// least 1000. Errors: `InvalidOption` above 2^32 - 1 rounds.
pub fn count_iterations(
    hash: HashAlg,
    key_len: usize,
    millis: u64,
    watch: &dyn Stopwatch,
) -> Result<u32, CryptError> {
    let mut key = vec![0; key_len];
    let long_enough = Duration::from_millis(millis.clamp(1, LONGEST_TRIAL_MS));
    let mut rounds = FIRST_TRIAL;
    let taken = loop {
        let start = watch.now();
        hash.derive(b"password", b"salt", rounds, &mut key);
        let taken = watch.now().saturating_sub(start);
        if taken >= long_enough || rounds >= LAST_TRIAL {
            break taken;
        }
        rounds *= 2;
    };
    let nanos = taken.as_nanos().max(1);
    let wanted = u128::from(rounds) * u128::from(millis) * 1_000_000 / nanos;
    u32::try_from(wanted.max(u128::from(MIN_ITERATIONS))).map_err(|_| {
        let message =
            format!("{millis} ms of key derivation take {wanted} rounds, allowed are up to {}", u32::MAX);
        CryptError::option(message)
    })
}

fn impossible(error: qcow2_format::FormatError) -> CryptError {
    CryptError::option("LUKS header cannot be encoded").with_source(error)
}

/// Rounds of the first trial; each following trial has twice as many.
const FIRST_TRIAL: u32 = 1 << 10;
/// Rounds of the last trial, even if the stopwatch does not advance.
const LAST_TRIAL: u32 = 1 << 26;
/// A trial of this many milliseconds is accurate enough.
const LONGEST_TRIAL_MS: u64 = 200;
