//! The exerciser against qemu-io: same exit code, same text on both streams except times and rates, and the
//! same guest content.
//!
//! `cli_io/lines.txt` contains single commands, `cli_io/scripts.txt` sequences of commands.

#![allow(clippy::unwrap_used, reason = "helpers of a test")]

use qcow2_testkit::oracle::Qemu;
use qcow2_tests::side_by_side::words;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

const LINES: &str = include_str!("cli_io/lines.txt");
const SCRIPTS: &str = include_str!("cli_io/scripts.txt");
const OURS: &str = env!("CARGO_BIN_EXE_qcow2-under-test");

/// One run of the exerciser.
#[derive(Clone, Debug, Default)]
struct Run {
    /// Name of the start folder.
    start: String,
    args: Vec<String>,
    input: String,
    /// True if the difference is intended.
    differs: bool,
}

#[test]
fn single_commands_match_qemu_io() {
    let mut runs = Vec::new();
    for line in LINES.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let run = Run {
            start: "written".to_owned(),
            args: ["-c", line, "x"].map(str::to_owned).to_vec(),
            ..Run::default()
        };
        if CHANGING.contains(&line.split(' ').next().unwrap()) {
            let mut args = run.args.clone();
            args.insert(0, "-r".to_owned());
            runs.push(Run { args, ..run.clone() });
        }
        runs.push(run);
    }
    compare_all(&runs);
}

/// Commands that open the disk for writing.
const CHANGING: [&str; 7] = ["write", "writev", "aio_write", "discard", "truncate", "t", "w"];

#[test]
fn command_sequences_match_qemu_io() {
    let mut runs: Vec<Run> = Vec::new();
    for line in SCRIPTS.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if let Some(header) = line.strip_prefix('@') {
            let mut words = header.trim_start_matches('!').split_whitespace().map(str::to_owned);
            let start = words.next().unwrap();
            runs.push(Run {
                start,
                args: words.collect(),
                differs: header.starts_with('!'),
                ..Run::default()
            });
        } else {
            let args = &mut runs.last_mut().unwrap().args;
            let place = args.iter().rposition(|arg| arg == "-c").map_or(0, |at| at + 2);
            args.splice(place..place, ["-c".to_owned(), line.to_owned()]);
        }
    }
    assert!(runs.len() > 80);
    compare_all(&runs);
}

#[test]
fn commands_from_standard_input_match_qemu_io() {
    let run = |args: &[&str], input: &str| Run {
        start: "written".to_owned(),
        args: args.iter().map(|&arg| arg.to_owned()).collect(),
        input: input.to_owned(),
        differs: false,
    };
    compare_all(&[
        run(&["x"], "length\nfoo\n\nread -q 0 1\nquit\nlength\n"),
        run(&["x"], "length"),
        run(&["x"], "foo\nlength\n"),
        run(&["x"], ""),
        run(&[], "length\nopen x\nread -P 1 0 1k\nclose\nquit"),
        run(&["-c", "length", "x"], "map\n"),
    ]);
}

#[test]
fn image_names_and_options_match_qemu_io() {
    let run = |args: &[&str]| Run {
        start: "overlay".to_owned(),
        args: args.iter().map(|&arg| arg.to_owned()).collect(),
        ..Run::default()
    };
    let json = r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"x"}}"#;
    compare_all(&[
        run(&[json, "-c", "length"]),
        run(&["nofile"]),
        run(&["-c", "length", "nofile"]),
        run(&["--cmd=length", "x"]),
        run(&["x", "--cm", "length"]),
        run(&["-c", "length", "bad"]),
        run(&["-c", "length", "orphan"]),
        run(&["-c", "length", "-f", "raw", "orphan"]),
        run(&["--image-opts", "-c", "length", "driver=qcow2,file.driver=file,file.filename=nofile"]),
    ]);
}

/// Discarded clusters are deallocated in the file, unless an option keeps them.
#[test]
fn discarded_clusters_are_deallocated_in_the_file() {
    let Some(world) = World::new() else { return };
    let used = |options: &str, program: &Path, name: &str| {
        let folder = world.copy("written", name);
        let image = format!("driver=qcow2,file.filename=x{options}");
        let commands = ["-c", "write -q -P 1 0 8M", "-c", "flush", "-c", "discard -q 0 8M", "--image-opts"];
        let run = Command::new(program).args(commands).arg(image).current_dir(&folder).output().unwrap();
        assert!(run.status.success(), "{run:?}");
        let data = fs::metadata(folder.join("x")).unwrap();
        std::os::unix::fs::MetadataExt::blocks(&data) * 512
    };
    for (id, options) in
        ["", ",discard-no-unref=on", ",pass-discard-request=off", ",discard=ignore"].iter().enumerate()
    {
        let theirs = used(options, world.qemu.io.path(), &format!("given-{id}-theirs"));
        let ours = used(options, &world.ours, &format!("given-{id}-ours"));
        let kept = options.contains("off") || options.contains("ignore");
        assert_eq!((ours > 8 << 20, theirs > 8 << 20), (kept, kept), "{options}: {ours} {theirs}");
    }
}

