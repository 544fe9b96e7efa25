//! Writers killed at random moments: check must find no corruption in what they leave.
//!
//! `QCOW2_KILLS` sets the number of kills (200 for a campaign), `QCOW2_SEED` the seed of the moments.
#![cfg(unix)]
#![allow(missing_docs, clippy::unwrap_used, clippy::print_stdout)]

use qcow2_testkit::oracle::Tool;
use qcow2_testkit::rng::Rng;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-under-test");

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn run(folder: &Path, args: &[&str]) {
    let status = Command::new(OURS).args(args).current_dir(folder).stdout(Stdio::null()).status().unwrap();
    assert!(status.success(), "{args:?}: {status}");
}

/// The command line of a writer that would run for seconds.
fn writer(rng: &mut Rng) -> Vec<String> {
    let text = |words: &str| words.split(' ').map(str::to_owned).collect::<Vec<_>>();
    match rng.below(4) {
        0 => text("convert -f raw -O qcow2 source.raw target.qcow2"),
        1 => text("convert -c -f raw -O qcow2 source.raw target.qcow2"),
        2 => text("bench -f qcow2 -w -c 2000000 -d 8 -S 1640628224 --flush-interval 50 target.qcow2"),
        _ => {
            let mut args = text("io -f qcow2 -t writeback");
            for _ in 0..400 {
                let (at, len) = (rng.below(60 << 20), 1 + rng.below(300_000));
                let command = match rng.below(5) {
                    0 | 1 => format!("write -q -P {} {at} {len}", rng.below(256)),
                    2 => format!("write -q -z -u {at} {len}"),
                    3 => format!("discard -q {at} {len}"),
                    _ => "flush".to_owned(),
                };
                args.extend(["-c".to_owned(), command]);
            }
            args.push("target.qcow2".to_owned());
            args
        }
    }
}

/// Changes with the target: inode, length, modification time.
fn stamp(folder: &Path) -> Option<(u64, u64, i64, i64)> {
    let data = std::fs::metadata(folder.join("target.qcow2")).ok()?;
    Some((data.ino(), data.len(), data.mtime(), data.mtime_nsec()))
}

/// Runs check on the result and panics on corruption. The header is written last, so an unfinished target has
/// none and is not recognised as an image.
fn judge(folder: &Path, program: &Path, verb: &[&str], what: &str) {
    let output = Command::new(program).args(verb).arg("target.qcow2").current_dir(folder).output().unwrap();
    let said =
        || String::from_utf8_lossy(&[output.stdout.clone(), output.stderr.clone()].concat()).into_owned();
    let code = output.status.code();
    let header = std::fs::read(folder.join("target.qcow2")).unwrap_or_default();
    let unfinished = !header.starts_with(b"QFI\xfb");
    assert!(
        matches!(code, Some(0 | 3)) || (unfinished && matches!(code, Some(1 | 63))),
        "{what}: {code:?}: {}",
        said()
    );
}

#[test]
fn killed_writers_leave_no_corruption_in_the_image() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let (kills, seed) = (number("QCOW2_KILLS", 12), number("QCOW2_SEED", 1));
    let mut rng = Rng::new(seed);
    let source: Vec<u8> =
        (0..48u64 << 20).map(|i| if i >> 16 & 3 == 0 { 0 } else { ((i * i) >> 9) as u8 }).collect();
    std::fs::write(folder.join("source.raw"), source).unwrap();
    let qemu = Tool::find("qemu-img");
    let mut hits = 0;
    for round in 0..kills {
        let _ = std::fs::remove_file(folder.join("target.qcow2"));
        let bits = ["16", "1", "64"][rng.below(3) as usize];
        let cluster = ["512", "4k", "64k"][rng.below(3) as usize];
        let options = format!("cluster_size={cluster},refcount_bits={bits}");
        run(folder, &["create", "-q", "-f", "qcow2", "-o", &options, "target.qcow2", "64M"]);
        let args = writer(&mut rng);
        let what = format!("seed {seed} round {round}: {}", args[..2].join(" "));
        let before = stamp(folder);
        let mut child = Command::new(OURS)
            .args(&args)
            .current_dir(folder)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // Waits for its first change first, however slow the machine.
        let started = Instant::now();
        while stamp(folder) == before && child.try_wait().unwrap().is_none() {
            assert!(started.elapsed() < Duration::from_secs(60), "{what}: changes nothing");
            std::thread::sleep(Duration::from_micros(200));
        }
        std::thread::sleep(Duration::from_micros(rng.below(60_000)));
        child.kill().unwrap();
        hits += u64::from(child.wait().unwrap().signal() == Some(9));
        judge(folder, Path::new(OURS), &["check"], &what);
        if let Some(qemu) = &qemu {
            judge(folder, qemu.path(), &["check", "-U"], &what);
        }
    }
    println!("{hits} of {kills} writers were at work when they were killed");
    assert!(hits * 3 >= kills, "{hits} of {kills}");
}
