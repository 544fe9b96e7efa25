//! Real signals: an interrupted verb stops soon and leaves every image sound, with the content from before or
//! after. SIGUSR1 prints progress.
//!
//! The moment of a signal is chosen by the bytes the program has read and written, which only Linux reports.
#![cfg(target_os = "linux")]
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test may stop, and says what it did"
)]

use qcow2_testkit::oracle::{Qemu, Tool};
use qcow2_tests::side_by_side::words;
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-under-test");

/// An interrupted verb and what must hold afterwards.
struct Case {
    line: &'static str,
    /// Images that must pass a check and keep their guest content.
    kept: &'static [&'static str],
    /// Images that must pass a check.
    sound: &'static [&'static str],
    /// A file that must not exist.
    gone: Option<&'static str>,
    /// True if it finishes once it has begun, because it is short and stopping would leak clusters.
    ends: bool,
}

const fn case(line: &'static str, kept: &'static [&'static str]) -> Case {
    Case { line, kept, sound: &[], gone: None, ends: false }
}

const CASES: &[Case] = &[
    Case { gone: Some("x"), ..case("convert -O qcow2 random.raw x", &[]) },
    Case { gone: Some("x"), ..case("convert -c -O qcow2 random.raw x", &[]) },
    Case { gone: Some("x"), ..case("rescue -O qcow2 base2.qcow2 x", &["base2.qcow2"]) },
    Case { gone: Some("x"), ..case("dd -O qcow2 bs=1M if=random.raw of=x", &[]) },
    Case { sound: &["base.qcow2"], ..case("commit over.qcow2", &["over.qcow2"]) },
    Case { sound: &["base.qcow2"], ..case("commit -d over.qcow2", &["over.qcow2"]) },
    case("rebase -b base2.qcow2 -F qcow2 over.qcow2", &["over.qcow2"]),
    case("rebase -c -b base2.qcow2 -F qcow2 over.qcow2", &["over.qcow2"]),
    case("amend -o refcount_bits=64 many.qcow2", &["many.qcow2"]),
    case("amend -o compat=0.10 zeroes.qcow2", &["zeroes.qcow2"]),
    case("check -r all leaky.qcow2", &["leaky.qcow2"]),
    case("resize --preallocation=full over.qcow2 300M", &["over.qcow2"]),
    case("resize --preallocation=metadata many.qcow2 90M", &["many.qcow2"]),
    case("compare random.raw copy.raw", &[]),
    case("checksum random.raw", &[]),
    case("measure -O qcow2 many.qcow2", &["many.qcow2"]),
    Case { ends: true, ..case("bitmap --merge b1 maps.qcow2 b0", &["maps.qcow2"]) },
    Case { ends: true, ..case("snapshot -c new many.qcow2", &["many.qcow2"]) },
    Case { ends: true, ..case("snapshot -d old many.qcow2", &["many.qcow2"]) },
];

/// In percent of all bytes a verb reads and writes: where it is interrupted, and by where it must have
/// stopped in at least one try.
const INTERRUPTED_AT: [u64; 2] = [20, 55];
const STOPPED_AT: u64 = 90;
/// How many times a verb may finish before the signal arrives.
const TRIES: usize = 20;

#[test]
fn interrupted_verbs_leave_sound_images() {
    let Some(qemu) = Qemu::find() else { return };
    let root = tempfile::tempdir().unwrap();
    let start = root.path().join("start");
    fs::create_dir(&start).unwrap();
    make(&qemu, &start);
    for case in CASES {
        let folder = root.path().join("case");
        let before: Vec<_> = case.kept.iter().map(|image| checksum(&start, image)).collect();
        let run = |share: Option<u64>, all: u64| {
            copy_for(case.line, &start, &folder);
            let ended = interrupt(&folder, case.line, share.map(|share| all * share / 100));
            judge(&qemu, case, (&folder, &start), &ended, &before);
            fs::remove_dir_all(&folder).unwrap();
            ended
        };
        let whole = run(None, 0);
        assert!(whole.status.success() || case.line.contains("-r all"), "{}: {}", case.line, whole.status);
        let early = |ended: &Ended| ended.is_interrupted() && ended.moved * 100 < whole.moved * STOPPED_AT;
        let mut ends: Vec<_> = INTERRUPTED_AT.map(|share| run(Some(share), whole.moved)).into();
        for _ in 0..TRIES {
            if case.ends || ends.iter().any(early) {
                break;
            }
            ends.push(run(Some(INTERRUPTED_AT[0]), whole.moved));
        }
        assert!(case.ends || ends.iter().any(early), "{} goes on: {ends:?} of {whole:?}", case.line);
        println!("{}: {:?} of {}", case.line, ends.iter().map(|e| e.moved).collect::<Vec<_>>(), whole.moved);
    }
}

/// Signals that `nohup` or a shell's `&` has set to ignored do not end a verb; with the default disposition
/// they do.
#[test]
fn ignored_signals_stay_ignored() {
    let root = tempfile::tempdir().unwrap();
    fs::write(root.path().join("random.raw"), vec![5; 8 << 20]).unwrap();
    for (ignored, sent, ended) in [
        ("HUP INT", &[Signal::HUP, Signal::INT][..], None),
        ("HUP INT", &[Signal::TERM], Some(15)),
        ("HUP", &[Signal::INT], Some(2)),
        ("INT", &[Signal::HUP], Some(1)),
    ] {
        let verb = "convert -r 16M -f raw -O qcow2 random.raw x";
        let script = format!("trap '' {ignored}; exec {OURS} {verb}");
        let mut command = by_default("sh");
        command.args(["-c", &script]);
        let mut child = start(command, root.path(), "");
        // The target exists once the signal handlers are installed.
        while state(&child) != 'Z' && !root.path().join("x").exists() {
            thread::sleep(Duration::from_millis(1));
        }
        sent.iter().for_each(|&signal| send(&child, signal));
        let status = child.wait().unwrap();
        assert_eq!(status.signal(), ended, "{ignored} ignored, {sent:?} sent: {status}");
        assert_eq!(status.success(), ended.is_none());
        assert_eq!(root.path().join("x").exists(), ended.is_none());
        let _ = fs::remove_file(root.path().join("x"));
    }
}

/// Checks the images after `ended`.
fn judge(qemu: &Qemu, case: &Case, (folder, start): (&Path, &Path), ended: &Ended, before: &[String]) {
    let line = case.line;
    assert!(ended.is_interrupted() || ended.status.success(), "{line}: {ended:?}");
    for image in case.kept.iter().chain(case.sound) {
        let checked = qemu.img.run_in(folder, &["check", image]);
        let good = checked.code == Some(0) || (line.contains("-r all") && checked.code == Some(3));
        assert!(good, "{line} after {ended:?}: {checked}");
        let told = qemu.img.run_in(folder, &["info", image]).success().stdout;
        assert!(!told.contains("in-use"), "{line}: {told}");
    }
    for (image, before) in case.kept.iter().zip(before) {
        let same = match line.starts_with("resize") {
            // A longer disk must have the same content up to the old size, and zeroes after it.
            true => {
                let old = start.join(image).display().to_string();
                qemu.img.run_in(folder, &["compare", &old, image]).code == Some(0)
            }
            false => *before == checksum(folder, image),
        };
        assert!(same, "{line} after {ended:?}: another disk");
    }
    if let (true, Some(gone)) = (ended.is_interrupted(), case.gone) {
        assert!(!folder.join(gone).exists(), "{line}: {gone} was left");
    }
}

/// A new `folder` with the files of `start` that `line` uses.
fn copy_for(line: &str, start: &Path, folder: &Path) {
    fs::create_dir(folder).unwrap();
    // `dd` has its file names after `if=`.
    let name = |word: &String| word.rsplit('=').next().unwrap_or_default().to_owned();
    let mut names: Vec<_> = words(line).iter().map(name).collect();
    for (top, below) in
        [("over.qcow2", "base.qcow2"), ("over.qcow2", "base2.qcow2"), ("zeroes.qcow2", "random.raw")]
    {
        if names.iter().any(|name| name == top) && !names.iter().any(|name| name == below) {
            names.push(below.to_owned());
        }
    }
    for name in names.iter().filter(|name| name.contains('.') && start.join(name).exists()) {
        let (from, to) = (start.join(name).display().to_string(), folder.join(name).display().to_string());
        Tool::find("cp").unwrap().run_in(folder, &["--sparse=always", &from, &to]).success();
    }
}

/// How a program ended.
#[derive(Debug)]
struct Ended {
    status: ExitStatus,
    /// Bytes that it read and wrote.
    moved: u64,
}

impl Ended {
    fn is_interrupted(&self) -> bool {
        self.status.signal() == Some(2)
    }
}

/// Runs `line` and interrupts it once it has read and written `after` bytes; it must end within seconds.
///
/// Runs with low priority, so that the observer gets the CPU: a whole verb takes milliseconds on tmpfs.
fn interrupt(folder: &Path, line: &str, after: Option<u64>) -> Ended {
    let mut command = by_default("nice");
    command.args(["-n", "10", OURS]);
    let mut child = start(command, folder, line);
    let (mut after, mut sent) = (after, Instant::now());
    // A child that has ended can still be queried until it is waited for.
    while state(&child) != 'Z' {
        if after.is_some_and(|after| moved(&child) >= after) {
            send(&child, Signal::INT);
            (after, sent) = (None, Instant::now());
        }
        assert!(sent.elapsed() < Duration::from_secs(60), "{line} does not end");
        if after.is_none() {
            thread::sleep(Duration::from_micros(300));
        }
    }
    let moved = moved(&child);
    Ended { status: child.wait().unwrap(), moved }
}

/// State of the child in /proc: `R`, `S`, ..., `Z` once it has ended.
fn state(child: &Child) -> char {
    let text = fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
    text.rsplit(')').next().and_then(|rest| rest.trim().chars().next()).unwrap()
}

/// Bytes that the child has read and written.
fn moved(child: &Child) -> u64 {
    let text = fs::read_to_string(format!("/proc/{}/io", child.id())).unwrap();
    let number = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|rest| rest.trim().parse::<u64>().ok()).unwrap()
    };
    number("rchar:") + number("wchar:")
}

