//! The server's process: in the background, and with its number in a file.

#[cfg(unix)]
use super::words::system_text;
#[cfg(unix)]
use crate::background;

/// What becomes of the server's process. Where the system has no unix, both are ignored.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Process {
    /// Serve in the background.
    pub forks: bool,
    /// Where to write the number of the process.
    pub pid_file: Option<String>,
}

impl Process {
    /// Starts the server in the background, by the name that this one was `called` by, unless this is it
    /// already or nobody wants that. Returns the exit code of the process that has started it. Errors: a
    /// text.
    pub fn start(&self, called: &str) -> Result<Option<u8>, String> {
        #[cfg(unix)]
        if self.forks && !background::is_here() {
            let code = background::start(called);
            return code.map(Some).map_err(|error| failed("Failed to fork", &error));
        }
        let _ = called;
        Ok(None)
    }

    /// Clients can connect: writes the file, and lets the process go that has started this one. Errors: a
    /// text.
    pub fn announce(&self) -> Result<(), String> {
        #[cfg(unix)]
        if let Some(path) = &self.pid_file {
            let written = background::write_pid(path.as_ref());
            written.map_err(|error| failed(&format!("Could not create '{path}'"), &error))?;
        }
        #[cfg(unix)]
        if self.forks {
            background::detach().map_err(|error| failed("Failed to daemonize", &error))?;
        }
        Ok(())
    }
}

#[cfg(unix)]
fn failed(what: &str, error: &std::io::Error) -> String {
    format!("{what}: {}", system_text(error))
}
