//! Exports of qemu-nbd: qemu-img and our program read and write them and print the same.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a test may stop")]

use qcow2_testkit::oracle::{Qemu, Tool};
use qcow2_tests::side_by_side::{Comparison, SideBySide, words};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-under-test");

/// A server that is stopped when dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Server {
    /// Serves `image` on `socket` with these options and waits until it listens.
    fn start(folder: &Path, socket: &Path, options: &str, image: &str) -> Option<Self> {
        let tool = Tool::find("qemu-nbd")?;
        let mut command = Command::new(tool.path());
        command.current_dir(folder).arg("-k").arg(socket).args(words(options)).arg(image);
        let server = Self(command.stdin(Stdio::null()).spawn().unwrap());
        let started = Instant::now();
        while !socket.exists() {
            assert!(started.elapsed() < Duration::from_secs(20), "qemu-nbd does not listen");
            thread::sleep(Duration::from_millis(20));
        }
        Some(server)
    }
}

fn make(qemu_img: &Tool, folder: &Path) {
    let img = |line: &str| qemu_img.run_in(folder, &words(line)).success();
    img("create -q -f qcow2 s.qcow2 8M");
    let io = Qemu::find().unwrap().io;
    io.run_in(folder, &words("-c 'write -P 5 1M 100k' -c 'write -z 4M 1M' -c 'write -P 6 7M 1M' s.qcow2"))
        .success();
    img("convert -O qcow2 s.qcow2 copy.qcow2");
    img("create -q -f raw r.raw 8M");
}

#[test]
fn reading_an_export_matches_qemu_img() {
    let root = tempfile::tempdir().unwrap();
    let Some(both) = SideBySide::new(Path::new(OURS), root.path(), make) else { return };
    let socket = root.path().join("s");
    let Some(_server) = Server::start(&both.start(), &socket, "-r -t -e 8 -x one -f qcow2", "s.qcow2") else {
        return;
    };
    let socket = socket.display();
    let (url, old) =
        (format!("nbd+unix:///one?socket={socket}"), format!("nbd:unix:{socket}:exportname=one"));
    let options = format!("driver=nbd,server.type=unix,server.path={socket},export=one");
    let nested = format!("driver=raw,offset=1M,size=64k,file.{}", options.replace(',', ",file."));
    check(
        &both,
        &[
            format!("info {url}"),
            format!("info {old}"),
            format!("info --output=json {url}"),
            format!("info --image-opts {options}"),
            format!("info --image-opts {nested}"),
            format!("info nbd+unix:///other?socket={socket}"),
            format!("info nbd:unix:{socket}"),
            format!("info -f qcow2 {url}"),
            format!("map {url}"),
            format!("map --output=json {url}"),
            format!("check {url}"),
            format!("compare {url} copy.qcow2"),
            format!("compare {url} r.raw"),
            format!("convert -O qcow2 {url} x"),
            format!("convert -O raw {old} x"),
            format!("convert -O raw --image-opts {nested} x"),
            format!("convert -n -O raw copy.qcow2 {url}"),
            format!("create -f raw {url} 1M"),
        ],
    );
}

fn check(both: &SideBySide, lines: &[String]) {
    let runs = lines.iter().map(|line| both.run(line));
    let wrong: Vec<Comparison> = runs.filter(|run| !run.differences.is_empty()).collect();
    let text: Vec<String> = wrong.iter().map(|run| format!("{}\n{}", run.line, run.differences)).collect();
    assert!(wrong.is_empty(), "{}", text.join("\n"));
}

/// An export as a target: qemu-img finds in the file what our program wrote.
#[test]
fn an_export_is_a_conversion_target() {
    let root = tempfile::tempdir().unwrap();
    let Some(both) = SideBySide::new(Path::new(OURS), root.path(), make) else { return };
    let served = |name: &str, options: &str, image: &str| -> Option<(Server, PathBuf)> {
        let socket = root.path().join(name);
        Some((Server::start(&both.start(), &socket, options, image)?, socket))
    };
    let Some((server, socket)) = served("raw", "-t --discard=unmap -f raw", "r.raw") else { return };
    let url = format!("nbd+unix://?socket={}", socket.display());
    let ours = |line: &str| both.ours().run_in(&both.start(), &words(line));
    let theirs = |line: &str| both.reference().run_in(&both.start(), &words(line));
    for (line, code) in [
        (format!("convert -n -O raw s.qcow2 {url}"), 0),
        (format!("compare -F raw s.qcow2 {url}"), 0),
        (format!("create -f raw {url} 9M"), 1),
        (format!("create -f qcow2 {url} 9M"), 0),
        (format!("info {url}"), 0),
        (format!("convert -O qcow2 s.qcow2 {url}"), 0),
        (format!("check {url}"), 0),
        (format!("compare s.qcow2 {url}"), 0),
    ] {
        ours(&line).expect_code(code);
    }
    drop(server);
    theirs("check -f qcow2 r.raw").success();
    theirs("compare -F qcow2 s.qcow2 r.raw").success();
}

