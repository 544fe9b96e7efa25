//! Asking for a password on a terminal.

use qcow2_blockdev::AskPassword;
use qcow2_crypt::Secret;
use std::io::{self, BufRead, IsTerminal, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A person at the terminal, who is asked once for each name; nobody in place of qemu-img, which never asks.
#[derive(Debug)]
pub struct Terminal;

impl AskPassword for Terminal {
    fn is_possible(&self) -> bool {
        is_possible()
    }

    fn ask(&self, name: &str) -> Option<Secret> {
        ask(name)
    }

    fn forget(&self, name: &str) {
        answers().retain(|(asked, _)| asked != name);
    }
}

fn ask(name: &str) -> Option<Secret> {
    if !is_possible() {
        return None;
    }
    if let Some((_, secret)) = answers().iter().find(|(asked, _)| asked == name) {
        return Some(secret.clone());
    }
    // Asked only when nothing is shown any more: somebody may be quick.
    let line = without_echo(|| {
        let _ = write!(io::stderr().lock(), "Password for '{}': ", qcow2_report::human::escaped(name));
        let mut line = Vec::with_capacity(LONGEST_LINE);
        io::stdin().lock().read_until(b'\n', &mut line).ok().map(|_| line)
    });
    let _ = writeln!(io::stderr().lock());
    let mut line = line?;
    if line.last() == Some(&b'\n') {
        line.pop();
    }
    let secret = Secret::new(line);
    answers().push((name.to_owned(), secret.clone()));
    Some(secret)
}

fn is_possible() -> bool {
    let stands_in = std::env::args_os().next().is_some_and(|called| {
        std::path::Path::new(&called)
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("qemu-"))
    });
    !stands_in && io::stdin().is_terminal() && io::stderr().is_terminal()
}

/// What was answered, for images that are opened more than once.
fn answers() -> MutexGuard<'static, Vec<(String, Secret)>> {
    static ANSWERS: Mutex<Vec<(String, Secret)>> = Mutex::new(Vec::new());
    ANSWERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `read` while the terminal does not show what is typed.
#[cfg(unix)]
fn without_echo<T>(read: impl FnOnce() -> T) -> T {
    use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};
    let input = io::stdin();
    let Ok(shown) = tcgetattr(&input) else { return read() };
    let mut hidden = shown.clone();
    hidden.local_modes.remove(LocalModes::ECHO);
    let _ = tcsetattr(&input, OptionalActions::Flush, &hidden);
    let result = read();
    let _ = tcsetattr(&input, OptionalActions::Now, &shown);
    result
}

#[cfg(not(unix))]
fn without_echo<T>(read: impl FnOnce() -> T) -> T {
    read()
}

/// Room for a line, so that growing does not leave parts of a password in memory.
const LONGEST_LINE: usize = 4096;
