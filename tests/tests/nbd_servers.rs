//! Servers of many kinds: our program reads them as qemu-img does, and what it writes is there.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a test may stop")]

use qcow2_testkit::oracle::{Qemu, Tool};
use qcow2_tests::nbd_server::NbdServer;
use qcow2_tests::side_by_side::{SideBySide, words};
use std::fs;
use std::path::Path;

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-under-test");

fn make(qemu_img: &Tool, folder: &Path) {
    let img = |line: &str| qemu_img.run_in(folder, &words(line)).success();
    img("create -q -f qcow2 s.qcow2 8M");
    let io = Qemu::find().unwrap().io;
    let changes = "-c 'write -P 5 1M 100k' -c 'write -z 4M 1M' -c 'write -P 6 7M 1M' s.qcow2";
    io.run_in(folder, &words(changes)).success();
    img("convert -O raw s.qcow2 r.raw");
}

/// Servers of `t.raw`, and the names of their exports.
const NBDKIT: [(&str, &str); 25] = [
    ("file t.raw", ""),
    ("-t 1 file t.raw", ""),
    ("--no-sr file t.raw", ""),
    ("--mask-handshake=0 file t.raw", ""),
    ("--mask-handshake=1 file t.raw", ""),
    ("--mask-handshake=2 file t.raw", ""),
    ("--filter=nozero file t.raw", ""),
    ("--filter=nozero file t.raw zeromode=emulate", ""),
    ("--filter=nozero file t.raw zeromode=notrim", ""),
    ("--filter=noparallel file t.raw serialize=connections", ""),
    ("--filter=noparallel file t.raw serialize=all-requests", ""),
    ("--filter=noextents file t.raw", ""),
    ("--filter=multi-conn file t.raw multi-conn-mode=disable", ""),
    ("--filter=fua file t.raw fuamode=discard", ""),
    ("--filter=fua file t.raw fuamode=emulate", ""),
    ("--filter=fua file t.raw fuamode=force", ""),
    ("--filter=delay file t.raw rdelay=2ms wdelay=2ms", ""),
    ("--filter=delay file t.raw delay-extents=1ms delay-zero=2ms delay-trim=2ms delay-open=5ms", ""),
    ("--filter=multi-conn file t.raw multi-conn-mode=emulate", ""),
    // The faults wait for a file that nobody makes.
    ("--filter=error file t.raw error=EIO error-rate=100% error-file=nofile", ""),
    ("--filter=nozero --filter=delay file t.raw zeromode=plugin delay-zero=1ms", ""),
    (
        "--filter=blocksize-policy --filter=delay file t.raw blocksize-minimum=512 blocksize-preferred=4096 \
         blocksize-maximum=64k blocksize-error-policy=error delay-read=1ms",
        "",
    ),
    ("--filter=exportname file t.raw exportname=one exportname=two exportname-strict=true", "two"),
    ("--filter=cow --filter=cache file t.raw", ""),
    (
        "--filter=blocksize-policy --filter=nozero --filter=noextents file t.raw blocksize-minimum=4096 \
         blocksize-preferred=64k blocksize-maximum=128k blocksize-error-policy=error",
        "",
    ),
];

const QEMU_NBD: [(&str, &str); 7] = [
    ("-f raw t.raw", ""),
    ("-f raw --discard=unmap --detect-zeroes=unmap t.raw", ""),
    ("-f raw --cache=writeback --aio=threads t.raw", ""),
    ("-f raw --cache=unsafe -x one -D text t.raw", "one"),
    ("-f raw -A -x one t.raw", "one"),
    ("-f raw --snapshot t.raw", ""),
    ("--image-opts driver=blkdebug,align=4096,max-transfer=65536,image.driver=file,image.filename=t.raw", ""),
];

