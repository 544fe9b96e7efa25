//! VMDK: a text that describes extents, alone or inside of a sparse extent. Numbers are little-endian.
//!
//! | sparse extent | size | field |
//! |---|---|---|
//! | 0 | 4 | `KDMV` |
//! | 4, 8 | 4 each | version, flags |
//! | 12 | 8 | sectors of the disk; 0: the text inside describes other extents |
//! | 28, 36 | 8 each | the text: first sector, sectors |
//! | 56 | 8 | grain directory, or all ones: a footer at the end of the file has it |
//!
//! The text is lines: comments with `#`, `key=value`, `ddb.key = "value"`, and extents: access, sectors,
//! type, `"file"`, offset. A line that is none of these is refused, since nobody knows what other programs
//! make of it.

use super::bytes::{Bytes, MAX_READ, little};
use super::finding::{Finding, NamedBy};
use super::report::VetReport;
use qcow2_core::StorageError;
use qcow2_core::format::signature::Container;

/// True if the file is a text that describes extents: one whose first line that is neither blank nor a
/// comment is a version, which is all that QEMU wants, or a text with a subformat.
pub(super) fn is_descriptor(file: &Bytes<'_>) -> Result<bool, StorageError> {
    let head = file.read(0, HEAD)?;
    let lines = head.split(|&byte| byte == b'\n').map(<[u8]>::trim_ascii);
    let mut lines = lines.filter(|line| !line.is_empty() && !line.starts_with(b"#"));
    if lines.next().is_some_and(|line| line.to_ascii_lowercase().starts_with(b"version=")) {
        return Ok(true);
    }
    let first = head.get(..512).unwrap_or(&head);
    let is_text = first.iter().all(|&byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace());
    Ok(is_text && text_of(&head).contains(CREATE_TYPE))
}

/// Judges the header, the text and the footer.
pub(super) fn vet(file: &Bytes<'_>, report: &mut VetReport) -> Result<(), StorageError> {
    let head = file.read(0, 512)?;
    if !head.starts_with(b"KDMV") {
        if head.starts_with(b"COWD") {
            report.found(malformed("an old sparse extent, which has no description"));
            return Ok(());
        }
        describe(&file.read(0, MAX_TEXT)?, 0, true, report);
        return Ok(());
    }
    let (version, sectors) = (little(&head, 4, 4), little(&head, 12, 8));
    let (first, count) = (little(&head, 28, 8), little(&head, 36, 8));
    report.virtual_size = Some(sectors.saturating_mul(512));
    if !(1..=3).contains(&version) {
        report.found(malformed(format!("version is {version}, allowed are 1 to 3")));
    }
    if first != 1 {
        report.found(malformed(format!("the description is in sector {first}, allowed is 1")));
    }
    let at = first.saturating_mul(512);
    let text = file.read(at, count.saturating_mul(512).min(MAX_TEXT))?;
    describe(&text, at, sectors == 0, report);
    if little(&head, 56, 8) == AT_END {
        footer(&head, file, report)?;
    }
    Ok(())
}

/// Judges the text at `at`. `others`: whether the extents are other files, not the one that the text is in.
fn describe(bytes: &[u8], at: u64, others: bool, report: &mut VetReport) {
    let text = text_of(bytes);
    if !text.is_ascii() {
        report.found(malformed("the description is not ASCII"));
    }
    // Bytes that are not UTF-8 are replaced in the text, which moves what follows.
    let original =
        Some(bytes).filter(|bytes| bytes.get(..text.len()).is_some_and(|b| str::from_utf8(b).is_ok()));
    let subformat = text.split_once(CREATE_TYPE).and_then(|(_, rest)| rest.split_once('"'));
    let subformat = subformat.map_or("", |(subformat, _)| subformat);
    if !ACCEPTED.contains(&subformat) {
        let seen: String = subformat.chars().take(64).collect();
        report.found(malformed(format!("subformat is '{seen}', allowed are {}", ACCEPTED.join(", "))));
    }
    let mut extents = Vec::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let (key, value) = line.split_once('=').unwrap_or((line, ""));
        match line.split_whitespace().next() {
            _ if line.starts_with("ddb") => {}
            Some("rw" | "rdonly" | "noaccess") => extents.push(line),
            _ if !line.contains('=') || key.contains(char::is_whitespace) => {
                let line: String = line.chars().take(64).collect();
                report.found(malformed(format!("the description has the line '{line}'")));
            }
            _ if key == "parentfilenamehint" => {
                report.found(name(NamedBy::Parent, (original, at), &text, value.trim().trim_matches('"')));
            }
            _ if key == "parentcid" && value.trim() != "ffffffff" => {
                report.found(Finding::NoName { role: NamedBy::Parent });
            }
            _ => {}
        }
    }
    if extents.is_empty() {
        report.found(malformed("the description has no extents"));
    }
    let several = extents.len() > 1;
    for line in extents {
        let file = line.split('"').nth(1).unwrap_or(line);
        if others || several || line.contains(['/', '\\']) || file.contains(':') {
            report.found(name(NamedBy::Extent, (original, at), &text, file));
        }
    }
}

/// The finding for `part` of the lower-case `text` of a description at `at`. `original`: the description
/// itself, if it has as many bytes as the text.
fn name(role: NamedBy, (original, at): (Option<&[u8]>, u64), text: &str, part: &str) -> Finding {
    let index = part.as_ptr() as usize - text.as_ptr() as usize;
    let original = original.and_then(|bytes| bytes.get(index..index + part.len()));
    let original = original.map_or(part.into(), String::from_utf8_lossy);
    Finding::name(role, &original, Some(at.saturating_add(index as u64)))
}

/// Judges the footer: a marker, a header that takes the place of the first one, and an end marker, a sector
/// each.
fn footer(head: &[u8], file: &Bytes<'_>, report: &mut VetReport) -> Result<(), StorageError> {
    let tail = file.tail(3 * 512)?;
    let header = tail.get(512..1024).unwrap_or_default();
    let (marker, end) = (tail.get(..512).unwrap_or_default(), tail.get(1024..).unwrap_or_default());
    let is_blank = |bytes: &[u8], from: usize| bytes.iter().skip(from).all(|&byte| byte == 0);
    let fields =
        |header: &[u8]| (little(header, 0, 8), little(header, 12, 8), header.get(28..44).map(Vec::from));
    if fields(head) != fields(header) {
        report.found(malformed("header and footer differ"));
    }
    if little(header, 56, 8) == AT_END {
        report.found(malformed("the footer refers to another footer"));
    }
    if little(marker, 8, 8) != FOOTER << 32 || !is_blank(marker, 16) {
        report.found(malformed("the marker of the footer is not valid"));
    }
    if !is_blank(end, 0) {
        report.found(malformed("the marker at the end is not valid"));
    }
    Ok(())
}

/// The text in `bytes`, up to the first zero; upper and lower case mean the same in it.
fn text_of(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).to_ascii_lowercase()
}

fn malformed(why: impl Into<String>) -> Finding {
    Finding::malformed(Container::Vmdk, why)
}

const CREATE_TYPE: &str = "createtype=\"";
/// Subformats that are one file.
const ACCEPTED: [&str; 2] = ["monolithicsparse", "streamoptimized"];
/// In place of the grain directory: a footer has it.
const AT_END: u64 = u64::MAX;
/// Type of the marker before a footer.
const FOOTER: u64 = 3;
/// How much is looked at to see whether a file is a text.
const HEAD: u64 = 64 << 10;
/// The largest text, as in QEMU.
const MAX_TEXT: u64 = MAX_READ - 1;
