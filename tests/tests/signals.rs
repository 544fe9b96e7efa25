//! Real signals: an interrupted verb stops soon, and every image it worked on is whole, with the content from before or after.
//! SIGUSR1 shows progress.
#![cfg(unix)]
#![allow(missing_docs, clippy::unwrap_used, reason = "a test may stop")]

use qcow2_testkit::oracle::{Qemu, Tool};
use qcow2_tests::side_by_side::words;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-under-test");

/// What is expected of a verb that was interrupted.
struct Case {
    line: &'static str,
    /// Images that a check must find clean, and that must show the disk they showed before.
    kept: &'static [&'static str],
    /// A file that must not be there.
    gone: Option<&'static str>,
}

const fn case(line: &'static str, kept: &'static [&'static str]) -> Case {
    Case { line, kept, gone: None }
}

const CASES: &[Case] = &[
    Case { gone: Some("x"), ..case("convert -O qcow2 random.raw x", &[]) },
    Case { gone: Some("x"), ..case("convert -c -O qcow2 random.raw x", &[]) },
    Case { gone: Some("x"), ..case("dd -O qcow2 bs=1M if=random.raw of=x", &[]) },
    case("commit over.qcow2", &["over.qcow2"]),
    case("rebase -b base2.qcow2 -F qcow2 over.qcow2", &["over.qcow2"]),
    case("rebase -c -b base2.qcow2 -F qcow2 over.qcow2", &["over.qcow2"]),
    case("amend -o refcount_bits=64 many.qcow2", &["many.qcow2"]),
    case("amend -o compat=0.10 zeroes.qcow2", &["zeroes.qcow2"]),
    case("check -r all leaky.qcow2", &["leaky.qcow2"]),
    case("resize --preallocation=full over.qcow2 300M", &["over.qcow2"]),
    case("resize --preallocation=metadata over.qcow2 16G", &["over.qcow2"]),
    case("compare random.raw copy.raw", &[]),
    case("checksum random.raw", &[]),
    case("measure -O qcow2 many.qcow2", &["many.qcow2"]),
    case("bitmap --merge b1 maps.qcow2 b0", &["maps.qcow2"]),
    case("snapshot -c new many.qcow2", &["many.qcow2"]),
    case("snapshot -d old many.qcow2", &["many.qcow2"]),
];

#[test]
fn interrupted_verbs_leave_whole_images() {
    let Some(qemu) = Qemu::find() else { return };
    let root = tempfile::tempdir().unwrap();
    let start = root.path().join("start");
    fs::create_dir(&start).unwrap();
    make(&qemu, &start);
    let (mut hit, mut missed) = (0, Vec::new());
    for (number, case) in CASES.iter().enumerate() {
        let mut delay = Duration::from_millis(80);
        // Until a signal comes in time; what ends before it is right as well.
        loop {
            let folder = root.path().join(format!("{number}"));
            Tool::find("cp")
                .unwrap()
                .run_in(root.path(), &["-a", "--sparse=always", "start", &number.to_string()])
                .success();
            let before: Vec<_> = case.kept.iter().map(|image| checksum(&folder, image)).collect();
            let ended = interrupt(&folder, case.line, delay);
            let interrupted = ended.signal() == Some(2);
            assert!(interrupted || ended.success(), "{}: {ended}", case.line);
            for (image, before) in case.kept.iter().zip(before) {
                let repairs = case.line.contains("-r all");
                let checked = qemu.img.run_in(&folder, &["check", image]);
                let good = checked.code == Some(0) || (repairs && checked.code == Some(3));
                assert!(good, "{} after {delay:?}: {checked}", case.line);
                let same = match case.line.starts_with("resize") {
                    // A longer disk is the same as far as it goes, and zeroes from there on.
                    true => {
                        let old = start.join(image).display().to_string();
                        qemu.img.run_in(&folder, &["compare", &old, image]).code == Some(0)
                    }
                    false => before == checksum(&folder, image),
                };
                assert!(same, "{}: another disk", case.line);
                let told = qemu.img.run_in(&folder, &["info", image]).success().stdout;
                assert!(!told.contains("in-use"), "{}: {told}", case.line);
            }
            if let (true, Some(gone)) = (interrupted, case.gone) {
                assert!(!folder.join(gone).exists(), "{}: {gone} was left", case.line);
            }
            fs::remove_dir_all(&folder).unwrap();
            if interrupted {
                hit += 1;
                break;
            }
            if delay < Duration::from_millis(5) {
                missed.push(case.line);
                break;
            }
            delay /= 2;
        }
    }
    println!("{hit} of {} were interrupted; too quick: {missed:?}", CASES.len());
    assert!(hit >= 9, "too quick: {missed:?}");
}

/// Runs `line` and interrupts it after `delay`; it must end within seconds.
fn interrupt(folder: &Path, line: &str, delay: Duration) -> ExitStatus {
    let mut child = spawn(OURS, folder, line);
    thread::sleep(delay);
    send(&child, "INT");
    let sent = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        assert!(sent.elapsed() < Duration::from_secs(20), "{line} does not stop");
        thread::sleep(Duration::from_millis(2));
    }
}

