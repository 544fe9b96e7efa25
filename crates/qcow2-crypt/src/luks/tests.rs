use super::volume::SECTOR;
use super::*;
use crate::error::{CryptError, CryptErrorKind, SlotRefusal};
use crate::random::{Random, Stopwatch};
use crate::secret::Secret;
use crate::spec::{CipherAlg, CipherMode, CipherSpec, HashAlg, IvGen};
use proptest::prelude::*;
use qcow2_core::{HostOffset, Storage};
use qcow2_format::crypt::LUKS_HEADER_LEN;
use qcow2_io::MemoryStorage;
use qcow2_testkit::crash::CrashWorld;
use qcow2_testkit::cut::CrashImage;
use qcow2_testkit::fault::{CHANGING_CALLS, Fault, FaultPlan, FaultStorage};
use qcow2_testkit::pages::PageBytes;
use qcow2_testkit::rng::Rng;
use qcow2_testkit::storage::PageStorage;
use std::cell::Cell;
use std::sync::{Arc, Mutex};
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

/// Every call advances by a second, which gives the minimum number of iterations.
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
fn layout_matches_cryptsetup_and_qemu() {
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
fn every_cipher_unlocks_with_the_right_password_only() {
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
fn slots_are_added_and_erased() {
    let storage = make(&NewVolume::default());
    let volume = || Volume::read(&storage, START).unwrap();
    let key = unlock(&storage, "word").unwrap();
    assert_eq!(volume().free_slot(), Some(1));
    let change = volume().add_key(5, (&key, &secret("second")), 1000, &mut Counter(2)).unwrap();
    change.apply(&storage, START, &mut Counter(2)).unwrap();
    assert_eq!(unlock(&storage, "second").unwrap().bytes(), key.bytes());
    assert_eq!(volume().active_slots().collect::<Vec<_>>(), [0, 5]);
    let limit = IterationLimit::default();
    assert_eq!(volume().slots_of(&storage, START, &secret("second"), limit).unwrap(), [5]);
    let taken = volume().add_key(5, (&key, &secret("x")), 1000, &mut Counter(2)).unwrap_err();
    assert_eq!(*taken.kind(), CryptErrorKind::KeySlot(SlotRefusal::InUse(5)));
    let none = volume().add_key(8, (&key, &secret("x")), 1000, &mut Counter(2)).unwrap_err();
    assert_eq!(*none.kind(), CryptErrorKind::KeySlot(SlotRefusal::NoSuchSlot(8)));
    let before = volume().slot_offset(0);
    let mut old = vec![0; 512];
    storage.read_at(HostOffset::new(before), &mut old).unwrap();
    volume().erase_keys(&[0]).unwrap().apply(&storage, START, &mut Counter(3)).unwrap();
    let mut new = vec![0; 512];
    storage.read_at(HostOffset::new(before), &mut new).unwrap();
    assert_ne!(old, new, "key material was not overwritten");
    assert_eq!(unlock(&storage, "word").unwrap_err(), CryptErrorKind::WrongPassword);
    assert!(unlock(&storage, "second").is_ok());
}

#[test]
fn header_faults_are_reported_and_work_is_limited() {
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

/// Creates `slots` passwords that take `rounds` PBKDF2 rounds to try, digests included. A limit just below
/// must refuse to try them; the limit itself must not.
#[track_caller]
fn check_work(hash: HashAlg, alg: CipherAlg, slots: u64, rounds: u64) {
    let spec = CipherSpec { alg, ..CipherSpec::default() };
    let storage = make(&NewVolume { spec, hash, iter_time_ms: 0 });
    let volume = || Volume::read(&storage, START).unwrap();
    let key = unlock(&storage, "word").unwrap();
    for index in 1..slots {
        put_key((&storage, START), index as usize, (&key, &secret("b")), 1000, &mut Counter(index)).unwrap();
    }
    let tried = |limit| volume().unlock(&storage, START, &secret("word"), IterationLimit(limit));
    let refused = tried(rounds - 1).unwrap_err();
    assert_eq!(*refused.kind(), CryptErrorKind::TooManyIterations, "{hash:?} {alg:?}");
    assert_eq!(tried(rounds).unwrap().bytes(), key.bytes(), "{hash:?} {alg:?}");
}

/// A key longer than the digest takes several PBKDF2 passes, each with all rounds.
#[test]
fn work_counts_every_pbkdf2_pass() {
    const ROUNDS: u64 = 1000;
    // A 64-byte key takes 4, 2 and 1 passes with 20, 32 and 64-byte digests; then 1 pass for the 20-byte key
    // digest.
    check_work(HashAlg::Sha1, CipherAlg::Aes256, 1, ROUNDS * (4 + 1));
    check_work(HashAlg::Sha256, CipherAlg::Aes256, 1, ROUNDS * (2 + 1));
    check_work(HashAlg::Sha512, CipherAlg::Aes256, 1, ROUNDS * (1 + 1));
    // With a 16-byte hash the key digest takes two passes.
    check_work(HashAlg::Md5, CipherAlg::Aes128, 1, ROUNDS * (2 + 2));
    check_work(HashAlg::Sha1, CipherAlg::Aes256, 3, 3 * ROUNDS * (4 + 1));
}

#[test]
fn erasing_overwrites_every_sector_of_key_material() {
    let (start, _) = with_passwords(&["word", "b", "c"]);
    let storage = PageStorage::new(start);
    let volume = Volume::read(&storage, START).unwrap();
    let material = |index: usize| {
        let mut bytes = vec![0x5a; volume.material_len() as usize];
        storage.read_at(HostOffset::new(volume.slot_offset(index)), &mut bytes).unwrap();
        bytes
    };
    let before = [0, 1, 2].map(material);
    volume.erase_keys(&[0, 2]).unwrap().apply(&storage, START, &mut Counter(9)).unwrap();
    let after = [0, 1, 2].map(material);
    assert!(after[1] == before[1], "the slot between them is unchanged");
    for index in [0, 2] {
        let sectors = before[index].chunks(SECTOR as usize).zip(after[index].chunks(SECTOR as usize));
        for (number, (old, new)) in sectors.enumerate() {
            assert_ne!(old, new, "slot {index}: sector {number} was not overwritten");
        }
    }
}

#[test]
fn iterations_scale_with_the_stopwatch() {
    struct Exact(Cell<Duration>);
    impl Stopwatch for Exact {
        fn now(&self) -> Duration {
            self.0.set(self.0.get() + Duration::from_millis(1));
            self.0.get()
        }
    }
    let watch = || Exact(Cell::new(Duration::ZERO));
    // By this stopwatch every trial takes 1 ms, so for 1 ms the first trial of 1024 rounds is enough.
    assert_eq!(count_iterations(HashAlg::Md5, 16, 1, &watch()).unwrap(), 1024);
    assert_eq!(count_iterations(HashAlg::Md5, 16, 0, &watch()).unwrap(), 1000);
    assert!(count_iterations(HashAlg::Md5, 16, u64::MAX, &Slow::default()).is_err());
}

proptest! {
    #[test]
    fn headers_never_panic(changes in proptest::collection::vec((0..LUKS_HEADER_LEN, any::<u8>()), 0..20)) {
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

/// A volume with `passwords` in its first slots, and its master key.
fn with_passwords(passwords: &[&str]) -> (PageBytes, Secret) {
    let spec = CipherSpec { alg: CipherAlg::Aes128, mode: CipherMode::Cbc, ..CipherSpec::default() };
    let made = make(&NewVolume { spec, iter_time_ms: 0, ..NewVolume::default() });
    let key = unlock(&made, "word").unwrap();
    for (index, password) in passwords.iter().enumerate().skip(1) {
        put_key((&made, START), index, (&key, &secret(password)), 1000, &mut Counter(index as u64)).unwrap();
    }
    let mut bytes = vec![0; made.len().unwrap() as usize];
    made.read_at(START, &mut bytes).unwrap();
    (PageBytes::from_bytes(&bytes), key)
}

/// Applies `change` to a volume with `passwords` in its first slots and cuts the power at every step.
/// Afterwards each enabled slot must unlock with its password or with "new", and at least one must be
/// enabled.
#[track_caller]
fn check_power_cuts(passwords: &[&str], change: impl FnOnce(&dyn Storage)) {
    let (bytes, _) = with_passwords(passwords);
    let world = CrashWorld::new();
    let storage = world.add(bytes);
    let passwords: Vec<Secret> = passwords.iter().map(|text| secret(text)).collect();
    let (state, new) = (Mutex::new((0, Rng::new(5))), secret("new"));
    world.set_hook(Some(Arc::new(move |_, cut| {
        let mut state = state.lock().unwrap();
        let (step, rng) = &mut *state;
        *step += 1;
        let header = |image: CrashImage| {
            let mut header = [0; LUKS_HEADER_LEN];
            image.disks[0].read(0, &mut header);
            header
        };
        // The passes over erased material are all alike, so only a sample of them is checked.
        if header(cut.everything()) == header(cut.nothing()) && *step % 32 != 0 {
            return;
        }
        let mut images = vec![cut.everything()];
        images.extend((0..3).map(|_| cut.sample(rng)));
        // Each of the two header sectors alone.
        images.extend((0..cut.combinations().min(4)).map(|number| cut.image(number)));
        for image in images {
            let storage = image.storage(0);
            let volume = Volume::read(&*storage, START).unwrap();
            let opens = |index: usize| {
                let valid = passwords.get(index).into_iter().chain([&new]);
                valid.into_iter().any(|p| volume.unlock_slot(index, &*storage, START, p).unwrap().is_some())
            };
            let on: Vec<usize> = volume.active_slots().collect();
            assert!(!on.is_empty(), "step {step}: no slot is enabled");
            assert!(on.iter().all(|&index| opens(index)), "step {step}: not all of {on:?} unlock");
        }
    })));
    change(&*storage);
}

#[test]
fn power_cut_leaves_each_slot_usable_or_disabled() {
    let seven = ["word", "b", "c", "d", "e", "f", "g"];
    let eight = ["word", "b", "c", "d", "e", "f", "g", "h"];
    let put = |index: usize, password: &'static str, opens: &'static str| {
        move |storage: &dyn Storage| {
            let volume = Volume::read(storage, START).unwrap();
            let key = volume.unlock(storage, START, &secret(opens), IterationLimit::default()).unwrap();
            put_key((storage, START), index, (&key, &secret(password)), 1000, &mut Counter(9)).unwrap();
            let now = volume.header().slots[index].salt;
            assert_ne!(Volume::read(storage, START).unwrap().header().slots[index].salt, now);
        }
    };
    let erase = |indexes: &'static [usize]| {
        move |storage: &dyn Storage| {
            let change = Volume::read(storage, START).unwrap().erase_keys(indexes).unwrap();
            change.apply(storage, START, &mut Counter(9)).unwrap();
        }
    };
    check_power_cuts(&["word"], put(1, "new", "word"));
    check_power_cuts(&["word"], put(6, "new", "word"));
    check_power_cuts(&["word"], put(7, "new", "word"));
    check_power_cuts(&["word"], put(0, "new", "word"));
    check_power_cuts(&seven, put(6, "new", "word"));
    check_power_cuts(&eight, put(6, "new", "word"));
    check_power_cuts(&eight, erase(&[6]));
    check_power_cuts(&eight, erase(&[0, 6, 7]));
}

/// Applies `change` to a volume with `passwords` in its first slots while one storage call fails, once or
/// from then on. The change must report the failure; each enabled slot must still unlock to the same key,
/// with its password or with "new"; at least one must be enabled.
#[track_caller]
fn check_faults(passwords: &[&str], change: impl Fn(&dyn Storage, &Secret) -> Result<(), CryptError>) {
    let (start, key) = with_passwords(passwords);
    let secrets: Vec<Secret> = passwords.iter().map(|text| secret(text)).collect();
    let new = secret("new");
    // A write of two sectors may be torn.
    let faults = [Fault::Io, Fault::Short { bytes: 512 }, Fault::LateIo];
    for (fault, sticky) in faults.into_iter().flat_map(|fault| [(fault, false), (fault, true)]) {
        // The passes over erased material are all alike, so only a sample of them is checked.
        for nth in (0..12).chain((12..).step_by(37)) {
            let bytes = Arc::new(PageStorage::new(start.clone()));
            let storage = FaultStorage::new(Arc::clone(&bytes) as Arc<dyn Storage>);
            storage.set_plan(Some(FaultPlan { calls: CHANGING_CALLS.to_vec(), nth, sticky, fault }));
            let changed = change(&storage, &key);
            let fired = storage.fired() > 0;
            let what = format!("{fault:?}, sticky {sticky}, call {nth}");
            assert_eq!(changed.is_err(), fired, "{what}: {changed:?}");
            let volume = Volume::read(&*bytes, START).unwrap();
            let on: Vec<usize> = volume.active_slots().collect();
            assert!(!on.is_empty(), "{what}: no slot is enabled");
            for index in on {
                let valid = secrets.get(index).into_iter().chain([&new]);
                let opened =
                    valid.filter_map(|p| volume.unlock_slot(index, &*bytes, START, p).unwrap()).next();
                let opened =
                    opened.unwrap_or_else(|| panic!("{what}: slot {index} is enabled but does not unlock"));
                assert_eq!(opened.bytes(), key.bytes(), "{what}: slot {index}");
            }
            if !fired {
                break;
            }
        }
    }
}

#[test]
fn write_failure_leaves_each_slot_usable_or_disabled() {
    let eight = ["word", "b", "c", "d", "e", "f", "g", "h"];
    let put = |index: usize| {
        move |storage: &dyn Storage, key: &Secret| {
            put_key((storage, START), index, (key, &secret("new")), 1000, &mut Counter(9))
        }
    };
    let erase = |indexes: &'static [usize]| {
        move |storage: &dyn Storage, _: &Secret| {
            let change = Volume::read(storage, START)?.erase_keys(indexes)?;
            change.apply(storage, START, &mut Counter(9))
        }
    };
    check_faults(&["word"], put(1));
    check_faults(&["word"], put(6));
    check_faults(&["word"], put(0));
    check_faults(&eight, put(6));
    check_faults(&eight, erase(&[0, 6, 7]));
}

#[test]
fn invalid_key_slot_changes_are_refused() {
    let storage = make(&NewVolume { iter_time_ms: 0, ..NewVolume::default() });
    let volume = || Volume::read(&storage, START).unwrap();
    let key = unlock(&storage, "word").unwrap();
    let fill = |wanted, force| volume().slot_to_fill(wanted, force).map_err(|e| e.kind().clone());
    let erase = |which: SlotsToErase<'_>, force| {
        let found = volume().slots_to_erase((&storage, START), which, force, IterationLimit::default());
        found.map_err(|e| e.kind().clone())
    };
    let refused = |refusal| Err(CryptErrorKind::KeySlot(refusal));
    let (word, other) = (secret("word"), secret("other"));
    assert_eq!(fill(None, false), Ok(1));
    assert_eq!(fill(Some(0), false), Err(CryptErrorKind::KeySlot(SlotRefusal::InUse(0))));
    assert_eq!(fill(Some(0), true), Ok(0));
    assert_eq!(fill(Some(8), true), Err(CryptErrorKind::KeySlot(SlotRefusal::NoSuchSlot(8))));
    assert_eq!(erase(SlotsToErase::Slot(0, None), false), refused(SlotRefusal::LastOne(0)));
    assert_eq!(erase(SlotsToErase::Slot(0, None), true), Ok(vec![0]));
    assert_eq!(erase(SlotsToErase::Slot(3, None), false), refused(SlotRefusal::Erased(3)));
    assert_eq!(erase(SlotsToErase::Slot(0, Some(&other)), true), refused(SlotRefusal::OtherPassword(0)));
    assert_eq!(erase(SlotsToErase::UnlockedBy(&other), true), refused(SlotRefusal::NoneOpens));
    assert_eq!(erase(SlotsToErase::UnlockedBy(&word), false), refused(SlotRefusal::AllOpen));
    put_key((&storage, START), 4, (&key, &word), 1000, &mut Counter(3)).unwrap();
    assert_eq!(erase(SlotsToErase::UnlockedBy(&word), false), refused(SlotRefusal::AllOpen));
    put_key((&storage, START), 4, (&key, &other), 1000, &mut Counter(4)).unwrap();
    assert_eq!(volume().active_slots().collect::<Vec<_>>(), [0, 4]);
    assert_eq!(erase(SlotsToErase::UnlockedBy(&word), false), Ok(vec![0]));
    for index in [1, 2, 3, 5, 6, 7] {
        put_key((&storage, START), index, (&key, &other), 1000, &mut Counter(5)).unwrap();
    }
    assert_eq!(fill(None, true), Err(CryptErrorKind::KeySlot(SlotRefusal::AllInUse)));
}
