//! The limits in README.md are those of the code.
#![allow(clippy::unwrap_used, reason = "a test may stop")]

use qcow2_format::limit;
use qcow2_testkit::oracle::Tool;

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-under-test");

/// Sizes in MiB where the limit is one of bytes.
fn shown(name: &str, value: u64) -> String {
    if name.starts_with("bytes") || name.starts_with("changed bytes") {
        assert!(value.is_multiple_of(1 << 20), "{name} is {value}");
        return format!("{} MiB", value >> 20);
    }
    value.to_string()
}

#[test]
fn the_table_of_limits_is_that_of_the_code() {
    let limits: &[(&str, u64)] = &[
        ("bytes of an L1 table", limit::MAX_L1_TABLE_SIZE),
        ("bytes of the refcount table", limit::MAX_REFCOUNT_TABLE_SIZE),
        ("snapshots of an image", u64::from(limit::MAX_SNAPSHOTS)),
        ("bytes of the snapshot table", limit::MAX_SNAPSHOT_TABLE_SIZE),
        ("bitmaps of an image", u64::from(limit::MAX_BITMAPS)),
        ("bytes of one bitmap's bits", limit::MAX_BITMAP_DATA_SIZE),
        ("layers of a backing chain", qcow2_core::chain::MAX_CHAIN_LEN as u64),
        ("bytes of counters of a check", qcow2_ops::check::MAX_COUNTERS_SIZE),
        ("clusters of a file that is checked", qcow2_ops::check::MAX_CLUSTERS),
        ("changed bytes of a repair", qcow2_ops::mend::MAX_CHANGED),
        ("bytes held of an image that is read from a pipe", qcow2_ops::stream::MAX_HELD),
        ("bytes of bitmaps' tables that `info` judges", qcow2_ops::info::MAX_BITMAP_TABLES),
        ("ranges that a rescue lists", qcow2_ops::rescue::MAX_RANGES as u64),
        ("findings of `vet` for one file", qcow2_ops::vet::MAX_FINDINGS as u64),
        ("rounds of key derivation to unlock a LUKS header", qcow2_crypt::luks::DEFAULT_ITERATION_LIMIT),
    ];
    let readme = concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md");
    let readme = std::fs::read_to_string(readme).unwrap();
    let table = readme.split("| limit | value | origin |").nth(1).unwrap();
    let rows: Vec<&str> = table.lines().skip(2).take_while(|line| line.starts_with('|')).collect();
    assert_eq!(rows.len(), limits.len(), "a limit is in one of the lists only");
    for (row, &(name, value)) in rows.iter().zip(limits) {
        let start = format!("| {name} | {} | ", shown(name, value));
        assert!(row.starts_with(&start), "{row} should start with {start}");
    }
}

/// The general help under our own name says where they are.
#[test]
fn the_help_names_the_page_of_limits() {
    let folder = tempfile::tempdir().unwrap();
    let help = |tool: &Tool| tool.run_in(folder.path(), &["--help"]).success().stdout;
    let line = "Limits of images and verbs: see \"Limits\" in README.md.\n";
    assert!(help(&Tool::at(OURS)).ends_with(line));
    let readme = concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md");
    assert!(std::fs::read_to_string(readme).unwrap().contains("\n## Limits\n"));
    let described = Tool::at(OURS).run_in(folder.path(), &["--describe"]).success().stdout;
    let described: serde_json::Value = serde_json::from_str(&described).unwrap();
    assert_eq!(described["limits"].as_str(), Some(line.trim_end()));
    #[cfg(unix)]
    {
        let link = folder.path().join("qemu-img");
        std::os::unix::fs::symlink(OURS, &link).unwrap();
        assert!(!help(&Tool::at(link)).contains("Limits"));
    }
}
