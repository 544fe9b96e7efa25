//! Clients written by others find what a file holds, and leave in it what they wrote.

use super::{Server, folder, ours, wait_for};
use qcow2_testkit::oracle::{Qemu, Tool};
use std::fs;

#[test]
fn qemus_tools_read_and_write_through_the_server() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = folder();
    let root = folder.path();
    let server = Server::start(root, &["disk"]);
    let uri = server.uri();
    let commands = [
        "write -P 1 0 9M",
        "write -P 2 77777 3333",
        "write -z 1M 128k",
        "write -f -P 3 20M 512",
        "discard 2M 64k",
        "write -z -u 3M 1M",
        "write -P 4 67108352 512",
        "flush",
        "read -P 4 67108352 512",
        "read -P 0 1M 128k",
        "read -P 1 4M 5M",
        "read -P 0 9M 11M",
    ];
    let args: Vec<&str> = ["-f", "raw"]
        .into_iter()
        .chain(commands.iter().flat_map(|command| ["-c", command]))
        .chain([&*uri])
        .collect();
    let said = qemu.io.run_in(root, &args).success();
    assert!(!said.stdout.contains("failed"), "{}", said.stdout);
    let through = qemu.img.run_in(root, &["map", "--output=json", "-f", "raw", &uri]).success().stdout;
    qemu.img.run_in(root, &["convert", "-f", "raw", "-O", "raw", &uri, "copy"]).success();
    assert!(server.end("-TERM").success());
    assert!(!root.join("s").exists(), "the socket's file goes with the server");
    qemu.img.run_in(root, &["compare", "-f", "raw", "-F", "qcow2", "copy", "disk"]).success();
    qemu.img.run_in(root, &["check", "disk"]).success();
    // What clients hear of holes is what the image's map says, but for offsets.
    let direct = ours(root, &["map", "--output=json", "disk"]);
    let parts = |text: &str| -> Vec<(u64, u64, bool)> {
        let parsed: serde_json::Value = serde_json::from_str(text).unwrap();
        let mut parts: Vec<(u64, u64, bool)> = Vec::new();
        for part in parsed.as_array().unwrap() {
            let (start, len) = (part["start"].as_u64().unwrap(), part["length"].as_u64().unwrap());
            let zero = part["zero"].as_bool().unwrap();
            match parts.last_mut().filter(|last| last.2 == zero) {
                Some(last) => last.1 += len,
                None => parts.push((start, len, zero)),
            }
        }
        parts
    };
    assert_eq!(parts(&through), parts(&direct));
}

/// Flags and contexts are those of qemu-nbd for the same options.
#[test]
fn an_export_is_described_as_by_the_reference() {
    let Some(reference) = Tool::find("qemu-nbd") else { return };
    let Some(nbdinfo) = Tool::find("nbdinfo") else { return };
    let folder = folder();
    let root = folder.path();
    ours(root, &["bitmap", "--add", "disk", "b"]);
    ours(root, &["bitmap", "--disable", "disk", "b"]);
    ours(root, &["create", "-q", "-f", "raw", "raw", "3M"]);
    for args in [
        &["-t"][..],
        &["-t", "-e", "3", "-D", "a text"],
        &["-t", "-r", "-e", "0"],
        &["-t", "-A", "-B", "b", "-x", ""],
        &["-t", "-o", "1048576"],
        &["-t", "-f", "raw"],
        &["-t", "-s"],
    ] {
        let image = if args.contains(&"raw") { "raw" } else { "disk" };
        let server = Server::start_tool(root, &[args, &[image]].concat());
        let said = nbdinfo.run_in(root, &["--json", &server.uri()]).success().stdout;
        assert!(server.end("-TERM").success());
        // A copy of its own: a server that is killed leaves a bitmap that nobody can use.
        fs::copy(root.join(image), root.join("theirs")).unwrap();
        let socket = root.join("t");
        let mut command = std::process::Command::new(reference.path());
        let mut child =
            command.arg("-k").arg(&socket).args(args).arg("theirs").current_dir(root).spawn().unwrap();
        wait_for(&socket, &mut child);
        let uri = format!("nbd+unix:///?socket={}", socket.display());
        let expected = nbdinfo.run_in(root, &["--json", &uri]).success().stdout;
        child.kill().unwrap();
        child.wait().unwrap();
        let _ = fs::remove_file(&socket);
        let facts = |text: &str| {
            let mut parsed: serde_json::Value = serde_json::from_str(text).unwrap();
            let export = parsed["exports"][0].as_object_mut().unwrap();
            // Which block size is best is ours to say; a raw file cannot promise fast zeroes.
            for key in ["uri", "block_size_preferred", "content", "can_fast_zero"] {
                export.remove(key);
            }
            parsed
        };
        assert_eq!(facts(&said), facts(&expected), "{args:?}");
    }
}

