//! Copies of one folder for test runs that change files. A copy is reused: only the files that the previous
//! run changed are copied again.

use qcow2_testkit::oracle::Tool;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Metadata};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

/// The copies of a folder.
pub struct Copies {
    start: PathBuf,
    root: PathBuf,
    made: Mutex<usize>,
    idle: Mutex<Vec<FolderCopy>>,
}

/// One copy, equal to the folder until a test changes it.
pub struct FolderCopy {
    path: PathBuf,
    stamps: BTreeMap<String, Stamp>,
    /// When the last of its files was written.
    ready: Instant,
}

/// The files of a copy at one moment.
#[derive(PartialEq, Eq)]
pub struct FolderState(BTreeMap<String, Stamp>);

/// What the system updates when a file changes: length, modification time, and (inode, ctime).
type Stamp = (u64, Option<SystemTime>, (u64, i64, i64));

/// Longer than the granularity of file timestamps: a change after this delay gets a different time.
const CLOCK_STEP: Duration = Duration::from_millis(20);

impl Copies {
    /// Copies of `start`, to be created in `root`.
    pub fn new(start: PathBuf, root: PathBuf) -> Self {
        Self { start, root, made: Mutex::default(), idle: Mutex::default() }
    }

    /// A copy that equals the folder.
    pub fn take(&self) -> FolderCopy {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let copy = idle.unwrap_or_else(|| {
            let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
            *made += 1;
            let path = self.root.join(format!("copy-{made}"));
            copy_folder(&self.start, &path);
            FolderCopy { stamps: stamps(&path), path, ready: Instant::now() }
        });
        thread::sleep(CLOCK_STEP.saturating_sub(copy.ready.elapsed()));
        copy
    }

    /// Takes a copy back for reuse, and records what was changed in it.
    pub fn give_back(&self, mut copy: FolderCopy) {
        let changed = copy.changed();
        for name in &changed {
            let path = copy.path.join(name);
            match fs::symlink_metadata(&path) {
                Ok(data) if data.is_dir() => fs::remove_dir_all(&path).expect("a folder of this run"),
                Ok(_) => fs::remove_file(&path).expect("a file of this run"),
                Err(_) => {}
            }
            let original = self.start.join(name);
            if original.exists() {
                copy_folder(&original, &path);
            }
        }
        if !changed.is_empty() {
            (copy.stamps, copy.ready) = (stamps(&copy.path), Instant::now());
        }
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(copy);
    }
}

impl FolderCopy {
    /// Path of the copy.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What its files are like now: two of these differ if a file was changed in between.
    pub fn state(&self) -> FolderState {
        FolderState(stamps(&self.path))
    }

    /// Names of the files that were changed, created or removed in it.
    pub fn changed(&self) -> BTreeSet<String> {
        let now = stamps(&self.path);
        let names = now.keys().chain(self.stamps.keys());
        names.filter(|&name| now.get(name) != self.stamps.get(name)).cloned().collect()
    }
}

fn stamps(folder: &Path) -> BTreeMap<String, Stamp> {
    let stamp = |data: Metadata| (data.len(), data.modified().ok(), number_and_change(&data));
    let entries = fs::read_dir(folder).expect("a folder of the test");
    let entries = entries.map(|entry| entry.expect("an entry of the test's folder"));
    let named = entries.map(|entry| {
        let data = entry.path().symlink_metadata().expect("an entry of the test's folder");
        (entry.file_name().to_string_lossy().into_owned(), stamp(data))
    });
    named.collect()
}

#[cfg(unix)]
fn number_and_change(data: &Metadata) -> (u64, i64, i64) {
    use std::os::unix::fs::MetadataExt;
    (data.ino(), data.ctime(), data.ctime_nsec())
}

#[cfg(not(unix))]
fn number_and_change(_: &Metadata) -> (u64, i64, i64) {
    (0, 0, 0)
}

/// Copies a file, or a folder with its content; keeps holes, since some images are about holes.
pub fn copy_folder(from: &Path, to: &Path) {
    let args = ["-a".as_ref(), "--sparse=always".as_ref(), from.as_os_str(), to.as_os_str()];
    Tool::find("cp").expect("cp").run_in(Path::new("."), &args).success();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reused_copy_equals_the_folder_again() {
        let root = std::env::temp_dir().join(format!("copies-{}", std::process::id()));
        let start = root.join("start");
        fs::create_dir_all(start.join("dir")).unwrap();
        for name in ["same", "longer", "other", "gone", "moved"] {
            fs::write(start.join(name), name).unwrap();
        }
        let copies = Copies::new(start.clone(), root.clone());
        for _ in 0..2 {
            let copy = copies.take();
            assert!(copy.changed().is_empty());
            let at = |name: &str| copy.path().join(name);
            fs::write(at("longer"), "much longer").unwrap();
            fs::write(at("other"), "OTHER").unwrap();
            fs::remove_file(at("gone")).unwrap();
            fs::rename(at("moved"), at("away")).unwrap();
            fs::write(at("new"), "").unwrap();
            fs::write(at("dir").join("inner"), "").unwrap();
            let changed: Vec<String> = copy.changed().into_iter().collect();
            assert_eq!(changed, ["away", "dir", "gone", "longer", "moved", "new", "other"]);
            copies.give_back(copy);
        }
        let copy = copies.take();
        let files = |folder: &Path| {
            let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
            let content = |path: PathBuf| (path.file_name().unwrap().to_owned(), fs::read(&path).ok());
            names.map(content).collect::<BTreeMap<_, _>>()
        };
        assert_eq!(files(copy.path()), files(&start));
        assert_eq!(fs::read_dir(copy.path().join("dir")).unwrap().count(), 0);
        assert_eq!(*copies.made.lock().unwrap(), 1);
        fs::remove_dir_all(&root).unwrap();
    }
}
