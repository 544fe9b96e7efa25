//! The command under adverse conditions: hostile images, full disks, Ctrl-C, closed pipes.
#![allow(clippy::unwrap_used, reason = "helpers of a test")]

use qcow2_core::format::{AutoclearFeatures, BitmapsExtension, Header, HostOffset, Version};
use qcow2_testkit::oracle::{Outcome, Tool};
use qcow2_testkit::rng::Rng;
use qcow2_tests::side_by_side::words;
use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-under-test");

/// Kilobytes of data segment that a run may use: 64 MiB.
const MEMORY: u32 = 64 << 10;

/// Time limit of a run. On an idle machine it takes up to one second.
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs the command in `folder` under these limits.
fn run(folder: &Path, line: &str) -> Outcome {
    let shell = Tool::find("bash").expect("bash");
    let started = Instant::now();
    let script = format!("ulimit -d {MEMORY}; exec {OURS} {line}");
    let outcome = shell.run_in(folder, &["-c", &script]);
    assert!(started.elapsed() < PATIENCE, "took {:?}: {outcome}", started.elapsed());
    outcome
}

/// The run must end with `code` and exactly one line on standard error, which is returned.
#[track_caller]
fn check_refused(folder: &Path, line: &str, code: i32) -> String {
    let outcome = run(folder, line).expect_code(code);
    assert_eq!(outcome.stdout, "", "{outcome}");
    assert_eq!(outcome.stderr.lines().count(), 1, "{outcome}");
    assert!(outcome.stderr.starts_with("qcow2: "), "{outcome}");
    outcome.stderr.trim_end().to_owned()
}

fn header(change: impl FnOnce(&mut Header)) -> Vec<u8> {
    let mut header = Header::new(Version::V3, 16);
    header.size = 1 << 30;
    header.l1_size = 2;
    header.l1_table_offset = HostOffset::new(0x30000);
    header.refcount_table_offset = HostOffset::new(0x10000);
    header.refcount_table_clusters = 1;
    change(&mut header);
    header.encode_cluster().unwrap()
}

fn with_bytes(mut image: Vec<u8>, at: usize, bytes: &[u8]) -> Vec<u8> {
    image[at..at + bytes.len()].copy_from_slice(bytes);
    image
}

#[test]
fn invalid_headers_are_refused_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let mut random = vec![0; 100_000];
    Rng::new(3).fill(&mut random);
    let sound = header(|_| {});
    let images: &[(&str, Vec<u8>, &str)] = &[
        ("zero-length", Vec::new(), "Image is not in qcow2 format"),
        ("random", random, "Image is not in qcow2 format"),
        ("truncated", sound[..30].to_vec(), "qcow2 header too short"),
        ("version-9", with_bytes(sound.clone(), 7, &[9]), "Unsupported qcow2 version 9"),
        ("version-0", with_bytes(sound.clone(), 7, &[0]), "Unsupported qcow2 version 0"),
        ("clusters-2^63", with_bytes(sound.clone(), 23, &[63]), "Unsupported cluster size: 2^63"),
        ("header-length", with_bytes(sound.clone(), 100, &[255; 4]), "qcow2 header exceeds cluster size"),
        (
            "features",
            with_bytes(sound.clone(), 72, &[255]),
            "Unsupported qcow2 feature(s): Unknown incompatible feature: ff00000000000000",
        ),
        ("l1-gigabytes", header(|h| h.l1_size = u32::MAX), "Active L1 table too large"),
        (
            "refcounts-gigabytes",
            header(|h| h.refcount_table_clusters = i32::MAX as u32),
            "Reference count table too large",
        ),
        ("backing-offset", with_bytes(sound.clone(), 8, &[255; 8]), "Invalid backing file offset"),
        (
            "backing-length",
            with_bytes(sound, 8, &[0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 255, 0]),
            "Backing file name too long",
        ),
    ];
    fs::write(folder.path().join("other"), "").unwrap();
    for (name, bytes, reason) in images {
        fs::write(folder.path().join(name), bytes).unwrap();
        let expected = format!("qcow2: Could not open '{name}': {reason}");
        for line in ["info -f qcow2", "info --output=json -f qcow2", "map -f qcow2", "check -f qcow2"] {
            assert_eq!(check_refused(folder.path(), &format!("{line} {name}"), 1), expected);
        }
        assert_eq!(check_refused(folder.path(), &format!("compare -f qcow2 {name} other"), 2), expected);
        assert_eq!(check_refused(folder.path(), &format!("convert -f qcow2 {name} target"), 1), expected);
        assert!(!folder.path().join("target").exists());
    }
}

