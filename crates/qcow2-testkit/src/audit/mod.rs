//! An image checker that shares no code with the engine: it counts references and compares them with
//! refcounts, straight from the bytes. Entries are decoded with qcow2-format, whose own bugs are caught by
//! that crate's tests and by QEMU's tools.
//!
//! It is stricter than `qemu-img check` where a crash must not do damage: two owners of one cluster are a
//! problem even if the refcount is two. Unless the dirty bit is set, no refcount may be below the number of
//! references (a crash may leak, never share), and the copied flag must be set exactly when the refcount is
//! one.

mod extras;
mod header;
mod refcounts;

use crate::pages::PageBytes;
use header::RawHeader;
use qcow2_format::l1::{self, L1Entry};
use qcow2_format::l2::{L2Entry, L2Format};
use refcounts::Refcounts;

/// Class of a problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProblemKind {
    /// The header cannot be parsed.
    Header,
    /// A table, entry or descriptor violates the format or lies outside the file.
    Broken,
    /// Two owners reference one cluster that they may not share.
    Shared,
    /// A refcount is below the number of references, and the dirty bit is not set.
    CountTooLow,
    /// The copied flag is set on a cluster with several references: an in-place write would change all of
    /// them.
    CopiedWhileShared,
    /// The copied flag differs from "refcount is one" in a way that is harmless so far.
    CopiedMismatch,
}

/// One problem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Its class.
    pub kind: ProblemKind,
    /// What was found, and where.
    pub message: String,
}

/// The result of an audit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Audit {
    /// The dirty bit is set: refcounts below the references, and copied flags that follow them, are then no
    /// problem.
    pub dirty: bool,
    /// The corrupt bit is set.
    pub corrupt: bool,
    /// There are persistent bitmaps marked as consistent.
    pub bitmaps: bool,
    /// How many bitmaps are marked in use.
    pub bitmaps_in_use: u64,
    /// Clusters whose refcount is above their references.
    pub leaks: u64,
    /// Clusters whose refcount is below their references, whether or not that is a problem.
    pub low_counts: u64,
    /// All problems in the order they were found; at most [`MAX_PROBLEMS`].
    pub problems: Vec<Problem>,
}

/// Later problems are dropped.
pub const MAX_PROBLEMS: usize = 50;

impl Audit {
    /// True without any problem; leaks are allowed.
    pub fn is_sound(&self) -> bool {
        self.problems.is_empty()
    }

    /// True if a problem of `kind` was found.
    pub fn has(&self, kind: ProblemKind) -> bool {
        self.problems.iter().any(|problem| problem.kind == kind)
    }

    fn problem(&mut self, kind: ProblemKind, message: impl Into<String>) {
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(Problem { kind, message: message.into() });
        }
    }
}

/// Audits `image`, the bytes of a whole qcow2 file. `data_len`: length of its external data file, if it has
/// one.
pub fn audit(image: &PageBytes, data_len: Option<u64>) -> Audit {
    let mut audit = Audit::default();
    let header = match RawHeader::parse(image) {
        Ok(header) => header,
        Err(message) => {
            audit.problem(ProblemKind::Header, message);
            return audit;
        }
    };
    audit.dirty = header.dirty;
    audit.corrupt = header.corrupt;
    audit.bitmaps = header.bitmaps.is_some();
    let clusters = header.l2.geometry.clusters_for(image.len()) as usize;
    let mut walk = Walk { image, header: &header, data_len, audit, owners: vec![Owned::default(); clusters] };
    walk.own(0, 1, Owner::Header);
    let counts = walk.refcounts();
    walk.l1(header.l1_offset, header.l1_entries, true);
    walk.extras();
    walk.compare(&counts);
    walk.copied_flags(&counts);
    walk.audit
}

/// What a host cluster is used for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Owner {
    #[default]
    Nobody,
    Header,
    RefcountTable,
    RefcountBlock,
    ActiveL1,
    InactiveL1,
    L2,
    Data,
    Compressed,
    SnapshotTable,
    Bitmap,
    Crypt,
}

#[derive(Clone, Copy, Debug, Default)]
struct Owned {
    owner: Owner,
    references: u64,
    /// References from the active L1 table and its L2 tables.
    active: u64,
}

struct Walk<'a> {
    image: &'a PageBytes,
    header: &'a RawHeader,
    data_len: Option<u64>,
    audit: Audit,
    owners: Vec<Owned>,
}

