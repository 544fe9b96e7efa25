//! Locks on every kind of file, and the rule that no verb writes to a file that it reads.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of a test")]

use qcow2_testkit::locks::{Holder, locked_bytes};
use qcow2_testkit::oracle::{Outcome, Qemu, Tool, skip};
use qcow2_tests::side_by_side::words;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-under-test");

/// Serializes the tests when `cargo test` runs them in one process: a child process that another test is just
/// starting holds a copy of every descriptor, and its locks, until exec.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A folder with images, and both programs under both names.
struct World {
    root: tempfile::TempDir,
    qemu: Qemu,
}

impl World {
    /// `None`, with a printed skip, if the tools are missing.
    fn new() -> Option<Self> {
        let qemu = Qemu::find()?;
        let root = tempfile::tempdir().unwrap();
        let world = Self { root, qemu };
        fs::create_dir(world.path("bin")).unwrap();
        for name in ["qcow2", "qemu-img", "qemu-io"] {
            symlink(OURS, world.path("bin").join(name)).unwrap();
        }
        fs::create_dir(world.folder()).unwrap();
        let bytes: Vec<u8> = (0..1u32 << 20).map(|i| (i / 512 % 251) as u8 + 1).collect();
        fs::write(world.file("y.raw"), &bytes).unwrap();
        fs::write(world.file("second"), &bytes[..64 << 10]).unwrap();
        fs::write(world.file("data"), &bytes).unwrap();
        symlink("y.raw", world.file("soft.raw")).unwrap();
        fs::hard_link(world.file("y.raw"), world.file("hard.raw")).unwrap();
        for line in [
            "create -q -f qcow2 a.qcow2 1M",
            "create -q -f qcow2 -b y.raw -F raw over.qcow2",
            "create -q -f qcow2 -b a.qcow2 -F qcow2 top.qcow2",
            "create -q -f qcow2 -o data_file=data.new,data_file_raw=on ext.qcow2 1M",
            "create -q -f qcow2 target.qcow2 1M",
        ] {
            world.qemu.img.run_in(&world.folder(), &words(line)).success();
        }
        fs::rename(world.file("data"), world.file("data.new")).unwrap();
        world.qemu.io.run_in(&world.folder(), &["-c", "write -P 7 64k 64k", "a.qcow2"]).success();
        Some(world)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn folder(&self) -> PathBuf {
        self.path("files")
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder().join(name)
    }

    /// Runs a shell line in which our program is found under every name.
    fn shell(&self, line: &str) -> Outcome {
        let shell = Tool::find("bash").expect("bash");
        let script = format!("PATH={}:$PATH; {line}", self.path("bin").display());
        shell.run_in(&self.folder(), &["-c", &script])
    }

    /// Runs a line as it is, with the reference tools.
    fn theirs(&self, line: &str) -> Outcome {
        Tool::find("bash").expect("bash").run_in(&self.folder(), &["-c", line])
    }

    /// The content of every file.
    fn contents(&self) -> BTreeMap<String, Vec<u8>> {
        let entries = fs::read_dir(self.folder()).unwrap().map(Result::unwrap);
        let files = entries.filter(|entry| !entry.path().metadata().unwrap().file_type().is_block_device());
        files
            .map(|entry| (entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path()).unwrap()))
            .collect()
    }

    /// The run must exit with 1 and one sentence that contains `reason` (for a lock, followed by a question),
    /// and leave every file unchanged.
    #[track_caller]
    fn check_refused(&self, line: &str, reason: &str) {
        let before = self.contents();
        let outcome = self.shell(line).expect_code(1);
        assert!(outcome.stderr.lines().next().is_some_and(|line| line.contains(reason)), "{outcome}");
        let lines = if reason.ends_with("lock") { 2 } else { 1 };
        assert_eq!(outcome.stderr.lines().count(), lines, "{outcome}");
        let mut after = self.contents();
        // A created file is removed again; a truncated old one stays, empty.
        for new in ["new", "new.qcow2"] {
            assert!(after.remove(new).is_none_or(|bytes| bytes.is_empty()), "{line}");
        }
        assert!(before == after, "{line}: a file has changed");
    }
}

const READ: &str = "is being read and cannot be written to";
const WRITTEN: &str = "is being written to and cannot be opened again";

