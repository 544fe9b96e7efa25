//! A file in disguise: whatever name leads to a file that is being read, no verb writes to it.
//!
//! An NBD server of the same file cannot be recognised by its name. It holds the locks of the file, which
//! refuse the source unless `-U` is given.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of a test")]

use qcow2_testkit::oracle::{Outcome, Tool, skip};
use qcow2_tests::side_by_side::words;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-under-test");

/// A folder with `y.raw`, an overlay on it and one with it as its data file, and our program as qemu-img.
struct World {
    root: tempfile::TempDir,
    bytes: Vec<u8>,
}

impl World {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..1u32 << 20).map(|i| (i / 512 % 251) as u8 + 1).collect();
        let world = Self { root, bytes };
        symlink(OURS, world.file("qemu-img")).unwrap();
        symlink(OURS, world.file("qcow2")).unwrap();
        for line in [
            "create -q -f raw y.raw 1M",
            "create -q -f qcow2 -b y.raw -F raw over.qcow2",
            "create -q -f qcow2 -o data_file=y.raw,data_file_raw=on ext.qcow2 1M",
            "create -q -f qcow2 a.qcow2 1M",
        ] {
            world.ours("qemu-img", line).success();
        }
        fs::write(world.file("y.raw"), &world.bytes).unwrap();
        world
    }

    fn file(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn ours(&self, name: &str, line: &str) -> Outcome {
        Tool::at(self.file(name)).run_in(self.root.path(), &words(line))
    }

    fn shell(&self, line: &str) -> Outcome {
        Tool::find("bash").expect("bash").run_in(self.root.path(), &["-c", line])
    }

    /// `name` leads to `y.raw`. As the target of a copy of `y.raw`, and as the source of one onto `y.raw`, it
    /// is refused with exit code 1 and a message that says why, and the file stays whole.
    #[track_caller]
    fn check(&self, what: &str, name: &str) {
        self.check_target(what, name);
        self.check_source(what, name);
    }

    #[track_caller]
    fn check_target(&self, what: &str, name: &str) {
        for line in [
            format!("convert -f raw -O raw y.raw {name}"),
            format!("convert -U -f raw -O raw y.raw {name}"),
            format!("convert -U -n -f raw -O raw y.raw {name}"),
            format!("convert -U -n -O raw over.qcow2 {name}"),
            format!("convert -U -n -O raw ext.qcow2 {name}"),
            format!("dd -U -f raw -O raw if=y.raw of={name}"),
            format!("create -q -f qcow2 -b {} -F raw {name}", self.file("y.raw").display()),
        ] {
            self.check_refused(what, &line);
        }
    }

    #[track_caller]
    fn check_source(&self, what: &str, name: &str) {
        let raw = if name.starts_with("'json:") { "" } else { "-f raw " };
        for line in [
            format!("convert {raw}-O raw {name} y.raw"),
            format!("convert -U {raw}-O qcow2 {name} y.raw"),
            format!("convert -U -n {raw}-O raw {name} y.raw"),
            format!("convert -U -n {raw}-O qcow2 {name} ext.qcow2"),
            format!("dd -U {raw}-O raw if={name} of=y.raw"),
        ] {
            self.check_refused(what, &line);
        }
    }

    #[track_caller]
    fn check_refused(&self, what: &str, line: &str) {
        for program in ["qcow2", "qemu-img"] {
            let outcome = self.shell(&format!("exec 7<> y.raw; ./{program} {line}"));
            assert!(
                fs::read(self.file("y.raw")).unwrap() == self.bytes,
                "{what}: {line}: changed: {outcome}"
            );
            assert_eq!(outcome.code, Some(1), "{what}: {line}: {outcome}");
            assert!(
                REASONS.iter().any(|reason| outcome.stderr.contains(reason)),
                "{what}: {line}: {outcome}"
            );
        }
    }

    /// Runs a command that only the administrator may run; `None`, with a printed skip, if it fails.
    fn root_only(&self, line: &str) -> Option<String> {
        let done = self.shell(line);
        if done.code != Some(0) {
            skip(&format!("`{line}` is not allowed here"));
            return None;
        }
        Some(done.stdout.trim().to_owned())
    }
}

