//! What a rescue found, as JSON.

use qcow2_ops::RescueReport;
use qcow2_ops::rescue::{HeaderSource, L1Source, Ranges};
use serde_json::{Value, json};

/// The report on the image called `filename`. `complete`: nothing is lost or guessed.
pub fn to_json(report: &RescueReport, filename: &str) -> Value {
    let (l1, l1_found) = match report.l1 {
        L1Source::Named(at) => (Some(at.value()), false),
        L1Source::Found(at) => (Some(at.value()), true),
        L1Source::None => (None, false),
    };
    json!({
        "filename": filename,
        "complete": report.is_complete(),
        "header-found": report.header == HeaderSource::Found,
        "cluster-size": report.cluster_size,
        "extended-l2": report.extended_l2,
        "virtual-size": report.size,
        "size-known": report.size_known,
        "refcounts-found": report.refcounts,
        "l1-table": l1,
        "l1-table-searched": l1_found,
        "other-l1-tables": report.other_l1.iter().map(|at| at.value()).collect::<Vec<_>>(),
        "l2-tables": report.tables,
        "unplaced-l2-tables": report.unplaced.0,
        "unplaced-bytes": report.unplaced.1,
        "lost-bytes": report.lost.bytes,
        "lost-omitted": report.lost.omitted,
        "lost": list(&report.lost, |reason| json!({"reason": reason.name()})),
        "placed-omitted": report.placed.omitted,
        "placed": list(&report.placed, |(evidence, table)| {
            json!({"evidence": evidence.name(), "guess": evidence.is_guess(), "l2-table": table.value()})
        }),
    })
}

/// Ranges of the disk, each with the fields that `what` makes.
fn list<T: Copy>(ranges: &Ranges<T>, what: impl Fn(T) -> Value) -> Value {
    let range = |range: &qcow2_ops::rescue::Range<T>| {
        let mut fields = what(range.what);
        fields["start"] = range.start.into();
        fields["length"] = range.len.into();
        fields
    };
    ranges.listed.iter().map(range).collect()
}
