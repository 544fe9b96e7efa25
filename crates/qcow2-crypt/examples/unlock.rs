//! Creates a LUKS header in memory, adds a second password and unlocks it: `cargo run -p qcow2-crypt
//! --example unlock`.
#![allow(clippy::print_stdout, reason = "the example prints its results")]

use qcow2_core::{HostOffset, SectorNumbering, Storage};
use qcow2_crypt::luks::{IterationLimit, NewVolume, Volume, create};
use qcow2_crypt::{CryptError, Random, Secret, Stopwatch};
use qcow2_io::MemoryStorage;
use std::time::{Duration, Instant};

/// A predictable generator, for this example only. A real program must use the operating system's random
/// source.
struct Guessable(u64);

impl Random for Guessable {
    fn fill(&mut self, buf: &mut [u8]) -> Result<(), CryptError> {
        for byte in buf {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *byte = (self.0 >> 56) as u8;
        }
        Ok(())
    }
}

struct Wall(Instant);

impl Stopwatch for Wall {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }
}

fn main() -> Result<(), CryptError> {
    let (start, limit) = (HostOffset::default(), IterationLimit::default());
    let (first, second) = (Secret::new(b"first".to_vec()), Secret::new(b"second".to_vec()));
    let mut random = Guessable(1);
    let new = NewVolume { iter_time_ms: 20, ..NewVolume::default() };
    let storage = MemoryStorage::new();
    storage.write_at(start, &create(&new, &first, &mut random, &Wall(Instant::now()))?)?;

    let volume = Volume::read(&storage, start)?;
    let key = volume.unlock(&storage, start, &first, limit)?;
    volume.add_key(1, (&key, &second), 1000, &mut random)?.apply(&storage, start, &mut random)?;

    let volume = Volume::read(&storage, start)?;
    let key = volume.unlock(&storage, start, &second, limit)?;
    let cipher = volume.cipher(&key, SectorNumbering::Host)?;
    let mut sector = [0x5a; 512];
    cipher.encrypt_sectors(0, &mut sector);
    println!("{}-{}: {:02x?} ...", volume.header().cipher, volume.header().mode, &sector[..8]);
    cipher.decrypt_sectors(0, &mut sector);
    println!(
        "slots in use: {:?}, back again: {}",
        volume.active_slots().collect::<Vec<_>>(),
        sector == [0x5a; 512]
    );
    Ok(())
}
