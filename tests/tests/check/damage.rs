//! One kind of damage at a time, in images made by qemu-img.

use crate::words::lines;
use crate::{exit_code, report};
use qcow2_testkit::oracle::Qemu;
use std::fs;
use std::path::{Path, PathBuf};

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;

/// An image's bytes and the offsets of its first tables.
pub(crate) struct Image {
    pub(crate) bytes: Vec<u8>,
    pub(crate) l1: u64,
    pub(crate) l2: u64,
    pub(crate) refcount_table: u64,
    pub(crate) refcount_block: u64,
    snapshots: u64,
}

impl Image {
    pub(crate) fn read(path: &Path) -> Self {
        let bytes = fs::read(path).expect("the image can be read");
        let mut image = Self { bytes, l1: 0, l2: 0, refcount_table: 0, refcount_block: 0, snapshots: 0 };
        image.l1 = image.word(40);
        image.l2 = image.word(image.l1) & 0xff_ffff_ffff_fe00;
        image.refcount_table = image.word(48);
        image.refcount_block = image.word(image.refcount_table);
        image.snapshots = image.word(64);
        image
    }

    pub(crate) fn word(&self, at: u64) -> u64 {
        let word = &self.bytes[at as usize..at as usize + 8];
        u64::from_be_bytes(word.try_into().expect("eight bytes"))
    }

    pub(crate) fn put(&mut self, at: u64, bytes: &[u8]) {
        self.bytes[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    }

    pub(crate) fn set(&mut self, at: u64, word: u64) {
        self.put(at, &word.to_be_bytes());
    }

    pub(crate) fn change(&mut self, at: u64, change: impl FnOnce(u64) -> u64) {
        self.set(at, change(self.word(at)));
    }

    /// Length of the file, rounded up to 64 KiB.
    fn end(&self) -> u64 {
        (self.bytes.len() as u64).next_multiple_of(65536)
    }
}

/// How to make an image: `qemu-img create` options, size, `qemu-io` commands; `snapshot` takes one.
#[derive(Clone, Copy)]
pub(crate) struct Base<'a> {
    pub(crate) options: &'a str,
    pub(crate) size: &'a str,
    pub(crate) commands: &'a [&'a str],
}

const PLAIN: Base<'_> = Base { options: "", size: "4M", commands: &["write 0 256k"] };
const EXTENDED: Base<'_> = Base { options: "extended_l2=on", ..PLAIN };
const DATA_FILE: Base<'_> = Base { options: "data_file=data.raw", ..PLAIN };
const VERSION_2: Base<'_> = Base { options: "compat=0.10", ..PLAIN };
const COMPRESSED_BASE: Base<'_> =
    Base { commands: &["write -c 0 64k", "write -c 64k 64k", "write 128k 64k"], ..PLAIN };
const SNAPSHOTS: Base<'_> = Base { commands: &["write 0 64k", "snapshot s0", "snapshot s1"], ..PLAIN };

pub(crate) struct Bench {
    pub(crate) qemu: Qemu,
    pub(crate) folder: tempfile::TempDir,
}