/// Tables as large as the limits allow, in small files: the right result or a one-line error, with little
/// memory.
#[test]
fn huge_tables_in_small_files_cost_little_memory() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| fs::write(folder.path().join(name), bytes).unwrap();
    write("l1", &header(|h| (h.l1_size, h.size) = (4 << 20, 2 << 50)));
    write("refcounts", &header(|h| h.refcount_table_clusters = 128));
    let snapshots = HostOffset::new(0x40000);
    write("snapshots", &header(|h| (h.nb_snapshots, h.snapshots_offset) = (65_536, snapshots)));
    let bitmaps = BitmapsExtension {
        count: 65_535,
        reserved: 0,
        directory_size: 67_107_840,
        directory_offset: snapshots,
    };
    let many_bitmaps = header(|h| {
        h.extensions.bitmaps = Some(bitmaps);
        h.features.autoclear = AutoclearFeatures::BITMAPS;
    });
    write("bitmaps", &many_bitmaps);
    write("other", b"");
    for name in ["l1", "refcounts"] {
        run(folder.path(), &format!("info {name}")).success();
    }
    assert!(check_refused(folder.path(), "info snapshots", 1).contains("snapshot 0 is damaged"));
    let shown = run(folder.path(), "info bitmaps").success().stdout;
    assert!(shown.contains("bitmap directory ends past the end"), "{shown}");
    for name in ["l1", "refcounts", "snapshots", "bitmaps"] {
        run(folder.path(), &format!("map {name}")).success();
        run(folder.path(), &format!("compare {name} other")).success();
        // Damaged bitmaps are what cannot be checked; QEMU does not open such an image.
        let code = if name == "bitmaps" { 1 } else { 2 };
        let checked = run(folder.path(), &format!("check {name}")).expect_code(code);
        assert!(checked.stderr.lines().count() <= 10_001, "{}", checked.stderr.len());
    }
}

#[test]
fn backing_chain_loops_and_long_chains() {
    let folder = tempfile::tempdir().unwrap();
    let make = |name: &str, backing: Option<String>| {
        let image = header(|h| {
            h.backing_file = backing.map(String::into_bytes);
            h.extensions.backing_format = h.backing_file.as_ref().map(|_| b"qcow2".to_vec());
            h.cluster_bits = 9;
            (h.size, h.l1_size) = (1 << 20, 32);
        });
        fs::write(folder.path().join(name), image).unwrap();
    };
    make("a", Some("b".into()));
    make("b", Some("a".into()));
    make("self", Some("./self".into()));
    assert_eq!(
        check_refused(folder.path(), "info --backing-chain a", 1),
        "qcow2: Backing file 'a' creates an infinite loop."
    );
    for line in ["map a", "map self", "convert a target", "convert self target"] {
        assert!(check_refused(folder.path(), line, 1).contains("creates an infinite loop"));
    }
    assert!(check_refused(folder.path(), "compare a self", 2).contains("creates an infinite loop"));
    for name in ["a", "self"] {
        run(folder.path(), &format!("info {name}")).success();
        // Checked by qemu-img too, the references are in the image alone.
        let checked = run(folder.path(), &format!("check {name}"));
        assert!(!checked.stderr.contains("loop"), "{checked}");
    }
    make("c0", None);
    for i in 1..=1100 {
        make(&format!("c{i}"), Some(format!("c{}", i - 1)));
    }
    run(folder.path(), "map c1000").success();
    run(folder.path(), "convert -O qcow2 c1000 target").success();
    assert!(check_refused(folder.path(), "map c1100", 1).contains("more than 1024 layers"));
}

/// strace; `None`, with a printed skip, if it is missing or may not trace.
#[allow(clippy::print_stdout, reason = "a skip must be seen")]
fn strace(folder: &Path) -> Option<Tool> {
    let strace = Tool::find("strace")?;
    let traces = strace.run_in(folder, &["-o", "/dev/null", "true"]);
    if traces.code != Some(0) {
        // Some machines forbid tracing, which no package can fix: skip.
        assert!(traces.stderr.contains("Operation not permitted"), "{traces}");
        println!("skipped: tracing is not allowed here");
        return None;
    }
    Some(strace)
}

