//! The report as text for people.

use super::report::{HeaderSource, L1Source, Range, Ranges, RescueReport};
use std::fmt;

impl fmt::Display for RescueReport {
    /// A line for each fact, and for each range that is lost or has a table whose place the L1 table does not
    /// tell. Each line ends.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let extended = if self.extended_l2 { ", extended l2 entries" } else { "" };
        let header = match self.header {
            HeaderSource::Found => "found",
            HeaderSource::Derived => "lost; names and features are not known",
        };
        writeln!(f, "header: {header}")?;
        writeln!(f, "clusters: {} bytes{extended}", self.cluster_size)?;
        let known =
            if self.size_known { "" } else { ", as far as the tables reach; the real size is not known" };
        writeln!(f, "disk: {} bytes{known}", self.size)?;
        match self.l1 {
            L1Source::Named(at) => writeln!(f, "l1 table: at {at}")?,
            L1Source::Found(at) => writeln!(f, "l1 table: found at {at}")?,
            L1Source::None => writeln!(f, "l1 table: lost")?,
        }
        for at in &self.other_l1 {
            writeln!(f, "other l1 table: at {at}")?;
        }
        let counts = if self.refcounts { "" } else { "; no refcounts tell which are in use" };
        writeln!(f, "l2 tables: {}{counts}", self.tables)?;
        if self.unplaced.0 > 0 {
            writeln!(f, "l2 tables without a place: {}, mapping {} bytes", self.unplaced.0, self.unplaced.1)?;
        }
        list(f, "placed without the l1 table", &self.placed, |f, (evidence, table)| {
            let kind = if evidence.is_guess() { "guessed" } else { "proved" };
            write!(f, "l2 table at {table}, {kind} by {evidence}")
        })?;
        list(f, "lost", &self.lost, |f, reason| write!(f, "{reason}"))
    }
}

fn list<T: Copy>(
    f: &mut fmt::Formatter<'_>,
    title: &str,
    ranges: &Ranges<T>,
    what: impl Fn(&mut fmt::Formatter<'_>, T) -> fmt::Result,
) -> fmt::Result {
    if ranges.bytes == 0 {
        return Ok(());
    }
    writeln!(f, "{title}: {} bytes", ranges.bytes)?;
    for &Range { start, len, what: of } in &ranges.listed {
        write!(f, "  {start:#x}: {len} bytes: ")?;
        what(f, of)?;
        writeln!(f)?;
    }
    match ranges.omitted {
        0 => Ok(()),
        omitted => writeln!(f, "  and {omitted} more ranges"),
    }
}
