//! What a copy has done, and what it has lost.

use crate::source::SECTOR;

/// The result of a copy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CopyReport {
    /// Guest bytes written as data.
    pub data_bytes: u64,
    /// Guest bytes copied by the storages (copy offload); included in `data_bytes`.
    pub offloaded_bytes: u64,
    /// Guest bytes zeroed because the target might have held other data.
    pub zeroed_bytes: u64,
    /// Clusters stored compressed; not included in `data_bytes`.
    pub compressed_clusters: u64,
    /// Ranges that could not be read and are now zero, in guest order; at most 1,000 are listed.
    pub unreadable: Vec<Unreadable>,
    /// Number of unreadable sectors.
    pub unreadable_sectors: u64,
}

/// A range of the source that could not be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    /// Guest offset of the first byte.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// The error with its causes, as text.
    pub reason: String,
    /// The operating system's error number, if it was a storage that failed.
    pub os_code: Option<i32>,
    /// The tables did not tell where it is stored; otherwise only its bytes could not be read.
    pub unmapped: bool,
}

impl CopyReport {
    /// Tells what could not be read, a line each. With `each_sector` as qemu-img does: a line for every
    /// sector, and unmapped ones three times, for their place when the data is measured and for both when it
    /// is copied; otherwise a line for each range and the number of sectors. `words`: the text of an error
    /// number; `None`: of damaged tables.
    pub fn tell_losses(
        &self,
        each_sector: bool,
        words: &dyn Fn(Option<i32>) -> String,
        tell: &mut dyn FnMut(&str),
    ) {
        if !each_sector {
            for Unreadable { offset, len, reason, .. } in &self.unreadable {
                tell(&format!("error while reading at byte {offset} ({len} bytes): {reason}"));
            }
            if self.unreadable_sectors > 0 {
                tell(&format!("{} sectors could not be read and are zeroes now", self.unreadable_sectors));
            }
            return;
        }
        let sectors = |lost: &Unreadable| (lost.offset..lost.offset + lost.len).step_by(SECTOR as usize);
        let line = |what: &str, at, lost: &Unreadable| {
            format!("error while reading {what}offset {at}: {}", words(lost.os_code))
        };
        for lost in self.unreadable.iter().filter(|lost| lost.unmapped) {
            sectors(lost).for_each(|at| tell(&line("block status at ", at, lost)));
        }
        for lost in &self.unreadable {
            for at in sectors(lost) {
                if lost.unmapped {
                    tell(&line("block status at ", at, lost));
                }
                tell(&line("", at, lost));
            }
        }
    }
}
