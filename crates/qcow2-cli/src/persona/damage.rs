//! Damage, in QEMU's words and when it is found: what comes after it says no more than that a request failed.

use qcow2_core::{Damage, DamageObserver, Error, L2Slot, OverlapChecks, find_cause};
use std::error::Error as StdError;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether errors say it themselves, in our own words: for the whole run.
static OWN: AtomicBool = AtomicBool::new(false);

/// Leaves it to the errors, under our own name.
pub(crate) fn speak_own_words() {
    OWN.store(true, Ordering::Relaxed);
}

/// The error below `error` that is about damage which was told when it was found.
pub(super) fn told<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a Error> {
    let engine = find_cause::<Error>(error).filter(|_| !OWN.load(Ordering::Relaxed))?;
    match engine.damage().and_then(sentence) {
        Some(_) => Some(engine),
        None => engine.source().and_then(told),
    }
}

/// Tells of damage.
pub(crate) struct DamageWords;

impl DamageObserver for DamageWords {
    fn damage_found(&self, error: &Error, marked: bool) {
        let Some(what) = error.damage().and_then(sentence).filter(|_| told(error).is_some()) else { return };
        let (begin, which) = if marked { ("Marking image as", "") } else { ("Image is", "non-fatal ") };
        // Nobody is left to hear that complaining failed.
        let _ = writeln!(
            io::stderr().lock(),
            "qcow2: {begin} corrupt: {what}; further {which}corruption events will be suppressed"
        );
    }
}

/// `None`: QEMU has no words for it.
fn sentence(damage: Damage) -> Option<String> {
    Some(match damage {
        Damage::L2TableOffset { index, offset } => {
            format!("L2 table offset {} unaligned (L1 index: {})", hex(offset.value()), hex(index.value()))
        }
        Damage::ClusterOffset { offset, zero, to_change: Some(guest), .. } => {
            let which = if zero { "Preallocated zero" } else { "Data" };
            let (offset, guest) = (hex(offset.value()), hex(guest.value()));
            format!("{which} cluster offset {offset} unaligned (guest offset: {guest})")
        }
        Damage::ClusterOffset { entry, offset, .. } => {
            format!("Cluster allocation offset {} unaligned ({})", hex(offset.value()), slot(entry))
        }
        Damage::ZeroInVersion2 { entry } => {
            format!("Zero cluster entry found in pre-v3 image ({})", slot(entry))
        }
        Damage::SubclusterBitmap { entry, to_change } => {
            let gap = if to_change.is_some() { " " } else { "  " };
            format!("Invalid cluster entry found{gap}({})", slot(entry))
        }
        Damage::CompressedInDataFile { entry } => {
            format!("Compressed cluster entry found in image with external data file ({})", slot(entry))
        }
        Damage::DataFileOffset { entry, guest, offset } => format!(
            "External data file host cluster offset {} does not match guest cluster offset: {}, L2 index: {})",
            hex(offset.value()),
            hex(guest.value()),
            hex(entry.index.value())
        ),
        Damage::RefcountBlockOffset { index, offset } => {
            format!("Refblock offset {} unaligned (reftable index: {})", hex(offset.value()), hex(index))
        }
        Damage::Overlap { kinds, .. } => {
            let (_, name) = METADATA.iter().find(|(kind, _)| kinds.contains(*kind))?;
            format!("Preventing invalid write on metadata (overlaps with {name})")
        }
        Damage::HeaderFree { table } => {
            let what = if table.is_some() { "L2 table" } else { "compressed cluster" };
            format!("Preventing invalid allocation of {what} at offset 0")
        }
        _ => return None,
    })
}

fn slot(entry: L2Slot) -> String {
    format!("L2 offset: {}, L2 index: {}", hex(entry.table.value()), hex(entry.index.value()))
}

/// As C prints a number with a prefix, which zero does not get.
fn hex(number: u64) -> String {
    if number == 0 { "0".to_owned() } else { format!("{number:#x}") }
}

/// QEMU's names; where several kinds share a cluster it says the first of these.
const METADATA: [(OverlapChecks, &str); 9] = [
    (OverlapChecks::MAIN_HEADER, "qcow2_header"),
    (OverlapChecks::ACTIVE_L1, "active L1 table"),
    (OverlapChecks::ACTIVE_L2, "active L2 table"),
    (OverlapChecks::REFCOUNT_BLOCK, "refcount block"),
    (OverlapChecks::REFCOUNT_TABLE, "refcount table"),
    (OverlapChecks::SNAPSHOT_TABLE, "snapshot table"),
    (OverlapChecks::INACTIVE_L1, "inactive L1 table"),
    (OverlapChecks::INACTIVE_L2, "inactive L2 table"),
    (OverlapChecks::BITMAP_DIRECTORY, "bitmap directory"),
];

#[cfg(test)]
mod tests {
    use super::*;
    use qcow2_core::format::{L1Index, L2Index};
    use qcow2_core::{GuestOffset, HostOffset, TableKind};

    #[test]
    fn damage_in_words() {
        let entry = L2Slot { table: HostOffset::new(0x40000), index: L2Index::new(0) };
        let (offset, guest) = (HostOffset::new(0x50800), GuestOffset::new(0));
        let misplaced = |zero, to_change| Damage::ClusterOffset { entry, offset, zero, to_change };
        let overlap = |kinds| Damage::Overlap { offset, kinds };
        for (damage, text) in [
            (
                Damage::L2TableOffset { index: L1Index::new(0), offset: HostOffset::new(0x40200) },
                "L2 table offset 0x40200 unaligned (L1 index: 0)",
            ),
            (
                misplaced(true, None),
                "Cluster allocation offset 0x50800 unaligned (L2 offset: 0x40000, L2 index: 0)",
            ),
            (misplaced(false, Some(guest)), "Data cluster offset 0x50800 unaligned (guest offset: 0)"),
            (
                misplaced(true, Some(guest)),
                "Preallocated zero cluster offset 0x50800 unaligned (guest offset: 0)",
            ),
            (
                Damage::RefcountBlockOffset { index: 1, offset: HostOffset::new(0x20800) },
                "Refblock offset 0x20800 unaligned (reftable index: 0x1)",
            ),
            (
                overlap(OverlapChecks::REFCOUNT_TABLE.with(OverlapChecks::ACTIVE_L1)),
                "Preventing invalid write on metadata (overlaps with active L1 table)",
            ),
            (
                Damage::HeaderFree { table: Some(TableKind::L2) },
                "Preventing invalid allocation of L2 table at offset 0",
            ),
        ] {
            assert_eq!(sentence(damage).as_deref(), Some(text));
        }
        assert_eq!(sentence(overlap(OverlapChecks::NONE)), None);
    }
}