/// `info` opens only the file it is given, whatever that file names.
#[test]
fn info_opens_only_the_named_file() {
    let folder = tempfile::tempdir().unwrap();
    let Some(strace) = strace(folder.path()) else { return };
    let image = header(|h| {
        h.backing_file = Some(b"secret".to_vec());
        h.extensions.backing_format = Some(b"raw".to_vec());
        h.features.incompatible.set(qcow2_core::format::IncompatibleFeatures::DATA_FILE, true);
        h.extensions.data_file = Some(b"secret".to_vec());
    });
    fs::write(folder.path().join("image"), image).unwrap();
    fs::write(folder.path().join("secret"), "secret").unwrap();
    let args = ["-f", "-e", "trace=openat,open,stat,statx,readlink", "-o", "trace", OURS, "info", "image"];
    strace.run_in(folder.path(), &args).success();
    let trace = fs::read_to_string(folder.path().join("trace")).unwrap();
    assert!(trace.contains("\"image\"") && !trace.contains("secret"), "{trace}");
}

/// File systems have many ways of saying that they have no locks: every verb goes on without.
#[test]
fn images_open_where_the_file_system_has_no_locks() {
    let folder = tempfile::tempdir().unwrap();
    let Some(strace) = strace(folder.path()) else { return };
    run(folder.path(), "create -q -f qcow2 a.qcow2 1M").success();
    for error in ["ENOLCK", "EOPNOTSUPP", "ENOSYS", "EINVAL", "EACCES"] {
        let inject = format!("inject=fcntl:error={error}");
        for line in [
            "info a.qcow2",
            "check a.qcow2",
            "map a.qcow2",
            "convert -O qcow2 a.qcow2 b.qcow2",
            "resize a.qcow2 2M",
        ] {
            let mut args = vec!["-f", "-o", "/dev/null", "-e", &inject, OURS];
            args.extend(line.split(' '));
            let outcome = strace.run_in(folder.path(), &args);
            assert_eq!(outcome.code, Some(0), "{error}: {line}: {outcome}");
        }
    }
}

#[test]
fn control_characters_in_names_are_escaped() {
    let folder = tempfile::tempdir().unwrap();
    let image = header(|h| {
        h.backing_file = Some("\x1b[31mred\n\u{202e}\r".as_bytes().to_vec());
        h.extensions.backing_format = Some(b"raw\x07".to_vec());
    });
    fs::write(folder.path().join("image"), image).unwrap();
    let told = run(folder.path(), "info image").success().stdout;
    assert!(told.contains("backing file: \\x1b[31mred\\n\\u{202e}\\r\n"), "{told}");
    assert!(told.contains("backing file format: raw\\x07\n"), "{told}");
    assert!(!told.contains('\x1b') && !told.contains('\x07'));
}

/// A failed command neither removes a file that existed before nor leaves a partial one.
#[test]
fn a_failed_command_keeps_old_files_and_leaves_no_partial_ones() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::write(at("precious"), "precious").unwrap();
    for line in [
        "create -f qcow2 -o cluster_size=3 precious 1M",
        "create -f qcow2 -o preallocation=nonsense precious 1M",
        "create -f qcow2 -o data_file=missing/x precious 1M",
        "create -f qcow2 -o data_file=precious,compat=v2 new 1M",
        "create -f raw -o preallocation=metadata precious 1M",
        "create -f qcow2 precious 1000P",
        "convert -O qcow2 -o compression_type=none precious new",
    ] {
        run(folder.path(), line).expect_code(1);
        assert_eq!(fs::read(at("precious")).unwrap(), b"precious", "{line}");
        assert!(!at("new").exists(), "{line}");
    }
    // An image with a damaged compressed cluster: reading fails after much has been written.
    run(folder.path(), "create -q -f raw source 8M").success();
    fs::write(at("source"), vec![7; 8 << 20]).unwrap();
    run(folder.path(), "convert -c -O qcow2 source damaged").success();
    let mut bytes = fs::read(at("damaged")).unwrap();
    let len = bytes.len();
    bytes[len - 700..].fill(0xff);
    fs::write(at("damaged"), bytes).unwrap();
    fs::write(at("old"), "old").unwrap();
    let told = check_refused(folder.path(), "convert -O qcow2 damaged new", 1);
    assert!(told.contains("error while reading at byte"), "{told}");
    check_refused(folder.path(), "convert -O raw damaged old", 1);
    assert!(!at("new").exists());
    assert_eq!(fs::read(at("old")).unwrap(), b"", "what is left does not look finished");
}