impl Walk<'_> {
    fn format(&self) -> L2Format {
        self.header.l2
    }

    fn cluster_size(&self) -> u64 {
        self.header.l2.geometry.cluster_size()
    }

    /// Big-endian 64-bit words from `offset` on; words past the end of the file are 0.
    fn words(&self, offset: u64, count: u64) -> Vec<u64> {
        read_words(self.image, offset, count)
    }

    /// Records that `owner` uses `count` clusters from byte `offset` on. False if one lies outside the file.
    fn own(&mut self, offset: u64, count: u64, owner: Owner) -> bool {
        self.own_for(offset, count, owner, false)
    }

    fn own_for(&mut self, offset: u64, count: u64, owner: Owner, active: bool) -> bool {
        let first = offset / self.cluster_size();
        let end = first.checked_add(count);
        if end.is_none_or(|end| end > self.owners.len() as u64) {
            let message = format!("{owner:?}: {count} clusters at {offset:#x} pass the end of the file");
            self.audit.problem(ProblemKind::Broken, message);
            return false;
        }
        for index in first..first + count {
            let owned = &mut self.owners[index as usize];
            let shareable = match owner {
                Owner::Compressed => true,
                // Several L1 tables may reference it, but the active one only once.
                Owner::L2 | Owner::Data => !(active && owned.active > 0),
                _ => false,
            };
            if owned.references > 0 && !(shareable && owned.owner == owner) {
                let message = format!("cluster {index}: used as {:?} and as {owner:?}", owned.owner);
                self.audit.problem(ProblemKind::Shared, message);
            }
            owned.owner = owner;
            owned.references += 1;
            owned.active += u64::from(active);
        }
        true
    }

    fn l1(&mut self, offset: u64, entries: u64, active: bool) {
        if entries == 0 {
            return;
        }
        let geometry = self.format().geometry;
        if !geometry.is_aligned(offset) {
            self.audit
                .problem(ProblemKind::Broken, format!("l1 table at {offset:#x} is not cluster aligned"));
            return;
        }
        let owner = if active { Owner::ActiveL1 } else { Owner::InactiveL1 };
        if !self.own(offset, geometry.clusters_for(entries * 8), owner) {
            return;
        }
        for (index, raw) in self.words(offset, entries).into_iter().enumerate() {
            if l1::reserved_bits(raw) != 0 {
                self.audit
                    .problem(ProblemKind::Broken, format!("l1 entry {index}: reserved bits in {raw:#x}"));
            }
            match L1Entry::decode(raw, &geometry) {
                Ok(entry) => {
                    if let Some(table) = entry.l2_table {
                        self.l2(table.value(), index as u64, active);
                    }
                }
                Err(error) => self.audit.problem(ProblemKind::Broken, format!("l1 entry {index}: {error}")),
            }
        }
    }

    fn l2(&mut self, offset: u64, l1_index: u64, active: bool) {
        if !self.own_for(offset, 1, Owner::L2, active) {
            return;
        }
        let format = self.format();
        for (index, raw, bitmap) in l2_words(self.image, format, offset) {
            let guest = (l1_index * format.geometry.l2_entries() + index) * self.cluster_size();
            if format.reserved_bits(raw) != 0 {
                let message = format!("l2 entry of guest {guest:#x}: reserved bits in {raw:#x}");
                self.audit.problem(ProblemKind::Broken, message);
            }
            match format.decode(raw, bitmap) {
                Ok(L2Entry::Standard(entry)) => {
                    if let Some(host) = entry.host {
                        self.data(host.value(), guest, active);
                    }
                }
                Ok(L2Entry::Compressed(stream)) => {
                    self.compressed(stream.host.value(), stream.len, raw, active);
                }
                Err(error) => {
                    self.audit.problem(ProblemKind::Broken, format!("l2 entry of guest {guest:#x}: {error}"));
                }
            }
        }
    }

    fn data(&mut self, host: u64, guest: u64, active: bool) {
        if !self.format().external_data {
            self.own_for(host, 1, Owner::Data, active);
        } else if host != guest {
            let message =
                format!("guest {guest:#x}: mapped to {host:#x} of the data file, allowed is the same offset");
            self.audit.problem(ProblemKind::Broken, message);
        } else if self.data_len.is_some_and(|len| host >= len) {
            let message = format!("guest {guest:#x}: past the end of the data file");
            self.audit.problem(ProblemKind::Broken, message);
        }
    }

    fn compressed(&mut self, host: u64, len: u64, raw: u64, active: bool) {
        if self.format().external_data || L2Format::has_copied_flag(raw) {
            let message =
                format!("compressed entry {raw:#x}: has the copied flag, or the image has a data file");
            self.audit.problem(ProblemKind::Broken, message);
        }
        // The file may end inside the last sector of the last stream, but not before its cluster.
        let first = host / self.cluster_size();
        let last = (host + len - 1) / self.cluster_size();
        self.own_for(first * self.cluster_size(), last - first + 1, Owner::Compressed, active);
    }

    /// Compares every refcount with the references.
    fn compare(&mut self, counts: &Refcounts) {
        for (index, owned) in self.owners.iter().enumerate() {
            let count = counts.of(index as u64);
            if count > owned.references {
                self.audit.leaks += 1;
            } else if count < owned.references {
                self.audit.low_counts += 1;
                if !self.header.dirty && self.audit.problems.len() < MAX_PROBLEMS {
                    let Owned { owner, references, .. } = owned;
                    let message =
                        format!("cluster {index} ({owner:?}): refcount {count}, references {references}");
                    self.audit.problems.push(Problem { kind: ProblemKind::CountTooLow, message });
                }
            }
        }
        self.audit.leaks += counts.counted_from(self.owners.len() as u64);
    }

    /// Compares the copied flags in the active tables with the refcounts.
    fn copied_flags(&mut self, counts: &Refcounts) {
        let format = self.format();
        let l1 = self.words(self.header.l1_offset, self.header.l1_entries);
        for (index, raw) in l1.into_iter().enumerate() {
            let Ok(L1Entry { l2_table: Some(table), copied }) = L1Entry::decode(raw, &format.geometry) else {
                continue;
            };
            self.copied_flag(table.value(), copied, counts, || format!("l1 entry {index}"));
            for (slot, raw, bitmap) in l2_words(self.image, format, table.value()) {
                let Ok(L2Entry::Standard(entry)) = format.decode(raw, bitmap) else { continue };
                let Some(host) = entry.host else { continue };
                let place = || format!("l2 entry {slot} of l1 entry {index}");
                if !format.external_data {
                    self.copied_flag(host.value(), entry.copied, counts, place);
                } else if !entry.copied {
                    self.audit.problem(ProblemKind::CopiedMismatch, format!("{}: not copied", place()));
                }
            }
        }
    }

    fn copied_flag(&mut self, host: u64, copied: bool, counts: &Refcounts, place: impl Fn() -> String) {
        let index = host / self.cluster_size();
        let Some(owned) = self.owners.get(index as usize) else { return };
        let count = counts.of(index);
        if copied && owned.references > 1 {
            let message = format!("{}: copied, cluster {index} has {} references", place(), owned.references);
            self.audit.problem(ProblemKind::CopiedWhileShared, message);
        } else if copied != (count == 1) && !self.header.dirty {
            let message = format!("{}: copied is {copied}, cluster {index} has refcount {count}", place());
            self.audit.problem(ProblemKind::CopiedMismatch, message);
        }
    }
}

/// Big-endian 64-bit words from `offset` on; words past the end of the file are 0.
fn read_words(image: &PageBytes, offset: u64, count: u64) -> Vec<u64> {
    let mut bytes = vec![0; count as usize * 8];
    image.read(offset, &mut bytes);
    bytes.as_chunks::<8>().0.iter().map(|word| u64::from_be_bytes(*word)).collect()
}

/// The nonzero entries of an L2 table: index, first word, second word (0 without extended L2 entries).
fn l2_words(image: &PageBytes, format: L2Format, offset: u64) -> Vec<(u64, u64, u64)> {
    let step = (format.geometry.l2_entry_size() / 8) as usize;
    let words = read_words(image, offset, format.geometry.cluster_size() / 8);
    let entries = words.chunks(step).enumerate();
    let used = entries.filter(|(_, words)| words.iter().any(|&word| word != 0));
    used.map(|(index, words)| (index as u64, words[0], words.get(1).copied().unwrap_or(0))).collect()
}

#[cfg(test)]
mod tests;