/// What a refusal says: the guard's sentences, the locks', that of `create`, and that a protocol makes no
/// new images.
const REASONS: [&str; 6] = [
    "same filename as the backing file",
    "is being read and cannot be written to",
    "is being written to and cannot be opened again",
    "lock",
    "does not support creating new images",
    "does not support image creation",
];

/// Undoes what a test did to the machine, when dropped.
struct Undo(Vec<String>);

impl Drop for Undo {
    fn drop(&mut self) {
        for line in self.0.iter().rev() {
            let _ = Command::new("bash").args(["-c", line]).status();
        }
    }
}

#[test]
fn names_of_one_file_are_seen_through() {
    let world = World::new();
    let path = world.file("y.raw").display().to_string();
    symlink("y.raw", world.file("soft")).unwrap();
    symlink("soft", world.file("softer")).unwrap();
    fs::hard_link(&path, world.file("hard")).unwrap();
    fs::create_dir(world.file("dir")).unwrap();
    for (what, name) in [
        ("the same name", "y.raw"),
        ("a detour", "dir/../y.raw"),
        ("an absolute path", &path),
        ("a symbolic link", "soft"),
        ("a chain of links", "softer"),
        ("a hard link", "hard"),
        ("a descriptor in /proc", "/proc/self/fd/7"),
        ("a descriptor in /dev", "/dev/fd/7"),
        ("a protocol name", "file:y.raw"),
        ("a protocol name of a link", "file:hard"),
    ] {
        world.check(what, name);
    }
    let json = r#"'json:{"driver":"raw","file":{"driver":"file","filename":"hard"}}'"#;
    world.check_source("a description", json);
    for (what, line) in [
        ("options", "convert -n -U -f raw --target-image-opts y.raw driver=raw,file.filename=hard"),
        ("a window", "convert -U --image-opts -O raw driver=raw,offset=512,file.filename=hard y.raw"),
        ("no locks", "convert --image-opts driver=raw,file.filename=hard,file.locking=off y.raw"),
        ("its own data file", "create -q -f qcow2 -o data_file=hard -b y.raw -F raw new.qcow2"),
        ("a backing file to be", "convert -U -O qcow2 -B y.raw -F raw over.qcow2 hard"),
    ] {
        world.check_refused(what, line);
    }
}

/// A qcow2 image that another name would overwrite with what is made of it.
#[test]
fn an_image_is_not_made_over_itself() {
    let world = World::new();
    fs::hard_link(world.file("a.qcow2"), world.file("hard")).unwrap();
    symlink("a.qcow2", world.file("soft")).unwrap();
    let before = fs::read(world.file("a.qcow2")).unwrap();
    for name in ["a.qcow2", "./a.qcow2", "soft", "hard"] {
        for line in [
            format!("qcow2 rescue a.qcow2 {name}"),
            format!("qcow2 snapshot --external {name} a.qcow2"),
            format!("qcow2 create -q -f qcow2 -b a.qcow2 -F qcow2 {name}"),
            format!("qcow2 rebase -b {name} -F qcow2 a.qcow2"),
            format!("qemu-img convert -U -c -O qcow2 a.qcow2 {name}"),
        ] {
            let outcome = world.shell(&format!("./{line}"));
            assert!(fs::read(world.file("a.qcow2")).unwrap() == before, "{line}: {outcome}");
            assert!(outcome.code == Some(1) && !outcome.stderr.is_empty(), "{line}: {outcome}");
        }
    }
    // An image that names itself as its backing file has a chain without an end.
    world.ours("qemu-img", "rebase -u -b hard -F qcow2 a.qcow2").success();
    let before = fs::read(world.file("a.qcow2")).unwrap();
    for line in ["qcow2 commit a.qcow2", "qemu-img commit -d a.qcow2", "qcow2 rebase -b '' a.qcow2"] {
        world.shell(&format!("timeout 60 ./{line}")).expect_code(1);
        assert!(fs::read(world.file("a.qcow2")).unwrap() == before, "{line}");
    }
}

