//! What `check` shows: findings in qemu-img's words, then the counts.

use super::human;
use qcow2_core::format::l2::L2Fault;
use qcow2_core::walk::SnapshotFault;
use qcow2_ops::check::{CheckReport, Finding};
use serde_json::{Map, Value, json};
use std::fmt::Write;

/// What is left to do where a cluster has more references than a refcount holds.
const WIDEN: &str = "Use qemu-img amend to increase the refcount entry width or qemu-img convert to create a \
                     clean copy if the image cannot be opened for writing";

/// One finding, as it stands on standard error, perhaps of several lines. `program`: its own name.
pub fn finding(finding: &Finding, program: &str) -> String {
    match finding {
        Finding::PastEnd { offset, len, .. } => format!(
            "ERROR: counting reference for region exceeding the end of the file by one cluster or more: \
             offset {:#x} size {len:#x}",
            offset.value()
        ),
        Finding::Overflow { offset } => {
            format!("ERROR: overflow cluster offset={:#x}\n{WIDEN}", offset.value())
        }
        Finding::L1Reserved { entry } => format!("ERROR found L1 entry with reserved bits set: {entry:x}"),
        Finding::L2TableMisaligned { offset } => {
            format!("ERROR l2_offset={:x}: Table is not cluster aligned; L1 entry corrupted", offset.value())
        }
        Finding::L2Entry { fault, index, entry, offset, .. } => {
            l2_entry(*fault, *index, *entry, offset.value())
        }
        Finding::Snapshot(fault) => snapshot(fault, program),
        Finding::SnapshotsWithDataFile { count } => {
            format!("ERROR {count} snapshots in image with data file")
        }
        Finding::RefcountTableReserved { index } => {
            format!("ERROR refcount table entry {index} has reserved bits set")
        }
        Finding::RefcountBlockMisaligned { index } => {
            format!("ERROR refcount block {index} is not cluster aligned; refcount table entry corrupted")
        }
        Finding::RefcountBlockOutside { index } => format!("ERROR refcount block {index} is outside image"),
        Finding::RefcountBlockShared { index, references } => {
            format!("ERROR refcount block {index} refcount={references}")
        }
        Finding::RefcountUnreadable { cluster } => {
            format!("Can't get refcount for cluster {cluster}: Input/output error")
        }
        Finding::Refcount { cluster, stored, references } => {
            let what = if stored > references { "Leaked" } else { "ERROR" };
            format!("{what} cluster {cluster} refcount={stored} reference={references}")
        }
        Finding::L1Copied { index, entry, refcount } => {
            format!("ERROR OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x} refcount={refcount}")
        }
        Finding::L2Copied { entry, refcount, .. } => {
            format!("ERROR OFLAG_COPIED data cluster: l2_entry={entry:x} refcount={refcount}")
        }
        other => format!("ERROR {other}"),
    }
}

fn l2_entry(fault: L2Fault, index: u64, entry: u64, offset: u64) -> String {
    match fault {
        L2Fault::ReservedBits => format!("ERROR found l2 entry with reserved bits set: {entry:x}"),
        L2Fault::CompressedCopied => {
            format!("ERROR: coffset={offset:#x}: copied flag must never be set for compressed clusters")
        }
        L2Fault::CompressedInDataFile => {
            format!("ERROR compressed cluster {index} with data file, entry={entry:#x}")
        }
        L2Fault::CompressedWithBitmap => format!(
            "ERROR compressed cluster {index} with non-zero subcluster allocation bitmap, entry={entry:#x}"
        ),
        L2Fault::SubclusterBitmap => {
            format!("ERROR offset={offset:x}: Allocated cluster has corrupted subcluster allocation bitmap")
        }
        L2Fault::UnallocatedWithBitmap => {
            "ERROR: Unallocated cluster has non-zero subcluster allocation map".to_owned()
        }
        L2Fault::DataMisaligned => {
            format!("ERROR offset={offset:x}: Data cluster is not properly aligned; L2 entry corrupted.")
        }
        L2Fault::PreallocatedMisaligned => format!(
            "ERROR offset={offset:x}: Preallocated cluster is not properly aligned; L2 entry corrupted."
        ),
        other => format!("ERROR l2 entry {index}, entry={entry:#x}: {other:?}"),
    }
}

fn snapshot(fault: &SnapshotFault, program: &str) -> String {
    let l1 = |(id, name): &(String, String), what: String| {
        let (id, name) = (human::escaped(id), human::escaped(name));
        format!("ERROR snapshot {id} ({name}) {what}; snapshot table entry corrupted")
    };
    match fault {
        SnapshotFault::TooMany { .. } => format!("{program}: ERROR snapshot table too large"),
        SnapshotFault::Misplaced { .. } => format!("{program}: ERROR snapshot table offset invalid"),
        SnapshotFault::Unreadable { index, .. } => format!(
            "{program}: ERROR failed to read the snapshot table: Too much extra metadata in snapshot table \
             entry {index}"
        ),
        SnapshotFault::Incomplete { index } => format!("ERROR snapshot table entry {index} is incomplete"),
        SnapshotFault::L1Misaligned { snapshot, offset } => {
            l1(snapshot, format!("l1_offset={:#x}: L1 table is not cluster aligned", offset.value()))
        }
        SnapshotFault::L1TooLarge { snapshot, entries } => {
            l1(snapshot, format!("l1_size={entries:#x}: L1 table is too large"))
        }
        other => format!("ERROR snapshot table: {other:?}"),
    }
}

