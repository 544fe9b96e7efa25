//! Copies of one folder for runs that change files: a copy is used again, and before that only what a run has
//! changed in it is copied anew.

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

/// One copy: as the folder was, until somebody changes it.
pub struct FolderCopy {
    path: PathBuf,
    stamps: BTreeMap<String, Stamp>,
    /// When the last of its files was put there.
    ready: Instant,
}

/// What the system changes with a file: its length, when it was written, its number and when it was last
/// changed in any way.
type Stamp = (u64, Option<SystemTime>, (u64, i64, i64));

/// Longer than the system's clock for files stands still: a change that comes later has another time.
const CLOCK_STEP: Duration = Duration::from_millis(20);

impl Copies {
    /// Copies of `start`, to be made in `root`.
    pub fn new(start: PathBuf, root: PathBuf) -> Self {
        Self { start, root, made: Mutex::default(), idle: Mutex::default() }
    }

    /// A copy that is as the folder is.
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

    /// Takes a copy back, and the changes in it.
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
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of what was changed, made or removed in it.
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

/// Copies a folder with what is in it, or a file; holes stay holes, which images may be about.
pub fn copy_folder(from: &Path, to: &Path) {
    let args = ["-a".as_ref(), "--sparse=always".as_ref(), from.as_os_str(), to.as_os_str()];
    Tool::find("cp").expect("cp").run_in(Path::new("."), &args).success();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_as_the_folder_was_whatever_was_done_to_it() {
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
