//! Clients that speak TLS, or should: who may connect, what is refused, and handshakes that stand still.

use super::{OURS, Server, folder, ours};
use qcow2_nbd::proto::{OptionCode, OptionRequest};
use qcow2_testkit::oracle::Tool;
use std::io::{Read, Write};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Folders of certificates: the files of each, without `.pem`, and where from.
const FOLDERS: [(&str, &[(&str, &str)]); 7] = [
    ("srv", &[("ca-cert", "ca-cert"), ("server-cert", "server-cert"), ("server-key", "server-key")]),
    ("cli", &[("ca-cert", "ca-cert"), ("client-cert", "client-cert"), ("client-key", "client-key")]),
    ("anybody", &[("ca-cert", "ca-cert")]),
    ("other", &[("ca-cert", "other-ca-cert"), ("client-cert", "client-cert"), ("client-key", "client-key")]),
    ("nokey", &[("ca-cert", "ca-cert"), ("server-cert", "server-cert")]),
    ("mixed", &[("ca-cert", "ca-cert"), ("server-cert", "server-cert"), ("server-key", "client-key")]),
    ("badca", &[("ca-cert", "client-key"), ("server-cert", "server-cert"), ("server-key", "server-key")]),
];

/// A folder with the image `disk` and the certificates.
pub(super) fn secure_folder() -> tempfile::TempDir {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/qcow2-nbd/tests/tls");
    let folder = folder();
    for (name, files) in FOLDERS {
        let path = folder.path().join(name);
        std::fs::create_dir(&path).unwrap();
        for (to, from) in files {
            std::fs::copy(source.join(format!("{from}.pem")), path.join(format!("{to}.pem"))).unwrap();
        }
    }
    folder
}

pub(super) fn credentials(folder: &str, verify: &str) -> String {
    format!("tls-creds-x509,id=t,endpoint=server,dir={folder},verify-peer={verify},sanity-check=off")
}

const CLIENT: &str = "CN=qcow2 test client";

/// The export in `folder` for a client with the certificates in `dir`.
fn export(folder: &Path, dir: &str) -> [String; 4] {
    [
        "--object".to_owned(),
        format!("tls-creds-x509,id=t,dir={dir},sanity-check=off"),
        "--image-opts".to_owned(),
        format!(
            "driver=raw,file.driver=nbd,file.path={},file.tls-creds=t,file.tls-hostname=localhost",
            folder.join("s").display()
        ),
    ]
}

/// Whether a client with the certificates in `dir` gets the disk.
pub(super) fn is_let_in(folder: &Path, dir: &str) -> bool {
    let export = export(folder, dir);
    let args: Vec<&str> = ["info"].into_iter().chain(export.iter().map(String::as_str)).collect();
    Tool::at(OURS).run_in(folder, &args).code == Some(0)
}

#[test]
fn foreign_clients_and_ours_over_tls() {
    let folder = secure_folder();
    let root = folder.path();
    for verify in ["on", "off"] {
        let server =
            Server::start(root, &["--object", &credentials("srv", verify), "--tls-creds", "t", "disk"]);
        let cli = export(root, "cli");
        let cli: Vec<&str> = cli.iter().map(String::as_str).collect();
        ours(root, &[&["io", "-c", "write -q -P 7 1M 3M", "-c", "flush"], &cli[..]].concat());
        let read = ["-c", "read -q -P 7 1M 3M", "-c", "read -q -P 0 4M 4M"];
        ours(root, &[&["io"], &read[..], &cli[..]].concat());
        if let Some(io) = Tool::find("qemu-io") {
            io.run_in(root, &[&read[..], &cli[..]].concat()).success();
            let write = ["-c", "aio_write -q -P 8 8M 1M", "-c", "aio_write -q -P 9 9M 1M", "-c", "aio_flush"];
            io.run_in(root, &[&write[..], &["-c", "read -q -P 9 9M 1M"], &cli[..]].concat()).success();
        }
        let uri = |dir: &str| {
            let (socket, dir) = (root.join("s").display().to_string(), root.join(dir).display().to_string());
            format!("nbds+unix://localhost/?socket={socket}&tls-certificates={dir}")
        };
        if let Some(info) = Tool::find("nbdinfo") {
            let size = info.run_in(root, &["--size", &uri("cli")]).success();
            assert_eq!(size.stdout, "67108864\n");
            // Nothing is told without TLS, not even that there is an export.
            for args in [vec!["--list", "URI"], vec!["--size", "URI"]] {
                let plain = server.uri();
                let args: Vec<&str> =
                    args.iter().map(|arg| if *arg == "URI" { &*plain } else { arg }).collect();
                let refused = info.run_in(root, &args);
                assert!(refused.code != Some(0) && refused.stdout.is_empty(), "{}", refused.stdout);
            }
        }
        assert!(is_let_in(root, "cli"));
        assert_eq!(is_let_in(root, "anybody"), verify == "off");
        assert!(!is_let_in(root, "other"));
        assert!(server.end("-TERM").success());
    }
    ours(root, &["check", "-q", "disk"]);
}

