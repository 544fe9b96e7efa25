//! What a rescue found, what it could not read, and what it only guesses.

use qcow2_core::HostOffset;
use std::fmt;

/// Ranges that are listed at most, of each kind; all are counted. Origin: ours.
pub const MAX_RANGES: usize = 100_000;

/// Where the header's facts come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeaderSource {
    /// The header itself.
    Found,
    /// The rest of the file, or options. The names of a backing file and a data file, and an encryption, are
    /// not known then.
    Derived,
}

/// Where the L1 table comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L1Source {
    /// Where the header, or the caller, says.
    Named(HostOffset),
    /// The table that was found there, by its shape.
    Found(HostOffset),
    /// There is none: L2 tables are placed by other evidence.
    None,
}

/// Why a range could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Reason {
    /// The L1 entry is damaged, and no table was found in its place.
    NoTable,
    /// The L2 table is past the end of the file.
    TablePastEnd,
    /// Where the L2 table was is something else now.
    TableDamaged,
    /// The L2 table is all zeroes, and there are clusters in use that no table maps.
    TableEmpty,
    /// The L2 table belongs to another range already.
    TableShared,
    /// The L2 entry is damaged.
    EntryDamaged,
    /// The cluster is past the end of the file.
    PastEnd,
    /// The cluster is metadata.
    Metadata,
    /// The compressed stream does not expand.
    StreamDamaged,
    /// The device cannot read it.
    Unreadable,
    /// It is in the backing file, which was not given.
    Backing,
    /// It is in the data file, which was not given.
    DataFile,
    /// It is encrypted, and there is no key.
    Encrypted,
}

impl Reason {
    /// A name for programs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NoTable => "no-table",
            Self::TablePastEnd => "table-past-end",
            Self::TableDamaged => "table-damaged",
            Self::TableEmpty => "table-empty",
            Self::TableShared => "table-shared",
            Self::EntryDamaged => "entry-damaged",
            Self::PastEnd => "cluster-past-end",
            Self::Metadata => "cluster-is-metadata",
            Self::StreamDamaged => "stream-damaged",
            Self::Unreadable => "unreadable",
            Self::Backing => "backing-file-not-given",
            Self::DataFile => "data-file-not-given",
            Self::Encrypted => "no-key",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoTable => "l1 entry is damaged and no l2 table was found for it",
            Self::TablePastEnd => "l2 table is past the end of the file",
            Self::TableDamaged => "l2 table was overwritten",
            Self::TableEmpty => "l2 table is all zeroes, and clusters are in use that no table maps",
            Self::TableShared => "l2 table belongs to another range",
            Self::EntryDamaged => "l2 entry is damaged",
            Self::PastEnd => "cluster is past the end of the file",
            Self::Metadata => "cluster is metadata",
            Self::StreamDamaged => "compressed stream is damaged",
            Self::Unreadable => "device cannot read it",
            Self::Backing => "is in the backing file, which was not given",
            Self::DataFile => "is in the data file, which was not given",
            Self::Encrypted => "is encrypted, and no key was given",
        })
    }
}

/// How it is known which range an L2 table maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Evidence {
    /// An entry of the L1 table.
    L1,
    /// A snapshot's L1 table has it there, and its refcount is higher than the snapshots make it.
    Shared,
    /// A snapshot's or an old L1 table has an entry there, whose table maps some of the same clusters.
    Overlap,
    /// The guest's data has a structure that says where on the disk it is.
    Content,
    /// The data is in a data file, at the offsets that it has on the disk.
    DataOffset,
    /// Its data is beside that of the range before or after it in the file: a guess, though a good one.
    Border,
    /// A snapshot's or an old L1 table has it there: a guess, the disk may have changed since.
    OldTable,
    /// The order of the tables in the file: a guess.
    Order,
}

impl Evidence {
    /// True if the place may be wrong.
    pub const fn is_guess(self) -> bool {
        matches!(self, Self::Border | Self::OldTable | Self::Order)
    }

    /// A name for programs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::L1 => "l1-entry",
            Self::Shared => "shared-with-snapshot",
            Self::Overlap => "overlap",
            Self::Content => "content",
            Self::DataOffset => "data-offset",
            Self::Border => "border",
            Self::OldTable => "old-l1-table",
            Self::Order => "order",
        }
    }
}

impl fmt::Display for Evidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::L1 => "an l1 entry",
            Self::Shared => "a snapshot's l1 table and the refcount, which tell that the disk has it too",
            Self::Overlap => "clusters it shares with an older table of that range",
            Self::Content => "a structure in the data that says where on the disk it is",
            Self::DataOffset => "offsets in the data file, which are those on the disk",
            Self::Border => "data that is beside that of a neighbouring range in the file",
            Self::OldTable => "a snapshot's or an old l1 table, and may be older",
            Self::Order => "the order of the tables in the file",
        })
    }
}

/// A range of guest bytes with what is to be said of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range<T> {
    /// The first byte.
    pub start: u64,
    /// How many.
    pub len: u64,
    /// What is to be said.
    pub what: T,
}

/// Ranges in guest order; neighbours of the same kind are one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ranges<T> {
    /// The first [`MAX_RANGES`] of them.
    pub listed: Vec<Range<T>>,
    /// How many are not listed.
    pub omitted: u64,
    /// Bytes of all.
    pub bytes: u64,
}

impl<T> Default for Ranges<T> {
    fn default() -> Self {
        Self { listed: Vec::new(), omitted: 0, bytes: 0 }
    }
}

impl<T: Copy + PartialEq> Ranges<T> {
    /// Adds a range behind all others.
    pub(super) fn push(&mut self, start: u64, len: u64, what: T) {
        if len == 0 {
            return;
        }
        self.bytes = self.bytes.saturating_add(len);
        let last = self.listed.last_mut().filter(|_| self.omitted == 0);
        if let Some(last) = last.filter(|last| last.what == what && last.start + last.len == start) {
            last.len += len;
        } else if self.listed.len() < MAX_RANGES {
            self.listed.push(Range { start, len, what });
        } else {
            self.omitted += 1;
        }
    }
}

/// What a rescue found.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RescueReport {
    /// Where the facts of the header come from.
    pub header: HeaderSource,
    /// Bytes of a cluster.
    pub cluster_size: u64,
    /// True for L2 entries with subclusters.
    pub extended_l2: bool,
    /// Bytes of the disk.
    pub size: u64,
    /// False if nothing tells the size; then it is as far as the tables reach.
    pub size_known: bool,
    /// True if the image stores refcounts that can be used.
    pub refcounts: bool,
    /// Where the L1 table comes from.
    pub l1: L1Source,
    /// Other L1 tables, of snapshots or old ones, which can be named to read them instead. The first 1,000.
    pub other_l1: Vec<HostOffset>,
    /// L2 tables that are used.
    pub tables: u64,
    /// L2 tables without a place, and the bytes that they map.
    pub unplaced: (u64, u64),
    /// What could not be read.
    pub lost: Ranges<Reason>,
    /// Tables whose place is not given by the L1 table, with the evidence.
    pub placed: Ranges<(Evidence, HostOffset)>,
}

impl RescueReport {
    /// True if every byte of the disk was read, none of them by a guess.
    pub fn is_complete(&self) -> bool {
        let guessed = self.placed.listed.iter().any(|range| range.what.0.is_guess());
        let known = self.size_known && self.unplaced.0 == 0 && self.placed.omitted == 0;
        known && self.lost.bytes == 0 && !guessed
    }
}