fn spawn(program: &str, folder: &Path, line: &str) -> Child {
    let mut command = Command::new(program);
    command.args(words(line)).current_dir(folder).stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn send(child: &Child, signal: &str) {
    // A child that is gone and not waited for yet takes signals too.
    let status = Command::new("kill").args(["-s", signal, &child.id().to_string()]).status().unwrap();
    assert!(status.success());
}

/// What a machine sees of an image.
fn checksum(folder: &Path, image: &str) -> String {
    Tool::at(OURS).run_in(folder, &["checksum", image]).success().stdout
}

fn make(qemu: &Qemu, folder: &Path) {
    let img = |line: &str| drop(qemu.img.run_in(folder, &words(line)).success());
    // qemu-img takes half a minute where clusters are this small.
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
    own("create -q -f qcow2 -o cluster_size=512,preallocation=metadata many.qcow2 160M");
    img("snapshot -c old many.qcow2");
    img("create -q -f qcow2 -o cluster_size=4k -b random.raw -F raw zeroes.qcow2");
    io("-c 'write -q -z 0 32M' zeroes.qcow2");
    own("create -q -f qcow2 -o cluster_size=512,preallocation=metadata leaky.qcow2 160M");
    let mut leaky = fs::OpenOptions::new().write(true).open(folder.join("leaky.qcow2")).unwrap();
    leak(&mut leaky, folder);
    img("create -q -f qcow2 maps.qcow2 8G");
    img("bitmap --add -g 512 maps.qcow2 b0");
    img("bitmap --add -g 512 maps.qcow2 b1");
    io("-c 'write -q -P 5 1G 1M' maps.qcow2");
}

/// Gives a cluster behind the end a refcount.
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

/// What is shown on standard output after SIGUSR1, as pieces between carriage returns.
fn shown(program: &Path, folder: &Path, line: &str) -> Vec<String> {
    let mut child = spawn(&program.display().to_string(), folder, line);
    let signals = 3;
    for _ in 0..signals {
        thread::sleep(Duration::from_millis(250));
        if child.try_wait().unwrap().is_none() {
            send(&child, "USR1");
        }
    }
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{line}: {}", output.status);
    let text = String::from_utf8(output.stdout).unwrap();
    text.split('\r').map(str::trim).filter(|piece| !piece.is_empty()).map(str::to_owned).collect()
}

#[test]
fn progress_on_request() {
    let Some(qemu) = Qemu::find() else { return };
    let root = tempfile::tempdir().unwrap();
    let folder = root.path();
    let mut bytes = vec![0; 8 << 20];
    qcow2_testkit::rng::Rng::new(3).fill(&mut bytes);
    fs::write(folder.join("random.raw"), &bytes).unwrap();
    let link = folder.join("qemu-img");
    std::os::unix::fs::symlink(OURS, &link).unwrap();
    let percent = |piece: &String| piece.starts_with('(') && piece.ends_with("/100%)");
    for program in [qemu.img.path(), &link] {
        let pieces = shown(program, folder, "convert -O qcow2 -r 8M random.raw x");
        assert!(pieces.iter().all(percent), "{}: {pieces:?}", program.display());
        // qemu-img shows it when its next piece is done, which may be never.
        assert!(!pieces.is_empty() || program != link, "no progress");
        // Who shows it anyway is not disturbed.
        let pieces = shown(program, folder, "convert -p -O qcow2 -r 8M random.raw x");
        assert!(pieces.len() > 2 && pieces.iter().all(percent), "{}: {pieces:?}", program.display());
        assert!(pieces.is_sorted_by_key(|piece| piece.len()), "{pieces:?}");
    }
}
