use super::*;
use crate::random::{Random, Stopwatch};
use crate::spec::{CipherAlg, CipherMode, IvGen};
use proptest::prelude::*;
use qcow2_io::MemoryStorage;
use std::cell::Cell;
use std::time::Duration;

struct Counter(u64);

impl Random for Counter {
    fn fill(&mut self, buf: &mut [u8]) -> Result<(), CryptError> {
        for byte in buf {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *byte = (self.0 >> 33) as u8;
        }
        Ok(())
    }
}

/// Every look takes a second: the fewest iterations.
#[derive(Default)]
struct Slow(Cell<u64>);

impl Stopwatch for Slow {
    fn now(&self) -> Duration {
        self.0.set(self.0.get() + 1);
        Duration::from_secs(self.0.get())
    }
}

const START: HostOffset = HostOffset::new(0);

fn secret(text: &str) -> Secret {
    Secret::new(text.as_bytes().to_vec())
}

fn make(new: &NewVolume) -> MemoryStorage {
    let area = create(new, &secret("word"), &mut Counter(1), &Slow::default()).unwrap();
    assert_eq!(area.len() as u64, new.area_len());
    let storage = MemoryStorage::new();
    storage.write_at(START, &area).unwrap();
    storage
}

fn unlock(storage: &MemoryStorage, password: &str) -> Result<Secret, CryptErrorKind> {
    let volume = Volume::read(storage, START).map_err(|e| e.kind().clone())?;
    let limit = IterationLimit::default();
    volume.unlock(storage, START, &secret(password), limit).map_err(|e| e.kind().clone())
}

#[test]
fn the_layout_is_that_of_other_tools() {
    let new = |alg, mode| NewVolume {
        spec: CipherSpec { alg, mode, ..CipherSpec::default() },
        ..NewVolume::default()
    };
    for (alg, mode, payload, second) in [
        (CipherAlg::Aes256, CipherMode::Xts, 4040, 512),
        (CipherAlg::Aes128, CipherMode::Xts, 2056, 264),
        (CipherAlg::Aes128, CipherMode::Cbc, 1032, 136),
        (CipherAlg::Aes192, CipherMode::Cbc, 1544, 200),
    ] {
        let volume = Volume::read(&make(&new(alg, mode)), START).unwrap();
        assert_eq!(volume.header().payload_offset_sectors, payload, "{alg:?} {mode:?}");
        assert_eq!(volume.header().slots[1].material_offset_sectors, second, "{alg:?} {mode:?}");
        assert_eq!(volume.header().slots[0].iterations, 2048);
    }
}

#[test]
fn every_combination_opens_with_its_password_only() {
    for alg in ["aes-128", "aes-192", "aes-256", "serpent-256", "twofish-192", "cast5-128"] {
        for (mode, ivgen) in [
            (CipherMode::Xts, IvGen::Plain64),
            (CipherMode::Cbc, IvGen::Essiv),
            (CipherMode::Cbc, IvGen::Plain),
            (CipherMode::Ctr, IvGen::Plain64),
        ] {
            let alg = CipherAlg::from_name(alg).unwrap();
            let spec = CipherSpec { alg, mode, ivgen, ivgen_hash: None };
            if spec.check().is_err() {
                continue;
            }
            let storage = make(&NewVolume { spec, hash: HashAlg::Sha1, iter_time_ms: 0 });
            assert!(unlock(&storage, "word").is_ok(), "{spec:?}");
            assert_eq!(unlock(&storage, "Word").unwrap_err(), CryptErrorKind::WrongPassword);
        }
    }
}

