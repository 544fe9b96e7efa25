//! Runs the same lines with qemu-img and with our program, each in its own copy of a folder.

use super::{OURS, SECRETS};
use qcow2_testkit::oracle::{Outcome, Tool};
use qcow2_tests::side_by_side::words;
use std::fs;
use std::path::PathBuf;
use tempfile::TempDir;

/// Both programs and their folders.
pub(crate) struct Both {
    root: TempDir,
    qemu: Tool,
    ours: Tool,
}

impl Both {
    /// Runs the lines of `start` with qemu-img in one folder, and copies it. `None` if qemu-img is missing.
    pub(crate) fn new(start: &[&str]) -> Option<Self> {
        let qemu = Tool::find("qemu-img")?;
        let root = tempfile::tempdir().unwrap();
        let ours = root.path().join("qemu-img");
        std::os::unix::fs::symlink(OURS, &ours).unwrap();
        let both = Self { root, qemu, ours: Tool::at(ours) };
        fs::create_dir(both.folder("theirs")).unwrap();
        fs::create_dir(both.folder("ours")).unwrap();
        fs::write(both.folder("theirs").join("d.raw"), super::pattern::bytes(7, 0, 300_032)).unwrap();
        for line in start {
            both.qemu.run_in(&both.folder("theirs"), &with_secrets(line)).expect_code(0);
        }
        for entry in fs::read_dir(both.folder("theirs")).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), both.folder("ours").join(entry.file_name())).unwrap();
        }
        Some(both)
    }

    /// The folder of `who`: "theirs" or "ours".
    pub(crate) fn folder(&self, who: &str) -> PathBuf {
        self.root.path().join(who)
    }

    /// Runs `line` with both, which must give the same text and exit code. Returns our outcome.
    #[track_caller]
    pub(crate) fn line(&self, line: &str) -> Outcome {
        let words = with_secrets(line);
        let theirs = self.qemu.run_in(&self.folder("theirs"), &words);
        let ours = self.ours.run_in(&self.folder("ours"), &words);
        let said = |outcome: &Outcome| (outcome.code, outcome.stdout.clone(), outcome.stderr.clone());
        assert_eq!(said(&theirs), said(&ours), "{line}");
        ours
    }

    /// Runs `line` with both, which must succeed.
    #[track_caller]
    pub(crate) fn done(&self, line: &str) {
        self.line(line).expect_code(0);
    }

    /// Runs `command` with qemu-io on the image called `name` in both folders.
    #[track_caller]
    pub(crate) fn io_as(&self, name: &str, command: &str) {
        let io = Tool::find("qemu-io").expect("qemu-io beside qemu-img");
        for who in ["theirs", "ours"] {
            let words = [&SECRETS[..], &["--image-opts", name, "-c", command]].concat();
            io.run_in(&self.folder(who), &words).expect_code(0);
        }
    }

    /// The lines of `qemu-img info` on `file` that begin with `key`; the same in both folders.
    #[track_caller]
    pub(crate) fn told(&self, file: &str, key: &str) -> Vec<String> {
        let [theirs, ours] = ["theirs", "ours"].map(|who| {
            let said = self.qemu.run_in(&self.folder(who), &["info", file]).expect_code(0).stdout;
            let values = said.lines().filter_map(|line| line.trim().strip_prefix(key));
            values.map(|value| value.trim().to_owned()).collect::<Vec<_>>()
        });
        assert_eq!(theirs, ours, "{file}: {key}");
        ours
    }

    /// The image called `name` (options without the file), with `file` in both folders, must have the same
    /// content for qemu-img.
    #[track_caller]
    pub(crate) fn same(&self, name: &str, file: &str) {
        let [theirs, ours] = ["theirs", "ours"]
            .map(|who| format!("{name},file.filename={}", self.folder(who).join(file).display()));
        let line = format!("compare --image-opts {theirs} {ours}");
        self.qemu.run_in(&self.folder("ours"), &with_secrets(&line)).expect_code(0);
    }
}

/// The words of `line`, with the secrets after the verb.
fn with_secrets(line: &str) -> Vec<String> {
    let mut all = words(line);
    let rest = all.split_off(1);
    all.into_iter().chain(SECRETS.iter().map(|&word| word.to_owned())).chain(rest).collect()
}