impl Bench {
    pub(crate) fn new() -> Option<Self> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        Some(Self { qemu: Qemu::find()?, folder })
    }

    pub(crate) fn make(&self, base: Base<'_>) -> PathBuf {
        let path = self.folder.path().join("image.qcow2");
        let _ = fs::remove_file(&path);
        let mut create = vec!["create", "-q", "-f", "qcow2"];
        if !base.options.is_empty() {
            create.extend(["-o", base.options]);
        }
        create.extend(["image.qcow2", base.size]);
        self.qemu.img.run_in(self.folder.path(), &create).success();
        for command in base.commands {
            if let Some(name) = command.strip_prefix("snapshot ") {
                self.qemu.img.run_in(self.folder.path(), &["snapshot", "-c", name, "image.qcow2"]).success();
            } else {
                self.qemu.io.run_in(self.folder.path(), &["-c", command, "image.qcow2"]).success();
            }
        }
        path
    }

    /// Damages an image and compares our report with QEMU's: exit code, lines, counts and statistics.
    pub(crate) fn case(&self, name: &str, base: Base<'_>, damage: impl FnOnce(&mut Image)) {
        self.compare(name, base, damage, true);
    }

    /// Compares the exit code and the first line only: QEMU's further lines are side effects that we do not
    /// repeat.
    fn case_by_class(&self, name: &str, base: Base<'_>, damage: impl FnOnce(&mut Image)) {
        self.compare(name, base, damage, false);
    }

    pub(crate) fn compare(&self, name: &str, base: Base<'_>, damage: impl FnOnce(&mut Image), whole: bool) {
        let path = self.make(base);
        let mut image = Image::read(&path);
        damage(&mut image);
        fs::write(&path, &image.bytes).expect("the image can be written");
        let text = self.qemu.img.run_in(self.folder.path(), &["check", "image.qcow2"]);
        let ours = report(&path);
        assert_eq!(Some(exit_code(&ours)), text.code, "{name}: {text}\n{ours:#?}");
        let theirs: Vec<&str> = text
            .stderr
            .lines()
            .filter(|line| !line.is_empty() && !line.starts_with("qcow2: ") && !line.starts_with("You can "))
            .filter(|line| !line.starts_with("qemu-img: Check failed"))
            .collect();
        let lines = lines(&ours.findings);
        if !whole {
            assert_eq!(theirs.first(), lines.first().map(String::as_str).as_ref(), "{name}");
            return;
        }
        assert_eq!(lines, theirs, "{name}: lines");
        if ours.incomplete {
            return;
        }
        let json = self.qemu.img.run_in(self.folder.path(), &["check", "--output=json", "image.qcow2"]);
        let number = |key: &str| json_number(&json.stdout, key);
        let expected = [
            "check-errors",
            "corruptions",
            "leaks",
            "total-clusters",
            "allocated-clusters",
            "fragmented-clusters",
            "compressed-clusters",
            "image-end-offset",
        ]
        .map(|key| (key, number(key)));
        let found = [
            ours.check_errors,
            ours.corruptions,
            ours.leaks,
            ours.total_clusters,
            ours.allocated_clusters,
            ours.fragmented_clusters,
            ours.compressed_clusters,
            ours.image_end_offset,
        ];
        for ((key, expected), found) in expected.into_iter().zip(found) {
            assert_eq!(found, expected, "{name}: {key}\n{ours:#?}");
        }
    }
}

/// The number after `"key":` in QEMU's JSON; 0 where the key is missing.
fn json_number(json: &str, key: &str) -> u64 {
    let Some((_, rest)) = json.split_once(&format!("\"{key}\":")) else { return 0 };
    let digits: String = rest.trim_start().chars().take_while(char::is_ascii_digit).collect();
    digits.parse().expect("a number")
}

#[test]
fn sound_images_give_the_same_report() {
    let Some(bench) = Bench::new() else { return };
    let nothing = |_: &mut Image| ();
    for options in ["", "compat=0.10", "extended_l2=on", "data_file=data.raw", "lazy_refcounts=on"] {
        bench.case(options, Base { options, ..PLAIN }, nothing);
    }
    for bits in [1, 2, 4, 8, 16, 32, 64] {
        let options = &format!("refcount_bits={bits}");
        bench.case(options, Base { options, ..PLAIN }, nothing);
        let options = &format!("refcount_bits={bits},cluster_size=512");
        bench.case(options, Base { options, ..PLAIN }, nothing);
    }
    for options in ["cluster_size=512", "cluster_size=4k", "cluster_size=2M"] {
        bench.case(options, Base { options, size: "40M", commands: &["write 1M 8M", "write 0 1M"] }, nothing);
    }
    for options in ["", "compression_type=zstd", "extended_l2=on"] {
        bench.case(options, Base { options, ..COMPRESSED_BASE }, nothing);
    }
    bench.case("empty", Base { commands: &[], ..PLAIN }, nothing);
    bench.case("no size", Base { size: "0", commands: &[], ..PLAIN }, nothing);
    bench.case("snapshots", SNAPSHOTS, nothing);
    let later = &["write 0 256k", "snapshot a", "write 64k 64k", "snapshot b", "write -z 128k 64k"];
    bench.case("changed after a snapshot", Base { commands: later, ..PLAIN }, nothing);
    let later = &["write 0 256k", "snapshot a", "write 64k 64k"];
    bench.case("4-bit snapshots", Base { options: "refcount_bits=4", commands: later, ..PLAIN }, nothing);
    let mixed = &["write 0 64k", "write 512k 64k", "write 128k 64k", "write -z 64k 64k", "write 192k 64k"];
    bench.case("out of order", Base { commands: mixed, ..PLAIN }, nothing);
    let two = &["write 0 64k", "write 600M 64k", "write 64k 64k"];
    bench.case("two tables", Base { size: "2G", commands: two, ..PLAIN }, nothing);
    bench.case("zero in place", PLAIN, |i| i.change(i.l2 + 8, |entry| entry | 1));
    bench.case("zero flag in version 2", VERSION_2, |i| i.change(i.l2, |entry| entry | 1));
    bench.case("data in the wrong place", DATA_FILE, |i| i.set(i.l2 + 8, COPIED | 0x80000));
    bench.case("dirty", PLAIN, |i| i.set(72, 1));
    bench.case("corrupt", PLAIN, |i| i.set(72, 2));
}

