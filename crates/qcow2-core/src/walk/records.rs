//! Tables whose entries differ in length: the snapshot table and the bitmap directory, read a window at a
//! time.

use super::{TablePlace, Walk};
use crate::error::Result;
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
    /// The header counts more snapshots than there may be. The table was not read.
    TooMany {
        /// How many it counts.
        count: u32,
    },
    /// The table is not cluster aligned or ends past 2^63 - 1. It was not read.
    Misplaced {
        /// Where the header says it is.
        offset: HostOffset,
    },
    /// An entry cannot be read, or the entries so far pass 64 MiB. The rest of the table was not read.
    Unreadable {
        /// The entry's index.
        index: u32,
        /// Why; `None` where the table is too large.
        error: Option<FormatError>,
    },
    /// A version 3 entry lacks fields that it must have.
    Incomplete {
        /// The entry's index.
        index: u32,
    },
    /// The snapshot's L1 table is not cluster aligned.
    L1Misaligned {
        /// The snapshot's id and name.
        snapshot: (String, String),
        /// Where the entry says the table is.
        offset: HostOffset,
    },
    /// The snapshot's L1 table is larger than 32 MiB.
    L1TooLarge {
        /// The snapshot's id and name.
        snapshot: (String, String),
        /// How many entries it would have.
        entries: u32,
    },
}

/// What is wrong with the bitmap directory; nothing after it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapFault {
    /// The bitmap's index.
    pub index: u32,
    /// What is wrong with its entry.
    pub error: FormatError,
}

/// The snapshot table as far as references go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotTable {
    /// Bytes of the table.
    pub len: u64,
    /// The L1 tables of all snapshots that have a usable one.
    pub l1_tables: Vec<TablePlace>,
}

impl Walk<'_> {
    /// Reads the snapshot table, telling `fault` what is wrong. `None` where it cannot be read to its end:
    /// then nobody knows what the snapshots refer to. Errors: `Storage`.
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

    /// Reads the bitmap directory, where there is a trusted one, and judges its entries as an open does.
    /// Returns the place of each bitmap's table and what stopped the reading. Errors: `Storage`.
    pub fn bitmaps(&self) -> Result<(Vec<TablePlace>, Option<BitmapFault>)> {
        let mut tables = Vec::new();
        let Some(directory) = self.header.trusted_bitmaps() else { return Ok((tables, None)) };
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
                Ok(bitmap) => tables
                    .push(TablePlace { offset: bitmap.table_offset, entries: bitmap.table_entries.into() }),
                Err(error) => return Ok((tables, Some(BitmapFault { index, error }))),
            }
        }
        let fault = (records.consumed < directory.directory_size).then(|| BitmapFault {
            index: directory.count,
            error: Bitmap::wrong_count(directory.count.saturating_add(1), directory.count),
        });
        Ok((tables, fault))
    }
}

/// Reads entries of any length one after the other through a window of the file.
struct Records<'a> {
    walk: &'a Walk<'a>,
    /// Where the window's bytes end in the file.
    at: HostOffset,
    /// Bytes of the table behind the window; `None` where its end is not known.
    left: Option<u64>,
    window: Vec<u8>,
    /// How much of the window is used up.
    used: usize,
    /// Bytes of all entries so far.
    consumed: u64,
}

/// Bytes of the window; more than any entry that is accepted.
const WINDOW: usize = 256 << 10;
const _: () = assert!(WINDOW > MAX_ENTRY_LEN);

impl<'a> Records<'a> {
    fn new(walk: &'a Walk<'a>, at: HostOffset, left: Option<u64>) -> Self {
        Self { walk, at, left, window: Vec::new(), used: 0, consumed: 0 }
    }

    /// The next entry as `parse` reads it from the front of the bytes, or why it cannot.
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

    /// Moves the window on so that it starts with the next entry. False where that brings nothing.
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
