//! The name qemu-nbd: command lines that are refused, in the reference's words.

use super::{OURS, Server, folder, wait_for};
use qcow2_testkit::oracle::Tool;
use std::collections::BTreeSet;
use std::os::unix::fs::symlink;

/// Every line is refused before anybody can connect.
const REFUSED: &[&str] = &[
    "",
    "-v",
    "disk disk",
    "nofile",
    "-f qcow2 nofile",
    "-f bogus disk",
    "-f luks disk",
    "--image-opts driver=qcow2,file.filename=nofile",
    "--image-opts -f raw disk",
    "--bogus disk",
    "-P 1 disk",
    "-k",
    "--port",
    "--ver",
    "-k relative disk",
    "-t -k relative disk disk",
    "-k /nodir/s disk",
    "nofile -k /nodir/s",
    "-p x disk",
    "-p -1 disk",
    "-b 1.2.3.4 disk",
    "-e x disk",
    "-e -1 disk",
    "-e 1.5 disk",
    "-e 2000000000000 disk",
    "-e 0x10 -k /nodir/s disk",
    "--sh=2 -k /nodir/s disk",
    "--persist -k /nodir/s disk",
    "--cache=foo disk",
    "--cache=none -n disk",
    "--cache writeback --cache unsafe disk",
    "-n -n disk",
    "--aio=foo disk",
    "--aio threads --aio threads disk",
    "--aio=native disk",
    "--discard=foo disk",
    "--discard unmap --discard ignore disk",
    "--detect-zeroes=foo disk",
    "--detect-zeroes=unmap disk",
    "--detect-zeroes=unmap --discard=unmap disk",
    "-o x disk",
    "-o 20M disk",
    "-o 2000000000 disk",
    "--handshake-limit=x disk",
    "--handshake-limit=-1 disk",
    "-l none disk",
    "-s -l none disk",
    "-l snapshot.id=1 disk",
    "-l snapshot.foo=1 disk",
    "-B none disk",
    "--object foo,id=a disk",
    "--pid-file=/nodir/p disk",
    "-L",
    "-L disk",
    "-L -f raw",
    "-L -x a",
    "-L -A",
    "-L --discard=unmap",
    "--fork -L",
    "--fork --pid-file=/nodir/p disk",
    "--fork nofile",
    "--fork -k /nodir/s disk",
    "--help=x",
    "--versio=1",
    "-rq nofile",
    "-e 010 -f raw nofile",
    "-e 0x nofile",
    "-e 2147483648 nofile",
    "-o 18446744073709551616 nofile",
    "-o 1k nofile",
    "--fork=x disk",
    "-B a -B b nofile",
    "-l snapshot.name=a,foo=b disk",
    "--cache= nofile",
    "--aio= nofile",
    "--discard= nofile",
    "--detect-zeroes= nofile",
    "--handshake-limit= nofile",
    "--handshake-limit=4294967296 nofile",
    "--object secret nofile",
    "--object secret,id=a nofile",
    "--object secret,id=a,data=b,data=c nofile",
    "--object foo,id=a",
    "--object foo,id=a --bogus",
    "--object foo,id=a -k relative disk",
    "-k relative --object foo,id=a disk",
    "-L --object foo,id=a",
    "-T foo=bar --object foo,id=a",
    "--object secret,id=a,foo,help",
    "--object {\"qom-type\":\"secret\",\"id\":\"a\"} disk",
    "--object {\"qom-type\":\"secret\",\"id\":\"a\",\"data\":\"b\"} nofile",
    "--object {\"qom-type\":\"secret\",\"id\":\"a\",\"data\":5} disk",
    "--object {\"id\":\"a\"} disk",
    "--object {\"id\" disk",
    "-o -0 nofile",
    "-o -1 nofile",
    "-o +1 nofile",
    "-o -1 -f raw disk",
    "-o -0x10 -f raw disk",
    "-o +-1 disk",
    "-e -0 nofile",
    "-e +1 nofile",
    "--handshake-limit=-0 nofile",
    "--image-opts nofile",
    "--image-opts driver=foo",
    "-- -t nofile",
    "nofile --",
    "-d",
    "-c /dev/nbd0",
    "-L -c /dev/nbd0",
    "-L -t",
    "-L nofile extra",
    "--li",
    "--snapsh nofile",
    "--read-onl nofile",
];