#[test]
fn bitmap_clusters_count_as_references() {
    let Some(bench) = Bench::new() else { return };
    let path = bench.make(PLAIN);
    for name in ["one", "two"] {
        bench.qemu.img.run_in(bench.folder.path(), &["bitmap", "--add", "image.qcow2", name]).success();
    }
    bench.qemu.io.run_in(bench.folder.path(), &["-c", "write 1M 64k", "image.qcow2"]).success();
    let ours = report(&path);
    assert_eq!((exit_code(&ours), &ours.findings), (0, &Vec::new()));
    bench.qemu.img.run_in(bench.folder.path(), &["check", "image.qcow2"]).success();

    let mut image = Image::read(&path);
    let extension = image.bytes.windows(8).position(|w| w == [0x23, 0x85, 0x28, 0x75, 0, 0, 0, 24]);
    let directory = image.word(extension.expect("the bitmaps extension") as u64 + 24);
    let table = image.word(directory);
    let good = image.bytes.clone();
    let check = |image: &Image| {
        fs::write(&path, &image.bytes).expect("the image can be written");
        let theirs = bench.qemu.img.run_in(bench.folder.path(), &["check", "image.qcow2"]);
        (report(&path), theirs)
    };

    image.set(table, 0x10000);
    let (ours, theirs) = check(&image);
    assert_eq!(Some(exit_code(&ours)), theirs.code, "{theirs}");
    assert!(lines(&ours.findings).iter().all(|line| theirs.stderr.contains(line.as_str())), "{theirs}");
    assert!(ours.findings.len() >= 2);

    image.bytes.clone_from(&good);
    image.set(88, 0);
    let (ours, theirs) = check(&image);
    assert_eq!(
        (exit_code(&ours), theirs.code),
        (3, Some(3)),
        "without the autoclear bit all is leaked: {theirs}"
    );
    assert_eq!(ours.leaks as usize, theirs.stderr.matches("Leaked cluster").count());

    // QEMU opens neither of these; we report the damage as what cannot be checked.
    for damage in [|i: &mut Image, t: u64| i.set(t, 2), |i: &mut Image, _| i.bytes[65536 * 8..].fill(0xff)] {
        image.bytes.clone_from(&good);
        damage(&mut image, table);
        let (ours, theirs) = check(&image);
        assert_eq!((exit_code(&ours), theirs.code), (1, Some(1)), "{theirs}");
    }
    image.bytes.clone_from(&good);
    image.bytes[directory as usize + 32 + 24..][..3].copy_from_slice(b"one");
    let (ours, theirs) = check(&image);
    assert_eq!((exit_code(&ours), theirs.code), (1, Some(1)), "two bitmaps of one name: {theirs}");
}

