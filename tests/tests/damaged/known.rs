//! What no operation has business with: it stays byte for byte.

use crate::layout::Layout;
use qcow2_testkit::pages::PageBytes;

/// Tables as they were right after the damage.
pub(crate) struct Known {
    /// The fields of the header that say what the rest of the image means.
    fields: Vec<u8>,
    /// Id, offset and bytes of the L1 tables of snapshots: they are copies, and never change.
    snapshots: Vec<(Vec<u8>, u64, Vec<u8>)>,
    /// The refcount table: blocks never move, but for another width of refcounts.
    blocks: Vec<u64>,
}

impl Known {
    /// Those of an image.
    pub(crate) fn read(bytes: &PageBytes) -> Self {
        let layout = Layout::read(bytes);
        // The header is written in place, and a file may grow over what is past its end.
        let inside = |at: u64, table: &[u8]| at > 0 && at + table.len() as u64 <= bytes.len();
        let snapshots = layout.snapshot_tables().filter(|(_, at, table)| inside(*at, table));
        let snapshots = snapshots.map(|(id, at, table)| (id.to_vec(), at, table)).collect();
        Self { fields: fields(bytes), snapshots, blocks: layout.refcount_table().to_vec() }
    }

    /// The refcounts may have another width now, in other blocks.
    pub(crate) fn amended(&mut self) {
        self.blocks.clear();
    }

    /// A snapshot is gone; another one may get its id, and the place of its table.
    pub(crate) fn deleted(&mut self, id: &[u8]) {
        self.snapshots.retain(|(old, ..)| old != id);
    }

    /// What of it has changed.
    pub(crate) fn check(&self, now: &PageBytes) -> Result<(), String> {
        if fields(now) != self.fields {
            return Err("the header has other fields".to_owned());
        }
        let layout = Layout::read(now);
        for (id, at, table) in layout.snapshot_tables() {
            let name = String::from_utf8_lossy(id);
            let known = self.snapshots.iter().find(|(old, place, _)| old == id && *place == at);
            if known.is_some_and(|(.., old)| *old != table) {
                return Err(format!("the l1 table of snapshot {name} at {at:#x} has changed"));
            }
        }
        let blocks = self.blocks.iter().zip(layout.refcount_table());
        match blocks.enumerate().find(|(_, (old, new))| **old != 0 && old != new) {
            Some((index, (old, new))) => Err(format!("refcount block {index} was {old:#x} and is {new:#x}")),
            None => Ok(()),
        }
    }
}

/// Signature, cluster size and encryption.
fn fields(bytes: &PageBytes) -> Vec<u8> {
    let mut header = [0; 104];
    bytes.read(0, &mut header);
    [&header[..4], &header[20..24], &header[32..36]].concat()
}
