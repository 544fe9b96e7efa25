//! Header extensions. Spec: "Header extensions", "Bitmaps extension", "Full disk encryption header pointer".
//!
//! The list starts right after the header. It ends at the end marker, at the backing file name, or at the end
//! of the first cluster. Each extension:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | type |
//! | 4 | 4 | length of the data, without the padding |
//! | 8 | length | data, then zeroes up to a multiple of 8 |
//!
//! Type 0 ends the list.

use crate::bytes::Reader;
use crate::error::{FormatError, FormatErrorKind};
use crate::feature::FeatureName;
use crate::limit;
use crate::units::HostOffset;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

const END: u32 = 0;
const BACKING_FORMAT: u32 = 0xE279_2ACA;
const FEATURE_NAMES: u32 = 0x6803_F857;
pub(crate) const BITMAPS: u32 = 0x2385_2875;
const LUKS: u32 = 0x0537_BE77;
const DATA_FILE: u32 = 0x4441_5441;

pub(crate) const BITMAPS_LEN: u32 = 24;
const LUKS_LEN: u32 = 16;

/// Location of the LUKS header area in the image file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LuksPointer {
    /// Host offset of the area, cluster aligned.
    pub offset: HostOffset,
    /// Length of the area in bytes.
    pub len: u64,
}

/// The bitmaps extension: number of bitmaps and location of the bitmap directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// Number of bitmaps, 1 to 65535.
    pub count: u32,
    /// Reserved; 0 in a valid image.
    pub reserved: u32,
    /// Length of the directory in bytes, at most 67107840.
    pub directory_size: u64,
    /// Host offset of the directory, cluster aligned.
    pub directory_offset: HostOffset,
}

/// An extension that this crate does not know, kept byte for byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownExtension {
    /// Its type.
    pub kind: u32,
    /// Its data, without the padding.
    pub data: Vec<u8>,
}

/// All extensions of a header. If a type appears twice, the last one wins.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extensions {
    /// Format of the backing file, at most 15 bytes, usually ASCII.
    pub backing_format: Option<Vec<u8>>,
    /// Name of the external data file.
    pub data_file: Option<Vec<u8>>,
    /// LUKS header area; only valid with the LUKS encryption method.
    pub luks: Option<LuksPointer>,
    /// The feature name table.
    pub feature_names: Option<Vec<FeatureName>>,
    /// The bitmaps extension; valid only if the `BITMAPS` autoclear bit is set.
    pub bitmaps: Option<BitmapsExtension>,
    /// All other extensions, in file order.
    pub unknown: Vec<UnknownExtension>,
}

impl Extensions {
    /// Parses the extensions in `area`, the bytes between the header and the backing file name. A missing end
    /// marker is accepted. The contents are not checked here; see [`Header::parse`](crate::Header::parse).
    ///
    /// Errors: `ExtensionTooLarge`, `BackingFormatTooLong`, `CryptoExtensionLength`,
    /// `BitmapsExtensionLength`.
    pub fn parse(area: &[u8]) -> Result<Self, FormatError> {
        let mut extensions = Self::default();
        visit(area, |kind, data| extensions.take(kind, data))?;
        Ok(extensions)
    }

    /// Parses only the feature name table. Needed to name unknown incompatible features in an image whose
    /// other extensions cannot be parsed. Empty if there is no table.
    pub fn feature_names(area: &[u8]) -> Vec<FeatureName> {
        let mut names = Vec::new();
        let _unreadable_rest = visit(area, |kind, data| {
            if kind == FEATURE_NAMES {
                names = FeatureName::parse_table(data);
            }
            Ok(())
        });
        names
    }

    fn take(&mut self, kind: u32, data: &[u8]) -> Result<(), FormatError> {
        match kind {
            BACKING_FORMAT => self.backing_format = Some(backing_format(data)?),
            DATA_FILE => self.data_file = Some(data.to_vec()),
            LUKS => self.luks = Some(luks(data)?),
            FEATURE_NAMES => self.feature_names = Some(FeatureName::parse_table(data)),
            BITMAPS => self.bitmaps = Some(bitmaps(data)?),
            kind => self.unknown.push(UnknownExtension { kind, data: data.to_vec() }),
        }
        Ok(())
    }

    /// Appends the extensions and the end marker to `out`, in QEMU's order: backing format, data file name,
    /// LUKS pointer, feature names, bitmaps, unknown ones.
    ///
    /// Errors: `BackingFormatTooLong`; `TooLong` for data of 4 GiB or more.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), FormatError> {
        if let Some(name) = &self.backing_format {
            push(out, BACKING_FORMAT, &backing_format(name)?)?;
        }
        if let Some(name) = &self.data_file {
            push(out, DATA_FILE, name)?;
        }
        if let Some(luks) = &self.luks {
            push(out, LUKS, &encode_luks(luks))?;
        }
        if let Some(names) = &self.feature_names {
            push(out, FEATURE_NAMES, &FeatureName::encode_table(names))?;
        }
        if let Some(bitmaps) = &self.bitmaps {
            push(out, BITMAPS, &encode_bitmaps(bitmaps))?;
        }
        for unknown in &self.unknown {
            push(out, unknown.kind, &unknown.data)?;
        }
        push(out, END, &[])
    }

    /// The backing format as [text](crate::text).
    pub fn backing_format_name(&self) -> Option<String> {
        self.backing_format.as_deref().map(crate::text::text_of)
    }

    /// The data file's name as [text](crate::text).
    pub fn data_file_name(&self) -> Option<String> {
        self.data_file.as_deref().map(crate::text::text_of)
    }
}