#[test]
fn l1_damage_gives_the_same_report() {
    let Some(bench) = Bench::new() else { return };
    bench.case("reserved bits", PLAIN, |i| i.change(i.l1, |entry| entry | 1 | 1 << 56));
    bench.case("far past the end", PLAIN, |i| i.set(i.l1, COPIED | 1 << 40));
    bench.case("just past the end", PLAIN, |i| i.set(i.l1, COPIED | i.end()));
    bench.case("not copied", PLAIN, |i| i.change(i.l1, |entry| entry & !COPIED));
    bench.case("two entries, one table", Base { size: "1G", ..PLAIN }, |i| i.set(i.l1 + 8, i.word(i.l1)));
    bench.case("table past the end", PLAIN, |i| i.set(40, 1 << 40));
    bench.case_by_class("misaligned", PLAIN, |i| i.change(i.l1, |entry| entry + 512));
    bench.case_by_class("reserved bits only", PLAIN, |i| i.set(i.l1, 1));
    bench.case_by_class("table at the header", PLAIN, |i| i.set(40, 0));
    let copied_only = |i: &mut Image| i.set(i.l1, COPIED);
    let path = bench.make(PLAIN);
    let mut image = Image::read(&path);
    copied_only(&mut image);
    fs::write(&path, &image.bytes).expect("the image can be written");
    assert_eq!(
        (exit_code(&report(&path)), report(&path).corruptions),
        (2, 1),
        "QEMU reads the header as a table"
    );
}

#[test]
fn l2_damage_gives_the_same_report() {
    let Some(bench) = Bench::new() else { return };
    bench.case("reserved bits", PLAIN, |i| i.change(i.l2, |entry| entry | 0x100 | 1 << 60));
    bench.case("misaligned", PLAIN, |i| i.change(i.l2, |entry| entry + 512));
    bench.case("misaligned zero", PLAIN, |i| i.change(i.l2, |entry| entry + 513));
    bench.case("far past the end", PLAIN, |i| i.set(i.l2, COPIED | 1 << 40));
    bench.case("just past the end", PLAIN, |i| i.set(i.l2, COPIED | i.end()));
    bench.case("not copied", PLAIN, |i| i.change(i.l2, |entry| entry & !COPIED));
    bench.case("two in one place", PLAIN, |i| i.change(i.l2 + 8, |entry| entry - 65536));
    bench.case("data in the table", PLAIN, |i| i.set(i.l2, COPIED | i.l2));
    bench.case("cut", PLAIN, |i| i.bytes.truncate(i.bytes.len() - 65536 * 2));
    bench.case("cut inside a cluster", PLAIN, |i| i.bytes.truncate(i.bytes.len() - 65536 - 100));
    bench.case("compressed and copied", COMPRESSED_BASE, |i| i.change(i.l2, |entry| entry | COPIED));
    bench.case("compressed too long", Base { commands: &["write -c 0 64k"], ..PLAIN }, |i| {
        i.change(i.l2, |entry| entry | 0xff << 54);
    });
    bench.case("compressed far past the end", COMPRESSED_BASE, |i| i.set(i.l2, COMPRESSED | 1 << 45));
    let small = Base { options: "cluster_size=4k", commands: &["write -c 0 4k"], ..PLAIN };
    bench.case("compressed past 2^56", small, |i| i.set(i.l2, COMPRESSED | 1 << 57));
    bench.case("1-bit overflow", Base { options: "refcount_bits=1", ..PLAIN }, |i| {
        i.change(i.l2 + 8, |entry| entry - 65536);
    });
}

#[test]
fn subcluster_damage_gives_the_same_report() {
    let Some(bench) = Bench::new() else { return };
    bench.case("allocated and zero", EXTENDED, |i| i.set(i.l2 + 8, 0x1_0000_0001));
    bench.case("allocated without a place", EXTENDED, |i| {
        i.set(i.l2, 0);
        i.set(i.l2 + 8, 1);
    });
    bench.case("both without a place", EXTENDED, |i| {
        i.set(i.l2, 0);
        i.set(i.l2 + 8, 0x1_0000_0001);
    });
    bench.case("misaligned preallocated", EXTENDED, |i| {
        i.change(i.l2, |entry| entry + 512);
        i.set(i.l2 + 8, 0);
    });
    bench.case("misaligned", EXTENDED, |i| i.change(i.l2, |entry| entry + 512));
    bench.case("zero flag", EXTENDED, |i| i.change(i.l2, |entry| entry | 1));
    let compressed = Base { commands: &["write -c 0 64k"], ..EXTENDED };
    bench.case("compressed with a bitmap", compressed, |i| i.set(i.l2 + 8, 4));
}

