//! Sockets that a service manager hands over.

use super::{Client, OURS, folder};
use qcow2_nbd::blocking::{Connection, Plain, negotiate};
use qcow2_nbd::client::{Negotiation, Step};
use qcow2_testkit::oracle::Tool;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// Starts `program` with `args` and `socket` as its descriptor 3, as a service manager does.
fn start(folder: &Path, program: &Path, args: &str, socket: OwnedFd) -> Child {
    let line = format!(
        "exec 3<&0 </dev/null; export LISTEN_FDS=1 LISTEN_PID=$$; exec '{}' {args}",
        program.display()
    );
    let mut command = Command::new("sh");
    command.args(["-c", &line]).current_dir(folder).stdin(socket).stdout(Stdio::null());
    command.spawn().unwrap()
}

fn connect(path: &Path) -> Client {
    let mut stream = UnixStream::connect(path).unwrap();
    let Step::Ready(export) = negotiate(&mut stream, Negotiation::with_export("")).unwrap() else {
        panic!("no export")
    };
    let connection = Connection::new(Plain(stream.try_clone().unwrap()), stream, export.mode);
    Client { connection, size: export.size }
}

/// Both names serve it, leave its file alone, and shut down what is theirs only: the manager's socket goes on
/// to take clients, for the next server.
#[test]
fn a_unix_socket_that_was_handed_over() {
    let folder = folder();
    let root = folder.path();
    let (link, path) = (root.join("qemu-nbd"), root.join("s"));
    symlink(OURS, &link).unwrap();
    let listener = UnixListener::bind(&path).unwrap();
    for (program, args) in [(link.as_path(), "-t disk"), (Path::new(OURS), "serve disk"), (&link, "disk")] {
        // The queue is there before the server is.
        let mut server = start(root, program, args, listener.try_clone().unwrap().into());
        let client = connect(&path);
        assert_eq!(client.size, 64 << 20);
        client.write(0, &[7; 512]);
        client.flush();
        assert_eq!(connect_if_many(args, &path, &client), [7; 512]);
        drop(client);
        if args != "disk" {
            let pid = server.id().to_string();
            assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        }
        assert!(server.wait().unwrap().success(), "{args}");
        assert!(path.exists());
    }
}

/// Clients of the manager's socket would wait for ever for a server that listens elsewhere.
#[test]
fn no_other_socket_beside_one_that_was_handed_over() {
    let folder = folder();
    for args in ["serve --socket other disk", "serve --listen localhost:0 disk"] {
        let line = format!("exec 3</dev/null; export LISTEN_FDS=1 LISTEN_PID=$$; exec '{OURS}' {args}");
        let refused = Tool::at("/bin/sh").run_in(folder.path(), &["-c", &line]).expect_code(1);
        assert!(refused.stderr.contains("LISTEN_FDS"), "{args}: {}", refused.stderr);
        assert!(!folder.path().join("other").exists());
    }
}

/// A second client, where the server takes two.
fn connect_if_many(args: &str, path: &Path, one: &Client) -> Vec<u8> {
    if args.starts_with("serve") { connect(path).read(0, 512) } else { one.read(0, 512) }
}

#[test]
fn a_tcp_socket_that_was_handed_over() {
    let folder = folder();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let mut server = start(folder.path(), Path::new(OURS), "serve disk", listener.into());
    let mut stream = TcpStream::connect(address).unwrap();
    assert!(matches!(negotiate(&mut stream, Negotiation::with_export("")).unwrap(), Step::Ready(_)));
    let pid = server.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    assert!(server.wait().unwrap().success());
}

/// Variables that are for another process, or are no numbers, hand nothing over; a descriptor that is none is
/// refused as by the reference.
#[test]
fn what_is_no_handed_over_socket() {
    let Some(reference) = Tool::find("qemu-nbd") else { return };
    let folder = folder();
    let root = folder.path();
    let link = root.join("qemu-nbd");
    symlink(OURS, &link).unwrap();
    let shell = Tool::at("/bin/sh");
    for variables in ["LISTEN_FDS=1 LISTEN_PID=1", "LISTEN_FDS=x LISTEN_PID=$$", "LISTEN_FDS=1 LISTEN_PID=$$"]
    {
        let [theirs, own] = [reference.path(), &link].map(|program| {
            let address = if variables.ends_with("1 LISTEN_PID=$$") { "" } else { "-k /nodir/s" };
            let line = format!("exec 3<&- ; export {variables}; exec '{}' {address} disk", program.display());
            shell.run_in(root, &["-c", &line])
        });
        assert_eq!((own.code, own.stderr), (theirs.code, theirs.stderr), "{variables}");
    }
}