impl BitmapsExtension {
    /// Checks the fields. Call it only if the `BITMAPS` autoclear bit is set: otherwise the extension is
    /// stale and may hold anything. `cluster_size`: bytes.
    ///
    /// Errors: `BitmapsReserved`, `BitmapsCount`, `BitmapDirectoryOffset`, `BitmapDirectorySize`.
    pub fn validate(&self, cluster_size: u64) -> Result<(), FormatError> {
        let err = |kind, message| Err(FormatError::new(kind, message));
        if self.reserved != 0 {
            let message = format!("bitmaps extension: reserved word is {:#x}, allowed is 0", self.reserved);
            return err(FormatErrorKind::BitmapsReserved(self.reserved), message);
        }
        if self.count == 0 || self.count > limit::MAX_BITMAPS {
            let message =
                format!("bitmaps extension: {} bitmaps, allowed are 1 to {}", self.count, limit::MAX_BITMAPS);
            return err(FormatErrorKind::BitmapsCount(self.count), message);
        }
        let offset = self.directory_offset;
        if !offset.value().is_multiple_of(cluster_size) {
            let message = format!("bitmap directory at {offset} is not a multiple of {cluster_size}");
            return err(FormatErrorKind::BitmapDirectoryOffset(offset.value()), message);
        }
        let size = self.directory_size;
        if size == 0 || size > limit::MAX_BITMAP_DIRECTORY_SIZE {
            let max = limit::MAX_BITMAP_DIRECTORY_SIZE;
            let message = format!("bitmap directory of {size} bytes, allowed are 1 to {max}");
            return err(FormatErrorKind::BitmapDirectorySize(size), message);
        }
        Ok(())
    }
}

/// Calls `take` with the type and data of each extension, up to the end marker or the end of the area.
fn visit(
    area: &[u8],
    mut take: impl FnMut(u32, &[u8]) -> Result<(), FormatError>,
) -> Result<(), FormatError> {
    let mut reader = Reader::new(area, 0);
    while reader.position() < area.len() {
        let at = reader.position();
        let too_large = |kind, len| {
            FormatError::new(
                FormatErrorKind::ExtensionTooLarge { kind, len },
                format!("header extension {kind:#010x} of {len} bytes passes the end of the extension area"),
            )
        };
        let (Some(kind), Some(len)) = (reader.u32(), reader.u32()) else {
            let kind = crate::bytes::read_u32(area, at).unwrap_or(END);
            return Err(too_large(kind, 0));
        };
        let data =
            usize::try_from(len).ok().and_then(|n| reader.take(n)).ok_or_else(|| too_large(kind, len))?;
        if kind == END {
            break;
        }
        take(kind, data)?;
        let padding = data.len().next_multiple_of(8) - data.len();
        if reader.take(padding).is_none() {
            break;
        }
    }
    Ok(())
}

fn backing_format(data: &[u8]) -> Result<Vec<u8>, FormatError> {
    let max = limit::MAX_BACKING_FORMAT;
    if data.len() > max as usize {
        return Err(FormatError::new(
            FormatErrorKind::BackingFormatTooLong(data.len() as u32),
            format!("backing format name of {} bytes, allowed are {max}", data.len()),
        ));
    }
    Ok(data.to_vec())
}

fn luks(data: &[u8]) -> Result<LuksPointer, FormatError> {
    let mut reader = Reader::new(data, 0);
    match (data.len(), reader.u64(), reader.u64()) {
        (16, Some(offset), Some(len)) => Ok(LuksPointer { offset: HostOffset::new(offset), len }),
        _ => Err(FormatError::new(
            FormatErrorKind::CryptoExtensionLength(data.len() as u32),
            format!("encryption header extension of {} bytes, allowed are {LUKS_LEN}", data.len()),
        )),
    }
}

fn encode_luks(luks: &LuksPointer) -> Vec<u8> {
    [luks.offset.value().to_be_bytes(), luks.len.to_be_bytes()].concat()
}

fn bitmaps(data: &[u8]) -> Result<BitmapsExtension, FormatError> {
    let mut reader = Reader::new(data, 0);
    match (data.len(), reader.u32(), reader.u32(), reader.u64(), reader.u64()) {
        (24, Some(count), Some(reserved), Some(directory_size), Some(offset)) => Ok(BitmapsExtension {
            count,
            reserved,
            directory_size,
            directory_offset: HostOffset::new(offset),
        }),
        _ => Err(FormatError::new(
            FormatErrorKind::BitmapsExtensionLength(data.len() as u32),
            format!("bitmaps extension of {} bytes, allowed are {BITMAPS_LEN}", data.len()),
        )),
    }
}

fn encode_bitmaps(bitmaps: &BitmapsExtension) -> Vec<u8> {
    let mut data = Vec::with_capacity(BITMAPS_LEN as usize);
    data.extend_from_slice(&bitmaps.count.to_be_bytes());
    data.extend_from_slice(&bitmaps.reserved.to_be_bytes());
    data.extend_from_slice(&bitmaps.directory_size.to_be_bytes());
    data.extend_from_slice(&bitmaps.directory_offset.value().to_be_bytes());
    data
}

fn push(out: &mut Vec<u8>, kind: u32, data: &[u8]) -> Result<(), FormatError> {
    let len = u32::try_from(data.len()).map_err(|_| {
        let len = data.len() as u64;
        FormatError::new(
            FormatErrorKind::TooLong(len),
            format!("header extension {kind:#010x} of {len} bytes"),
        )
    })?;
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&len.to_be_bytes());
    out.extend_from_slice(data);
    out.resize(out.len() + (data.len().next_multiple_of(8) - data.len()), 0);
    Ok(())
}
