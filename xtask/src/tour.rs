//! Converts, changes and checks a sample disk: every command is printed, run on real files, and its result
//! checked.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Size of the sample in bytes if there is no `mke2fs` to make a file system.
const PLAIN_SAMPLE_LEN: usize = 64 << 20;

/// Builds the command and runs the tour: convert, inspect, overlay, write, check, and back to the same bytes.
pub(crate) fn run(root: &Path) -> Result<(), String> {
    let tour = Tour::new(root)?;
    tour.make_sample()?;
    say("Convert a raw disk to qcow2: zeroes are not stored; the second image is compressed.");
    tour.qcow2("convert -p -f raw -O qcow2 disk.raw disk.qcow2")?;
    tour.qcow2("convert -c -f raw -O qcow2 disk.raw compressed.qcow2")?;
    tour.qcow2("compare -f raw -F qcow2 disk.raw disk.qcow2")?;
    say("Write to an overlay; its backing file stays unchanged.");
    tour.qcow2("create -f qcow2 -b disk.qcow2 -F qcow2 overlay.qcow2")?;
    tour.qcow2_with("io", &["-c", "write -P 0x41 1M 64k", "-c", "read -P 0x41 1M 64k", "overlay.qcow2"])?;
    tour.qcow2("info overlay.qcow2")?;
    tour.qcow2("map overlay.qcow2")?;
    tour.qcow2("check overlay.qcow2")?;
    tour.qcow2("check disk.qcow2")?;
    say("Convert back to raw and compare.");
    tour.qcow2("convert -f qcow2 -O raw compressed.qcow2 back.raw")?;
    tour.finish()
}

/// Builds the command in `profile` and returns its path.
pub(crate) fn build(root: &Path, profile: &str) -> Result<PathBuf, String> {
    let mut build = Command::new(crate::cargo());
    build.args(["build", "--profile", profile, "--locked", "--package", "qcow2-cli"]).current_dir(root);
    succeed(&mut build, "cargo build")?;
    Ok(target(root).join(profile).join("qcow2"))
}

fn target(root: &Path) -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from)
}

struct Tour {
    program: PathBuf,
    folder: PathBuf,
}

impl Tour {
    fn new(root: &Path) -> Result<Self, String> {
        say("Building the command without optimisation, which takes a third of the time.");
        let program = build(root, "quick")?;
        let folder = target(root).join("tour");
        if folder.exists() {
            fs::remove_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        }
        fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        Ok(Self { program, folder })
    }

    /// Makes a file system with this workspace's sources, or plain bytes if `mke2fs` is missing.
    fn make_sample(&self) -> Result<(), String> {
        let Some(mke2fs) = crate::find_program("mke2fs") else {
            say("mke2fs was not found: the sample is a plain file.");
            return self.write(&sample_bytes(PLAIN_SAMPLE_LEN));
        };
        say("A sample: a disk of 1 GiB with an ext4 file system, this workspace's crates in it.");
        let crates = concat!(env!("CARGO_MANIFEST_DIR"), "/../crates");
        let args = ["-q", "-t", "ext4", "-d", crates, "disk.raw", "1G"];
        println!("$ mke2fs -q -t ext4 -d crates disk.raw 1G");
        succeed(Command::new(mke2fs).args(args).current_dir(&self.folder), "mke2fs")
    }

    fn write(&self, bytes: &[u8]) -> Result<(), String> {
        fs::write(self.folder.join("disk.raw"), bytes).map_err(|e| format!("disk.raw: {e}"))
    }

    fn qcow2(&self, line: &str) -> Result<(), String> {
        let words: Vec<_> = line.split(' ').collect();
        self.qcow2_with(words[0], &words[1..])
    }

    fn qcow2_with(&self, verb: &str, args: &[&str]) -> Result<(), String> {
        let quoted: Vec<_> =
            args.iter().map(|a| if a.contains(' ') { format!("'{a}'") } else { (*a).to_owned() }).collect();
        println!("$ qcow2 {verb} {}", quoted.join(" "));
        let mut command = Command::new(&self.program);
        succeed(command.arg(verb).args(args).current_dir(&self.folder), &format!("qcow2 {verb}"))
    }

    fn finish(&self) -> Result<(), String> {
        if !same_bytes(&self.folder.join("disk.raw"), &self.folder.join("back.raw"))? {
            return Err("back.raw differs from disk.raw".to_owned());
        }
        println!("disk.raw and back.raw are equal, byte for byte.");
        if let Some(e2fsck) =
            crate::find_program("e2fsck").filter(|_| crate::find_program("mke2fs").is_some())
        {
            println!("$ e2fsck -fn back.raw");
            succeed(Command::new(e2fsck).args(["-fn", "back.raw"]).current_dir(&self.folder), "e2fsck")?;
        }
        say("Sizes in bytes:");
        for name in ["disk.raw", "disk.qcow2", "compressed.qcow2", "overlay.qcow2"] {
            let len = fs::metadata(self.folder.join(name)).map_err(|e| format!("{name}: {e}"))?.len();
            println!("{len:>12}  {name}");
        }
        println!("\nThe files are in {}.", self.folder.display());
        Ok(())
    }
}

fn same_bytes(a: &Path, b: &Path) -> Result<bool, String> {
    let open = |path: &Path| File::open(path).map_err(|e| format!("{}: {e}", path.display()));
    let (mut a, mut b) = (open(a)?, open(b)?);
    let (mut left, mut right) = (Vec::new(), Vec::new());
    loop {
        for (file, piece) in [(&mut a, &mut left), (&mut b, &mut right)] {
            piece.clear();
            file.take(1 << 20).read_to_end(piece).map_err(|e| e.to_string())?;
        }
        if left != right || left.is_empty() {
            return Ok(left == right);
        }
    }
}

fn say(text: &str) {
    println!("\n# {text}");
}

/// Sample bytes: half repetitive, a quarter incompressible, a quarter zero.
fn sample_bytes(len: usize) -> Vec<u8> {
    let mut state = 1u64;
    let mut bytes = vec![0; len];
    for (at, byte) in bytes.iter_mut().enumerate() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        *byte = match at >> 20 & 3 {
            0 => 0,
            1 => (state >> 56) as u8,
            _ => (at >> 8) as u8,
        };
    }
    bytes
}

/// Runs `command`, called `name` in errors, and waits for it to succeed.
pub(crate) fn succeed(command: &mut Command, name: &str) -> Result<(), String> {
    let status = command.stdin(Stdio::null()).status().map_err(|e| format!("cannot run {name}: {e}"))?;
    if status.success() { Ok(()) } else { Err(format!("{name}: {status}")) }
}