#[test]
fn only_those_that_are_authorized() {
    let folder = secure_folder();
    let root = folder.path();
    let exact = format!("authz-simple,id=a,identity={CLIENT}");
    let glob = "authz-list,id=a,policy=deny,rules.0.match=CN=qcow2*,rules.0.policy=allow,rules.0.format=glob";
    let denied = format!("authz-list,id=a,policy=allow,rules.0.match={CLIENT},rules.0.policy=deny");
    for (object_of_authz, expected) in [
        (&*exact, true),
        ("authz-simple,id=a,identity=CN=qcow2 test", false),
        (glob, true),
        ("authz-list,id=a,policy=allow", true),
        ("authz-list,id=a", false),
        (&*denied, false),
        // The reference also starts without such an authorization, and lets nobody in.
        ("authz-simple,id=b,identity=x", false),
    ] {
        let creds = credentials("srv", "on");
        let args =
            ["-t", "--object", &creds, "--object", object_of_authz, "--tls-creds", "t", "--tls-authz", "a"];
        let server = Server::start_tool(root, &[&args[..], &["disk"]].concat());
        assert_eq!(is_let_in(root, "cli"), expected, "{object_of_authz}");
        assert!(!is_let_in(root, "anybody"), "{object_of_authz}");
        assert!(server.end("-TERM").success());
    }
    // Clients that prove nothing cannot be told apart: the reference lets all of them in.
    let creds = credentials("srv", "off");
    for authz in ["a", "none"] {
        let args =
            ["-t", "--object", &creds, "--object", &exact, "--tls-creds", "t", "--tls-authz", authz, "disk"];
        let server = Server::start_tool(root, &args);
        assert!(is_let_in(root, "cli") && is_let_in(root, "anybody"), "{authz}");
        assert!(server.end("-TERM").success());
    }
    let args =
        ["serve", "--object", &creds, "--object", &exact, "--tls-creds", "t", "--tls-authz", "a", "disk"];
    let refused = Tool::at(OURS).run_in(root, &args);
    assert_eq!(
        (refused.code, refused.stderr.contains("verify-peer=on")),
        (Some(1), true),
        "{}",
        refused.stderr
    );
    let args =
        ["serve", "--object", &credentials("srv", "on"), "--tls-creds", "t", "--tls-authz", "a", "disk"];
    let refused = Tool::at(OURS).run_in(root, &args).expect_code(1);
    assert!(refused.stderr.contains("No authorization with id 'a'"), "{}", refused.stderr);
}