/// A raw source is locked like any other: the error is qemu-img's, and the source stays intact.
#[test]
fn convert_onto_its_own_source_fails_as_in_qemu_img() {
    let _alone = alone();
    let Some(world) = World::new() else { return };
    let before = world.contents();
    for line in [
        "convert -f raw -O raw y.raw y.raw",
        "convert -O raw y.raw y.raw",
        "convert -f raw -O qcow2 y.raw y.raw",
        "convert -f raw -O raw y.raw soft.raw",
        "convert -f raw -O raw y.raw hard.raw",
        "convert -f raw -O raw hard.raw y.raw",
        "convert -f raw -O raw -o preallocation=full y.raw y.raw",
        "convert --image-opts -O raw driver=raw,file.filename=y.raw y.raw",
        "convert --image-opts -O raw driver=raw,offset=512,file.filename=y.raw y.raw",
        "convert --image-opts -O raw driver=raw,file.driver=blkdebug,file.image.filename=y.raw y.raw",
        r#"convert -O raw 'json:{"driver":"raw","file":{"driver":"file","filename":"y.raw"}}' y.raw"#,
        "convert -f raw -O raw second y.raw y.raw",
        "convert -f raw -O raw y.raw second y.raw",
        "convert -n -f raw -O raw y.raw y.raw",
        "convert -n -f raw --target-image-opts y.raw driver=raw,file.filename=y.raw",
        "convert -O raw over.qcow2 y.raw",
        "convert -n -O raw over.qcow2 y.raw",
        "convert -O raw over.qcow2 over.qcow2",
        "convert -O raw ext.qcow2 data.new",
        "convert -n -O raw ext.qcow2 data.new",
        "convert -O qcow2 -B y.raw -F raw over.qcow2 y.raw",
        "convert -f raw -O qcow2 -o data_file=y.raw,data_file_raw=on y.raw new.qcow2",
    ] {
        let ours = world.shell(&format!("qemu-img {line}")).expect_code(1);
        let theirs = world.theirs(&format!("qemu-img {line}")).expect_code(1);
        assert_eq!(ours.stderr, theirs.stderr, "{line}");
        assert!(ours.stderr.contains("Failed to get \"write\" lock"), "{ours}");
        assert!(before == world.contents(), "{line}: a file has changed");
    }
}

/// Cases that qemu-img would carry out: locks are off, or do not conflict.
#[test]
fn no_verb_writes_to_a_file_it_reads() {
    let _alone = alone();
    let Some(world) = World::new() else { return };
    for line in [
        "convert -U -f raw -O raw y.raw y.raw",
        "convert -U -f raw -O qcow2 y.raw hard.raw",
        "convert -U -n -f raw -O raw y.raw soft.raw",
        "convert -U -n -O raw over.qcow2 y.raw",
        "convert -U -O raw top.qcow2 a.qcow2",
        "convert -U -O raw -o preallocation=full second y.raw hard.raw",
        "convert -U -O raw ext.qcow2 data.new",
        "convert -U -n -f raw -O qcow2 data.new ext.qcow2",
        "convert -U -f raw -O qcow2 -o data_file=y.raw,data_file_raw=on y.raw new.qcow2",
        "convert -n --target-image-opts -f raw y.raw driver=raw,file.filename=y.raw,file.locking=off",
        "convert --image-opts driver=raw,file.filename=y.raw,file.locking=off y.raw",
        "convert --image-opts driver=raw,file.filename=y.raw,force-share=on y.raw",
        "dd -f raw -O raw if=y.raw of=y.raw",
        "dd -f raw -O qcow2 if=y.raw of=soft.raw",
        "dd -U -f raw -O raw bs=4k skip=1 if=y.raw of=hard.raw",
        "dd -O raw if=over.qcow2 of=y.raw",
        "dd -U -O raw if=top.qcow2 of=a.qcow2",
        "create -q -f qcow2 -b y.raw -F raw ./y.raw",
        "create -q -f qcow2 -b y.raw -F raw soft.raw",
        "create -q -f qcow2 -b over.qcow2 -F qcow2 hard.raw",
        "create -q -u -f qcow2 -b y.raw -F raw ./y.raw 1M",
        "create -q -f qcow2 -b y.raw -F raw -o data_file=hard.raw new.qcow2",
        "convert -O qcow2 -B top.qcow2 -F qcow2 second a.qcow2",
        "convert -O qcow2 -o backing_file=y.raw,backing_fmt=raw second hard.raw",
    ] {
        world.check_refused(&format!("qcow2 {line}"), READ);
        world.check_refused(&format!("qemu-img {line}"), READ);
    }
    for line in [
        "rebase -b over.qcow2 -F raw over.qcow2",
        "rebase -b data.new -F raw ext.qcow2",
        r#"rebase -b 'json:{"driver":"raw","file":{"driver":"file","filename":"top.qcow2"}}' -F raw top.qcow2"#,
    ] {
        world.check_refused(&format!("qcow2 {line}"), WRITTEN);
    }
    world.check_refused(
        "qcow2 rebase -b over.qcow2 -F qcow2 over.qcow2",
        "Failed to get shared \"write\" lock",
    );
    world.check_refused(
        "qcow2 create -q -f qcow2 -o data_file=./new.qcow2 new.qcow2 1M",
        "Failed to get \"write\" lock",
    );
}

