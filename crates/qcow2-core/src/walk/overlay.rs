//! Overlapping tables: how many tables each byte belongs to.
//!
//! A hostile image may have 65536 snapshots whose L1 tables of 32 MiB overlap each other, or are all the
//! same. Entries of all tables lie at multiples of 8, so visiting each entry once, with the number of tables
//! it belongs to, replaces visiting every table.

use ::alloc::vec::Vec;
use qcow2_format::HostOffset;

/// A table of 8-byte entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TablePlace {
    /// Its first byte, a multiple of 8.
    pub offset: HostOffset,
    /// How many entries it has.
    pub entries: u64,
}

impl TablePlace {
    /// Bytes of the table.
    pub const fn len(&self) -> u64 {
        self.entries.saturating_mul(8)
    }

    /// True if the table has no entry.
    pub const fn is_empty(&self) -> bool {
        self.entries == 0
    }
}

/// A range of bytes that belong to the same number of tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Its first byte.
    pub offset: HostOffset,
    /// Its bytes, at least 1.
    pub len: u64,
    /// How many tables it belongs to, at least 1.
    pub times: u64,
}

/// Splits the union of `tables` into segments. Returns them in ascending order of offset, without overlap, at
/// most twice as many as tables. A table that would end past 2^64 - 1 is cut there.
pub fn overlay(tables: &[TablePlace]) -> Vec<Segment> {
    let mut edges: Vec<(u64, bool)> = Vec::with_capacity(tables.len() * 2);
    for table in tables {
        let start = table.offset.value();
        let end = start.saturating_add(table.len());
        if start < end {
            edges.extend([(start, true), (end, false)]);
        }
    }
    edges.sort_unstable();
    let mut segments: Vec<Segment> = Vec::new();
    let mut open = 0u64;
    let mut last = 0;
    for (at, opens) in edges {
        if open > 0 && at > last {
            segments.push(Segment { offset: HostOffset::new(last), len: at - last, times: open });
        }
        last = at;
        debug_assert!(opens || open > 0, "a table ends before it begins");
        open = if opens { open + 1 } else { open - 1 };
    }
    debug_assert_eq!(open, 0, "a table does not end");
    segments
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn place(offset: u64, entries: u64) -> TablePlace {
        TablePlace { offset: HostOffset::new(offset), entries }
    }

    fn segment(offset: u64, len: u64, times: u64) -> Segment {
        Segment { offset: HostOffset::new(offset), len, times }
    }

    #[test]
    fn equal_nested_and_touching_tables() {
        assert_eq!(overlay(&[]), []);
        assert_eq!(overlay(&[place(64, 0)]), []);
        assert_eq!(overlay(&[place(0, 2), place(0, 2)]), [segment(0, 16, 2)]);
        assert_eq!(
            overlay(&[place(0, 8), place(16, 2)]),
            [segment(0, 16, 1), segment(16, 16, 2), segment(32, 32, 1)]
        );
        assert_eq!(overlay(&[place(0, 1), place(8, 1)]), [segment(0, 8, 1), segment(8, 8, 1)]);
    }

    proptest! {
        #[test]
        fn segments_count_tables_per_byte(tables in proptest::collection::vec((0..20u64, 0..6u64), 0..12)) {
            let places: Vec<_> = tables.iter().map(|&(at, entries)| place(at * 8, entries)).collect();
            let mut expected: BTreeMap<u64, u64> = BTreeMap::new();
            for (at, entries) in tables {
                (at..at + entries).for_each(|word| *expected.entry(word * 8).or_default() += 1);
            }
            let mut found = BTreeMap::new();
            let mut end = 0;
            for s in overlay(&places) {
                prop_assert!(s.offset.value() >= end && s.len > 0);
                end = s.offset.value() + s.len;
                (s.offset.value()..end).step_by(8).for_each(|word| { found.insert(word, s.times); });
            }
            prop_assert_eq!(found, expected);
        }
    }
}