/// Every line is refused before anybody can connect, as by the reference. `SRV` and so on are objects.
const REFUSED: &[&str] = &[
    "--tls-creds t disk",
    "SRV --tls-creds u disk",
    "CLI --tls-creds t disk",
    "SECRET --tls-creds t disk",
    "--object tls-creds-x509,id=t,dir=nokey,endpoint=server --tls-creds t disk",
    "--object tls-creds-x509,id=t,dir=anybody,endpoint=server --tls-creds t disk",
    "--object tls-creds-x509,id=t,dir=mixed,endpoint=server --tls-creds t disk",
    "--object tls-creds-x509,id=t,dir=badca,endpoint=server --tls-creds t disk",
    "--object tls-creds-x509,id=t,dir=nodir,endpoint=server --tls-creds t disk",
    "--object tls-creds-x509,id=t,endpoint=server --tls-creds t disk",
    "--object tls-creds-x509,id=t,dir=srv,endpoint=server,foo=bar disk",
    "--object tls-creds-x509,id=t,dir=srv,endpoint=foo disk",
    "--tls-authz a disk",
    "AUTHZ --tls-authz a disk",
    "SRV --tls-creds t --tls-hostname foo disk",
    "--tls-hostname foo disk",
    "SRV AUTHZ --tls-creds t --tls-authz a -k /nodir/s disk",
    "SRV --tls-creds t --tls-authz none -k /nodir/s disk",
    "SRV --tls-creds t nofile",
    "--tls-creds t --tls-creds u disk",
    "--fork --tls-creds t disk",
    "--object authz-simple,id=a disk",
    "--object authz-simple,identity=x disk",
    "--object authz-list,id=a,policy=foo disk",
    "--object authz-list,id=a,rules.0.match=x disk",
    "--object authz-list,id=a,rules=x disk",
    "--object authz-list-file,id=a,filename=x disk",
    "AUTHZ AUTHZ disk",
    "-L --tls-creds t",
    "-L SRV --tls-creds t",
    "-L --tls-authz a",
    "-L --tls-hostname foo",
    "-L CLI AUTHZ --tls-creds t --tls-authz a",
    "-L CLI --tls-creds t",
    "--tls-creds",
    "--tls disk",
];