/// A full disk, simulated by a limit on the file size.
#[test]
fn a_full_disk_fails_in_one_line_without_a_partial_target() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::write(at("source"), vec![7; 4 << 20]).unwrap();
    let shell = Tool::find("bash").expect("bash");
    for line in [
        "convert -O qcow2 source new",
        "convert -O raw source new",
        "convert -O qcow2 -c -o cluster_size=512 source new",
        "create -q -f qcow2 -o preallocation=full new 4M",
        "create -q -f qcow2 -o preallocation=falloc new 4M",
        "create -q -f raw -o preallocation=full new 4M",
    ] {
        // The limit is in units of 1 KiB. Its signal (SIGXFSZ) does not end the program.
        let script = format!("ulimit -f 100; exec {OURS} {line}");
        let outcome = shell.run_in(folder.path(), &["-c", &script]).expect_code(1);
        assert_eq!(outcome.stderr.lines().count(), 1, "{outcome}");
        assert!(outcome.stderr.contains("too large"), "{outcome}");
        assert!(!at("new").exists(), "{line}");
    }
}

/// A bitmap that cannot be stored is told of by its name, and is not taken for a current one afterwards.
#[cfg(unix)]
#[test]
fn a_full_disk_loses_a_bitmap_with_a_word() {
    let folder = tempfile::tempdir().unwrap();
    let own = |line: &str| Tool::at(OURS).run_in(folder.path(), &words(line));
    own("create -q -f qcow2 image 64M").success();
    own("io -f qcow2 -c 'write -q 0 1M' image").success();
    own("bitmap --add -g 512 image b0").success();
    let kib = fs::metadata(folder.path().join("image")).unwrap().len().div_ceil(1024);
    let script = format!("ulimit -f {kib}; exec {OURS} io -f qcow2 -c 'write -q 0 64k' image");
    let outcome = Tool::find("bash").expect("bash").run_in(folder.path(), &["-c", &script]);
    let lost = "Failed to write bitmap 'b0' to file: File too large";
    assert!(outcome.stderr.contains("Lost persistent bitmaps during inactivation"), "{outcome}");
    assert!(outcome.stderr.contains(lost) && outcome.stderr.lines().count() == 1, "{outcome}");
    own("check image").success();
    let shown = own("info image").success();
    assert!(shown.stdout.contains("in-use"), "{shown}");
}

/// On failure the old content is intact: same guest data, no leaks, size unchanged.
#[cfg(unix)]
#[test]
fn a_full_disk_keeps_existing_images_intact() {
    let start = tempfile::tempdir().unwrap();
    let own = |folder: &Path, line: &str| {
        let outcome = Tool::at(OURS).run_in(folder, &words(line)).success();
        outcome.stdout
    };
    fs::write(start.path().join("data"), vec![7; 4 << 20]).unwrap();
    fs::write(start.path().join("raw"), vec![5; 64 << 10]).unwrap();
    own(start.path(), "create -q -f qcow2 base 4M");
    own(start.path(), "create -q -f qcow2 -b base -F qcow2 over");
    own(start.path(), "io -f qcow2 -c 'write -q -P 9 0 4M' over");
    own(start.path(), "create -q -f qcow2 -b data -F raw thin");
    own(start.path(), "create -q -f qcow2 -o cluster_size=512 small 64k");
    let shell = Tool::find("bash").expect("bash");
    for (line, images) in [
        ("resize --preallocation=falloc base 9M", &["base"][..]),
        ("resize --preallocation=full base 9M", &["base"]),
        ("resize --preallocation=metadata small 90M", &["small"]),
        ("resize -f raw --preallocation=full raw 4M", &["raw"]),
        ("resize -f raw --preallocation=falloc raw 4M", &["raw"]),
        ("commit over", &["base", "over"]),
        ("rebase -b '' thin", &["thin"]),
    ] {
        let folder = tempfile::tempdir().unwrap();
        for name in ["data", "raw", "base", "over", "thin", "small"] {
            fs::copy(start.path().join(name), folder.path().join(name)).unwrap();
        }
        let script = format!("ulimit -f 1000; exec {OURS} {line}");
        let outcome = shell.run_in(folder.path(), &["-c", &script]).expect_code(1);
        assert_eq!(outcome.stderr.lines().count(), 1, "{outcome}");
        assert!(outcome.stderr.contains("File too large"), "{outcome}");
        for image in images {
            if *image == "raw" {
                assert_eq!(fs::read(folder.path().join(image)).unwrap(), vec![5; 64 << 10], "{line}");
                continue;
            }
            own(folder.path(), &format!("check -q -f qcow2 {image}"));
            if *image != "base" || line.starts_with("resize") {
                let seen = own(folder.path(), &format!("checksum -f qcow2 {image}"));
                assert_eq!(seen, own(start.path(), &format!("checksum -f qcow2 {image}")), "{line}");
            }
        }
    }
}

