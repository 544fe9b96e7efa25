//! A server in the background: the program starts itself again, waits until clients can connect, and ends.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

/// Set in the environment of the background process.
const MARK: &str = "QCOW2_SERVE_IN_BACKGROUND";

/// Whether this process is the one in the background.
pub fn is_here() -> bool {
    std::env::var_os(MARK).is_some()
}

/// Starts this program again, as `called` and with the same arguments. Returns the exit code for this
/// process: 0 once the other one has called [`detach`], or that of the other one if it ends before. What it
/// complains of goes where this process's complaints go.
pub fn start(called: &str) -> io::Result<u8> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg0(called).args(std::env::args_os().skip(1)).env(MARK, "1");
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let mut line = String::new();
    if let Some(out) = child.stdout.take() {
        BufReader::new(out).read_line(&mut line)?;
    }
    if line == READY {
        return Ok(0);
    }
    let code = child.wait()?.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.filter(|code| *code != 0).unwrap_or(1))
}

/// Tells the process in the foreground that clients can connect, and lets go of its terminal and outputs.
pub fn detach() -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(READY.as_bytes()).and_then(|()| out.flush())?;
    let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
    // Fails for the leader of a group, which was started by nobody that has a terminal to take away.
    let _ = rustix::process::setsid();
    rustix::stdio::dup2_stdout(&null)?;
    Ok(rustix::stdio::dup2_stderr(&null)?)
}

/// Writes the number of this process to the file `path`.
pub fn write_pid(path: &Path) -> io::Result<()> {
    std::fs::write(path, format!("{}\n", std::process::id()))
}

const READY: &str = "ready\n";
