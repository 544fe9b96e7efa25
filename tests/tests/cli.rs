//! The command against qemu-img: same exit code, same text on both streams, and images with the same guest
//! content.
//!
//! `cli/lines.txt` and `cli/names.txt` contain the command lines, `cli/different.txt` those with intended
//! differences and the reason. `QCOW2_LINES=resize` runs the lines that start with that word.

#![allow(clippy::unwrap_used, reason = "helpers of a test")]

use qcow2_testkit::oracle::Tool;
use qcow2_testkit::rng::Rng;
use qcow2_tests::copies::copy_folder;
use qcow2_tests::side_by_side::{SideBySide, made_once, words};
use std::fs;
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
    let made = made_once(Path::new(env!("CARGO_TARGET_TMPDIR")), include_str!("cli.rs"), make_start)?;
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

/// Creates the start folder of every command line.
fn make_start(qemu_img: &Tool, folder: &Path) {
    let qemu_io = Tool::find("qemu-io").expect("qemu-io beside qemu-img");
    let img = |line: &str| drop(qemu_img.run_in(folder, &words(line)).success());
    let io = |line: &str| drop(qemu_io.run_in(folder, &words(line)).success());
    let sparse = |name: &str, len: u64| fs::File::create(folder.join(name)).unwrap().set_len(len).unwrap();
    img("create -q -f qcow2 t.qcow2 1M");
    img("create -q -f qcow2 base.qcow2 1500k");
    img("create -q -f qcow2 x8 8M");
    img("create -q -f qcow2 s.qcow2 4M");
    io("-c 'write -P 5 1M 64k' -c 'write -z 2M 64k' s.qcow2");
    img("snapshot -c sn s.qcow2");
    io("-c 'write -P 8 1M 4k' s.qcow2");
    img("create -q -f qcow2 -b s.qcow2 -F qcow2 o.qcow2");
    io("-c 'write -P 6 1536k 64k' o.qcow2");
    img("create -q -f qcow2 -u -b gone -F raw orphan.qcow2 1M");
    img("convert -c -O qcow2 s.qcow2 comp.qcow2");
    for name in ["bm.qcow2", "used.qcow2"] {
        img(&format!("create -q -f qcow2 {name} 4M"));
        img(&format!("bitmap --add {name} b0"));
        img(&format!("bitmap --add --disable -g 4k {name} b1"));
        io(&format!("-c 'write -P 5 1M 64k' {name}"));
    }
    set_in_use(&folder.join("used.qcow2"));
    img("create -q -f qcow2 -o extended_l2=on ext.qcow2 4M");
    io("-c 'write -P 7 3k 5k' ext.qcow2");
    img("create -q -f qcow2 -o data_file=df.raw df.qcow2 2M");
    io("-c 'write -P 7 3k 5k' df.qcow2");
    make_chains(&img, &io);
    make_damaged(&img, &io, folder);
    fs::create_dir(folder.join("dir")).unwrap();
    img("create -q -f qcow2 -u -b nbd://127.0.0.1:1/x -F raw nbdback.qcow2 1M");
    img("create -q -f qcow2 -u -b foo:bar -F raw fooback.qcow2 1M");
    for (name, len) in [("r.raw", MIB), ("base.raw", MIB), ("h.raw", 4 * MIB), ("odd.raw", 4 * MIB + 1)] {
        sparse(name, len);
    }
    for (name, len) in [("odd2.raw", 1_500_000), ("zero", 0), ("tiny0", 3)] {
        sparse(name, len);
    }
    io("-f raw -c 'write -P 5 1M 100k' h.raw");
    let name = r#"'json:{"driver":"raw","file":{"driver":"file","filename":"h.raw"}}'"#;
    img(&format!("create -q -f qcow2 -u -b {name} -F raw jsback.qcow2 4M"));
    io("-c 'write -P 3 512k 64k' jsback.qcow2");
    fs::write(folder.join("tiny"), "abc").unwrap();
    let mut random = [0; 1000];
    Rng::new(7).fill(&mut random);
    fs::write(folder.join("rnd"), random).unwrap();
    let whole = fs::read(folder.join("s.qcow2")).unwrap();
    fs::write(folder.join("trunc.qcow2"), &whole[..102_400]).unwrap();
}

