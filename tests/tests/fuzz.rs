//! Runs the fuzz targets on their committed seeds, and on each seed with single bytes changed.

use qcow2_testkit::fuzz::Target;
use qcow2_testkit::rng::Rng;
use std::fs;
use std::path::Path;

fn seeds(target: &Target) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds").join(target.seeds);
    let mut seeds: Vec<_> = fs::read_dir(&folder)
        .unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
        .map(|entry| entry.expect("a folder entry").path())
        .map(|path| (path.display().to_string(), fs::read(&path).expect("a readable seed")))
        .collect();
    seeds.sort();
    assert!(seeds.len() > 5, "{} has {} seeds", folder.display(), seeds.len());
    seeds
}

fn targets() -> impl Iterator<Item = &'static Target> {
    qcow2_testkit::fuzz::TARGETS.iter().chain(qcow2_tests::fuzz::TARGETS)
}

#[test]
fn committed_seeds_pass() {
    for target in targets() {
        for (_, bytes) in seeds(target) {
            (target.body)(&bytes);
        }
    }
}

#[test]
fn seeds_with_any_byte_changed_pass() {
    for target in targets() {
        for (name, bytes) in seeds(target) {
            // Every byte of small seeds, a few hundred bytes of large ones.
            let mut rng = Rng::new(bytes.len() as u64);
            let all = bytes.len() as u64;
            let places: Vec<u64> =
                if all < 1000 { (0..all).collect() } else { (0..300).map(|_| rng.below(all)).collect() };
            for at in places {
                let at = at as usize;
                for value in [0, 1, 0x7f, 0x80, 0xff, bytes[at] ^ 1, bytes[at] ^ 0x10] {
                    let mut changed = bytes.clone();
                    changed[at] = value;
                    let outcome = std::panic::catch_unwind(|| (target.body)(&changed));
                    assert!(outcome.is_ok(), "{name} with byte {at} set to {value:#x}");
                }
            }
        }
    }
}

#[test]
fn truncated_seeds_pass() {
    for target in targets() {
        for (_, bytes) in seeds(target) {
            let step = bytes.len() / 500 + 1;
            (0..bytes.len()).step_by(step).for_each(|len| (target.body)(&bytes[..len]));
        }
    }
}
