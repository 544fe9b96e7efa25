//! Damaged images, checked and repaired beside the reference. `cargo xtask damage` runs as many as asked; the
//! table of a run over 5,000 is in `tests/data/damage.txt`.
#![allow(clippy::unwrap_used, reason = "a test may stop")]

use qcow2_tests::campaign::Campaign;
use std::time::Duration;

/// The first 120 images: 48 with random damage, 72 semantic mutants. `QCOW2_DAMAGE_IMAGES` and `QCOW2_SEED`
/// choose others.
#[test]
fn damaged_images_end_no_worse_than_by_the_reference() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let campaign = Campaign {
        ours: env!("CARGO_BIN_EXE_qcow2-under-test").into(),
        images: number("QCOW2_DAMAGE_IMAGES").unwrap_or(120),
        time: Duration::from_secs(24 * 3600),
        seed: number("QCOW2_SEED").unwrap_or(0),
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        keep: None,
    };
    let folder = tempfile::tempdir().unwrap();
    let Some(table) = campaign.run(folder.path()) else { return };
    println!("{table}");
    assert_eq!(table.broken(), Vec::<String>::new());
    let all = [table.random, table.semantic];
    assert!(all.iter().all(|column| column.ours_clean >= column.reference_clean), "{table}");
    assert!(all.iter().all(|column| column.ours_kept >= column.reference_kept), "{table}");
    // Something was damaged, and something was repaired.
    assert!(all.iter().all(|column| column.ours_clean * 20 > column.images), "{table}");
}