#[test]
fn damage_with_a_data_file_gives_the_same_report() {
    let Some(bench) = Bench::new() else { return };
    bench.case("not copied", DATA_FILE, |i| i.change(i.l2 + 8, |entry| entry & !COPIED));
    bench.case("compressed", DATA_FILE, |i| i.set(i.l2 + 8, COMPRESSED | 0x50000));
    bench.case("misaligned", DATA_FILE, |i| i.set(i.l2 + 8, COPIED | 0x10200));
    bench.case("zero at 0", DATA_FILE, |i| i.set(i.l2, COPIED | 1));
}

#[test]
fn refcount_damage_gives_the_same_report() {
    let Some(bench) = Bench::new() else { return };
    bench.case("leak", PLAIN, |i| i.put(i.refcount_block + 2 * 3, &[0, 2]));
    bench.case("counted past the end", PLAIN, |i| i.put(i.refcount_block + 2 * 20, &[0, 1]));
    bench.case("too low", PLAIN, |i| i.put(i.refcount_block + 2 * 5, &[0, 0]));
    bench.case("reserved bits", PLAIN, |i| i.change(i.refcount_table, |entry| entry | 1));
    bench.case("misaligned block", PLAIN, |i| i.change(i.refcount_table, |entry| entry + 512));
    bench.case("block past the end", PLAIN, |i| i.set(i.refcount_table + 8, i.end()));
    bench.case("block far past the end", PLAIN, |i| i.set(i.refcount_table + 8, 1 << 40));
    bench.case("first block far past the end", PLAIN, |i| i.set(i.refcount_table, 1 << 40));
    bench.case("block past 2^63", PLAIN, |i| i.set(i.refcount_table, 1 << 63));
    bench.case("one block twice", PLAIN, |i| i.set(i.refcount_table + 8, i.refcount_block));
    bench.case("block at the table", PLAIN, |i| i.set(i.refcount_table + 8, i.refcount_table));
    bench.case("no block", PLAIN, |i| i.set(i.refcount_table, 0));
    bench.case("table past the end", PLAIN, |i| i.set(48, 1 << 40));
    bench.case("no table", PLAIN, |i| i.put(56, &[0; 4]));
    for bits in [1u32, 2, 4, 8, 32, 64] {
        let options = &format!("refcount_bits={bits}");
        bench.case(options, Base { options, ..PLAIN }, |i| i.bytes[i.refcount_block as usize] ^= 1);
    }
}

#[test]
fn snapshot_damage_gives_the_same_report() {
    let Some(bench) = Bench::new() else { return };
    bench.case("more than there are", SNAPSHOTS, |i| i.put(60, &5u32.to_be_bytes()));
    bench.case("far too many", SNAPSHOTS, |i| i.put(60, &65537u32.to_be_bytes()));
    bench.case("misplaced", SNAPSHOTS, |i| i.set(64, i.snapshots + 8));
    bench.case("past the end", SNAPSHOTS, |i| i.set(64, 1 << 40));
    bench.case("too much extra data", SNAPSHOTS, |i| i.put(i.snapshots + 36, &2000u32.to_be_bytes()));
    bench.case("misaligned l1", SNAPSHOTS, |i| i.set(i.snapshots, 0x12345));
    bench.case("l1 too large", SNAPSHOTS, |i| i.put(i.snapshots + 8, &4_194_305u32.to_be_bytes()));
    bench.case("l1 past the end", SNAPSHOTS, |i| i.set(i.snapshots, 1 << 40));
    bench.case("id too long", SNAPSHOTS, |i| i.put(i.snapshots + 12, &[0xff, 0xff]));
    bench.case("two with one l1", SNAPSHOTS, |i| i.set(i.snapshots, i.word(i.snapshots + 72)));
}