/// The counts for people.
pub fn to_text(report: &CheckReport) -> String {
    let mut out = String::new();
    if report.corruptions == 0 && report.leaks == 0 && report.check_errors == 0 {
        out.push_str("No errors were found on the image.\n");
    }
    if report.corruptions > 0 {
        let _ = write!(
            out,
            "\n{} errors were found on the image.\nData may be corrupted, or further writes to the image may \
             corrupt it.\n",
            report.corruptions
        );
    }
    if report.leaks > 0 {
        let _ = write!(
            out,
            "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no harm to \
             data.\n",
            report.leaks
        );
    }
    if report.check_errors > 0 {
        let _ = write!(out, "\n{} internal errors have occurred during the check.\n", report.check_errors);
    }
    let (total, allocated) = (report.total_clusters, report.allocated_clusters);
    if total > 0 && allocated > 0 {
        let percent = |part: u64, whole: u64| part as f64 * 100.0 / whole as f64;
        let _ = writeln!(
            out,
            "{allocated}/{total} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            percent(allocated, total),
            percent(report.fragmented_clusters, allocated),
            percent(report.compressed_clusters, allocated)
        );
    }
    if report.image_end_offset > 0 {
        let _ = writeln!(out, "Image end offset: {}", report.image_end_offset);
    }
    out
}

/// What a repair changed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fixed {
    /// Refcounts that were too high.
    pub leaks: u64,
    /// Everything else.
    pub corruptions: u64,
}

/// The counts as qemu-img's JSON object, keys in its order.
pub fn to_json(report: &CheckReport, fixed: &Fixed, filename: &str, format: &str) -> Value {
    let mut out = Map::new();
    let mut put = |key: &str, number: u64| {
        if number > 0 || key == "check-errors" {
            out.insert(key.to_owned(), json!(number));
        }
    };
    put("image-end-offset", report.image_end_offset);
    put("compressed-clusters", report.compressed_clusters);
    put("total-clusters", report.total_clusters);
    put("corruptions", report.corruptions);
    put("corruptions-fixed", fixed.corruptions);
    put("check-errors", report.check_errors);
    put("leaks", report.leaks);
    put("leaks-fixed", fixed.leaks);
    put("allocated-clusters", report.allocated_clusters);
    out.insert("filename".to_owned(), json!(filename));
    out.insert("format".to_owned(), json!(format));
    if report.fragmented_clusters > 0 {
        out.insert("fragmented-clusters".to_owned(), json!(report.fragmented_clusters));
    }
    Value::Object(out)
}

/// What a repair would change, below the counts.
pub fn changes_text(changes: Option<&[String]>) -> String {
    let Some(changes) = changes else { return String::new() };
    let lines: String = changes.iter().map(|change| format!("    {change}\n")).collect();
    format!("\nNothing was written. A repair would change:\n{lines}")
}

/// The same in the JSON object.
pub fn with_changes(mut told: Value, changes: Option<Vec<String>>) -> Value {
    if let (Some(changes), Some(map)) = (changes, told.as_object_mut()) {
        map.insert("dry-run".to_owned(), json!(true));
        map.insert("changes".to_owned(), json!(changes));
    }
    told
}

#[cfg(test)]
mod tests {
    use super::*;
    use qcow2_core::HostOffset;

    #[track_caller]
    fn check(seen: &Finding, text: &str) {
        assert_eq!(finding(seen, "qemu-img"), text);
    }

    #[test]
    fn findings() {
        check(
            &Finding::Overflow { offset: HostOffset::new(0x5000) },
            "ERROR: overflow cluster offset=0x5000\nUse qemu-img amend to increase the refcount entry width or \
             qemu-img convert to create a clean copy if the image cannot be opened for writing",
        );
        check(
            &Finding::Refcount { cluster: 3, stored: 2, references: 1 },
            "Leaked cluster 3 refcount=2 reference=1",
        );
        check(
            &Finding::Refcount { cluster: 3, stored: 0, references: 1 },
            "ERROR cluster 3 refcount=0 reference=1",
        );
        check(
            &Finding::L1Copied { index: 0, entry: 0x8000_0000_0004_0000, refcount: 0 },
            "ERROR OFLAG_COPIED L2 cluster: l1_index=0 l1_entry=8000000000040000 refcount=0",
        );
        check(
            &Finding::L2TableMisaligned { offset: HostOffset::new(0x40200) },
            "ERROR l2_offset=40200: Table is not cluster aligned; L1 entry corrupted",
        );
        let names = ("1".to_owned(), "a\x1b".to_owned());
        check(
            &Finding::Snapshot(SnapshotFault::L1TooLarge { snapshot: names, entries: 0x1000 }),
            "ERROR snapshot 1 (a\\x1b) l1_size=0x1000: L1 table is too large; snapshot table entry corrupted",
        );
        let too_many = Finding::Snapshot(SnapshotFault::TooMany { count: 70_000 });
        check(&too_many, "qemu-img: ERROR snapshot table too large");
    }
}
