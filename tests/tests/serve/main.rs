//! `serve` and the name qemu-nbd: foreign clients, hostile ones, signals and kills.
#![cfg(target_os = "linux")]
#![allow(missing_docs, clippy::unwrap_used, clippy::print_stdout, reason = "a test may stop")]

mod activation;
mod clients;
mod control;
mod hostile;
mod kill;
mod libnbd;
mod tls;
mod tool;

use qcow2_nbd::blocking::{Connection, Job, Plain, Transfer, negotiate};
use qcow2_nbd::client::{Negotiation, Step};
use qcow2_nbd::proto::Command as NbdCommand;
use qcow2_testkit::oracle::Tool;
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-under-test");

/// A running `qcow2 serve`.
struct Server {
    child: Child,
    folder: PathBuf,
}

impl Server {
    /// Serves `args` on the socket `s` in `folder`; returns when clients can connect.
    fn start(folder: &Path, args: &[&str]) -> Self {
        let mut command = Command::new(OURS);
        command.args(["serve", "--socket", "s"]).args(args).current_dir(folder);
        let mut child = command.stdout(Stdio::piped()).stdin(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "listening on nbd+unix:///?socket=s\n");
        Self { child, folder: folder.to_owned() }
    }

    /// The same in a folder where a server was killed: it has left its sockets.
    fn start_again(folder: &Path, args: &[&str]) -> Self {
        for socket in ["s", "c"] {
            let _ = std::fs::remove_file(folder.join(socket));
        }
        Self::start(folder, args)
    }

    /// The same under the name qemu-nbd, with a socket that is waited for.
    fn start_tool(folder: &Path, args: &[&str]) -> Self {
        let mut command = Command::new(OURS);
        command.arg0("qemu-nbd").arg("-k").arg(folder.join("s")).args(args).current_dir(folder);
        let mut child = command.stdin(Stdio::null()).spawn().unwrap();
        wait_for(&folder.join("s"), &mut child);
        Self { child, folder: folder.to_owned() }
    }

    fn uri(&self) -> String {
        self.uri_of("")
    }

    fn uri_of(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.folder.join("s").display())
    }

    fn connect(&self) -> Client {
        let mut stream = UnixStream::connect(self.folder.join("s")).unwrap();
        let Step::Ready(export) = negotiate(&mut stream, Negotiation::with_export("")).unwrap() else {
            panic!("no export")
        };
        let connection = Connection::new(Plain(stream.try_clone().unwrap()), stream, export.mode);
        Client { connection, size: export.size }
    }

    fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([name, &pid]).status().unwrap().success());
    }

    /// Ends the server with `signal` and waits for it.
    fn end(mut self, signal: &str) -> ExitStatus {
        self.signal(signal);
        self.wait()
    }

    /// Ends the server at once.
    fn kill(mut self) {
        self.child.kill().unwrap();
        self.wait();
    }

    fn wait(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }

    /// Kibibytes of memory that are in use now.
    fn memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Only where a test has failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A client that panics at every error.
struct Client {
    connection: Connection<Plain<UnixStream>, UnixStream>,
    size: u64,
}

impl Client {
    fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut buf = vec![0x5a; len];
        let job = Job::new(NbdCommand::READ, offset, len as u64, Transfer::Receive(&mut buf));
        self.connection.run(&mut [job]).unwrap();
        buf
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let job = Job::new(NbdCommand::WRITE, offset, data.len() as u64, Transfer::Send(data));
        self.connection.run(&mut [job]).unwrap();
    }

    fn flush(&self) {
        self.connection.run(&mut [Job::new(NbdCommand::FLUSH, 0, 0, Transfer::None)]).unwrap();
    }
}

/// Waits until `server` listens on `socket`. The file of a socket is there a little earlier.
fn wait_for(socket: &Path, server: &mut Child) {
    let begun = Instant::now();
    while UnixStream::connect(socket).is_err() {
        assert!(begun.elapsed() < Duration::from_secs(60), "nobody listens");
        assert!(server.try_wait().unwrap().is_none(), "the server has ended");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A new folder with the qcow2 image `disk` of 64 MiB.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    ours(folder.path(), &["create", "-q", "-f", "qcow2", "disk", "64M"]);
    folder
}

fn ours(folder: &Path, args: &[&str]) -> String {
    Tool::at(OURS).run_in(folder, args).success().stdout
}
