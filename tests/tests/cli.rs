//! The command against qemu-img: same exit code, same text on both streams, and images with the same guest
//! content.
//!
//! `cli/lines.txt` and `cli/names.txt` contain the command lines, `cli/different.txt` those with intended
//! differences and the reason. `QCOW2_LINES=resize` runs the lines that start with that word. What other
//! programs run is in `cli_programs.rs`.

#![allow(clippy::unwrap_used, reason = "helpers of a test")]

use qcow2_testkit::oracle::Tool;
use qcow2_tests::copies::copy_folder;
use qcow2_tests::side_by_side::{SideBySide, made_once};
use qcow2_tests::start::make_start;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const LINES: &str = include_str!("cli/lines.txt");
const NAMES: &str = include_str!("cli/names.txt");
const DIFFERENT: &str = include_str!("cli/different.txt");

/// One test per verb, so that they run in parallel and the first failure shows early, and one for all other
/// lines.
macro_rules! tests_by_verb {
    ($($verb:ident)*) => {
        const VERBS: &[&str] = &[$(stringify!($verb)),*];

        mod same_words_same_codes_same_content {
            $(#[test]
            fn $verb() {
                super::check(|verb| verb == stringify!($verb));
            })*

            #[test]
            fn lines_without_a_verb() {
                super::check(|verb| !super::VERBS.contains(&verb));
            }
        }
    };
}

tests_by_verb! {
    amend bench bitmap check commit compare convert create dd info map measure rebase resize snapshot
}

/// Every line whose first word is `wanted` must give the same result, unless it is listed as different; then
/// it must still differ.
fn check(wanted: impl Fn(&str) -> bool) {
    let different: Vec<&str> = entries(DIFFERENT).collect();
    let begin = std::env::var("QCOW2_LINES").unwrap_or_default();
    let lines = entries(LINES).chain(entries(NAMES)).chain(different.iter().copied());
    let lines: Vec<&str> = lines.filter(|line| wanted(line.split(' ').next().unwrap_or_default())).collect();
    assert!(!lines.is_empty(), "a verb without lines");
    let lines: Vec<&str> = lines.into_iter().filter(|line| line.starts_with(&begin)).collect();
    let root = tempfile::tempdir().unwrap();
    let Some(both) = both_programs(root.path()) else { return };
    let (next, wrong) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let worker = || loop {
        let id = next.fetch_add(1, Ordering::Relaxed);
        let Some(line) = lines.get(id) else { return };
        let compared = both.run(line);
        let problem = match (different.contains(line), compared.differences.is_empty()) {
            (false, false) => format!("{line}\n{}", compared.differences),
            (true, true) => format!("{line}\nis the same now: remove it from the list of differences\n"),
            _ => continue,
        };
        wrong.lock().unwrap().push(problem);
    };
    thread::scope(|scope| {
        scope.spawn(worker);
        worker();
    });
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "{} of {} lines:\n\n{}", wrong.len(), lines.len(), wrong.join("\n"));
}

/// Both programs; each run starts from a copy of the same folder in `root`.
fn both_programs(root: &Path) -> Option<SideBySide> {
    let made =
        made_once(Path::new(env!("CARGO_TARGET_TMPDIR")), include_str!("../src/start.rs"), make_start)?;
    SideBySide::new(Path::new(OURS), root, |_, start| copy_folder(&made.join("."), start))
}

/// An image that another program writes to: which verbs open it, and with which error.
#[test]
fn an_image_with_a_writer_is_opened_or_refused_as_by_qemu_img() {
    let root = tempfile::tempdir().unwrap();
    let Some(both) = both_programs(root.path()) else { return };
    let image = both.start().join("s.qcow2");
    let image = image.display();
    let mut writer = start_writer(&both);
    let lines = [
        format!("info {image}"),
        format!("info -U {image}"),
        format!("map {image}"),
        format!("map -U --output=json {image}"),
        format!("check {image}"),
        format!("check -U {image}"),
        format!("compare {image} o.qcow2"),
        format!("compare -U {image} {image}"),
        format!("convert {image} x"),
        format!("convert -U -O qcow2 {image} x"),
        format!("convert -O qcow2 t.qcow2 {image}"),
        format!("convert -n -O qcow2 t.qcow2 {image}"),
        format!("create -f qcow2 {image} 1M"),
        format!("create -f qcow2 -b {image} -F qcow2 x"),
        format!("create -f raw {image} 1M"),
    ];
    let runs = lines.iter().map(|line| both.run(line));
    let wrong: Vec<String> = runs
        .filter(|run| !run.differences.is_empty())
        .map(|run| format!("{}\n{}", run.line, run.differences))
        .collect();
    writer.kill().unwrap();
    writer.wait().unwrap();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Where both streams are one pipe, what was printed before an error comes after it.
#[test]
fn a_pipe_gets_the_mention_of_sizes_after_the_error() {
    let root = tempfile::tempdir().unwrap();
    let Some(both) = both_programs(root.path()) else { return };
    std::fs::write(both.start().join("rules"), "[inject-error]\nevent = \"read_aio\"\n").unwrap();
    let [theirs, own] = [both.reference(), both.ours()].map(|tool| {
        let line = format!("{} compare blkdebug:rules:s.qcow2 r.raw 2>&1", tool.path().display());
        Tool::at("/bin/sh").run_in(&both.start(), &["-c", &line]).stdout
    });
    assert!(theirs.contains("Input/output error") && theirs.ends_with("Warning: Image size mismatch!\n"));
    assert_eq!(own, theirs);
}

/// A qemu-io that has `s.qcow2` open for writing, and sleeps.
fn start_writer(both: &SideBySide) -> Child {
    let image = both.start().join("s.qcow2");
    let started = Instant::now();
    loop {
        let mut writer = Command::new("qemu-io");
        writer.args(["-c", "sleep 60000"]).arg(&image).stdin(Stdio::null()).stdout(Stdio::null());
        let mut writer = writer.stderr(Stdio::null()).spawn().unwrap();
        // Testing whether qemu-io has the image open means opening it, which could get in its way: wait
        // first, and retry if it failed.
        thread::sleep(Duration::from_millis(500));
        let args = ["info".as_ref(), image.as_os_str()];
        let is_locked = both.reference().run_in(&both.start(), &args).code == Some(1);
        if is_locked && writer.try_wait().unwrap().is_none() {
            return writer;
        }
        writer.kill().unwrap();
        writer.wait().unwrap();
        assert!(started.elapsed() < Duration::from_secs(30), "the writer does not start");
    }
}

/// The lines of a list without blank lines and comments (`#`).
fn entries(list: &'static str) -> impl Iterator<Item = &'static str> {
    list.lines().filter(|line| !line.is_empty() && !line.starts_with('#'))
}

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-under-test");