/// The help is in words of ours, and names the options that the reference names.
#[test]
fn help_names_the_references_options() {
    let Some(reference) = Tool::find("qemu-nbd") else { return };
    let folder = folder();
    let link = folder.path().join("qemu-nbd");
    symlink(OURS, &link).unwrap();
    let [theirs, own] = [reference, Tool::at(&link)].map(|tool| {
        let text = tool.run_in(folder.path(), &["--help"]).success().stdout;
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '-');
        words.filter(|word| word.starts_with("--")).map(str::to_owned).collect::<BTreeSet<_>>()
    });
    assert_eq!(own.difference(&theirs).collect::<Vec<_>>(), [] as [&String; 0]);
    assert_eq!(theirs.difference(&own).collect::<Vec<_>>(), [] as [&String; 0]);
    let version = Tool::at(&link).run_in(folder.path(), &["--version"]).success().stdout;
    assert!(version.starts_with("qemu-nbd 10.0"), "{version}");
}

/// Help that an option asks for ends the line, whatever stands behind it. Of all kinds of objects there are
/// fewer here, and no trace events.
#[test]
fn help_of_options() {
    let Some(reference) = Tool::find("qemu-nbd") else { return };
    let folder = folder();
    let link = folder.path().join("qemu-nbd");
    symlink(OURS, &link).unwrap();
    let check = |line: &str, is_same: bool| {
        let args: Vec<&str> = line.split_whitespace().collect();
        let [theirs, own] =
            [&reference, &Tool::at(&link)].map(|tool| tool.run_in(folder.path(), &args).success());
        let lines = |text: &str| text.lines().map(str::to_owned).collect::<BTreeSet<_>>();
        let (theirs_told, own_told) = (lines(&theirs.stdout), lines(&own.stdout));
        assert!(own_told.is_subset(&theirs_told), "{line}: {}", own.stdout);
        assert!(!is_same || own.stdout == theirs.stdout, "{line}: {}", own.stdout);
        assert_eq!(own.stderr, theirs.stderr, "{line}");
    };
    for kind in ["authz-list", "authz-simple", "secret", "throttle-group", "tls-creds-x509"] {
        check(&format!("--object {kind},help"), true);
        check(&format!("-L --object id=a,qom-type={kind},? --bogus"), true);
    }
    for line in
        ["--object help", "--object ? disk", "-L --object foo,help -k relative", "-T help", "-T ? -k x"]
    {
        check(line, false);
    }
}

/// A port that somebody else listens on.
#[test]
fn a_port_in_use() {
    let Some(reference) = Tool::find("qemu-nbd") else { return };
    let folder = folder();
    let link = folder.path().join("qemu-nbd");
    symlink(OURS, &link).unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let args = ["-b", "127.0.0.1", "-p", &port, "disk"];
    let theirs = reference.run_in(folder.path(), &args).expect_code(1);
    let own = Tool::at(&link).run_in(folder.path(), &args).expect_code(1);
    assert_eq!(own.stderr, theirs.stderr);
}

