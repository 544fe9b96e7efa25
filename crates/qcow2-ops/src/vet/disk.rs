//! VDI and LUKS, and partition tables, which are content of raw disks.

use super::bytes::{Bytes, big, little};
use super::finding::{Doubt, Finding, NamedBy};
use super::name::NameKind;
use super::options::VetOptions;
use super::report::VetReport;
use qcow2_core::StorageError;
use qcow2_core::format::crypt::LuksHeader;
use qcow2_core::format::signature::Container;

/// Judges a VDI header.
pub(super) fn vet_vdi(file: &Bytes<'_>, report: &mut VetReport) -> Result<(), StorageError> {
    const NORMAL: [u64; 2] = [1, 2];
    let head = file.read(0, 512)?;
    report.virtual_size = Some(little(&head, 0x170, 8));
    let kind = little(&head, 0x4c, 4);
    if !NORMAL.contains(&kind) {
        // Undo and difference images name their parent by its UUID, which programs look up.
        let why = format!("image type is {kind}, allowed are 1 and 2");
        report.found(Finding::malformed(Container::Vdi, why));
    }
    for at in [0x1a8, 0x1b8] {
        let uuid = head.get(at..at + 16).unwrap_or_default();
        if uuid.iter().any(|&byte| byte != 0) {
            let name = uuid.iter().map(|byte| format!("{byte:02x}")).collect();
            let (role, kind, at) = (NamedBy::Parent, NameKind::Relative, Some(at as u64));
            report.found(Finding::Name { role, kind, name, at });
        }
    }
    Ok(())
}

/// Judges a LUKS header.
pub(super) fn vet_luks(
    file: &Bytes<'_>,
    options: &VetOptions,
    report: &mut VetReport,
) -> Result<(), StorageError> {
    let head = file.read(0, 592)?;
    match LuksHeader::parse(&head) {
        Err(error) => report.found(Finding::malformed(Container::Luks, error.to_string())),
        Ok(header) => {
            let payload = u64::from(header.payload_offset_sectors) * 512;
            report.virtual_size = Some(file.len().saturating_sub(payload));
            report.found(Finding::doubt(Doubt::Encrypted("luks"), None));
            iterations(&header, options, report);
        }
    }
    Ok(())
}

/// Judges what unlocking would cost.
pub(super) fn iterations(header: &LuksHeader, options: &VetOptions, report: &mut VetReport) {
    let slots = header.slots.iter().filter(|slot| slot.enabled).map(|slot| slot.iterations);
    let seen = u64::from(slots.chain([header.digest_iterations]).max().unwrap_or(0));
    if seen > options.max_iterations {
        report.found(Finding::Iterations { seen, allowed: options.max_iterations });
    }
}

/// True if the first sector ends like that of an MBR and is not the boot sector of a FAT file system.
pub(super) fn has_boot_signature(head: &[u8]) -> bool {
    let is_fat = head.get(0x10) == Some(&2) && head.get(0x15) == Some(&0xf8);
    head.get(510..512) == Some(&[0x55, 0xaa]) && !is_fat
}

/// Judges the MBR in the first sector.
pub(super) fn vet_partitions(file: &Bytes<'_>, report: &mut VetReport) -> Result<(), StorageError> {
    let head = file.read(0, 512)?;
    if !has_boot_signature(&head) {
        report.found(doubt("GPT without a protective MBR"));
        return Ok(());
    }
    let (mut used, mut protective) = (Vec::new(), false);
    for index in 0..4 {
        let at = 446 + 16 * index;
        let (boot, kind) = (big(&head, at, 1), big(&head, at + 4, 1));
        if boot & 0x7f != 0 {
            report.found(doubt("boot flag of an entry is neither 0 nor 0x80"));
        }
        if kind != 0 {
            used.push(index);
        }
        if kind == GPT {
            protective = true;
            if big(&head, at + 1, 3) != 0x00_02_00 {
                report.found(doubt("protective entry does not begin at CHS 0/0/2"));
            }
            if little(&head, at + 8, 4) != 1 {
                report.found(doubt("protective entry does not begin at LBA 1"));
            }
        }
    }
    if protective && used != [0] {
        report.found(doubt("protective MBR has other entries too"));
    }
    if used.is_empty() {
        report.found(doubt("MBR has no entries"));
    }
    Ok(())
}

fn doubt(why: &'static str) -> Finding {
    Finding::doubt(Doubt::Partitions(why), Some(446))
}

/// Type of the entry that protects a GPT.
const GPT: u64 = 0xee;