#[test]
fn refusals_are_the_references() {
    let Some(reference) = Tool::find("qemu-nbd") else { return };
    let folder = secure_folder();
    let root = folder.path();
    let link = root.join("qemu-nbd");
    symlink(OURS, &link).unwrap();
    let (tool, socket) = (Tool::at(&link), root.join("s").display().to_string());
    let mut wrong = Vec::new();
    for line in REFUSED {
        let line = line
            .replace("SRV", "--object tls-creds-x509,id=t,dir=srv,endpoint=server,sanity-check=off")
            .replace("CLI", "--object tls-creds-x509,id=t,dir=cli,sanity-check=off")
            .replace("SECRET", "--object secret,id=t,data=x")
            .replace("AUTHZ", "--object authz-simple,id=a,identity=x");
        let mut args: Vec<&str> = line.split_whitespace().collect();
        if !line.contains("-k") {
            args.splice(0..0, ["-k", &*socket]);
        }
        let theirs = reference.run_in(root, &args);
        let own = tool.run_in(root, &args);
        let expected =
            theirs.stderr.replace(&reference.path().display().to_string(), &link.display().to_string());
        if (own.code, &own.stdout, &own.stderr) != (theirs.code, &theirs.stdout, &expected) {
            wrong.push(format!(
                "{line}\n  reference {:?} {expected}  ours {:?} {}",
                theirs.code, own.code, own.stderr
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // What there is no library for, in words of ours.
    for (line, text) in [
        ("--object tls-creds-psk,id=t,dir=srv,endpoint=server disk", "tls-creds-psk is not supported"),
        ("--object tls-creds-anon,id=t,endpoint=server disk", "tls-creds-anon is not supported"),
        ("--selinux-label x disk", "SELinux labels of sockets are not supported"),
    ] {
        let own = tool.run_in(root, &line.split(' ').collect::<Vec<_>>()).expect_code(1);
        assert!(own.stderr.contains(text), "{}", own.stderr);
    }
}

/// Lists over TLS, both ways.
#[test]
fn exports_are_listed_over_tls() {
    let Some(reference) = Tool::find("qemu-nbd") else { return };
    let folder = secure_folder();
    let root = folder.path();
    let link = root.join("qemu-nbd");
    symlink(OURS, &link).unwrap();
    let (tool, socket) = (Tool::at(&link), root.join("s").display().to_string());
    let server =
        Server::start_tool(root, &["-t", "--object", &credentials("srv", "on"), "--tls-creds", "t", "disk"]);
    let client = |dir: &str| format!("tls-creds-x509,id=t,dir={dir},sanity-check=off");
    for (dir, host, is_fine) in
        [("cli", "localhost", true), ("cli", "foo", false), ("other", "localhost", false)]
    {
        let object = client(dir);
        let args = ["-L", "-k", &socket, "--object", &object, "--tls-creds", "t", "--tls-hostname", host];
        let [theirs, own] = [&reference, &tool].map(|tool| tool.run_in(root, &args));
        assert_eq!((own.code, &own.stdout), (theirs.code, &theirs.stdout), "{dir} {host}");
        assert_eq!(own.code == Some(0) && own.stdout.contains("67108864"), is_fine, "{}", own.stderr);
        let expected =
            theirs.stderr.replace(&reference.path().display().to_string(), &link.display().to_string());
        assert_eq!(own.stderr, expected);
    }
    assert!(server.end("-TERM").success());
}

/// A connection for which TLS was agreed on, and on which nothing of it has been sent.
pub(super) fn half_open(folder: &Path) -> UnixStream {
    let mut stream = UnixStream::connect(folder.join("s")).unwrap();
    stream.read_exact(&mut [0; 18]).unwrap();
    let mut bytes = 3u32.to_be_bytes().to_vec();
    OptionRequest::plain(OptionCode::STARTTLS).encode(&mut bytes);
    stream.write_all(&bytes).unwrap();
    stream.read_exact(&mut [0; 20]).unwrap();
    stream
}

/// A handshake that stands still, within TLS or before it, ends in its time; others do not wait for it.
#[test]
fn handshakes_that_stand_still_end() {
    let folder = secure_folder();
    let root = folder.path();
    let creds = credentials("srv", "on");
    let args = ["-t", "-e", "0", "--handshake-limit=1", "--object", &creds, "--tls-creds", "t", "disk"];
    let server = Server::start_tool(root, &args);
    let mut half = half_open(root);
    // The beginning of a record, whose rest never comes.
    let mut part = half_open(root);
    part.write_all(&[22, 3, 1, 2, 0, 1, 0]).unwrap();
    assert!(is_let_in(root, "cli"));
    // A byte now and then does not lengthen it.
    half.write_all(&[22, 3, 1, 0x3f, 0]).unwrap();
    while half.write_all(&[1]).is_ok() {
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    for stream in [&mut half, &mut part] {
        // The end, or a reset for what was sent too late.
        assert!(matches!(stream.read(&mut [0]), Ok(0) | Err(_)));
    }
    assert!(server.end("-TERM").success());
}

/// Bytes that were sent ahead of TLS are no part of what is said in it, and junk is no handshake.
#[test]
fn what_comes_in_the_place_of_tls() {
    let folder = secure_folder();
    let root = folder.path();
    let server = Server::start(root, &["--object", &credentials("srv", "on"), "--tls-creds", "t", "disk"]);
    let mut stream = UnixStream::connect(root.join("s")).unwrap();
    stream.read_exact(&mut [0; 18]).unwrap();
    let mut bytes = 3u32.to_be_bytes().to_vec();
    OptionRequest::plain(OptionCode::STARTTLS).encode(&mut bytes);
    OptionRequest::plain(OptionCode::LIST).encode(&mut bytes);
    stream.write_all(&bytes).unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    // The acknowledgement, and an alert of TLS at most.
    assert!(answer.len() >= 20 && answer.get(20).is_none_or(|kind| *kind == 21), "{answer:?}");
    let mut junk = half_open(root);
    junk.write_all(&[0xff; 1000]).unwrap();
    let _ = junk.read_to_end(&mut Vec::new());
    assert!(is_let_in(root, "cli"));
    assert!(server.end("-TERM").success());
}