/// Runs `program` with no signal ignored, however the tests were started: a shell's background jobs ignore
/// some.
fn by_default(program: &str) -> Command {
    let mut command = Command::new("env");
    command.args(["--default-signal", program]);
    command
}

fn start(mut command: Command, folder: &Path, line: &str) -> Child {
    command.args(words(line)).current_dir(folder).stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn send(child: &Child, signal: Signal) {
    // A child that has ended and was not waited for still accepts signals.
    kill_process(Pid::from_child(child), signal).unwrap();
}

/// A checksum of the guest content of an image.
fn checksum(folder: &Path, image: &str) -> String {
    Tool::at(OURS).run_in(folder, &["checksum", image]).success().stdout
}

fn make(qemu: &Qemu, folder: &Path) {
    let img = |line: &str| drop(qemu.img.run_in(folder, &words(line)).success());
    // qemu-img takes half a minute with clusters this small.
    let own = |line: &str| drop(Tool::at(OURS).run_in(folder, &words(line)).success());
    let io = |line: &str| drop(qemu.io.run_in(folder, &words(line)).success());
    let mut bytes = vec![0; 32 << 20];
    qcow2_testkit::rng::Rng::new(3).fill(&mut bytes);
    fs::write(folder.join("random.raw"), &bytes).unwrap();
    fs::write(folder.join("copy.raw"), &bytes).unwrap();
    img("convert -O qcow2 random.raw base2.qcow2");
    img("create -q -f qcow2 base.qcow2 32M");
    img("create -q -f qcow2 -b base.qcow2 -F qcow2 over.qcow2");
    let mut args = vec!["-f".to_owned(), "qcow2".to_owned()];
    for at in (0..16).map(|n| n * 2) {
        args.extend(["-c".to_owned(), format!("write -q -P {} {at}M 1M", at + 1)]);
    }
    args.push("over.qcow2".to_owned());
    qemu.io.run_in(folder, &args).success();
    own("create -q -f qcow2 -o cluster_size=512,preallocation=metadata many.qcow2 64M");
    img("snapshot -c old many.qcow2");
    img("create -q -f qcow2 -o cluster_size=4k -b random.raw -F raw zeroes.qcow2");
    io("-c 'write -q -z 0 32M' zeroes.qcow2");
    own("create -q -f qcow2 -o cluster_size=512,preallocation=metadata leaky.qcow2 100M");
    let mut leaky = fs::OpenOptions::new().write(true).open(folder.join("leaky.qcow2")).unwrap();
    leak(&mut leaky, folder);
    img("create -q -f qcow2 maps.qcow2 8G");
    img("bitmap --add -g 512 maps.qcow2 b0");
    img("bitmap --add -g 512 maps.qcow2 b1");
    io("-c 'write -q -P 5 1G 1M' maps.qcow2");
}

/// Gives a cluster past the end a refcount.
fn leak(image: &mut fs::File, folder: &Path) {
    use std::os::unix::fs::FileExt;
    let bytes = fs::read(folder.join("leaky.qcow2")).unwrap();
    let number = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let table = number(48) as usize;
    let clusters = bytes.len() / 512;
    let block = number(table + clusters / 256 * 8);
    assert_ne!(block, 0);
    image.write_all_at(&[0, 1], block + (clusters % 256) as u64 * 2).unwrap();
    image.set_len(bytes.len() as u64 + 512).unwrap();
}

/// Output of a program.
#[derive(Debug)]
struct Said {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

/// Output of `line` while it gets SIGUSR1 again and again until it ends.
fn asked(program: &Path, folder: &Path, line: &str) -> Said {
    let child = start(Command::new(program), folder, line);
    // Before the handler is installed, the signal would end it.
    while state(&child) != 'Z' && !listens(&child) {
        thread::sleep(Duration::from_micros(200));
    }
    while state(&child) != 'Z' {
        send(&child, Signal::USR1);
        thread::sleep(Duration::from_millis(3));
    }
    let output = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Said { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// True once SIGUSR1 is caught or blocked.
fn listens(child: &Child) -> bool {
    let text = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    let bit = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let bits = line.and_then(|rest| u64::from_str_radix(rest.trim(), 16).ok());
        bits.is_some_and(|bits| bits >> 9 & 1 == 1)
    };
    bit("SigCgt:") || bit("SigBlk:")
}

/// Verbs, and whether they print progress on SIGUSR1. qemu-img's other verbs may or may not die of the signal
/// (it blocks all signals while it creates a thread); ours never do.
const ASKED: [(&str, bool); 11] = [
    ("convert -O qcow2 -r 48M random.raw x", true),
    ("commit -r 48M over.qcow2", true),
    ("commit -d -r 48M over.qcow2", true),
    ("rebase -b base2.qcow2 -F qcow2 over.qcow2", true),
    ("amend -o compat=0.10 zeroes.qcow2", true),
    ("compare random.raw copy.raw", true),
    ("convert -p -O qcow2 -r 48M random.raw x", false),
    ("measure -O qcow2 over.qcow2", false),
    ("resize --preallocation=full over.qcow2 100M", false),
    ("check over.qcow2", false),
    ("dd -O qcow2 bs=1M if=random.raw of=x", false),
];

/// Progress lines go to standard error, for the verbs that have `-p`; standard output is that of a run
/// without signals.
#[test]
fn sigusr1_prints_progress_to_standard_error() {
    let Some(qemu) = Qemu::find() else { return };
    let root = tempfile::tempdir().unwrap();
    let start = root.path().join("start");
    fs::create_dir(&start).unwrap();
    make(&qemu, &start);
    let link = root.path().join("qemu-img");
    std::os::unix::fs::symlink(OURS, &link).unwrap();
    for (line, shows) in ASKED {
        let mut said = Vec::new();
        let reference = [qemu.img.path()].into_iter().filter(|_| shows);
        for program in reference.chain([&*link]) {
            // A quick verb may end before it gets the signal.
            let enough = |outcome: &Said| !shows || !outcome.stderr.is_empty();
            let run = || {
                let folder = root.path().join("case");
                copy_for(line, &start, &folder);
                let outcome = asked(program, &folder, line);
                fs::remove_dir_all(&folder).unwrap();
                outcome
            };
            let mut outcome = run();
            for _ in 0..20 {
                if enough(&outcome) {
                    break;
                }
                outcome = run();
            }
            let who = program.display();
            assert_eq!(outcome.code, Some(0), "{who} {line}: {outcome:?}");
            assert!(enough(&outcome), "{who} {line}: no progress");
            assert!(shows || outcome.stderr.is_empty(), "{who} {line}: {outcome:?}");
            let shares: Vec<_> = outcome.stderr.lines().map(share).collect();
            assert!(shares.is_sorted(), "{who} {line}: {shares:?}");
            assert!(outcome.stderr.is_empty() || outcome.stderr.ends_with('\n'));
            said.push(outcome.stdout.split('\r').next_back().unwrap_or_default().to_owned());
        }
        assert!(said.windows(2).all(|said| said[0] == said[1]), "{line}: {said:?}");
    }
}

/// The number in ` (12.34/100%)`, in hundredths.
fn share(line: &str) -> u64 {
    let number = line.strip_prefix("    (").and_then(|rest| rest.strip_suffix("/100%)"));
    let (whole, rest) = number.and_then(|number| number.split_once('.')).unwrap_or_else(|| panic!("{line}"));
    assert_eq!(rest.len(), 2, "{line}");
    whole.parse::<u64>().unwrap() * 100 + rest.parse::<u64>().unwrap()
}
