//! Tables with entries of varying length: the snapshot table and the bitmap directory, read a window at a
//! time.

use super::{TablePlace, Walk};
use crate::error::Result;
use ::alloc::collections::BTreeSet;
use ::alloc::string::String;
use ::alloc::vec::Vec;
use qcow2_format::bitmap::Bitmap;
use qcow2_format::header::Version;
use qcow2_format::snapshot::{MAX_ENTRY_LEN, MIN_EXTRA_V3, ParsedSnapshot, Snapshot};
use qcow2_format::{FormatError, HostOffset, limit};

/// What is wrong with the snapshot table or an entry of it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SnapshotFault {
    /// The header has more snapshots than allowed. The table was not read.
    TooMany {
        /// The number in the header.
        count: u32,
    },
    /// The table is not cluster aligned or ends past 2^63 - 1. It was not read.
    Misplaced {
        /// The offset in the header.
        offset: HostOffset,
    },
    /// An entry cannot be parsed, or the entries so far exceed 64 MiB. The rest of the table was not read.
    Unreadable {
        /// The entry's index.
        index: u32,
        /// What is wrong with the entry; `None` if the table is too large.
        error: Option<FormatError>,
    },
    /// A version 3 entry lacks required fields.
    Incomplete {
        /// The entry's index.
        index: u32,
    },
    /// The snapshot's L1 table is not cluster aligned.
    L1Misaligned {
        /// The snapshot's id and name.
        snapshot: (String, String),
        /// The offset in the entry.
        offset: HostOffset,
    },
    /// The snapshot's L1 table is larger than 32 MiB.
    L1TooLarge {
        /// The snapshot's id and name.
        snapshot: (String, String),
        /// The number of entries that the snapshot's entry gives.
        entries: u32,
    },
}

/// What is wrong with the bitmap directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapFault {
    /// The bitmap's index.
    pub index: u32,
    /// What is wrong with its entry.
    pub error: FormatError,
}

/// The snapshot table, as far as a reference count needs it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotTable {
    /// Bytes of the table.
    pub len: u64,
    /// The L1 tables of all snapshots that have a usable one.
    pub l1_tables: Vec<TablePlace>,
}

