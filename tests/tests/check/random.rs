//! Random damage to the tables of small images: the same lines, counts and statistics as QEMU.

use crate::damage::{Base, Bench, Image};
use qcow2_testkit::rng::Rng;

const SHAPES: &[(&str, u32)] = &[
    ("cluster_size=4k", 12),
    ("cluster_size=4k,refcount_bits=1", 12),
    ("cluster_size=4k,refcount_bits=8", 12),
    ("cluster_size=512,refcount_bits=64", 9),
    ("cluster_size=16k,extended_l2=on", 14),
    ("cluster_size=64k,refcount_bits=2", 16),
];

const COMMANDS: &[&[&str]] = &[
    &["write 0 200k", "write -z 64k 16k", "write -c 256k 64k"],
    &["write 0 200k", "snapshot a", "write 16k 100k", "write -c 256k 64k", "write -c 320k 64k"],
];

/// Changes one entry of a table in a way that a check judges by that entry alone.
fn damage(image: &mut Image, rng: &mut Rng, cluster_bits: u32, extended: bool) {
    let clusters = image.bytes.len() as u64 >> cluster_bits;
    let place = rng.below(clusters + 3) << cluster_bits;
    let entry_size = if extended { 16 } else { 8 };
    let l2 = image.l2 + rng.below(64) * entry_size;
    let flags = rng.pick(&[0, 1 << 63, 1 << 63, 1, 1 << 63 | 1]);
    match rng.below(12) {
        0 => image.change(image.l1, |entry| entry ^ 1 << 63),
        1 => image.change(l2, |entry| entry ^ 1 << 63),
        2 => image.change(l2, |entry| entry ^ 1 << rng.between(56, 61)),
        3 | 4 => image.set(l2, flags | place),
        5 => image.set(l2, flags | place | (512 * rng.below(1 << (cluster_bits - 9)))),
        6 => image.set(l2, 1 << 62 | place | rng.below(1 << cluster_bits)),
        7 if extended => image.set(l2 + 8, rng.next_u64()),
        7 => image.set(l2, 0),
        8 | 9 => {
            let at = image.refcount_block + rng.below(64);
            image.put(at, &[rng.next_u64() as u8]);
        }
        10 => image.set(image.refcount_table + 8 * rng.between(1, 3), place),
        _ => image.change(image.refcount_table + 8, |entry| entry | 1 << rng.below(9)),
    }
}

#[test]
fn random_table_damage_gives_the_same_report() {
    let Some(bench) = Bench::new() else { return };
    for seed in 0..120 {
        let mut rng = Rng::new(seed);
        let (options, cluster_bits) = rng.pick(SHAPES);
        let commands = if options.contains("refcount_bits=1") && !options.contains("16") {
            COMMANDS[0]
        } else {
            rng.pick(COMMANDS)
        };
        let base = Base { options, size: "1M", commands };
        let count = rng.between(1, 6);
        bench.case(&format!("seed {seed}: {options}"), base, |image| {
            for _ in 0..count {
                damage(image, &mut rng, cluster_bits, options.contains("extended"));
            }
        });
    }
}