/// A file that the shell opens as a standard stream is read or written too.
#[test]
fn redirected_files_are_checked_too() {
    let _alone = alone();
    let Some(world) = World::new() else { return };
    for (line, reason) in [
        ("convert -O raw - y.raw < y.raw", READ),
        ("convert -O qcow2 - hard.raw < y.raw", READ),
        ("convert -O raw - a.qcow2 < a.qcow2", READ),
        ("convert -O qcow2 -o data_file=y.raw - new.qcow2 < y.raw", READ),
        ("convert -f raw y.raw - >> y.raw", WRITTEN),
        ("convert -f raw y.raw - 1<> hard.raw", WRITTEN),
        ("convert -U -O qcow2 over.qcow2 - >> y.raw", WRITTEN),
        ("convert -U -f raw y.raw /dev/stdout >> y.raw", WRITTEN),
        ("dd -f raw if=y.raw of=/dev/fd/7 7<> y.raw", READ),
        ("convert -U -f raw /dev/stdin y.raw < y.raw", READ),
        ("map -f raw y.raw >> y.raw", WRITTEN),
        ("info a.qcow2 >> a.qcow2", WRITTEN),
    ] {
        world.check_refused(&format!("qcow2 {line}"), reason);
    }
    // A target may be given as a stream, and unrelated files may be streams.
    world.shell("qcow2 convert -f raw y.raw /dev/stdout > piped && cmp piped y.raw; rm piped").success();
    world.shell("qcow2 create -q -f qcow2 /dev/stdout 1M > piped && qcow2 check piped && rm piped").success();
    world.shell("qcow2 convert -f raw y.raw - > piped && cmp piped y.raw").success();
    world.shell("rm piped; qcow2 convert -O raw - piped < y.raw && cmp piped y.raw").success();
    world.shell("qcow2 info a.qcow2 > log && qcow2 map -f raw y.raw >> log 2>&1").success();
}

/// Verbs that legitimately open a file more than once.
#[test]
fn legitimate_double_opens_are_allowed() {
    let _alone = alone();
    let Some(world) = World::new() else { return };
    for line in [
        "compare -f raw -F raw y.raw hard.raw",
        "compare -f raw -F qcow2 y.raw over.qcow2",
        "convert -f raw -O raw y.raw soft.raw y.raw twice.raw",
        "convert -n -f raw -O qcow2 y.raw over.qcow2",
        "convert -O qcow2 -B y.raw -F raw over.qcow2 new.qcow2",
        "convert -O qcow2 -B a.qcow2 -F qcow2 top.qcow2 new.qcow2",
        "dd if=over.qcow2 of=new.raw",
        "create -q -f qcow2 -b y.raw -F raw new.qcow2",
        "snapshot --external newer.qcow2 top.qcow2",
        "io -c 'write -P 3 0 128k' over.qcow2",
        "commit over.qcow2",
        "io -c 'write -P 4 0 128k' top.qcow2",
        "commit -d top.qcow2",
        "rebase -b y.raw -F raw top.qcow2",
        "rebase -b a.qcow2 -F qcow2 top.qcow2",
        "rebase -b '' top.qcow2",
        "check -r all top.qcow2",
        "amend -o refcount_bits=64 top.qcow2",
        "bench -w -c 10 -f raw y.raw",
        "resize -f raw y.raw +1M",
        "io -s -c 'write 0 512' -f raw y.raw",
        "io -c 'read 0 512' -c 'reopen -r' -c 'reopen -w' -c 'write 0 512' -f raw y.raw",
    ] {
        world.shell(&format!("qcow2 {line}")).success();
    }
}

