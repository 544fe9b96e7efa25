//! Runs third-party programs as test oracles: QEMU's tools, e2fsprogs, 7-Zip. If one is missing, the test
//! prints a skip, or fails if [`REQUIRE`] is set.

use std::ffi::OsStr;
use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// The environment variable that turns a missing program into a failure, when set to anything but `0`.
pub const REQUIRE: &str = "QCOW2_REQUIRE_TOOLS";

/// Time limit for one run; the program is then killed and the test fails. QEMU's tools loop for ever on some
/// damaged images.
pub const TIME_LIMIT: Duration = Duration::from_secs(120);

/// An installed program.
#[derive(Clone, Debug)]
pub struct Tool {
    program: PathBuf,
}

impl Tool {
    /// Looks `name` up on the search path. If it is missing, prints `skipped: NAME not found` and returns
    /// `None`, and the calling test should return; panics instead if [`REQUIRE`] is set.
    pub fn find(name: &str) -> Option<Self> {
        let found = search(name).map(|program| Self { program });
        if found.is_none() {
            skip(&format!("{name} not found"));
        }
        found
    }

    /// Like [`find`](Self::find), for a program with several names.
    pub fn find_any(names: &[&str]) -> Option<Self> {
        let found = names.iter().find_map(|name| search(name)).map(|program| Self { program });
        if found.is_none() {
            skip(&format!("{} not found", names.join(" or ")));
        }
        found
    }

    /// The program at this path, such as one that cargo built.
    pub fn at(program: impl Into<PathBuf>) -> Self {
        Self { program: program.into() }
    }

    /// Path of the program.
    pub fn path(&self) -> &Path {
        &self.program
    }

    /// Runs the program in `folder` with `args` and waits for its end. Panics if it cannot be started or runs
    /// longer than [`TIME_LIMIT`].
    pub fn run_in<A: AsRef<OsStr>>(&self, folder: &Path, args: &[A]) -> Outcome {
        self.run_within(folder, args, TIME_LIMIT).unwrap_or_else(|late| panic!("{late}"))
    }

    /// Like [`run_in`](Self::run_in) with a time limit of the caller's. Errors: the program ran longer and
    /// was killed; the text names its command line.
    pub fn run_within<A: AsRef<OsStr>>(
        &self,
        folder: &Path,
        args: &[A],
        limit: Duration,
    ) -> Result<Outcome, String> {
        let mut command = Command::new(&self.program);
        command.args(args).current_dir(folder).stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).env("LC_ALL", "C");
        let shown: Vec<_> = args.iter().map(|arg| arg.as_ref().to_string_lossy().into_owned()).collect();
        let shown = format!("{} {}", self.program.display(), shown.join(" "));
        let child = command.spawn().unwrap_or_else(|e| panic!("cannot start {shown}: {e}"));
        wait(child, shown, limit)
    }
}

/// QEMU's image tools.
#[derive(Clone, Debug)]
pub struct Qemu {
    /// `qemu-img`.
    pub img: Tool,
    /// `qemu-io`.
    pub io: Tool,
}

impl Qemu {
    /// Both tools, or a printed skip; see [`Tool::find`].
    pub fn find() -> Option<Self> {
        Some(Self { img: Tool::find("qemu-img")?, io: Tool::find("qemu-io")? })
    }
}

/// Prints that a test did not run because of `reason`; panics if [`REQUIRE`] is set.
#[allow(clippy::print_stdout, reason = "a skip must be seen")]
pub fn skip(reason: &str) {
    assert!(!required(), "{reason}, but {REQUIRE} is set");
    println!("skipped: {reason}");
}

/// True if a missing program is a failure.
pub fn required() -> bool {
    std::env::var_os(REQUIRE).is_some_and(|value| value != "0" && !value.is_empty())
}

/// The result of a run.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The command line, for messages.
    pub command: String,
    /// Exit code; `None` if a signal ended the program.
    pub code: Option<i32>,
    /// Standard output, invalid UTF-8 replaced.
    pub stdout: String,
    /// Standard error, invalid UTF-8 replaced.
    pub stderr: String,
    /// Run time.
    pub elapsed: Duration,
}

impl Outcome {
    /// Returns the outcome if the exit code is `code`; otherwise panics with all output.
    pub fn expect_code(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{self}");
        self
    }

    /// [`expect_code`](Self::expect_code) 0.
    pub fn success(self) -> Self {
        self.expect_code(0)
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}\nexit code: {:?}\nstdout:\n{}\nstderr:\n{}",
            self.command, self.code, self.stdout, self.stderr
        )
    }
}

fn search(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // mke2fs and e2fsck are in sbin, which is not on every user's search path.
    let extra = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(extra).map(|folder| folder.join(name)).find(|file| file.is_file())
}

fn wait(mut child: Child, command: String, limit: Duration) -> Result<Outcome, String> {
    let started = Instant::now();
    let stdout = child.stdout.take().map(|pipe| thread::spawn(move || drain(pipe)));
    let stderr = child.stderr.take().map(|pipe| thread::spawn(move || drain(pipe)));
    let mut pause = Duration::from_micros(200);
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if started.elapsed() < limit => thread::sleep(pause),
            outcome => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("{command}: no end after {limit:?} ({outcome:?})"));
            }
        }
        pause = (pause * 2).min(Duration::from_millis(10));
    };
    let text =
        |reader: Option<thread::JoinHandle<String>>| reader.and_then(|r| r.join().ok()).unwrap_or_default();
    let elapsed = started.elapsed();
    Ok(Outcome { command, code: status.code(), stdout: text(stdout), stderr: text(stderr), elapsed })
}

fn drain(mut pipe: impl Read) -> String {
    let mut bytes = Vec::new();
    let _ = pipe.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_captures_both_streams_and_the_exit_code() {
        let sh = Tool::find("sh").unwrap();
        let outcome = sh.run_in(Path::new("/"), &["-c", "echo out; echo err >&2; exit 3"]).expect_code(3);
        assert_eq!((outcome.stdout.as_str(), outcome.stderr.as_str()), ("out\n", "err\n"));
    }

    #[test]
    fn output_larger_than_a_pipe_does_not_block() {
        let sh = Tool::find("sh").unwrap();
        let outcome = sh.run_in(
            Path::new("/"),
            &["-c", "i=0; while [ $i -lt 20000 ]; do echo 0123456789; i=$((i+1)); done"],
        );
        assert_eq!(outcome.success().stdout.len(), 20_000 * 11);
    }

    #[test]
    fn a_program_past_the_time_limit_is_killed() {
        let child = Command::new("sleep").arg("60").spawn().unwrap();
        let late = wait(child, "sleep 60".to_owned(), Duration::from_millis(50)).unwrap_err();
        assert!(late.starts_with("sleep 60: no end after"), "{late}");
    }

    #[test]
    #[should_panic(expected = "exit code: Some(1)")]
    fn an_unexpected_exit_code_panics() {
        Tool::find("false").unwrap().run_in::<&str>(Path::new("/"), &[]).success();
    }
}
