//! `info` of images whose bitmaps are damaged: as qemu-img, which does not open them, under its name; under
//! our own everything that can be shown, and which bitmap is damaged and how.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "helpers of a test")]

use qcow2_testkit::oracle::{Outcome, Tool};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-under-test");

/// An image of 1 MiB with the bitmaps `b0` and `b1`, and where its parts are.
struct Parts {
    bytes: Vec<u8>,
    /// The data of the header extension: count, reserved, size and offset of the directory.
    extension: usize,
    /// The directory: two entries of 32 bytes.
    directory: usize,
    /// The tables, of one entry each.
    tables: [usize; 2],
}

impl Parts {
    fn new(folder: &Path) -> Self {
        let run = |line: &str| {
            Tool::at(OURS).run_in(folder, &line.split(' ').collect::<Vec<_>>()).success();
        };
        run("create -q -f qcow2 a 1M");
        run("bitmap --add a b0");
        run("bitmap --add a b1");
        let bytes = fs::read(folder.join("a")).unwrap();
        let magic = 0x2385_2875u32.to_be_bytes();
        let extension = bytes.windows(4).position(|word| word == magic).unwrap() + 8;
        let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
        let directory = word(extension + 16);
        let tables = [word(directory), word(directory + 32)];
        Self { bytes, extension, directory, tables }
    }

    /// The image with a number of `len` bytes written at each of the places.
    fn with(&self, changes: &[(usize, usize, u64)]) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        for &(at, len, value) in changes {
            bytes[at..at + len].copy_from_slice(&value.to_be_bytes()[8 - len..]);
        }
        bytes
    }

    /// The image with another first entry: a name and extra data.
    fn with_entry(&self, name: &str, extra: usize) -> Vec<u8> {
        let mut entry = self.bytes[self.directory..self.directory + 18].to_vec();
        entry.extend((name.len() as u16).to_be_bytes());
        entry.extend((extra as u32).to_be_bytes());
        entry.resize(entry.len() + extra, 0);
        entry.extend(name.as_bytes());
        entry.resize(entry.len().next_multiple_of(8), 0);
        entry.extend(&self.bytes[self.directory + 32..self.directory + 64]);
        let mut bytes = self.with(&[(self.extension + 8, 8, entry.len() as u64)]);
        bytes[self.directory..self.directory + entry.len()].copy_from_slice(&entry);
        bytes
    }

    /// Damaged images, and what our own `info` says: of which bitmap, if of one, and a part of the text.
    fn damaged(&self) -> Vec<(&'static str, Vec<u8>, Option<usize>, &'static str)> {
        let [first, second] = [self.directory, self.directory + 32];
        let at = |offset: u64| (first, 8, offset);
        let one = |name, change, text| (name, self.with(&[change]), Some(0), text);
        let whole = |name, at, len, value, text| (name, self.with(&[(at, len, value)]), None, text);
        let same_name = (first + 24, 2, 0x6231);
        let [count, size, offset] = [self.extension, self.extension + 8, self.extension + 16];
        vec![
            one("table at 0", at(0), "table at 0x0 is not a multiple"),
            one("table inside a cluster", at(self.tables[0] as u64 + 512), "is not a multiple of 65536"),
            one("table past any file", at(1 << 63), "no file is that long"),
            one("table at the end", at((1 << 63) - (1 << 30)), "no file is that long"),
            one("table past the end", at(1 << 40), "passes the end of the image"),
            one("no table", (first + 8, 4, 0), "0 table entries, allowed are 1"),
            one("two clusters", (first + 8, 4, 2), "2 table entries, its disk needs 1"),
            one("more bits than allowed", (first + 8, 4, 8193), "536936448 bytes of bits"),
            one("huge", (first + 8, 4, 0xffff_ffff), "4294967295 table entries"),
            one("flags", (first + 12, 4, 4), "reserved flags 0x4"),
            one("flags in use", (first + 12, 4, 5), "reserved flags 0x4"),
            one("type", (first + 16, 1, 7), "type is 7, allowed is 1"),
            one("granularity 8", (first + 17, 1, 8), "granularity_bits is 8, allowed are 9 to 31"),
            one("granularity 32", (first + 17, 1, 32), "granularity_bits is 32"),
            one("granularity 255", (first + 17, 1, 255), "granularity_bits is 255"),
            one("table entry", (self.tables[0], 8, 2), "bitmap table entry 0x0000000000000002"),
            ("extra", self.with_entry("b0", 8), Some(0), "8 bytes of extra data, allowed are 0"),
            ("unnamed", self.with_entry("", 0), Some(0), "name of 0 bytes, allowed are 1 to 1023"),
            ("long name", self.with_entry(&"x".repeat(1024), 0), Some(0), "name of 1024 bytes"),
            ("one name", self.with(&[same_name]), Some(1), "another bitmap has this name"),
            ("in use", self.with(&[same_name, (first + 12, 4, 1)]), Some(1), "another bitmap has this name"),
            ("name and size", self.with(&[same_name, (second + 8, 4, 2)]), Some(1), "another bitmap"),
            ("name and table", self.with(&[same_name, (self.tables[1], 8, 2)]), Some(1), "another bitmap"),
            ("size of the first", self.with(&[same_name, (first + 8, 4, 2)]), Some(0), "its disk needs 1"),
            (
                "rule of the second",
                self.with(&[at(0), (second + 17, 1, 8)]),
                Some(1),
                "granularity_bits is 8",
            ),
            (
                "size and table",
                self.with(&[(first + 8, 4, 2), (self.tables[0], 8, 2)]),
                Some(0),
                "table entry",
            ),
            ("one too many", self.with(&[(count, 4, 1), (second + 17, 1, 8)]), None, "more than 1 bitmaps"),
            whole("one too few", count, 4, 3, "2 bitmaps, the header counts 3"),
            whole("cut", size, 8, 40, "ends inside an entry"),
            whole("long", first + 18, 2, 65_535, "ends inside an entry"),
            whole("too much extra data", first + 20, 4, 100_000, "ends inside an entry"),
            whole("on the header", offset, 8, 0, "ends inside an entry"),
            whole("directory past the end", offset, 8, 1 << 40, "directory ends past the end of the image"),
        ]
    }

    /// Images of which qemu-img finds nothing wrong, and neither do we.
    fn sound(&self) -> Vec<(&'static str, Vec<u8>)> {
        let first = self.directory;
        vec![
            ("untouched", self.with(&[])),
            ("in use, of another size", self.with(&[(first + 8, 4, 2), (first + 12, 4, 1)])),
            ("in use, damaged table", self.with(&[(self.tables[0], 8, 2), (first + 12, 4, 1)])),
            ("all ones", self.with(&[(self.tables[0], 8, 1)])),
            ("granularity 31", self.with(&[(first + 17, 1, 31)])),
        ]
    }
}