#[test]
fn refusals_are_the_references() {
    let Some(reference) = Tool::find("qemu-nbd") else { return };
    let folder = folder();
    let root = folder.path();
    let link = root.join("qemu-nbd");
    symlink(OURS, &link).unwrap();
    let tool = Tool::at(&link);
    let mut wrong = Vec::new();
    for line in REFUSED {
        let args: Vec<&str> = line.split_whitespace().collect();
        // A line without a socket gets one: the default port may be in use.
        let socket = root.join("s").display().to_string();
        let mut args = args;
        let has_address = args.iter().any(|arg| ["-k", "-p", "--port", "-b"].contains(arg));
        if !has_address && !line.is_empty() {
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
}

/// Without -t the server leaves with its last client that had an export.
#[test]
fn the_last_client_takes_the_server_with_it() {
    let folder = folder();
    let mut server = Server::start_tool(folder.path(), &["-e", "2", "disk"]);
    // One that only looks whether anybody is there.
    drop(std::os::unix::net::UnixStream::connect(folder.path().join("s")).unwrap());
    let (one, other) = (server.connect(), server.connect());
    one.write(0, &[1; 512]);
    drop(one);
    assert_eq!(other.read(0, 512), [1; 512]);
    drop(other);
    assert!(server.wait().success());
    assert!(!folder.path().join("s").exists());
}

/// Trims do nothing by default, and something with --discard=unmap; written zeroes are found if wanted.
#[test]
fn discards_and_zeroes_reach_the_image_only_if_wanted() {
    let Some(io) = Tool::find("qemu-io") else { return };
    let write = "write -q -P 1 0 1M";
    for (args, commands, expected) in [
        (&[][..], &[write, "discard 0 1M"][..], "read -P 1 0 1M"),
        (&["--discard=unmap"], &[write, "discard 0 1M"], "read -P 0 0 1M"),
        (&["--detect-zeroes=on"], &[write, "write -q -P 0 0 1M"], "read -P 0 0 1M"),
        (&[], &[write, "write -q -z 0 64k"], "read -P 0 0 64k"),
    ] {
        let folder = folder();
        let root = folder.path();
        let mut server = Server::start_tool(root, &[args, &["disk"]].concat());
        let uri = server.uri();
        let commands: Vec<&str> = commands.iter().flat_map(|command| ["-c", command]).collect();
        io.run_in(root, &[&["-f", "raw"][..], &commands, &[&uri]].concat()).success();
        assert!(server.wait().success());
        io.run_in(root, &["-f", "qcow2", "-c", expected, "disk"]).success();
    }
}

/// The foreground ends when clients can connect; nobody waits for the background's outputs.
#[test]
fn a_server_in_the_background() {
    let folder = folder();
    let root = folder.path();
    let link = root.join("qemu-nbd");
    symlink(OURS, &link).unwrap();
    let socket = root.join("s").display().to_string();
    let started = Tool::at(&link).run_in(root, &["--fork", "--pid-file", "pid", "-k", &socket, "disk"]);
    assert_eq!((started.code, &*started.stdout, &*started.stderr), (Some(0), "", ""));
    let pid = std::fs::read_to_string(root.join("pid")).unwrap();
    let pid = pid.strip_suffix('\n').unwrap();
    let name = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
    assert!(name.starts_with(&link.display().to_string()), "{name}");
    let Some(info) = Tool::find("nbdinfo") else { return };
    let uri = format!("nbd+unix:///?socket={socket}");
    assert_eq!(info.run_in(root, &["--size", &uri]).success().stdout, "67108864\n");
    // It leaves with its last client.
    let begun = std::time::Instant::now();
    while root.join("s").exists() {
        assert!(begun.elapsed().as_secs() < 60, "the server stays");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

/// Our list of the reference's exports is the reference's, and so is its list of ours.
#[test]
fn exports_are_listed_alike() {
    let Some(reference) = Tool::find("qemu-nbd") else { return };
    let folder = folder();
    let root = folder.path();
    let link = root.join("qemu-nbd");
    symlink(OURS, &link).unwrap();
    let tool = Tool::at(&link);
    let socket = root.join("s").display().to_string();
    let both = || [&reference, &tool].map(|tool| tool.run_in(root, &["-L", "-k", &socket]).success().stdout);
    let mut theirs = std::process::Command::new(reference.path());
    theirs.args(["-t", "-e", "3", "-x", "name", "-D", "text", "-A", "-k", &socket, "disk"]).current_dir(root);
    let mut child = theirs.spawn().unwrap();
    wait_for(&root.join("s"), &mut child);
    let [expected, seen] = both();
    assert!(seen.contains("qemu:allocation-depth") && seen == expected, "{expected}{seen}");
    child.kill().unwrap();
    child.wait().unwrap();
    let _ = std::fs::remove_file(root.join("s"));
    let server = Server::start_tool(root, &["-t", "-r", "-D", "text", "-A", "disk"]);
    let [expected, seen] = both();
    assert!(seen.contains("readonly") && seen == expected, "{expected}{seen}");
    assert!(server.end("-TERM").success());
}
