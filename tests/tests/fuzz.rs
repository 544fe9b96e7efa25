//! The fuzz targets' bodies over their committed seeds, and over each seed with every byte changed in turn.

use qcow2_testkit::fuzz::{TARGETS, Target};
use std::fs;
use std::path::Path;

fn seeds(target: &Target) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds").join(target.name);
    let mut seeds: Vec<_> = fs::read_dir(&folder)
        .unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
        .map(|entry| entry.expect("a folder entry").path())
        .map(|path| (path.display().to_string(), fs::read(&path).expect("a readable seed")))
        .collect();
    seeds.sort();
    assert!(seeds.len() > 5, "{} has {} seeds", folder.display(), seeds.len());
    seeds
}

#[test]
fn seeds_pass() {
    for target in TARGETS {
        for (_, bytes) in seeds(target) {
            (target.body)(&bytes);
        }
    }
}

#[test]
fn seeds_with_one_byte_changed_pass() {
    for target in TARGETS {
        for (name, bytes) in seeds(target) {
            for at in 0..bytes.len() {
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
fn seeds_cut_short_pass() {
    for target in TARGETS {
        for (_, bytes) in seeds(target) {
            (0..bytes.len()).for_each(|len| (target.body)(&bytes[..len]));
        }
    }
}
