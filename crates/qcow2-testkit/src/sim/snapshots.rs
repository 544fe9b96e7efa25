//! Which snapshots may exist after a power cut: the list before the change in flight or the list after it,
//! each snapshot with the content of the disk when it was taken.

use super::start::Start;
use crate::model::chain;
use crate::pattern;
use qcow2_core::{GuestOffset, Image, OpenOptions, Storage};
use std::sync::Arc;

/// A snapshot as it must be found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Taken {
    /// Its name, which is unique.
    pub(super) name: Vec<u8>,
    /// Content of the disk when it was taken.
    pub(super) content: Arc<Vec<u8>>,
}

/// The snapshots of a simulated image.
#[derive(Clone, Debug)]
pub(super) struct Snapshots {
    /// Lists that may be found; the last one is the current list.
    allowed: Vec<Vec<Taken>>,
    /// Content of the snapshot that is being applied.
    pub(super) going_back: Option<Arc<Vec<u8>>>,
    /// A change is in flight or has failed: copied flags may be missing.
    pub(super) careful: bool,
}

impl Default for Snapshots {
    fn default() -> Self {
        Self { allowed: vec![Vec::new()], going_back: None, careful: false }
    }
}

impl Snapshots {
    /// The current list.
    pub(super) fn now(&self) -> &[Taken] {
        self.allowed.last().map_or(&[], |list| list)
    }

    /// Records that a change to `list` begins.
    pub(super) fn start(&mut self, list: Vec<Taken>) {
        self.careful = true;
        self.allowed.push(list);
    }

    /// Records that the change has returned and left `list`.
    pub(super) fn finish(&mut self, list: Vec<Taken>) {
        self.careful = false;
        self.allowed = vec![list];
    }

    /// Checks that the snapshots of a crash image are one of the lists.
    pub(super) fn judge(&self, seen: &[Taken]) -> Result<(), String> {
        if self.allowed.iter().any(|list| list == seen) {
            return Ok(());
        }
        let names = |list: &[Taken]| {
            list.iter().map(|s| String::from_utf8_lossy(&s.name).into_owned()).collect::<Vec<_>>()
        };
        let allowed: Vec<_> = self.allowed.iter().map(|list| names(list)).collect();
        let wrong = seen.iter().find(|s| {
            self.allowed.iter().flatten().any(|other| other.name == s.name && other.content != s.content)
        });
        let content = wrong.map_or_else(String::new, |s| {
            format!("; {} has another content", String::from_utf8_lossy(&s.name))
        });
        Err(format!("snapshots {:?}, allowed {allowed:?}{content}", names(seen)))
    }
}

/// Reads every snapshot of the image on `storage`.
pub(super) fn read_all(
    start: &Start,
    image: &Image,
    storage: &Arc<dyn Storage>,
    options: &OpenOptions,
) -> Result<Vec<Taken>, String> {
    let snapshots = image.snapshots().map_err(|error| format!("snapshots do not read: {}", chain(&error)))?;
    let mut all = Vec::new();
    for (index, snapshot) in snapshots.into_iter().enumerate() {
        let source = start.source(Arc::clone(storage), None);
        let disk = Image::open_snapshot(source, options, |_| Some(index));
        let read = disk.and_then(|disk| {
            let mut content = pattern::unread(disk.size() as usize);
            disk.read_at(GuestOffset::new(0), &mut content).map(|()| content)
        });
        let content = read.map_err(|error| format!("snapshot {index} does not read: {}", chain(&error)))?;
        all.push(Taken { name: snapshot.name, content: Arc::new(content) });
    }
    Ok(all)
}