/// Reads the export of `r.raw`'s bytes as qemu-img does, then writes `s.qcow2` over other bytes. `start`:
/// serves `t.raw`.
fn check(
    both: &SideBySide,
    export: &str,
    socket: &Path,
    start: impl Fn() -> Option<NbdServer>,
    server: &str,
) {
    let folder = both.start();
    let url = format!("nbd+unix:///{export}?socket={}", socket.display());
    fs::copy(folder.join("r.raw"), folder.join("t.raw")).unwrap();
    let Some(running) = start() else { return };
    for line in [
        format!("info {url}"),
        format!("map --output=json {url}"),
        format!("convert -f raw -O qcow2 {url} x"),
        format!("compare -f raw -F raw {url} r.raw"),
    ] {
        let run = both.run(&line);
        assert!(run.differences.is_empty(), "{server}\n{line}\n{}", run.differences);
    }
    drop(running);
    fs::write(folder.join("t.raw"), vec![9; 8 << 20]).unwrap();
    let running = start();
    let ours = |tool: &Tool, line: &str| {
        let run = tool.run_in(&folder, &words(line));
        assert_eq!(run.code, Some(0), "{server}\n{line}\n{run}");
    };
    let io = Tool::at(both.ours().path().with_file_name("qemu-io"));
    ours(both.ours(), &format!("convert -n -O raw s.qcow2 {url}"));
    let changes = "-c 'write -f -q -P 7 5M 70001' -c 'write -z -u -q 1M 64k' -c 'discard -q 3M 1M' -c flush";
    ours(&io, &format!("-f raw {changes} -c 'write -q -z 512 1000' -c 'write -q -P 8 0 512' {url}"));
    ours(
        &io,
        &format!("-f raw -c 'read -q -P 7 5M 70001' -c 'read -q -P 0 1M 64k' -c 'read -q -P 6 7M 1M' {url}"),
    );
    both.reference().run_in(&folder, &words(&format!("convert -f raw -O raw {url} back.raw"))).success();
    drop(running);
    let mut expected = fs::read(folder.join("r.raw")).unwrap();
    expected[5 << 20..][..70001].fill(7);
    expected[1 << 20..][..64 << 10].fill(0);
    expected[..512].fill(8);
    expected[512..1512].fill(0);
    let back = fs::read(folder.join("back.raw")).unwrap();
    let differs = expected.iter().zip(&back).position(|(a, b)| a != b);
    assert!(differs.is_none() && expected.len() == back.len(), "{server}: {differs:?}");
}

#[test]
fn servers_of_nbdkit() {
    let root = tempfile::tempdir().unwrap();
    let Some(both) = SideBySide::new(Path::new(OURS), root.path(), make) else { return };
    let socket = root.path().join("s");
    for (options, export) in NBDKIT {
        check(&both, export, &socket, || NbdServer::nbdkit(&both.start(), &socket, options), options);
    }
}

#[test]
fn servers_of_qemu() {
    let root = tempfile::tempdir().unwrap();
    let Some(both) = SideBySide::new(Path::new(OURS), root.path(), make) else { return };
    let socket = root.path().join("s");
    for (options, export) in QEMU_NBD {
        check(&both, export, &socket, || NbdServer::qemu_nbd(&both.start(), &socket, options), options);
    }
}

/// What fails is told as by qemu-img.
#[test]
fn servers_that_fail() {
    let root = tempfile::tempdir().unwrap();
    let Some(both) = SideBySide::new(Path::new(OURS), root.path(), make) else { return };
    let (start, socket) = (both.start(), root.path().join("s"));
    let url = |export: &str| format!("nbd+unix:///{export}?socket={}", socket.display());
    let one = url("");
    for (options, lines) in [
        (
            "--filter=error pattern 8M error-pread=EIO error-pread-rate=100%",
            vec![
                format!("convert -m 1 -n -f raw -O raw {one} r.raw"),
                format!("compare -f raw -F raw {one} r.raw"),
            ],
        ),
        (
            "--filter=error memory 8M error-pwrite=ENOSPC error-pwrite-rate=100%",
            vec![format!("convert -m 1 -n -f qcow2 -O raw s.qcow2 {one}")],
        ),
        (
            "--filter=error memory 8M error-zero=EPERM error-zero-rate=100%",
            vec![format!("convert -m 1 -n -S 0 -f qcow2 -O raw s.qcow2 {one}")],
        ),
        (
            "--filter=error pattern 8M error-extents=EIO error-extents-rate=100%",
            vec![
                format!("map --output=json {one}"),
                format!("convert -m 1 -n -f raw -O raw {one} r.raw"),
                format!("compare -f raw -F raw {one} r.raw"),
            ],
        ),
        (
            "-r memory 8M",
            vec![format!("convert -m 1 -n -f qcow2 -O raw s.qcow2 {one}"), format!("info {one}")],
        ),
        (
            "--filter=exportname memory 8M exportname=one exportname-strict=true",
            vec![format!("info {}", url("two")), format!("info {}", url("one"))],
        ),
        // Its old style offers requests that it refuses then.
        (
            "-o memory 8M",
            vec![
                format!("info {one}"),
                format!("convert -f raw -O qcow2 {one} x"),
                format!("convert -m 1 -n -f qcow2 -O raw s.qcow2 {one}"),
            ],
        ),
        ("memory 1M", vec![format!("convert -m 1 -n -f qcow2 -O raw s.qcow2 {one}")]),
    ] {
        let Some(_server) = NbdServer::nbdkit(&start, &socket, options) else { return };
        for line in lines {
            let run = both.run(&line);
            assert!(run.differences.is_empty(), "{options}\n{line}\n{}", run.differences);
        }
    }
}