impl Walk<'_> {
    /// Reads the snapshot table and calls `fault` for everything wrong in it. Returns `None` if it cannot be
    /// read to its end: the references of the snapshots are then unknown. Errors: `Storage`.
    pub fn snapshots(&self, fault: &mut dyn FnMut(SnapshotFault)) -> Result<Option<SnapshotTable>> {
        let (count, offset) = (self.header.nb_snapshots, self.header.snapshots_offset);
        if count > limit::MAX_SNAPSHOTS {
            fault(SnapshotFault::TooMany { count });
            return Ok(None);
        }
        if !self.geometry().is_aligned(offset.value()) || offset.value() > limit::MAX_FILE_OFFSET {
            fault(SnapshotFault::Misplaced { offset });
            return Ok(None);
        }
        let mut table = SnapshotTable::default();
        let mut records = Records::new(self, offset, None);
        for index in 0..count {
            let parsed = records.next(|bytes| {
                let parsed = Snapshot::parse(bytes, self.header.disk_size())?;
                let len = parsed.len;
                Ok((parsed, len))
            })?;
            let unreadable = match parsed {
                Ok(_) if records.consumed > limit::MAX_SNAPSHOT_TABLE_SIZE => None,
                Ok(parsed) => {
                    self.snapshot_entry(index, parsed, &mut table, fault);
                    continue;
                }
                Err(error) => Some(error),
            };
            fault(SnapshotFault::Unreadable { index, error: unreadable });
            return Ok(None);
        }
        table.len = records.consumed;
        Ok(Some(table))
    }

    fn snapshot_entry(
        &self,
        index: u32,
        parsed: ParsedSnapshot,
        table: &mut SnapshotTable,
        fault: &mut dyn FnMut(SnapshotFault),
    ) {
        if parsed.extra_len < MIN_EXTRA_V3 && self.header.version >= Version::V3 {
            fault(SnapshotFault::Incomplete { index });
        }
        let snapshot = parsed.snapshot;
        let name = || (snapshot.id_text(), snapshot.name_text());
        let (offset, entries) = (snapshot.l1_table_offset, snapshot.l1_size);
        if !self.geometry().is_aligned(offset.value()) {
            fault(SnapshotFault::L1Misaligned { snapshot: name(), offset });
        } else if u64::from(entries) > limit::MAX_L1_ENTRIES {
            fault(SnapshotFault::L1TooLarge { snapshot: name(), entries });
        } else {
            table.l1_tables.push(TablePlace { offset, entries: entries.into() });
        }
    }

    /// Reads the bitmap directory, if its autoclear bit is set, and checks its entries as an open does.
    /// Returns offset and length of each bitmap's table, and the first fault, if any: the one that ended the
    /// reading, or else a name that two bitmaps have or a table where no file ends.
    /// Errors: `Storage`.
    pub fn bitmaps(&self) -> Result<(Vec<TablePlace>, Option<BitmapFault>)> {
        let mut tables = Vec::new();
        let Some(directory) = self.header.trusted_bitmaps() else { return Ok((tables, None)) };
        let (mut passed, mut names) = (None, BTreeSet::new());
        let mut records = Records::new(self, directory.directory_offset, Some(directory.directory_size));
        for index in 0..directory.count {
            if records.consumed == directory.directory_size {
                let error = Bitmap::wrong_count(index, directory.count);
                return Ok((tables, Some(BitmapFault { index, error })));
            }
            let judged = records.next(Bitmap::parse)?.and_then(|bitmap| {
                let disk_size = self.header.disk_size();
                bitmap.validate(self.geometry(), disk_size)?;
                bitmap.validate_table_size(self.geometry(), disk_size)?;
                Ok(bitmap)
            });
            match judged {
                Ok(bitmap) => {
                    tables.push(TablePlace {
                        offset: bitmap.table_offset,
                        entries: bitmap.table_entries.into(),
                    });
                    // The entries after it can be read all the same.
                    let known = bitmap.same_name();
                    let unique = if names.insert(bitmap.name.clone()) { Ok(()) } else { Err(known) };
                    let error = unique.and(bitmap.validate_table_place()).err();
                    passed = passed.or(error.map(|error| BitmapFault { index, error }));
                }
                Err(error) => return Ok((tables, Some(BitmapFault { index, error }))),
            }
        }
        let fault = (records.consumed < directory.directory_size).then(|| BitmapFault {
            index: directory.count,
            error: Bitmap::wrong_count(directory.count.saturating_add(1), directory.count),
        });
        Ok((tables, passed.or(fault)))
    }
}

/// Reads entries of varying length in sequence through a window of the file.
struct Records<'a> {
    walk: &'a Walk<'a>,
    /// End of the window in the file.
    at: HostOffset,
    /// Bytes of the table after the window; `None` if the table's length is unknown.
    left: Option<u64>,
    window: Vec<u8>,
    /// How much of the window is used up.
    used: usize,
    /// Bytes of all entries so far.
    consumed: u64,
}

/// Bytes of the window; larger than any accepted entry.
const WINDOW: usize = 256 << 10;
const _: () = assert!(WINDOW > MAX_ENTRY_LEN);

impl<'a> Records<'a> {
    fn new(walk: &'a Walk<'a>, at: HostOffset, left: Option<u64>) -> Self {
        Self { walk, at, left, window: Vec::new(), used: 0, consumed: 0 }
    }

    /// The next entry as `parse` reads it from the start of the window, or the parser's error.
    fn next<T>(
        &mut self,
        parse: impl Fn(&[u8]) -> Result<(T, usize), FormatError>,
    ) -> Result<Result<T, FormatError>> {
        let mut parsed = parse(&self.window[self.used..]);
        if parsed.is_err() && self.fill()? {
            parsed = parse(&self.window[self.used..]);
        }
        Ok(parsed.map(|(entry, len)| {
            self.used += len;
            debug_assert!(self.used <= self.window.len(), "an entry is longer than what was read");
            self.consumed += len as u64;
            entry
        }))
    }

    /// Moves the window so that it starts with the next entry. Returns false if it cannot get longer.
    fn fill(&mut self) -> Result<bool> {
        self.window.drain(..self.used);
        self.used = 0;
        let kept = self.window.len();
        let room = (WINDOW - kept) as u64;
        let more = self.left.map_or(room, |left| left.min(room));
        if more == 0 {
            return Ok(false);
        }
        self.window.resize(kept + more as usize, 0);
        self.walk.read(self.at, &mut self.window[kept..])?;
        self.at = HostOffset::new(self.at.value().saturating_add(more));
        self.left = self.left.map(|left| left - more);
        Ok(true)
    }
}