/// A disk that another program writes to: every verb opens or refuses it as qemu-img does.
#[test]
fn lock_conflicts_match_qemu_img() {
    let _alone = alone();
    let Some(world) = World::new() else { return };
    let json = r#"json:{"driver":"raw","file":{"driver":"file","filename":"y.raw"}}"#;
    let named = format!("rebase -u -F raw -b '{json}' top.qcow2");
    world.theirs(&format!("qemu-img {named}")).success();
    for holder in [
        "-f raw y.raw",
        "-r --image-opts driver=raw,size=4k,file.filename=y.raw",
        "-f raw data.new",
        "a.qcow2",
    ] {
        let _holder = Holder::new(world.qemu.io.path(), &world.folder(), words(holder)).unwrap();
        for line in [
            "convert -f raw -O raw y.raw new",
            "convert -O raw y.raw new",
            "convert -U -O raw y.raw new",
            "convert -O raw second y.raw new",
            "convert --image-opts driver=raw,size=512,file.filename=y.raw new",
            "convert --image-opts driver=raw,file.driver=blkdebug,file.image.filename=y.raw new",
            "convert -O raw over.qcow2 new",
            "convert -U -O raw over.qcow2 new",
            "convert -O raw top.qcow2 new",
            "convert -O raw ext.qcow2 new",
            "convert -O raw a.qcow2 new",
            "convert -n -f raw -O raw second y.raw",
            "convert -n -O qcow2 second ext.qcow2",
            "convert -n -O qcow2 second a.qcow2",
            "dd -f raw if=y.raw of=new",
            "dd if=over.qcow2 of=new",
            "dd if=ext.qcow2 of=new",
            "compare -f raw -F raw y.raw hard.raw",
            "compare -f raw -F qcow2 y.raw over.qcow2",
            "compare -f raw -F qcow2 data.new ext.qcow2",
            "map -f raw y.raw",
            "map over.qcow2",
            "map top.qcow2",
            "map ext.qcow2",
            "map --image-opts driver=raw,offset=512,file.filename=y.raw",
            "measure -O qcow2 -f raw y.raw",
            "measure -O qcow2 over.qcow2",
            "info y.raw",
            "info a.qcow2",
            "info -U a.qcow2",
            "check over.qcow2",
            "check ext.qcow2",
            "bench -c 1 -w -f raw y.raw",
            "resize -f raw y.raw 1M",
            "snapshot -l over.qcow2",
            "rebase -b y.raw -F raw over.qcow2",
            "amend -o lazy_refcounts=on over.qcow2",
            "commit ext.qcow2",
        ] {
            let [ours, theirs] =
                [world.shell(&format!("qemu-img {line}")), world.theirs(&format!("qemu-img {line}"))];
            assert_eq!((ours.code, &ours.stderr), (theirs.code, &theirs.stderr), "{holder}: {line}");
        }
    }
}

/// Every file of an image is locked as by qemu-io, through filter drivers too.
#[test]
fn lock_bytes_match_qemu_io() {
    let _alone = alone();
    let Some(world) = World::new() else { return };
    let files = ["y.raw", "a.qcow2", "over.qcow2", "top.qcow2", "ext.qcow2", "data.new"];
    for line in [
        "y.raw",
        "-f raw y.raw",
        "-r -f raw y.raw",
        "-r -U -f raw y.raw",
        "over.qcow2",
        "-r over.qcow2",
        "-r -U over.qcow2",
        "top.qcow2",
        "-r top.qcow2",
        "ext.qcow2",
        "-r ext.qcow2",
        "-r -U ext.qcow2",
        "-s -f raw y.raw",
        "--image-opts driver=raw,offset=512,file.filename=y.raw",
        "-r --image-opts driver=raw,size=512,file.filename=y.raw",
        "-r --image-opts driver=raw,file.driver=raw,file.size=512,file.file.filename=y.raw",
        "--image-opts driver=raw,file.driver=raw,file.file.filename=y.raw",
        "--image-opts driver=raw,file.driver=blkdebug,file.image.filename=y.raw",
        "--image-opts driver=file,filename=y.raw",
        "-r --image-opts driver=file,filename=y.raw,locking=off",
        "--image-opts driver=qcow2,file.filename=over.qcow2,file.locking=off",
        "-r --image-opts driver=qcow2,file.filename=ext.qcow2,file.locking=off",
        "-r --image-opts driver=qcow2,file.driver=raw,file.size=327680,file.file.filename=a.qcow2",
        "-r --image-opts driver=raw,file.driver=qcow2,file.file.filename=a.qcow2",
        "-r --image-opts driver=qcow2,file.filename=top.qcow2,backing.driver=raw,backing.file.filename=y.raw",
        "--image-opts driver=qcow2,file.filename=ext.qcow2,data-file.driver=file,data-file.filename=y.raw",
        "-r --image-opts driver=qcow2,file.filename=ext.qcow2,data-file.driver=file,data-file.filename=y.raw",
        r#"-r 'json:{"driver":"raw","size":512,"file":{"driver":"file","filename":"y.raw"}}'"#,
    ] {
        let [theirs, ours] = [world.qemu.io.path(), &world.path("bin/qemu-io")].map(|program| {
            let holder = Holder::new(program, &world.folder(), words(line)).unwrap();
            files.map(|file| (file, holder.locked_bytes(&world.file(file)).unwrap()))
        });
        assert_eq!(theirs, ours, "{line}");
        assert!(
            line.contains("-U") || line.contains("off") || theirs.iter().any(|(_, bytes)| !bytes.is_empty())
        );
    }
}

