//! VHD: a footer of 512 bytes at the end, in growing disks with a copy at the start, and a dynamic header.
//! All numbers are big-endian.
//!
//! | footer | size | field | | dynamic header | size | field |
//! |---|---|---|---|---|---|---|
//! | 0 | 8 | `conectix` | | 0 | 8 | `cxsparse` |
//! | 16 | 8 | place of the dynamic header | | 64 | 512 | name of the parent, UTF-16 |
//! | 48 | 8 | virtual size | | 576 | 8 * 24 | parent locators: code (4), space (4), |
//! | 60 | 4 | type: 2 fixed, 3 growing, 4 with a parent | | | | length (4), reserved (4), place (8) |

use super::bytes::{Bytes, big, wide_text};
use super::finding::{Finding, NamedBy};
use super::report::VetReport;
use qcow2_core::StorageError;
use qcow2_core::format::signature::Container;

/// Judges footer and dynamic header.
pub(super) fn vet(file: &Bytes<'_>, report: &mut VetReport) -> Result<(), StorageError> {
    let (first, last) = (file.read(0, FOOTER)?, file.tail(FOOTER)?);
    let old = file.tail(FOOTER - 1)?;
    let is_footer = |bytes: &[u8]| bytes.starts_with(b"conectix");
    let footers: Vec<&Vec<u8>> = [&first, &last, &old].into_iter().filter(|bytes| is_footer(bytes)).collect();
    let fields = |footer: &[u8]| (big(footer, 16, 8), big(footer, 48, 8), big(footer, 60, 4));
    if let [one, other, ..] = footers[..]
        && fields(one) != fields(other)
    {
        report.found(Finding::malformed(Container::Vhd, "the footer and its copy differ"));
    }
    for footer in footers {
        report.virtual_size = Some(big(footer, 48, 8));
        let kind = big(footer, 60, 4);
        match kind {
            FIXED => {}
            GROWING | CHILD => dynamic(file, big(footer, 16, 8), kind == CHILD, report)?,
            _ => {
                let why = format!("disk type is {kind}, allowed are 2 and 3");
                report.found(Finding::malformed(Container::Vhd, why));
            }
        }
    }
    Ok(())
}

fn dynamic(file: &Bytes<'_>, at: u64, child: bool, report: &mut VetReport) -> Result<(), StorageError> {
    let header = file.read(at, 1024)?;
    if !header.starts_with(b"cxsparse") {
        report.found(Finding::malformed(Container::Vhd, format!("no dynamic header at {at:#x}")));
    }
    let parent = wide_text(header.get(64..576).unwrap_or_default(), u16::from_be_bytes);
    if child || !parent.is_empty() {
        report.found(Finding::name(NamedBy::Parent, &parent, Some(at.saturating_add(64))));
    }
    for locator in (0..8).map(|index| 576 + 24 * index) {
        let (code, len, place) =
            (big(&header, locator, 4), big(&header, locator + 8, 4), big(&header, locator + 16, 8));
        if code == 0 {
            continue;
        }
        let bytes = file.read(place, len.min(MAX_LOCATOR))?;
        let name = match code {
            WIDE_RELATIVE | WIDE_ABSOLUTE => wide_text(&bytes, u16::from_le_bytes),
            _ => String::from_utf8_lossy(&bytes).trim_end_matches('\0').to_owned(),
        };
        report.found(Finding::name(NamedBy::Parent, &name, Some(place)));
    }
    Ok(())
}

const FOOTER: u64 = 512;
const FIXED: u64 = 2;
const GROWING: u64 = 3;
const CHILD: u64 = 4;
/// `W2ru` and `W2ku`: Windows paths.
const WIDE_RELATIVE: u64 = 0x5732_7275;
const WIDE_ABSOLUTE: u64 = 0x5732_6b75;
/// How much of a locator is read.
const MAX_LOCATOR: u64 = 4096;
