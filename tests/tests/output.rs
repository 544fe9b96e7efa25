//! Standard output that fails: a closed pipe changes no exit code and stops no work, an unfinished stream is
//! a failure, a full disk is reported. And signals while the other end of a pipe sleeps.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test may stop")]

use qcow2_testkit::oracle::Tool;
use qcow2_tests::side_by_side::words;
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-under-test");

struct World {
    root: tempfile::TempDir,
}

/// Where standard output goes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Out {
    /// A pipe whose reader is closed.
    Gone,
    /// A full device.
    Full,
    /// /dev/null.
    Null,
}

impl World {
    /// `a.raw`, `b.raw` with other content, `good.qcow2`, and `bad.qcow2`, in which an allocated cluster has
    /// refcount 0.
    fn new() -> Self {
        let world = Self { root: tempfile::tempdir().unwrap() };
        fs::write(world.path("a.raw"), vec![7; 3 << 20]).unwrap();
        fs::write(world.path("b.raw"), vec![8; 3 << 20]).unwrap();
        for image in ["good.qcow2", "bad.qcow2"] {
            let args = ["convert", "-f", "raw", "-O", "qcow2", "a.raw", image];
            Tool::at(OURS).run_in(world.root.path(), &args).success();
        }
        let mut bytes = fs::read(world.path("bad.qcow2")).unwrap();
        let word =
            |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
        let block = word(&bytes, word(&bytes, 48));
        bytes[block + 20..block + 22].fill(0);
        fs::write(world.path("bad.qcow2"), bytes).unwrap();
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// Runs the command as `name`; returns its exit code and standard error.
    fn run(&self, name: &str, line: &str, out: Out) -> (i32, String) {
        let program = self.path("bin").join(name);
        if !program.exists() {
            fs::create_dir_all(self.path("bin")).unwrap();
            std::os::unix::fs::symlink(OURS, &program).unwrap();
        }
        let mut command = Command::new(program);
        command.args(words(line)).current_dir(self.root.path());
        command.stdin(Stdio::null()).stderr(Stdio::piped());
        match out {
            Out::Gone => command.stdout(std::io::pipe().unwrap().1),
            Out::Full => command.stdout(File::options().write(true).open("/dev/full").unwrap()),
            Out::Null => command.stdout(Stdio::null()),
        };
        let done = command.output().unwrap();
        let code = done.status.code().unwrap_or_else(|| panic!("{line}: {}", done.status));
        (code, String::from_utf8_lossy(&done.stderr).into_owned())
    }
}

#[test]
fn a_closed_pipe_changes_no_exit_code() {
    let world = World::new();
    for (line, code) in [
        ("check good.qcow2", 0),
        ("check bad.qcow2", 2),
        ("check --output=json bad.qcow2", 2),
        ("compare a.raw b.raw", 1),
        ("compare a.raw good.qcow2", 0),
        ("compare -p a.raw b.raw", 1),
        ("info good.qcow2", 0),
        ("info missing.qcow2", 1),
        ("map --output=json good.qcow2", 0),
        ("snapshot -l good.qcow2", 0),
        ("measure -O qcow2 good.qcow2", 0),
        ("create -o help -f qcow2", 0),
        ("--help", 0),
        ("--version", 0),
        ("nonsense", 1),
    ] {
        for name in ["qcow2", "qemu-img"] {
            let heard = world.run(name, line, Out::Null);
            assert_eq!(heard.0, code, "{line}: {heard:?}");
            assert_eq!(world.run(name, line, Out::Gone), heard, "{name} {line}");
        }
    }
    assert_eq!(world.run("qcow2", "checksum a.raw", Out::Gone), (0, String::new()));
}

/// The work is done whether or not anybody reads the output.
#[test]
fn a_closed_pipe_stops_no_work() {
    let world = World::new();
    for name in ["qcow2", "qemu-img"] {
        assert_eq!(world.run(name, "create -f qcow2 new 1M", Out::Gone), (0, String::new()));
        assert_eq!(world.run(name, "resize new 2M", Out::Gone), (0, String::new()));
        let seen = Tool::at(OURS).run_in(world.root.path(), &["info", "--output=json", "new"]).success();
        assert!(seen.stdout.contains("\"virtual-size\": 2097152"), "{seen}");
        fs::remove_file(world.path("new")).unwrap();
    }
    let written = "-c 'write -P 1 0 512' -c 'write -P 2 512 512'";
    for (name, verb) in [("qcow2", "io "), ("qemu-io", "")] {
        let line = format!("{verb}-f raw {written} a.raw");
        assert_eq!(world.run(name, &line, Out::Gone), (0, String::new()));
        assert_eq!(fs::read(world.path("a.raw")).unwrap()[..1024], [[1; 512], [2; 512]].concat(), "{line}");
        fs::write(world.path("a.raw"), vec![7; 3 << 20]).unwrap();
        let line = format!("{verb}-f raw -c 'read 0 512' -c 'read -P 9 0 512' a.raw");
        assert_eq!(world.run(name, &line, Out::Gone).0, 1, "{line}");
    }
}

#[test]
fn an_unfinished_stream_exits_with_failure() {
    let world = World::new();
    for line in ["convert -O qcow2 a.raw -", "convert -O raw good.qcow2 -", "convert -O qcow2 --json a.raw -"]
    {
        assert_eq!(world.run("qcow2", line, Out::Null).0, 0, "{line}");
        let (code, told) = world.run("qcow2", line, Out::Gone);
        // A closed pipe ends it without a message.
        assert!(code == 1 && told.lines().all(|line| line.starts_with("{\"done\"")), "{line}: {code} {told}");
    }
}

#[test]
fn a_full_output_device_is_reported() {
    let world = World::new();
    for (line, code) in [
        ("info good.qcow2", 1),
        ("map good.qcow2", 1),
        ("map --output=json good.qcow2", 1),
        ("checksum good.qcow2", 1),
        ("measure -O qcow2 a.raw", 1),
        ("check good.qcow2", 1),
        ("convert -O raw good.qcow2 -", 1),
        ("convert -O qcow2 a.raw -", 1),
        ("--help", 1),
        ("compare a.raw b.raw", 1),
        // Not 1, which means that the images differ.
        ("compare a.raw good.qcow2", 2),
        ("io -f raw -c 'write -P 1 0 512' -c 'write -P 2 512 512' a.raw", 1),
    ] {
        let (found, told) = world.run("qcow2", line, Out::Full);
        assert_eq!(found, code, "{line}: {told}");
        assert_eq!(
            told, "qcow2: cannot write to standard output: No space left on device (os error 28)\n",
            "{line}"
        );
    }
    assert_eq!(fs::read(world.path("a.raw")).unwrap()[..1024], [[1; 512], [2; 512]].concat());
    // The exit code for the findings takes precedence over the output error.
    for line in ["check bad.qcow2", "check --output=json bad.qcow2"] {
        let (found, told) = world.run("qcow2", line, Out::Full);
        assert!(found == 2 && told.contains("No space left on device"), "{line}: {found} {told}");
    }
}

/// One signal ends it, whatever the other end of the pipe does.
#[test]
fn a_signal_ends_a_command_blocked_on_a_pipe() {
    let world = World::new();
    let start = |line: &str, input: Stdio, output: Stdio| {
        let mut command = Command::new("env");
        command.args(["--default-signal", OURS]).args(words(line)).current_dir(world.root.path());
        command.stdin(input).stdout(output).spawn().unwrap()
    };
    // More than fits into a pipe, with no reader.
    let (reader, writer) = std::io::pipe().unwrap();
    ends_by_signal(start("convert -f raw -O qcow2 a.raw -", Stdio::null(), writer.into()), world.root.path());
    drop(reader);
    for bytes in [0, 1 << 20] {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let child = start("convert -f raw -O qcow2 - new", reader.into(), Stdio::null());
        writer.write_all(&vec![7; bytes]).unwrap();
        ends_by_signal(child, world.root.path());
        assert!(!world.path("new").exists(), "after {bytes} bytes");
    }
}

/// Waits until `child` sleeps, sends it one signal, and waits for its end.
fn ends_by_signal(mut child: Child, folder: &Path) {
    let stat = format!("/proc/{}/stat", child.id());
    let spent = || fs::read_to_string(&stat).unwrap_or_default();
    let (started, mut before) = (Instant::now(), String::new());
    // Asleep: it has used no CPU time for a while.
    loop {
        thread::sleep(Duration::from_millis(300));
        let now = spent();
        if now == before && now.contains(") S ") {
            break;
        }
        assert!(started.elapsed() < PATIENCE, "{}: {now}", folder.display());
        before = now;
    }
    kill_process(Pid::from_raw(child.id() as i32).unwrap(), Signal::TERM).unwrap();
    while child.try_wait().unwrap().is_none() {
        if started.elapsed() > PATIENCE {
            child.kill().unwrap();
        }
        thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(child.wait().unwrap().signal(), Some(Signal::TERM.as_raw()));
}

/// Time limit of everything here.
const PATIENCE: Duration = Duration::from_secs(20);