fn without_size(outcome: &Outcome) -> String {
    outcome.stdout.lines().filter(|line| !line.contains("disk size")).collect()
}

#[test]
fn as_qemu_img_answers() {
    let Some(reference) = Tool::find("qemu-img") else { return };
    let folder = tempfile::tempdir().unwrap();
    let link = folder.path().join("qemu-img");
    symlink(OURS, &link).unwrap();
    let parts = Parts::new(folder.path());
    let damaged = parts.damaged().into_iter().map(|(name, bytes, ..)| (name, bytes));
    let mut wrong = Vec::new();
    for (name, bytes) in damaged.chain(parts.sound()) {
        fs::write(folder.path().join("x"), bytes).unwrap();
        for args in [&["info", "x"][..], &["info", "--output=json", "x"]] {
            let seen = [&reference, &Tool::at(&link)].map(|tool| {
                let outcome = tool.run_in(folder.path(), args);
                (outcome.code, outcome.stderr.clone(), without_size(&outcome))
            });
            if seen[0] != seen[1] {
                wrong.push(format!("{name}: {args:?}: {seen:#?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What is no image for qemu-img cannot be checked. With two exceptions: it checks an image with a bitmap
/// without a name, which it then does not open; and it does not check one with two bitmaps of one name, which
/// says nothing of the clusters in use.
#[test]
fn a_check_ends_as_qemu_imgs() {
    let Some(reference) = Tool::find("qemu-img") else { return };
    let folder = tempfile::tempdir().unwrap();
    let parts = Parts::new(folder.path());
    let damaged = parts.damaged().into_iter().map(|(name, bytes, ..)| (name, bytes));
    let mut wrong = Vec::new();
    for (name, bytes) in damaged.chain(parts.sound()) {
        if ["unnamed", "one name", "in use"].contains(&name) {
            continue;
        }
        fs::write(folder.path().join("x"), bytes).unwrap();
        let check = |tool: &Tool| tool.run_in(folder.path(), &["check", "-q", "x"]).code;
        let seen = [check(&reference), check(&Tool::at(OURS))];
        if seen[0] != seen[1] {
            wrong.push(format!("{name}: {seen:?}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[test]
fn under_our_own_name_all_is_shown() {
    let folder = tempfile::tempdir().unwrap();
    let parts = Parts::new(folder.path());
    let info = |bytes: &[u8]| {
        fs::write(folder.path().join("x"), bytes).unwrap();
        let text = Tool::at(OURS).run_in(folder.path(), &["info", "x"]).success().stdout;
        let json = Tool::at(OURS).run_in(folder.path(), &["info", "--output=json", "x"]).success().stdout;
        let json: Value = serde_json::from_str(&json).unwrap();
        assert_eq!(json["virtual-size"].as_u64(), Some(1 << 20));
        (text, json["format-specific"]["data"].clone())
    };
    for (name, bytes, bitmap, expected) in parts.damaged() {
        let (text, data) = info(&bytes);
        let damage = match bitmap {
            Some(index) => &data["bitmaps"][index]["damage"],
            None => &data["bitmap-directory-damage"],
        };
        let said = damage.as_str().unwrap_or_default();
        assert!(said.contains(expected), "{name}: {data:#}");
        let label = if bitmap.is_some() { "damage: " } else { "bitmap directory damage: " };
        assert!(text.contains(&format!("{label}{said}\n")), "{name}: {text}");
    }
    for (name, bytes) in parts.sound() {
        let (text, _) = info(&bytes);
        assert!(!text.contains("damage") && text.contains("name: b1"), "{name}: {text}");
    }
}