#[test]
fn a_bind_mount_is_seen_through() {
    let world = World::new();
    fs::write(world.file("bind"), "").unwrap();
    if world.root_only("mount --bind y.raw bind").is_none() {
        return;
    }
    let _undo = Undo(vec![format!("umount {}", world.file("bind").display())]);
    world.check("a bind mount", "bind");
}

/// A loop device of the file, of a part of it, of a loop device, and a partition of one; parts that do not
/// overlap are different disks.
#[test]
fn loop_devices_are_seen_through() {
    let world = World::new();
    let mut undo = Undo(Vec::new());
    let mut attach = |options: &str| {
        let name = world.root_only(&format!("losetup -f --show {options}"))?;
        undo.0.push(format!("losetup -d {name}"));
        Some(name)
    };
    let Some(whole) = attach("y.raw") else { return };
    let Some([above, part, next]) = attach(&whole)
        .zip(attach("-o 4096 --sizelimit 65536 y.raw"))
        .zip(attach("-o 69632 --sizelimit 65536 y.raw"))
        .map(|((above, part), next)| [above, part, next])
    else {
        return;
    };
    for (what, name) in [("a loop device", &whole), ("one of that", &above), ("one of a part", &part)] {
        world.check(what, name);
        world.check(what, &format!("host_device:{name}"));
    }
    world.check_refused("the loop device below", &format!("convert -U -n -f raw -O raw {above} {whole}"));
    world.check_refused("a part of it", &format!("convert -U -n -f raw -O raw {whole} {part}"));
    world.ours("qcow2", &format!("convert -n -f raw -O raw {part} {next}")).success();
    world.shell(&format!("blockdev --flushbufs {next}")).success();
    let after = fs::read(world.file("y.raw")).unwrap();
    assert!(after[69632..69632 + 65536] == world.bytes[4096..4096 + 65536]);
}

#[test]
fn overlay_file_systems_are_seen_through() {
    let world = World::new();
    for name in ["lower", "upper", "work", "merged"] {
        fs::create_dir(world.file(name)).unwrap();
    }
    fs::hard_link(world.file("y.raw"), world.file("lower/y.raw")).unwrap();
    let mount = "mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work merged";
    if world.root_only(mount).is_none() {
        return;
    }
    let _undo = Undo(vec![format!("umount {}", world.file("merged").display())]);
    world.check_source("the file of the lower layer", "merged/y.raw");
    // As a target it is a copy of its own from its first change on.
    world.ours("qcow2", "convert -f raw -O raw y.raw merged/y.raw").success();
    assert!(fs::read(world.file("y.raw")).unwrap() == world.bytes);
    world.ours("qcow2", "convert -f raw -O raw merged/y.raw y.raw").success();
    fs::remove_file(world.file("y.raw")).unwrap();
    fs::write(world.file("merged/new"), &world.bytes).unwrap();
    fs::hard_link(world.file("upper/new"), world.file("y.raw")).unwrap();
    world.check("a file of the upper layer", "merged/new");
}

/// A server that is stopped when dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn an_export_of_the_source_is_refused_by_its_locks() {
    let world = World::new();
    let Some(tool) = Tool::find("qemu-nbd") else { return };
    let mut command = Command::new(tool.path());
    command.current_dir(world.root.path()).args(["-t", "-f", "raw", "-k"]).arg(world.file("sock"));
    let _server = Server(command.arg("y.raw").stdin(Stdio::null()).spawn().unwrap());
    let started = Instant::now();
    while !Path::new(&world.file("sock")).exists() {
        assert!(started.elapsed() < Duration::from_secs(20), "qemu-nbd does not listen");
        thread::sleep(Duration::from_millis(20));
    }
    for name in ["nbd:unix:sock", "'nbd+unix:///?socket=sock'"] {
        world.check_refused("an export", &format!("convert -n -f raw -O raw y.raw {name}"));
        world.check_refused("an export", &format!("convert -n -O raw over.qcow2 {name}"));
        world.check_refused("an export", &format!("convert -f raw -O raw {name} y.raw"));
    }
}