/// While a raw disk is copied, nobody can write to it, nor to any file below the copied image.
#[test]
fn a_source_stays_locked_while_it_is_copied() {
    let _alone = alone();
    let Some(world) = World::new() else { return };
    for (line, locked) in [
        ("convert -f raw y.raw -", "y.raw"),
        ("convert y.raw -", "y.raw"),
        ("convert over.qcow2 -", "y.raw"),
        ("convert ext.qcow2 -", "data.new"),
    ] {
        let mut command = Command::new(OURS);
        command.args(words(line)).current_dir(world.folder()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        // The disk does not fit into a pipe, so the program waits for a reader.
        let mut out = child.stdout.take().unwrap();
        out.read_exact(&mut [0; 512]).unwrap();
        let bytes = locked_bytes(child.id(), &world.file(locked)).unwrap();
        assert_eq!(bytes, BTreeSet::from([100, 201, 203]), "{line}");
        let started = Instant::now();
        let seen = world.theirs(&format!("qemu-io -f raw -c 'write 0 512' {locked}"));
        assert!(seen.expect_code(1).stderr.contains("Failed to get \"write\" lock"), "{line}");
        assert!(started.elapsed() < Duration::from_secs(10));
        drop(out);
        child.wait().unwrap();
    }
}

/// A loop device, detached when dropped.
struct LoopDevice(String);

impl LoopDevice {
    /// `None` if this user may not create one.
    fn on(file: &Path) -> Option<Self> {
        let made = Command::new("losetup").args(["-f", "--show"]).arg(file).output().ok()?;
        let name = String::from_utf8(made.stdout).unwrap().trim().to_owned();
        (made.status.success() && !name.is_empty()).then_some(Self(name))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

/// A block device is the same source under every name.
#[test]
fn block_devices_are_locked_and_identified() {
    let _alone = alone();
    let Some(world) = World::new() else { return };
    let Some(device) = LoopDevice::on(&world.file("y.raw")) else {
        return skip("loop devices are not allowed here");
    };
    let name = &device.0;
    let rdev = fs::metadata(name).unwrap().rdev();
    let node = format!("mknod alias b {} {}", rdev >> 8 & 0xfff, rdev & 0xff);
    world.theirs(&node).success();
    for line in [
        format!("convert -f raw {name} {name}"),
        format!("convert -f raw host_device:{name} {name}"),
        format!("convert -n -f raw {name} {name}"),
    ] {
        let [ours, theirs] =
            [world.shell(&format!("qemu-img {line}")), world.theirs(&format!("qemu-img {line}"))];
        assert_eq!((ours.code, &ours.stderr), (Some(1), &theirs.stderr), "{line}");
    }
    // Another device node of the same device has separate locks.
    for line in [
        format!("convert -f raw {name} alias"),
        format!("convert -U -n -f raw host_device:{name} alias"),
        format!("dd -f raw if=alias of={name}"),
        format!("dd -f raw if={name} of={name}"),
        format!("create -q -f qcow2 -b {name} -F raw alias"),
        // The file behind a loop device is the same source, although it has separate locks.
        format!("convert -f raw -O raw {name} y.raw"),
        format!("convert -U -f raw -O raw {name} y.raw"),
        format!("convert -n -f raw -O raw y.raw {name}"),
        format!("dd -f raw if={name} of=y.raw"),
    ] {
        world.check_refused(&format!("qcow2 {line}"), READ);
    }
    for program in [world.qemu.io.path(), &*world.path("bin/qemu-io")] {
        for (line, locked) in [
            (format!("-f raw {name}"), vec![100, 101]),
            (format!("-r -f raw {name}"), vec![100]),
            (
                format!("-r --image-opts driver=raw,size=512,file.driver=host_device,file.filename={name}"),
                vec![100, 203],
            ),
        ] {
            let holder = Holder::new(program, &world.folder(), words(&line)).unwrap();
            assert_eq!(holder.locked_bytes(Path::new(name)).unwrap(), BTreeSet::from_iter(locked), "{line}");
        }
    }
}