/// While another program writes to an image, both get the same lock errors.
#[test]
fn lock_errors_match_qemu_io() {
    let Some(world) = World::new() else { return };
    let folder = world.copy("written", "in-use");
    let mut holder = Command::new(world.qemu.io.path())
        .arg("x")
        .current_dir(&folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    holder.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(holder.stdout.as_mut().unwrap()), &mut line)
        .unwrap();
    for options in [
        vec![],
        vec!["-r"],
        vec!["-r", "-U"],
        vec!["-U"],
        vec!["-s"],
        vec!["-f", "raw", "-r"],
        vec!["-f", "raw"],
    ] {
        let args: Vec<String> =
            options.iter().chain(&["-c", "read 0 512", "x"]).map(|&arg| arg.to_owned()).collect();
        let [theirs, ours] =
            [world.qemu.io.path(), &world.ours].map(|program| said(program, &folder, &args, ""));
        assert_eq!(theirs, ours, "{args:?}");
    }
    drop(holder.stdin.take());
    holder.wait().unwrap();
}

/// The start folders and both programs.
struct World {
    root: tempfile::TempDir,
    qemu: Qemu,
    ours: PathBuf,
}

impl World {
    /// `None`, with a printed skip, if the tools are missing.
    fn new() -> Option<Self> {
        let qemu = Qemu::find()?;
        let root = tempfile::tempdir().unwrap();
        let ours = root.path().join("bin/qemu-io");
        fs::create_dir(root.path().join("bin")).unwrap();
        std::os::unix::fs::symlink(OURS, &ours).unwrap();
        let world = Self { root, qemu, ours };
        world.make_starts();
        Some(world)
    }

    fn make_starts(&self) {
        let make = |name: &str, lines: &[&str]| {
            let folder = self.root.path().join(name);
            fs::create_dir(&folder).unwrap();
            fs::write(folder.join("pat"), "abc").unwrap();
            fs::write(folder.join("empty"), "").unwrap();
            for line in lines {
                let tool = if line.starts_with("-c") { &self.qemu.io } else { &self.qemu.img };
                tool.run_in(&folder, &words(line)).success();
            }
        };
        let new = "create -q -f qcow2 x 10M";
        make("empty", &[new]);
        make("nothing", &["create -q -f qcow2 x 0"]);
        make("written", &[new, "-c 'write -q -P 1 0 256k' -c 'write -q -P 2 300k 100k' x"]);
        make(
            "overlay",
            &[
                "create -q -f qcow2 b 4M",
                "-c 'write -q -P 1 0 256k' -c 'write -q -P 2 1M 100k' b",
                "create -q -f qcow2 -F qcow2 -b b x 10M",
                "-c 'write -q -P 3 128k 64k' x",
                "create -q -u -f qcow2 -F qcow2 -b nowhere orphan 10M",
            ],
        );
        fs::write(self.root.path().join("overlay/bad"), b"QFI\xfb\0\0\0\x09").unwrap();
        make(
            "extended",
            &[
                "create -q -f qcow2 -o extended_l2=on,cluster_size=64k x 10M",
                "-c 'write -q -P 1 0 100k' -c 'write -q -P 2 3M 100k' x",
            ],
        );
        make("v2-snapshot", &["create -q -f qcow2 -o compat=0.10 x 1M", "snapshot -c a x"]);
        make("bitmap-in-use", &["create -q -f qcow2 x 1M", "bitmap --add x b"]);
        let path = self.root.path().join("bitmap-in-use/x");
        let mut bytes = fs::read(&path).unwrap();
        // The bitmaps extension starts at byte 504 and ends with the offset of the directory.
        let directory = u64::from_be_bytes(bytes[528..536].try_into().unwrap()) as usize;
        bytes[directory + 15] |= 1;
        fs::write(&path, bytes).unwrap();
        make("dirty", &["create -q -f qcow2 x 1M", "-c 'write -q 0 64k' x"]);
        let path = self.root.path().join("dirty/x");
        let mut bytes = fs::read(&path).unwrap();
        // Not closed cleanly, and a cluster behind the others with a refcount.
        bytes[79] = 1;
        bytes[0x20000 + 2 * 8 + 1] = 1;
        bytes.resize(9 << 16, 0);
        fs::write(&path, bytes).unwrap();
        make("raw", &[]);
        let mut bytes = vec![0; 100_000];
        bytes[50_000..50_004].fill(b'a');
        fs::write(self.root.path().join("raw/x"), bytes).unwrap();
    }