#[test]
fn slots_come_and_go() {
    let storage = make(&NewVolume::default());
    let volume = || Volume::read(&storage, START).unwrap();
    let key = unlock(&storage, "word").unwrap();
    assert_eq!(volume().free_slot(), Some(1));
    let change = volume().add_key(5, (&key, &secret("second")), 1000, &mut Counter(2)).unwrap();
    change.apply(&storage, START).unwrap();
    assert_eq!(unlock(&storage, "second").unwrap().bytes(), key.bytes());
    assert_eq!(volume().active_slots().collect::<Vec<_>>(), [0, 5]);
    let limit = IterationLimit::default();
    assert_eq!(volume().slots_of(&storage, START, &secret("second"), limit).unwrap(), [5]);
    let taken = volume().add_key(5, (&key, &secret("x")), 1000, &mut Counter(2)).unwrap_err();
    assert_eq!(*taken.kind(), CryptErrorKind::KeySlot);
    let none = volume().add_key(8, (&key, &secret("x")), 1000, &mut Counter(2)).unwrap_err();
    assert_eq!(*none.kind(), CryptErrorKind::InvalidOption);
    let before = volume().slot_offset(0);
    let mut old = vec![0; 512];
    storage.read_at(HostOffset::new(before), &mut old).unwrap();
    volume().erase_keys(&[0], &mut Counter(3)).unwrap().apply(&storage, START).unwrap();
    let mut new = vec![0; 512];
    storage.read_at(HostOffset::new(before), &mut new).unwrap();
    assert_ne!(old, new, "key material stays");
    assert_eq!(unlock(&storage, "word").unwrap_err(), CryptErrorKind::WrongPassword);
    assert!(unlock(&storage, "second").is_ok());
}

#[test]
fn damage_is_named_and_work_is_bounded() {
    let good = make(&NewVolume::default());
    let mut bytes = vec![0; LUKS_HEADER_LEN];
    good.read_at(START, &mut bytes).unwrap();
    let broken = |at: usize, new: &[u8]| {
        let mut bytes = bytes.clone();
        bytes[at..at + new.len()].copy_from_slice(new);
        Volume::parse(&bytes)
    };
    let message = |at: usize, new: &[u8]| broken(at, new).unwrap_err().to_string();
    assert_eq!(message(0, b"QFI"), "volume is not in LUKS format");
    assert_eq!(message(7, &[2]), "LUKS version 2 is not supported, only version 1 is");
    assert!(message(8, b"rot\0").contains("rot"));
    assert!(message(72, b"crc\0").contains("crc"));
    assert!(message(104, &[0; 4]).contains("overlaps the header"));
    assert!(message(108, &[0xff; 4]).contains("allowed are 64"));
    assert!(message(164, &[0; 4]).contains("no iterations"));
    assert!(message(208, &[1, 2, 3, 4]).contains("damaged"));
    assert!(message(212, &[0; 4]).contains("key slot 0 has no iterations"));
    assert!(message(248, &[0; 4]).contains("key slot 0 lies at"));
    assert!(message(248 + 48, &8u32.to_be_bytes()).contains("key slot 1 overlaps key slot 0"));
    assert!(message(252, &[0xff; 4]).contains("stripes"));
    let heavy = broken(212, &[0xff; 4]).unwrap();
    let limit = IterationLimit::default();
    let error = heavy.unlock(&good, START, &secret("word"), limit).unwrap_err();
    assert_eq!(*error.kind(), CryptErrorKind::TooManyIterations);
    let short = MemoryStorage::new();
    short.write_at(START, &bytes).unwrap();
    let error = Volume::read(&short, START).unwrap().unlock(&short, START, &secret("word"), limit);
    assert_eq!(*error.unwrap_err().kind(), CryptErrorKind::Damaged);
}

#[test]
fn iterations_follow_the_clock() {
    struct Exact(Cell<Duration>);
    impl Stopwatch for Exact {
        fn now(&self) -> Duration {
            self.0.set(self.0.get() + Duration::from_millis(1));
            self.0.get()
        }
    }
    let watch = || Exact(Cell::new(Duration::ZERO));
    // A trial takes a millisecond by this watch, so a trial of 1 ms is enough and 1024 rounds are counted for it.
    assert_eq!(count_iterations(HashAlg::Md5, 16, 1, &watch()).unwrap(), 1024);
    assert_eq!(count_iterations(HashAlg::Md5, 16, 0, &watch()).unwrap(), 1000);
    assert!(count_iterations(HashAlg::Md5, 16, u64::MAX, &Slow::default()).is_err());
}

proptest! {
    #[test]
    fn any_header_is_judged(changes in proptest::collection::vec((0..LUKS_HEADER_LEN, any::<u8>()), 0..20)) {
        let area = make(&NewVolume::default());
        let mut bytes = vec![0; LUKS_HEADER_LEN];
        area.read_at(START, &mut bytes).unwrap();
        for (at, byte) in changes {
            bytes[at] = byte;
        }
        if let Ok(volume) = Volume::parse(&bytes) {
            area.write_at(START, &bytes).unwrap();
            let _ = volume.unlock(&area, START, &secret("word"), IterationLimit(100_000));
        }
    }
}