#[test]
fn libnbds_programs_copy_and_map() {
    let (Some(copy), Some(info)) = (Tool::find("nbdcopy"), Tool::find("nbdinfo")) else { return };
    let folder = folder();
    let root = folder.path();
    let bytes: Vec<u8> = (0..5_000_000u32).map(|at| (at / 7) as u8).collect();
    fs::write(root.join("source"), &bytes).unwrap();
    let server = Server::start(root, &["disk"]);
    copy.run_in(root, &["source", &server.uri()]).success();
    copy.run_in(root, &[&*server.uri(), "back"]).success();
    let map = info.run_in(root, &["--map", &server.uri()]).success().stdout;
    assert!(server.end("-INT").success());
    let back = fs::read(root.join("back")).unwrap();
    assert_eq!(back.len(), 64 << 20);
    assert!(back.starts_with(&bytes) && back[bytes.len()..].iter().all(|byte| *byte == 0));
    assert!(map.contains("hole,zero") && map.trim_start().starts_with('0'), "{map}");
    assert_eq!(ours(root, &["check", "disk"]).lines().next(), Some("No errors were found on the image."));
}

#[test]
fn several_images_have_their_names() {
    let Some(info) = Tool::find("nbdinfo") else { return };
    let folder = folder();
    let root = folder.path();
    ours(root, &["create", "-q", "-f", "raw", "other.raw", "1M"]);
    let server = Server::start(root, &["--read-only", "-D", "text", "disk", "other.raw"]);
    let said = info.run_in(root, &["--list", &server.uri()]).success().stdout;
    for expected in ["export=\"disk\"", "export=\"other.raw\"", "description: text", "is_read_only: true"] {
        assert!(said.contains(expected), "{expected}: {said}");
    }
    let none = info.run_in(root, &["--size", &server.uri_of("none")]);
    assert!(none.code != Some(0) && none.stderr.contains("no export named 'none'"), "{none:?}");
    assert_eq!(info.run_in(root, &["--size", &server.uri_of("other.raw")]).success().stdout, "1048576\n");
    assert!(server.end("-TERM").success());
}

/// A snapshot, a temporary overlay and a bitmap.
#[test]
fn what_was_and_what_will_not_stay() {
    let folder = folder();
    let root = folder.path();
    ours(root, &["io", "-c", "write -q -P 1 0 1M", "disk"]);
    ours(root, &["snapshot", "-c", "then", "disk"]);
    ours(root, &["io", "-c", "write -q -P 2 0 1M", "disk"]);
    let server = Server::start(root, &["-l", "then", "disk"]);
    assert_eq!(server.connect().read(4096, 512), [1; 512]);
    assert!(server.end("-TERM").success());
    let server = Server::start(root, &["-s", "disk"]);
    let client = server.connect();
    assert_eq!(client.read(4096, 512), [2; 512]);
    client.write(4096, &[3; 512]);
    client.flush();
    assert_eq!(client.read(4096, 513)[..], [&[3; 512][..], &[2]].concat());
    assert!(server.end("-TERM").success());
    ours(root, &["io", "-c", "read -P 2 0 1M", "disk"]);
}

/// What one client has written, the flush of another one covers.
#[test]
fn a_flush_covers_all_connections() {
    let folder = folder();
    let root = folder.path();
    let server = Server::start(root, &["disk"]);
    let (one, other) = (server.connect(), server.connect());
    assert_eq!(one.size, 64 << 20);
    one.write(10 << 20, &[7; 100_000]);
    assert_eq!(other.read(10 << 20, 100_000), vec![7; 100_000]);
    other.flush();
    server.end("-KILL");
    ours(root, &["io", "-c", "read -q -P 7 10M 100000", "disk"]);
}

/// A signal ends the server in order: what was answered is in the image, which is clean.
#[test]
fn a_signal_closes_the_image() {
    for signal in ["-TERM", "-INT", "-HUP"] {
        let folder = folder();
        let root = folder.path();
        let server = Server::start(root, &["disk"]);
        let client = server.connect();
        client.write(123, &[9; 70_000]);
        assert!(server.end(signal).success(), "{signal}");
        ours(root, &["io", "-r", "-c", "read -q -P 9 123 70000", "disk"]);
        ours(root, &["check", "-q", "disk"]);
        drop(client);
    }
}