/// A server that disconnects gives an error and no endless wait, and the message says what happened.
#[test]
fn a_disconnected_server_is_an_error() {
    let root = tempfile::tempdir().unwrap();
    let Some(qemu) = Qemu::find() else { return };
    make(&qemu.img, root.path());
    let socket = root.path().join("s");
    let Some(mut server) = Server::start(root.path(), &socket, "-t -f raw", "r.raw") else { return };
    let link = root.path().join("qemu-io");
    std::os::unix::fs::symlink(OURS, &link).unwrap();
    let mut child = Command::new(&link)
        .args(["-f", "raw"])
        .arg(format!("nbd+unix://?socket={}", socket.display()))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    use std::io::Write;
    writeln!(stdin, "read 0 64k\nsleep 1").unwrap();
    thread::sleep(Duration::from_millis(700));
    server.0.kill().unwrap();
    server.0.wait().unwrap();
    writeln!(stdin, "read 0 64k\nread 0 64k\nquit").unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(text.matches("read 65536/65536 bytes").count(), 1, "{text}");
    assert_eq!(text.matches("read failed: ").count(), 2, "{text}");
    assert_eq!(fs::metadata(root.path().join("r.raw")).unwrap().len(), 8 << 20);
}

/// A server on a TCP port: as source, as target, and as a backing file named in an image.
#[test]
fn tcp_servers_are_sources_targets_and_backing_files() {
    let root = tempfile::tempdir().unwrap();
    let Some(both) = SideBySide::new(Path::new(OURS), root.path(), make) else { return };
    let Some(tool) = Tool::find("qemu-nbd") else { return };
    let start = both.start();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut command = Command::new(tool.path());
    command.current_dir(&start).args(["-b", "127.0.0.1", "-p", &port.to_string()]);
    command.args(words("-t -e 8 -x one -f qcow2 s.qcow2")).stdin(Stdio::null());
    let _server = Server(command.spawn().unwrap());
    let started = Instant::now();
    while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(started.elapsed() < Duration::from_secs(20), "qemu-nbd does not listen");
        thread::sleep(Duration::from_millis(20));
    }
    let url = format!("nbd://127.0.0.1:{port}/one");
    let server = format!(r#"{{"type":"inet","host":"127.0.0.1","port":"{port}"}}"#);
    let file = format!(r#"{{"driver":"nbd","server":{server},"export":"one"}}"#);
    let json = format!(r#"json:{{"driver":"raw","file":{file}}}"#);
    let img = |line: &str| both.reference().run_in(&start, &words(line)).success();
    img(&format!("create -q -f qcow2 -F raw -b {url} byurl.qcow2"));
    img(&format!("create -q -f qcow2 -F raw -b '{json}' byjson.qcow2"));
    img("create -q -f qcow2 -F qcow2 -b byurl.qcow2 top.qcow2");
    let mut lines = vec![
        format!("info {url}"),
        format!("map {url}"),
        format!("info nbd:127.0.0.1:{port}:exportname=one"),
        format!("info nbd://127.0.0.1:{port}/other"),
        format!("compare {url} copy.qcow2"),
        format!("convert -O qcow2 {url} x"),
        format!("convert -O qcow2 '{json}' x"),
        format!("create -f qcow2 -F raw -b {url} x"),
        format!("convert -O qcow2 -B {url} -F raw s.qcow2 x"),
        "rebase -b r.raw -F raw byurl.qcow2".to_owned(),
        "commit top.qcow2".to_owned(),
    ];
    for image in ["byurl.qcow2", "byjson.qcow2", "top.qcow2"] {
        lines.extend(
            ["info", "info --backing-chain", "map", "map --output=json", "check", "measure -O qcow2"]
                .map(|verb| format!("{verb} {image}")),
        );
        lines.push(format!("compare {image} copy.qcow2"));
        lines.push(format!("convert {image} x"));
        lines.push(format!("rebase -b '' {image}"));
    }
    check(&both, &lines);
}
