//! Exports of qemu-nbd: qemu-img and our program read and write them and print the same.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a test may stop")]

use qcow2_testkit::oracle::{Qemu, Tool};
use qcow2_tests::nbd_server::NbdServer;
use qcow2_tests::side_by_side::{Comparison, SideBySide, words};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
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
    let Some(_server) = NbdServer::qemu_nbd(&both.start(), &socket, "-r -x one -f qcow2 s.qcow2") else {
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

/// What contexts of the server tell is shown as qemu-img shows it, and copies do not rely on it.
#[test]
fn contexts_of_the_server_are_mapped() {
    let root = tempfile::tempdir().unwrap();
    let Some(both) = SideBySide::new(Path::new(OURS), root.path(), make) else { return };
    let (start, io) = (both.start(), Qemu::find().unwrap().io);
    let img = |line: &str| both.reference().run_in(&start, &words(line)).success();
    img("create -q -f qcow2 -b s.qcow2 -F qcow2 m.qcow2");
    img("bitmap --add -g 64k m.qcow2 marks");
    img("bitmap --add --disable m.qcow2 off");
    let changes = "-c 'write -P 7 1M 128k' -c 'write -z 2M 64k' -c 'write -P 8 7M 192k' m.qcow2";
    io.run_in(&start, &words(changes)).success();
    let socket = root.path().join("s");
    let Some(_server) = NbdServer::qemu_nbd(&start, &socket, "-r -A -B marks -x one -f qcow2 m.qcow2") else {
        return;
    };
    let options = format!("driver=nbd,path={},export=one", socket.display());
    let raw = |more: &str| format!("driver=raw{more},file.{}", options.replace(',', ",file."));
    let marks = "x-dirty-bitmap=qemu:dirty-bitmap:marks";
    let mut lines = Vec::new();
    for context in [
        "base:allocation",
        "qemu:allocation-depth",
        "qemu:dirty-bitmap:marks",
        "qemu:dirty-bitmap:off",
        "qemu:dirty-bitmap:",
        "qemu:",
        "",
    ] {
        lines.push(format!("map --image-opts {options},x-dirty-bitmap={context}"));
        lines.push(format!("map --output=json --image-opts {options},x-dirty-bitmap={context}"));
    }
    for layers in [raw(""), raw(",offset=1M,size=6M"), raw(",offset=512")] {
        lines.push(format!("map --output=json --image-opts {layers}"));
        lines.push(format!("map --output=json --image-opts {layers},file.{marks}"));
        lines.push(format!("map --output=json -s 1M -l 3M --image-opts {layers},file.{marks}"));
    }
    lines.push(format!("info --image-opts {options},{marks}"));
    lines.push(format!("convert -O raw --image-opts {options},{marks} x"));
    check(&both, &lines);
    // qemu-img takes marks for zeroes here.
    let line = format!("compare --image-opts {options},{marks} driver=qcow2,file.filename=m.qcow2");
    both.ours().run_in(&start, &words(&line)).expect_code(0);
}

/// Names of exports are bytes, of which a server takes so many; a URL is text.
#[test]
fn names_of_exports_are_bytes() {
    let root = tempfile::tempdir().unwrap();
    let Some(both) = SideBySide::new(Path::new(OURS), root.path(), make) else { return };
    let socket = root.path().join("s");
    let name = OsStr::from_bytes(b"a\xff\xc3\xa9\xfe");
    let mut command = Command::new("qemu-nbd");
    command.args(["-r", "-f", "qcow2", "s.qcow2", "-x"]).arg(name);
    let _server = NbdServer::start(command, &both.start(), &socket, &["-t", "-e", "8", "-k"]);
    let with = |before: &str, after: &str| {
        let before = before.replace('@', &socket.display().to_string());
        let after = after.replace('@', &socket.display().to_string());
        OsString::from_vec([before.as_bytes(), name.as_bytes(), after.as_bytes()].concat())
    };
    for (args, name) in [
        (vec!["info"], with("nbd:unix:@:exportname=", "")),
        (vec!["info", "--output=json"], with("nbd:unix:@:exportname=", "")),
        (vec!["info", "--image-opts"], with("driver=nbd,path=@,export=", "")),
        (vec!["map", "--image-opts"], with("driver=nbd,path=@,export=", "")),
        (vec!["info"], with("nbd+unix:///", "?socket=@")),
        (vec!["info"], OsString::from(format!("nbd+unix:///a%ff%c3%a9%fe?socket={}", socket.display()))),
        (vec!["info", "--image-opts"], with("driver=nbd,path=@,export=x", "")),
        (vec!["info", "--image-opts"], with("driver=nbd,path=@,export=", &"x".repeat(4096))),
        (vec!["info", "--image-opts"], with("driver=nbd,path=@,x-dirty-bitmap=", &"x".repeat(4096))),
    ] {
        let args: Vec<&OsStr> = args.into_iter().map(OsStr::new).chain([&*name]).collect();
        let [theirs, ours] = [both.reference(), both.ours()].map(|tool| tool.run_in(&both.start(), &args));
        assert_eq!((&ours.stdout, ours.code), (&theirs.stdout, theirs.code), "{args:?}");
        assert_eq!(ours.stderr, theirs.stderr, "{args:?}");
    }
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
    let socket = root.path().join("raw");
    let server = NbdServer::qemu_nbd(&both.start(), &socket, "--discard=unmap -f raw r.raw");
    let Some(server) = server else { return };
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

/// Of a new image on an export nothing is left of what was there, and the export's size counts.
#[test]
fn creating_on_an_export_matches_qemu_img() {
    let root = tempfile::tempdir().unwrap();
    let Some(both) = SideBySide::new(Path::new(OURS), root.path(), make) else { return };
    let socket = root.path().join("raw");
    let server = NbdServer::qemu_nbd(&both.start(), &socket, "-e 8 -x one -f raw r.raw");
    let Some(_server) = server else { return };
    let raw = both.start().join("r.raw");
    let old = vec![7; 8 << 20];
    let url = |name: &str| format!("nbd+unix:///{name}?socket={}", socket.display());
    for (line, is_made) in [
        (format!("create -f nbd {} 1M", url("one")), true),
        (format!("create -f nbd {} 8M", url("one")), true),
        (format!("create -q -f nbd -o size=1000 {}", url("one")), true),
        (format!("create -f nbd -o preallocation=off {} 1M", url("one")), true),
        (format!("create -f raw {} 1M", url("one")), true),
        (format!("create -f nbd {} 9M", url("one")), false),
        (format!("create -f nbd -o preallocation=full {} 1M", url("one")), false),
        (format!("create -f nbd -o foo=1 {} 1M", url("one")), false),
        (format!("create -f nbd {} 1M", url("gone")), false),
        (format!("create -f qcow2 {} 1M", url("gone")), false),
        (format!("create -f nbd -b base {} 1M", url("one")), false),
        (format!("create -f nbd {}", url("one")), false),
    ] {
        let outcomes = [both.reference(), both.ours()].map(|tool| {
            fs::write(&raw, &old).unwrap();
            let outcome = tool.run_in(&both.start(), &words(&line));
            let bytes = fs::read(&raw).unwrap();
            assert_eq!(bytes[..512] == [0; 512], is_made, "{outcome}");
            assert!(bytes[512..] == old[512..], "{outcome}");
            (
                outcome.code,
                outcome.stdout,
                outcome.stderr.replace(&both.ours().path().display().to_string(), ""),
            )
        });
        assert_eq!(outcomes[0], outcomes[1], "{line}");
        assert_eq!(outcomes[0].0 == Some(0), is_made, "{line}");
    }
}

/// A server that disconnects gives an error and no endless wait, and the message says what happened.
#[test]
fn a_disconnected_server_is_an_error() {
    let root = tempfile::tempdir().unwrap();
    let Some(qemu) = Qemu::find() else { return };
    make(&qemu.img, root.path());
    let socket = root.path().join("s");
    let Some(mut server) = NbdServer::qemu_nbd(root.path(), &socket, "-f raw r.raw") else { return };
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
    writeln!(stdin, "read 0 64k\nsleep 1").unwrap();
    thread::sleep(Duration::from_millis(700));
    server.stop();
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

/// How a scripted server greets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    /// Old style: one export, no options.
    Old,
    /// Fixed newstyle, whose first connection is closed at the first request.
    Dropping,
}

/// Serves a disk of 1 MiB until a client says that it is done; returns what was written.
fn scripted(listener: &TcpListener, style: Style) -> Vec<(u64, u32)> {
    let mut written = Vec::new();
    for connection in 0.. {
        let (mut socket, _) = listener.accept().unwrap();
        greet(&mut socket, style);
        loop {
            let mut head = [0; 28];
            if socket.read_exact(&mut head).is_err() {
                break;
            }
            let command = u16::from_be_bytes([head[6], head[7]]);
            let offset = u64::from_be_bytes(head[16..24].try_into().unwrap());
            let len = u32::from_be_bytes(head[24..].try_into().unwrap());
            if command == 2 {
                return written;
            }
            if command == 1 {
                socket.read_exact(&mut vec![0; len as usize]).unwrap();
            }
            if style == Style::Dropping && connection == 0 {
                break;
            }
            let mut reply = [&0x6744_6698_u32.to_be_bytes()[..], &[0; 4], &head[8..16]].concat();
            match command {
                0 => reply.extend(vec![b'3'; len as usize]),
                1 => written.push((offset, len)),
                _ => {}
            }
            socket.write_all(&reply).unwrap();
        }
    }
    written
}

fn greet(socket: &mut TcpStream, style: Style) {
    let mut sent = b"NBDMAGIC".to_vec();
    if style == Style::Old {
        sent.extend(0x0000_4202_8186_1253_u64.to_be_bytes());
        sent.extend((1u64 << 20).to_be_bytes());
        sent.extend(1u32.to_be_bytes());
        sent.extend([0; 124]);
        return socket.write_all(&sent).unwrap();
    }
    sent.extend(b"IHAVEOPT\0\x03");
    socket.write_all(&sent).unwrap();
    socket.read_exact(&mut [0; 4]).unwrap();
    loop {
        let mut head = [0; 16];
        socket.read_exact(&mut head).unwrap();
        let len = u32::from_be_bytes(head[12..].try_into().unwrap());
        socket.read_exact(&mut vec![0; len as usize]).unwrap();
        let mut reply = |kind: u32, data: &[u8]| {
            let mut bytes = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
            bytes.extend(&head[8..12]);
            bytes.extend(kind.to_be_bytes());
            bytes.extend((data.len() as u32).to_be_bytes());
            bytes.extend(data);
            socket.write_all(&bytes).unwrap();
        };
        if head[11] != 7 {
            reply(0x8000_0001, &[]);
            continue;
        }
        reply(3, &[&[0, 0][..], &(1u64 << 20).to_be_bytes(), &[0, 1]].concat());
        return reply(1, &[]);
    }
}

/// Servers of the old style are understood, and with `reconnect-delay` a request outlives its connection.
/// What they have written is what qemu-io would have: such servers get whole sectors.
#[test]
fn old_servers_and_lost_connections() {
    let root = tempfile::tempdir().unwrap();
    let link = root.path().join("qemu-io");
    std::os::unix::fs::symlink(OURS, &link).unwrap();
    for (style, delay) in [(Style::Old, 0), (Style::Dropping, 20)] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = thread::spawn(move || scripted(&listener, style));
        let options = format!(
            "driver=raw,file.driver=nbd,file.reconnect-delay={delay},file.server.type=inet,\
             file.server.host=127.0.0.1,file.server.port={port}"
        );
        let run = Command::new(&link)
            .args(["-c", "write -q 7k 3k", "-c", "write -q 20500 10", "-c", "read -q -P 0x33 0 1M"])
            .args(["--image-opts", &options])
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(run.status.success(), "{style:?}: {}", String::from_utf8_lossy(&run.stdout));
        assert_eq!(server.join().unwrap(), [(7168, 3072), (20480, 512)], "{style:?}");
    }
}

/// A server with limits of a request's size gets aligned and split requests.
#[test]
fn limits_of_a_request_are_kept() {
    let root = tempfile::tempdir().unwrap();
    let Some(qemu) = Qemu::find() else { return };
    make(&qemu.img, root.path());
    let path = |name: &str| root.path().join(name);
    let bytes: Vec<u8> = (0..3_000_001u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    fs::write(path("odd.raw"), &bytes).unwrap();
    for (minimum, maximum) in [(4096, "32M"), (512, "64k"), (512, "4k"), (1, "4k")] {
        fs::write(path("t.raw"), vec![5; 8 << 20]).unwrap();
        let socket = path(&format!("s{minimum}-{maximum}"));
        let options = format!(
            "--filter=blocksize-policy file t.raw blocksize-error-policy=error blocksize-preferred=4096 \
             blocksize-minimum={minimum} blocksize-maximum={maximum}"
        );
        let Some(server) = NbdServer::nbdkit(root.path(), &socket, &options) else { return };
        let url = format!("nbd+unix:///?socket={}", socket.display());
        let link = path("qemu-img");
        let _ = std::os::unix::fs::symlink(OURS, &link);
        for line in [
            format!("convert -f raw -O raw {url} o.raw"),
            format!("compare -f raw -F raw {url} t.raw"),
            format!("convert -f raw -O qcow2 odd.raw {url}"),
            format!("check -f qcow2 {url}"),
            format!("convert -f qcow2 -O raw {url} back.raw"),
        ] {
            let run = Command::new(&link).args(words(&line)).current_dir(root.path()).output().unwrap();
            assert!(
                run.status.success(),
                "{minimum} {maximum} {line}: {}",
                String::from_utf8_lossy(&run.stderr)
            );
        }
        drop(server);
        assert!(fs::read(path("back.raw")).unwrap().starts_with(&bytes), "{minimum} {maximum}");
        qemu.img.run_in(root.path(), &words("check -f qcow2 t.raw")).success();
    }
}
