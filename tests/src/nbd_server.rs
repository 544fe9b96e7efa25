//! Servers of others, which are stopped when a test is over.

use crate::side_by_side::words;
use qcow2_testkit::oracle::Tool;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// A server on a Unix socket. It is stopped when dropped.
pub struct NbdServer {
    child: Child,
    socket: PathBuf,
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.socket);
    }
}

impl NbdServer {
    /// qemu-nbd, in `folder`, with the words of `options`. Prints a skip and returns `None` if it is missing.
    pub fn qemu_nbd(folder: &Path, socket: &Path, options: &str) -> Option<Self> {
        let mut command = Command::new(Tool::find("qemu-nbd")?.path());
        command.args(["-t", "-e", "8", "-k"]).arg(socket).args(words(options));
        Some(Self::start(command, folder, socket))
    }

    /// The same for nbdkit.
    pub fn nbdkit(folder: &Path, socket: &Path, options: &str) -> Option<Self> {
        let mut command = Command::new(Tool::find("nbdkit")?.path());
        command.args(["-f", "-U"]).arg(socket).args(words(options));
        Some(Self::start(command, folder, socket))
    }

    fn start(mut command: Command, folder: &Path, socket: &Path) -> Self {
        // What a server thinks of broken connections is of no interest.
        command.current_dir(folder).stdin(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().expect("a server that starts");
        let started = Instant::now();
        while !socket.exists() {
            let ended = child.try_wait().expect("the state of a child");
            assert!(ended.is_none(), "the server has ended: {command:?}");
            assert!(started.elapsed() < Duration::from_secs(60), "the server does not listen: {command:?}");
            thread::sleep(Duration::from_millis(20));
        }
        Self { child, socket: socket.to_owned() }
    }

    /// Stops it now.
    pub fn stop(&mut self) {
        self.child.kill().expect("a server that runs");
        self.child.wait().expect("a server that ends");
    }
}
