//! A disk with a real file system through our command and through QEMU's: same bytes, clean checks, a file
//! that is not larger, and overlays that either tool writes and both read.
//!
//! The disk is made by `mke2fs -d` from a copy of this workspace's sources and some large files.
//! `QCOW2_REAL_DISK_TREE` names another tree, `QCOW2_REAL_DISK_SIZE` another size (default `1G`).
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may stop, and says what it measured")]

use qcow2_core::HostOffset;
use qcow2_io::{Locking, OpenFile};
use qcow2_testkit::oracle::{Outcome, Qemu, Tool};
use qcow2_testkit::pattern;
use std::env;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// All programs involved, and the folder of this run.
struct Bench {
    ours: Tool,
    qemu: Qemu,
    mke2fs: Tool,
    e2fsck: Tool,
    folder: tempfile::TempDir,
}

impl Bench {
    fn find() -> Option<Self> {
        Some(Self {
            ours: Tool::at(env!("CARGO_BIN_EXE_qcow2-under-test")),
            qemu: Qemu::find()?,
            mke2fs: Tool::find("mke2fs")?,
            e2fsck: Tool::find("e2fsck")?,
            folder: tempfile::tempdir().unwrap(),
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn run(&self, tool: &Tool, line: &str) -> Outcome {
        tool.run_in(self.folder.path(), &line.split(' ').collect::<Vec<_>>()).success()
    }

    fn ours(&self, line: &str) -> Outcome {
        self.run(&self.ours, line)
    }

    fn qemu_img(&self, line: &str) -> Outcome {
        self.run(&self.qemu.img, line)
    }

    /// Creates `disk.raw` with a file system on it.
    fn make_disk(&self) {
        let tree = env::var_os("QCOW2_REAL_DISK_TREE").map_or_else(|| self.make_tree(), PathBuf::from);
        let size = env::var("QCOW2_REAL_DISK_SIZE").unwrap_or_else(|_| "1G".to_owned());
        let args = ["-q", "-t", "ext4", "-d", tree.to_str().unwrap(), "disk.raw", &size];
        self.mke2fs.run_in(self.folder.path(), &args).success();
    }

    /// Many small files (the sources of this workspace), some large ones, one with holes.
    fn make_tree(&self) -> PathBuf {
        let tree = self.path("tree");
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        for part in ["crates", "tests", "xtask"] {
            copy_tree(&workspace.join(part), &tree.join(part));
        }
        fs::write(tree.join("random"), pattern::bytes(1, 0, 24 << 20)).unwrap();
        fs::write(tree.join("repetitive"), pattern::bytes(4, 0, 16 << 20)).unwrap();
        let holes = File::create(tree.join("holes")).unwrap();
        for megabyte in [0, 17, 40] {
            holes.write_all_at(&pattern::bytes(3, 0, 70_000), megabyte << 20).unwrap();
        }
        tree
    }
}

fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_tree(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// Panics at the first byte in which two files differ.
fn assert_same_bytes(what: &str, a: &Path, b: &Path) {
    let (mut a, mut b) = (File::open(a).unwrap(), File::open(b).unwrap());
    assert_eq!(a.metadata().unwrap().len(), b.metadata().unwrap().len(), "{what}: length");
    let (mut left, mut right) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut offset = 0;
    loop {
        let n = a.read(&mut left).unwrap();
        b.read_exact(&mut right[..n]).unwrap();
        if n == 0 {
            return;
        }
        let wrong = left[..n].iter().zip(&right[..n]).position(|(x, y)| x != y);
        assert_eq!(wrong, None, "{what}: differ in the piece at {offset:#x}");
        offset += n as u64;
    }
}

fn checksum(path: &Path) -> u32 {
    let mut file = File::open(path).unwrap();
    let (mut hasher, mut buf) = (crc32fast::Hasher::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buf).unwrap() {
            0 => return hasher.finalize(),
            n => hasher.update(&buf[..n]),
        }
    }
}

#[test]
fn a_file_system_survives_conversion_to_qcow2_and_back() {
    let Some(bench) = Bench::find() else { return };
    bench.make_disk();
    for options in [
        "",
        "-c ",
        "-c -o compression_type=zstd ",
        "-o cluster_size=4k ",
        "-o extended_l2=on ",
        "-o compat=0.10 ",
    ] {
        bench.ours(&format!("convert -f raw -O qcow2 {options}disk.raw ours.qcow2"));
        bench.qemu_img(&format!("convert -f raw -O qcow2 {options}disk.raw theirs.qcow2"));
        bench.qemu_img("check -q -f qcow2 ours.qcow2");
        bench.ours("check -q -f qcow2 ours.qcow2");
        bench.qemu_img("compare -f raw -F qcow2 disk.raw ours.qcow2");
        bench.ours("compare -f qcow2 -F qcow2 theirs.qcow2 ours.qcow2");
        check_size(&bench, options);
        if matches!(options, "" | "-c ") {
            bench.ours("convert -f qcow2 -O raw ours.qcow2 back.raw");
            assert_same_bytes(options, &bench.path("disk.raw"), &bench.path("back.raw"));
            bench.run(&bench.e2fsck, "-fn back.raw");
        }
    }
}

/// Our file is not larger than qemu-img's, in length and in what is allocated of it. The blocks that the file
/// system counts are not asked for: it counts its own tables too, whose number depends on other writers.
fn check_size(bench: &Bench, options: &str) {
    let [ours, theirs] = ["ours.qcow2", "theirs.qcow2"].map(|name| size(&bench.path(name)));
    println!("[{options}] length, data: ours {ours:?}, qemu-img {theirs:?}");
    assert!(ours.0 <= theirs.0, "[{options}] length: ours {}, qemu-img {}", ours.0, theirs.0);
    assert!(ours.1 <= theirs.1, "[{options}] data: ours {}, qemu-img {}", ours.1, theirs.1);
}

/// Length of a file, and how much of it is no hole.
fn size(path: &Path) -> (u64, u64) {
    let file = OpenFile::read_only().with_locking(Locking::Off).open(path).unwrap();
    let (len, mut at, mut data) = (file.len().unwrap(), 0, 0);
    while at < len {
        let extent = file.extent_at(HostOffset::new(at), len - at).unwrap();
        data += if extent.data { extent.len } else { 0 };
        at += extent.len;
    }
    (len, data)
}

/// One change of an overlay, as a qemu-io command and as bytes.
#[derive(Clone, Copy, Debug)]
enum Change {
    Write { offset: u64, len: u64, byte: u8 },
    Zero { offset: u64, len: u64 },
}

const CHANGES: &[Change] = &[
    Change::Write { offset: 0, len: 1000, byte: 0x11 },
    Change::Write { offset: 65_000, len: 2000, byte: 0x22 },
    Change::Write { offset: 5 << 20, len: 3 << 20, byte: 0x33 },
    Change::Zero { offset: (6 << 20) + 512, len: 700_000 },
    Change::Zero { offset: 20 << 20, len: 5 << 20 },
    Change::Write { offset: (21 << 20) + 7, len: 11, byte: 0x44 },
    Change::Write { offset: (512 << 20) - 300, len: 600, byte: 0x55 },
    Change::Write { offset: (1 << 30) - 513, len: 513, byte: 0x66 },
];

impl Change {
    fn words(&self) -> String {
        match self {
            Self::Write { offset, len, byte } => format!("write -P {byte} {offset} {len}"),
            Self::Zero { offset, len } => format!("write -z {offset} {len}"),
        }
    }

    fn apply_to_file(&self, file: &File) {
        let (offset, len, byte) = match *self {
            Self::Write { offset, len, byte } => (offset, len, byte),
            Self::Zero { offset, len } => (offset, len, 0),
        };
        file.write_all_at(&vec![byte; len as usize], offset).unwrap();
    }
}

/// All changes in one run of qemu-io, or of our `io` with the same commands.
fn write_through(bench: &Bench, tool: &Tool, verb: Option<&str>, overlay: &str) {
    let commands = CHANGES.iter().flat_map(|change| ["-c".to_owned(), change.words()]);
    let end = ["-f", "qcow2", overlay].map(str::to_owned);
    let args: Vec<String> = verb.map(str::to_owned).into_iter().chain(commands).chain(end).collect();
    tool.run_in(bench.folder.path(), &args).success();
}

#[test]
fn an_overlay_written_by_either_tool_is_read_by_both() {
    let Some(bench) = Bench::find() else { return };
    bench.make_disk();
    bench.ours("convert -f raw -O qcow2 disk.raw base.qcow2");
    fs::copy(bench.path("disk.raw"), bench.path("expected.raw")).unwrap();
    let expected = File::options().write(true).open(bench.path("expected.raw")).unwrap();
    CHANGES.iter().for_each(|change| change.apply_to_file(&expected));
    let before = checksum(&bench.path("base.qcow2"));
    bench.ours("create -q -f qcow2 -b base.qcow2 -F qcow2 ours.qcow2");
    write_through(&bench, &bench.ours, Some("io"), "ours.qcow2");
    bench.qemu_img("create -q -f qcow2 -b base.qcow2 -F qcow2 theirs.qcow2");
    write_through(&bench, &bench.qemu.io, None, "theirs.qcow2");
    for overlay in ["ours.qcow2", "theirs.qcow2"] {
        bench.qemu_img(&format!("check -q -f qcow2 {overlay}"));
        bench.ours(&format!("check -q -f qcow2 {overlay}"));
        for reader in [&bench.ours, &bench.qemu.img] {
            bench.run(reader, &format!("convert -f qcow2 -O raw {overlay} read.raw"));
            let what = format!("{overlay} read by {}", reader.path().display());
            assert_same_bytes(&what, &bench.path("expected.raw"), &bench.path("read.raw"));
        }
    }
    bench.qemu_img("compare ours.qcow2 theirs.qcow2");
    bench.ours("compare ours.qcow2 theirs.qcow2");
    assert_eq!(checksum(&bench.path("base.qcow2")), before, "the backing file has changed");
}