    fn copy(&self, start: &str, name: &str) -> PathBuf {
        let folder = self.root.path().join(name);
        fs::create_dir(&folder).unwrap();
        for entry in fs::read_dir(self.root.path().join(start)).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), folder.join(entry.file_name())).unwrap();
        }
        folder
    }

    /// How the two programs differ; empty if they do not.
    fn compare(&self, id: usize, run: &Run) -> String {
        let folders = ["theirs", "ours"].map(|who| self.copy(&run.start, &format!("{id}-{who}")));
        let theirs = said(self.qemu.io.path(), &folders[0], &run.args, &run.input);
        let ours = said(&self.ours, &folders[1], &run.args, &run.input);
        let mut differences = String::new();
        if theirs != ours {
            differences = format!("theirs: {theirs}\nours: {ours}\n");
        }
        let [their_image, our_image] = folders.each_ref().map(|folder| folder.join("x"));
        if fs::read(&their_image).unwrap() != fs::read(&our_image).unwrap() {
            differences += &self.compare_images(run, &folders);
        }
        for folder in &folders {
            fs::remove_dir_all(folder).unwrap();
        }
        differences
    }

    /// Images with different bytes must have the same guest content, and ours must pass a check.
    fn compare_images(&self, run: &Run, [theirs, ours]: &[PathBuf; 2]) -> String {
        let (theirs, ours) = (theirs.join("x").display().to_string(), ours.join("x").display().to_string());
        let format = if run.start == "raw" { "raw" } else { "qcow2" };
        let args = ["compare", "-f", format, "-F", format, &theirs, &ours];
        let compared = self.qemu.img.run_in(self.root.path(), &args);
        let mut differences = String::new();
        if compared.code != Some(0) {
            differences += &format!("{compared}\n");
        }
        let checked = self.qemu.img.run_in(self.root.path(), &["check", "-f", format, &ours]);
        if !matches!(checked.code, Some(0 | 63)) {
            differences += &format!("{checked}\n");
        }
        differences
    }
}

fn compare_all(runs: &[Run]) {
    let Some(world) = World::new() else { return };
    let (next, wrong) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let worker = || loop {
        let id = next.fetch_add(1, Ordering::Relaxed);
        let Some(run) = runs.get(id) else { return };
        let differences = world.compare(id, run);
        let problem = match (run.differs, differences.is_empty()) {
            (false, false) => format!("{run:?}\n{differences}"),
            (true, true) => format!("{run:?}\nis the same now\n"),
            _ => continue,
        };
        wrong.lock().unwrap().push(problem);
    };
    std::thread::scope(|scope| {
        scope.spawn(worker);
        worker();
    });
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "{} of {} runs:\n\n{}", wrong.len(), runs.len(), wrong.join("\n"));
}

/// Exit code and both streams, without times and rates.
fn said(program: &Path, folder: &Path, args: &[String], input: &str) -> String {
    use std::os::unix::process::ExitStatusExt;
    let mut child = Command::new(program)
        .args(args)
        .current_dir(folder)
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A program that does not read its input may have ended already.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    let text = |bytes: &[u8]| masked(&String::from_utf8_lossy(bytes));
    let code = (output.status.code(), output.status.signal());
    format!("{code:?}\n{}-- stderr:\n{}", text(&output.stdout), text(&output.stderr))
}

/// The text without what differs from run to run (times and rates) and what is ours alone (descriptions).
fn masked(text: &str) -> String {
    text.lines().map(|line| masked_line(line) + "\n").collect()
}

fn masked_line(line: &str) -> String {
    if let Some((head, _)) = line.split_once(" ops; ").filter(|(_, rest)| rest.ends_with(" ops/sec)")) {
        return format!("{head} ops");
    }
    if let Some((usage, _)) = line.split_once(" -- ").filter(|(usage, _)| !usage.contains(": ")) {
        return usage.to_owned();
    }
    let fields: Vec<&str> = line.split(',').collect();
    match fields[..] {
        [bytes, ops, time, _, _] if time.contains(':') => format!("{bytes},{ops}"),
        _ => line.to_owned(),
    }
}

#[test]
fn masks_remove_only_times_rates_and_descriptions() {
    for (line, expected) in [
        ("64 KiB, 1 ops; 00.03 sec (1.603 MiB/sec and 25.6410 ops/sec)", "64 KiB, 1 ops"),
        ("65536,1,0:00:00.03,1680410.256,25.641", "65536,1"),
        ("map  -- what it does", "map "),
        ("read: invalid option -- 'x'", "read: invalid option -- 'x'"),
        ("Parsing error: unrecognized suffix -- 1x", "Parsing error: unrecognized suffix -- 1x"),
        ("wrote 65536/65536 bytes at offset 0", "wrote 65536/65536 bytes at offset 0"),
    ] {
        assert_eq!(masked_line(line), expected);
    }
}