#[cfg(unix)]
#[test]
fn interrupted_writers_leave_sound_images() {
    use std::os::unix::process::ExitStatusExt;
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::write(at("source"), vec![7; 8 << 20]).unwrap();
    for (target, before) in [("new", None), ("old", Some("old"))] {
        if let Some(text) = before {
            fs::write(at(target), text).unwrap();
        }
        // A shell's background jobs have SIGINT ignored, so reset it.
        let mut command = Command::new("env");
        command.args([
            "--default-signal",
            OURS,
            "convert",
            "-r",
            "1M",
            "-f",
            "raw",
            "-O",
            "qcow2",
            "source",
            target,
        ]);
        let mut child = command.current_dir(folder.path()).stdin(Stdio::null()).spawn().unwrap();
        let started = Instant::now();
        while fs::metadata(at(target)).map_or(0, |m| m.len()) < 1 << 20 {
            assert!(started.elapsed() < PATIENCE, "nothing was written");
            thread::sleep(Duration::from_millis(20));
        }
        let kill = Tool::find("kill").expect("kill");
        kill.run_in(folder.path(), &["-INT", &child.id().to_string()]).success();
        let status = child.wait().unwrap();
        assert_eq!(status.signal(), Some(2), "{status:?}");
        assert!(started.elapsed() < PATIENCE);
        match before {
            None => assert!(!at(target).exists()),
            Some(_) => assert_eq!(fs::read(at(target)).unwrap(), b""),
        }
    }
}

/// A closed pipe is no error.
#[test]
fn a_closed_pipe_is_no_error() {
    let folder = tempfile::tempdir().unwrap();
    let mut bytes = vec![0; 4 << 20];
    bytes.chunks_mut(8192).for_each(|chunk| chunk[0] = 1);
    fs::write(folder.path().join("source"), bytes).unwrap();
    run(folder.path(), "convert -O qcow2 -o cluster_size=512 source image").success();
    let mut command = Command::new(OURS);
    command.args(["map", "--output=json", "image"]).current_dir(folder.path());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut some = [0; 10];
    child.stdout.take().unwrap().read_exact(&mut some).unwrap();
    let outcome = child.wait_with_output().unwrap();
    assert_eq!((outcome.status.code(), outcome.stderr.len()), (Some(0), 0), "{outcome:?}");
}

/// A truncated copy reads as an image with less data in it. Verbs that read it warn and continue.
#[test]
fn a_truncated_image_gives_a_warning() {
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole.qcow2");
    run(folder.path(), "create -q -f qcow2 -o cluster_size=4k whole.qcow2 64M").success();
    run(folder.path(), "io -c 'write -P 1 1M 200k' -c 'write -P 2 40M 100k' whole.qcow2").success();
    let bytes = fs::read(&whole).unwrap();
    let seen = run(folder.path(), "checksum whole.qcow2").success();
    assert_eq!(seen.stderr, "");
    for len in [600, 4096, 5000, 20_000, 100_000, 200_000, bytes.len() - 4096] {
        fs::write(folder.path().join("cut.qcow2"), &bytes[..len]).unwrap();
        run(folder.path(), "create -q -f qcow2 -b cut.qcow2 -F qcow2 over.qcow2").success();
        for line in
            ["checksum over.qcow2", "convert -O raw cut.qcow2 out.raw", "compare -q cut.qcow2 over.qcow2"]
        {
            let seen = run(folder.path(), line).success();
            let start =
                format!("qcow2: warning: 'cut.qcow2' ends at byte {len}, but clusters in use reach up to ");
            assert!(seen.stderr.starts_with(&start), "{line}: {seen}");
        }
    }
    // No such warning under qemu-img's name, which does not print one.
    std::os::unix::fs::symlink(OURS, folder.path().join("qemu-img")).unwrap();
    let seen = Tool::at(folder.path().join("qemu-img"))
        .run_in(folder.path(), &["convert", "-O", "raw", "cut.qcow2", "x"]);
    assert_eq!(seen.success().stderr, "");
}