/// Images that need repair. Their clusters are, in order: header, refcount table, refcount block, L1 table,
/// L2 table, data, data.
fn make_damaged(img: &dyn Fn(&str), io: &dyn Fn(&str), folder: &Path) {
    img("create -q -f qcow2 whole.qcow2 4M");
    io("-c 'write -P 7 0 128k' whole.qcow2");
    let whole = fs::read(folder.join("whole.qcow2")).unwrap();
    let make = |name: &str, changes: &[(usize, &[u8])]| {
        let mut bytes = whole.clone();
        for (at, new) in changes {
            bytes.resize(bytes.len().max(at + new.len()), 0);
            bytes[*at..at + new.len()].copy_from_slice(new);
        }
        fs::write(folder.join(name), bytes).unwrap();
    };
    let (count, l1, l2) = (|cluster: usize| 0x20000 + 2 * cluster, 0x30000, 0x40000);
    let end: (usize, &[u8]) = (10 * 65536 - 1, &[0]);
    make("leak.qcow2", &[end, (count(8), &[0, 1])]);
    make("low.qcow2", &[(l2 + 8, &whole[l2..l2 + 8])]);
    make("high.qcow2", &[(count(5), &[0, 2])]);
    make("mixed.qcow2", &[end, (count(8), &[0, 1]), (count(5), &[0, 2])]);
    make("free.qcow2", &[(count(5), &[0, 0])]);
    make("flag.qcow2", &[(l2, &[0])]);
    make("l1flag.qcow2", &[(l1, &[0])]);
    make("reserved.qcow2", &[(l2, &[0x81])]);
    make("marked.qcow2", &[(79, &[2])]);
    make("dirty.qcow2", &[(79, &[1])]);
    make("dirtyleak.qcow2", &[(79, &[1]), end, (count(8), &[0, 1])]);
}

/// Chains for the verbs that change images in place.
fn make_chains(img: &dyn Fn(&str), io: &dyn Fn(&str)) {
    img("create -q -f raw b2.raw 2M");
    io("-f raw -c 'write -P 2 0 1900k' b2.raw");
    img("create -q -f qcow2 -b o.qcow2 -F qcow2 top.qcow2");
    io("-c 'write -P 3 512k 64k' -c 'write -z 1M 64k' top.qcow2");
    img("create -q -f qcow2 -b b2.raw -F raw long.qcow2 3M");
    io("-c 'write -P 4 0 64k' -c 'write -P 4 2944k 64k' -c 'write -z 1M 64k' long.qcow2");
    img("create -q -f qcow2 -b b2.raw -F raw short.qcow2 1M");
    io("-c 'write -P 4 960k 64k' short.qcow2");
    img("create -q -f qcow2 -o cluster_size=4k -b short.qcow2 -F qcow2 mid.qcow2 3M");
    io("-c 'write -P 9 100k 9k' -c 'write -P 9 2M 5k' mid.qcow2");
    img("create -q -f qcow2 -o compat=0.10 v2.qcow2 2M");
    io("-c 'write -P 9 0 100k' v2.qcow2");
    img("create -q -f qcow2 -o compat=0.10 v2s.qcow2 2M");
    io("-c 'write -P 9 0 100k' v2s.qcow2");
    img("snapshot -c a v2s.qcow2");
    img("create -q -f qcow2 -o compat=0.10 -b b2.raw -F raw v2o.qcow2 4M");
    io("-c 'write -z 1M 64k' -c 'write -P 6 3M 1k' v2o.qcow2");
    img("create -q -f qcow2 -o extended_l2=on -b b2.raw -F raw exto.qcow2 2M");
    io("-c 'write -P 6 1M 3k' -c 'write -z 10k 20k' exto.qcow2");
    img("create -q -f qcow2 shared.qcow2 1M");
    io("-c 'write -P 9 0 64k' shared.qcow2");
    img("snapshot -c a shared.qcow2");
    img("snapshot -c b shared.qcow2");
    img("create -q -f qcow2 sz.qcow2 1M");
    io("-c 'write -P 3 0 1M' sz.qcow2");
    img("snapshot -c small sz.qcow2");
    img("resize -q sz.qcow2 3M");
    io("-c 'write -P 4 1M 2M' sz.qcow2");
    img("snapshot -c big sz.qcow2");
    img("resize -q --shrink sz.qcow2 2M");
    img("create -q -f qcow2 shrunk.qcow2 2M");
    io("-c 'write -P 9 0 2M' shrunk.qcow2");
    img("resize -q --shrink shrunk.qcow2 100k");
}

/// Marks the first bitmap of the image at `path` as in use, as a crash leaves it.
fn set_in_use(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    // The bitmaps extension starts at byte 504 and ends with the offset of the directory.
    let directory = u64::from_be_bytes(bytes[528..536].try_into().unwrap()) as usize;
    bytes[directory + 15] |= 1;
    fs::write(path, bytes).unwrap();
}

const MIB: u64 = 1 << 20;
const OURS: &str = env!("CARGO_BIN_EXE_qcow2-under-test");
