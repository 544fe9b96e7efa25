//! Renders a finding as `qemu-img check` does.

use qcow2_core::walk::SnapshotFault;
use qcow2_format::l2::L2Fault;
use qcow2_ops::check::{Class, Finding, Found};

/// The lines that `qemu-img check` prints for a report.
pub(crate) fn lines(found: &[Found]) -> Vec<String> {
    found.iter().flat_map(|f| (0..f.times).flat_map(|_| line(&f.finding))).collect()
}

fn line(finding: &Finding) -> Vec<String> {
    let one = match finding {
        Finding::PastEnd { offset, len, .. } => format!(
            "ERROR: counting reference for region exceeding the end of the file by one cluster or more: offset {:#x} size {len:#x}",
            offset.value()
        ),
        Finding::Overflow { offset } => {
            return vec![
                format!("ERROR: overflow cluster offset={:#x}", offset.value()),
                "Use qemu-img amend to increase the refcount entry width or qemu-img convert to create a clean copy \
                 if the image cannot be opened for writing"
                    .to_owned(),
            ];
        }
        Finding::L1Reserved { entry } => format!("ERROR found L1 entry with reserved bits set: {entry:x}"),
        Finding::L2TableMisaligned { offset } => {
            format!("ERROR l2_offset={:x}: Table is not cluster aligned; L1 entry corrupted", offset.value())
        }
        Finding::L2Entry { fault, index, entry, offset, .. } => {
            l2_entry(*fault, *index, *entry, offset.value())
        }
        Finding::Snapshot(fault) => snapshot(fault),
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
            let word = if finding.class() == Class::Leak { "Leaked" } else { "ERROR" };
            format!("{word} cluster {cluster} refcount={stored} reference={references}")
        }
        Finding::L1Copied { index, entry, refcount } => {
            format!("ERROR OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x} refcount={refcount}")
        }
        Finding::L2Copied { entry, refcount, .. } => {
            format!("ERROR OFLAG_COPIED data cluster: l2_entry={entry:x} refcount={refcount}")
        }
        other => format!("(no words of QEMU for) {other}"),
    };
    vec![one]
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
        L2Fault::PreallocatedMisaligned => {
            format!(
                "ERROR offset={offset:x}: Preallocated cluster is not properly aligned; L2 entry corrupted."
            )
        }
        other => format!("(no words of QEMU for) {other:?}"),
    }
}

fn snapshot(fault: &SnapshotFault) -> String {
    match fault {
        SnapshotFault::TooMany { .. } => "qemu-img: ERROR snapshot table too large".to_owned(),
        SnapshotFault::Misplaced { .. } => "qemu-img: ERROR snapshot table offset invalid".to_owned(),
        SnapshotFault::Unreadable { index, .. } => format!(
            "qemu-img: ERROR failed to read the snapshot table: Too much extra metadata in snapshot table entry {index}"
        ),
        SnapshotFault::Incomplete { index } => format!("ERROR snapshot table entry {index} is incomplete"),
        SnapshotFault::L1Misaligned { snapshot: (id, name), offset } => format!(
            "ERROR snapshot {id} ({name}) l1_offset={:#x}: L1 table is not cluster aligned; snapshot table entry corrupted",
            offset.value()
        ),
        SnapshotFault::L1TooLarge { snapshot: (id, name), entries } => format!(
            "ERROR snapshot {id} ({name}) l1_size={entries:#x}: L1 table is too large; snapshot table entry corrupted"
        ),
        other => format!("(no words of QEMU for) {other:?}"),
    }
}
