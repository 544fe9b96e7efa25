//! Which bytes of a file a process has locked, and a qemu-io that keeps an image open meanwhile.
#![cfg(target_os = "linux")]

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// The bytes of `path` on which process `pid` holds locks (of open file descriptions), from the locks that
/// the kernel lists for each of its descriptors.
///
/// `/proc/locks` would not do: it knows inode numbers only, which files elsewhere share, and while other
/// processes lock and unlock, one read of it may give a lock twice.
///
/// # Errors
///
/// If the process or the file is not there.
pub fn locked_bytes(pid: u32, path: &Path) -> io::Result<BTreeSet<u64>> {
    use std::os::unix::fs::MetadataExt;
    let inode = format!(":{}", std::fs::metadata(path)?.ino());
    let mut bytes = BTreeSet::new();
    for descriptor in std::fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        // A descriptor may be closed meanwhile: in our own process, the one that lists the folder is.
        let Ok(text) = std::fs::read_to_string(descriptor?.path()) else { continue };
        for lock in text.lines().filter_map(|line| line.strip_prefix("lock:")) {
            let words: Vec<&str> = lock.split_whitespace().collect();
            if words[1] == "OFDLCK" && words[5].ends_with(&inode) {
                let byte = |word: &str| word.parse::<u64>().map_err(io::Error::other);
                bytes.extend(byte(words[6])?..=byte(words[7])?);
            }
        }
    }
    Ok(bytes)
}

/// A qemu-io (or a program like it) that keeps an image open until it is dropped.
#[derive(Debug)]
pub struct Holder(Child);

impl Holder {
    /// Starts `program` with `args` in `folder`, and returns once the image is open.
    ///
    /// # Errors
    ///
    /// If the program cannot be started or does not open the image.
    pub fn new<S: AsRef<OsStr>>(
        program: &Path,
        folder: &Path,
        args: impl IntoIterator<Item = S>,
    ) -> io::Result<Self> {
        let mut command = Command::new(program);
        command.args(args).current_dir(folder).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut holder = Self(command.spawn()?);
        let (Some(input), Some(output)) = (&mut holder.0.stdin, &mut holder.0.stdout) else {
            return Err(io::Error::other("no pipe"));
        };
        input.write_all(b"length\n")?;
        // The answer comes once the image is open, which it stays until the input ends.
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line)?;
        if line.contains("iB") || line.contains("bytes") {
            return Ok(holder);
        }
        Err(io::Error::other(format!("instead of a length: {line:?}")))
    }

    /// The bytes of `path` that it has locked; see [`locked_bytes`].
    ///
    /// # Errors
    ///
    /// As [`locked_bytes`].
    pub fn locked_bytes(&self, path: &Path) -> io::Result<BTreeSet<u64>> {
        locked_bytes(self.0.id(), path)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}
