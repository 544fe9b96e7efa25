//! VHDX: a region table leads to the metadata table, which leads to items. All numbers are little-endian.
//!
//! | table | head | entries |
//! |---|---|---|
//! | regions | `regi`, checksum (4), count (4), 4 more | GUID (16), place (8), length (4), 4 more |
//! | metadata | `metadata`, 2, count (2), 20 more | GUID (16), offset (4), length (4), 8 more |
//! | locator | type (16), 2, count (2) | offsets of key and value (4 each), lengths (2 each) |

use super::bytes::{Bytes, little, wide_text};
use super::finding::{Finding, NamedBy};
use super::report::VetReport;
use qcow2_core::StorageError;
use qcow2_core::format::signature::Container;

/// Judges both region tables: programs use the other one if the first is damaged.
pub(super) fn vet(file: &Bytes<'_>, report: &mut VetReport) -> Result<(), StorageError> {
    let mut found = false;
    for at in [192 << 10, 256 << 10] {
        let table = file.read(at, 64 << 10)?;
        if !table.starts_with(b"regi") {
            continue;
        }
        // A second one would be a second image, which nobody reads.
        let mut regions = entries(&table, 8, 16, 4).filter(|entry| entry.starts_with(&METADATA));
        if let Some(entry) = regions.next() {
            found = true;
            metadata(file, little(entry, 16, 8), report)?;
        }
    }
    if !found {
        report.found(Finding::malformed(Container::Vhdx, "no region table leads to a metadata table"));
    }
    Ok(())
}

fn metadata(file: &Bytes<'_>, region: u64, report: &mut VetReport) -> Result<(), StorageError> {
    let table = file.read(region, 64 << 10)?;
    if !table.starts_with(b"metadata") {
        report.found(Finding::malformed(Container::Vhdx, format!("no metadata table at {region:#x}")));
        return Ok(());
    }
    let mut seen = Vec::new();
    for entry in entries(&table, 10, 32, 2) {
        let guid = entry.first_chunk::<16>().copied().unwrap_or_default();
        if ![DISK_SIZE, PARAMETERS, LOCATOR].contains(&guid) {
            continue;
        }
        if seen.contains(&guid) {
            report.found(Finding::malformed(Container::Vhdx, "the metadata table has an item twice"));
            continue;
        }
        seen.push(guid);
        let (offset, len) = (little(entry, 16, 4), little(entry, 20, 4));
        let place = region.saturating_add(offset);
        let item = || file.read(place, len.min(MAX_ITEM));
        match guid {
            DISK_SIZE => report.virtual_size = Some(little(&item()?, 0, 8)),
            PARAMETERS if little(&item()?, 4, 4) & HAS_PARENT != 0 => {
                report.found(Finding::NoName { role: NamedBy::Parent });
            }
            LOCATOR => locator(&item()?, place, report),
            _ => {}
        }
    }
    Ok(())
}

fn locator(item: &[u8], place: u64, report: &mut VetReport) {
    let count = little(item, 18, 2) as usize;
    let text = |at: u64, len: u64| {
        let part = item.get(at as usize..).unwrap_or_default();
        wide_text(part.get(..len as usize).unwrap_or(part), u16::from_le_bytes)
    };
    for index in 0..count.min(MAX_KEYS) {
        let at = 20 + 12 * index;
        let value = little(item, at + 4, 4);
        let name = text(value, little(item, at + 10, 2));
        report.found(Finding::name(NamedBy::Parent, &name, Some(place.saturating_add(value))));
    }
    report.found(Finding::NoName { role: NamedBy::Parent });
}

/// The entries of 32 bytes that follow a head of `head` bytes; `count_at`: where their number is.
fn entries(table: &[u8], count_at: usize, head: usize, count_len: usize) -> impl Iterator<Item = &[u8]> {
    let count = little(table, count_at, count_len).min(MAX_ENTRIES) as usize;
    table.get(head..).unwrap_or_default().chunks_exact(32).take(count)
}

/// The most entries of either table. Origin: the specification.
const MAX_ENTRIES: u64 = 2047;
/// How much of an item is read.
const MAX_ITEM: u64 = 64 << 10;
/// How many keys of a locator are read; the specification has five.
const MAX_KEYS: usize = 16;
/// Bit of the file parameters: the disk has a parent.
const HAS_PARENT: u64 = 2;
/// 8B7CA206-4790-4B9A-B8FE-575F050F886E
const METADATA: [u8; 16] = *b"\x06\xa2\x7c\x8b\x90\x47\x9a\x4b\xb8\xfe\x57\x5f\x05\x0f\x88\x6e";
/// 2FA54224-CD1B-4876-B211-5DBED83BF4B8
const DISK_SIZE: [u8; 16] = *b"\x24\x42\xa5\x2f\x1b\xcd\x76\x48\xb2\x11\x5d\xbe\xd8\x3b\xf4\xb8";
/// CAA16737-FA36-4D43-B3B6-33F0AA44E76B
const PARAMETERS: [u8; 16] = *b"\x37\x67\xa1\xca\x36\xfa\x43\x4d\xb3\xb6\x33\xf0\xaa\x44\xe7\x6b";
/// A8D35F2D-B30B-454D-ABF7-D3D84834AB0C
const LOCATOR: [u8; 16] = *b"\x2d\x5f\xd3\xa8\x0b\xb3\x4d\x45\xab\xf7\xd3\xd8\x48\x34\xab\x0c";
