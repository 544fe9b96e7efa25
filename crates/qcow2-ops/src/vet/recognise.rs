//! Which containers the bytes of a file pass for.

use super::bytes::Bytes;
use super::finding::Finding;
use super::options::VetOptions;
use super::{disk, vmdk};
use qcow2_core::ImageFormat;
use qcow2_core::StorageError;
use qcow2_core::format::signature::{Container, PROBE_LEN, Place, SIGNATURES, probe, qcow};

/// All of them, each once, in the order of [`Container`].
pub(super) fn containers(file: &Bytes<'_>) -> Result<Vec<Container>, StorageError> {
    let head = file.read(0, PROBE_LEN as u64)?;
    let mut seen: Vec<Container> = qcow(&head).into_iter().collect();
    for signature in SIGNATURES {
        let len = signature.bytes.len() as u64;
        let at = match signature.place {
            Place::FromStart(at) => Some(at),
            Place::FromEnd(back) => file.len().checked_sub(back),
        };
        let bytes = at.map_or(Ok(Vec::new()), |at| file.read(at, len))?;
        if bytes == signature.bytes {
            seen.push(signature.container);
        }
    }
    if vmdk::is_descriptor(file)? {
        seen.push(Container::Vmdk);
    }
    if disk::has_boot_signature(&head) {
        seen.push(Container::Partitions);
    }
    seen.sort_unstable();
    seen.dedup();
    Ok(seen)
}

/// The one that the file would be opened as: the one that QEMU chooses; failing that, the one it could be
/// taken for by somebody else. `None`: raw.
pub(super) fn chosen(seen: &[Container], file: &Bytes<'_>) -> Result<Option<Container>, StorageError> {
    let head = file.read(0, PROBE_LEN as u64)?;
    let other = || seen.iter().copied().find(|container| !container.is_disk_content());
    Ok(probe(&head).or_else(other))
}

/// What is wrong with that alone.
pub(super) fn judge(seen: &[Container], format: Option<Container>, options: &VetOptions) -> Vec<Finding> {
    let mut findings = Vec::new();
    let (images, declared) = (seen.iter().filter(|container| !container.is_disk_content()), &options.format);
    match declared {
        Some(ImageFormat::Raw) => {
            findings.extend(images.map(|&container| Finding::NotRaw { container }));
        }
        Some(declared) if !format.is_some_and(|format| is_named(format, declared.name())) => {
            let declared = declared.name().chars().take(MAX_FORMAT).collect();
            findings.push(Finding::OtherFormat { declared, seen: format });
        }
        _ => {}
    }
    if seen.len() > 1 {
        findings.push(Finding::Polyglot { containers: seen.to_vec() });
    }
    let refused = seen.iter().filter(|container| !options.accepted.contains(container));
    findings.extend(refused.map(|&container| Finding::Format { container }));
    findings
}

/// Whether users call the format so.
fn is_named(format: Container, name: &str) -> bool {
    format.name() == name || (format == Container::Vhd && name == "vhd")
}

/// How much of a format's name is kept.
const MAX_FORMAT: usize = 64;
