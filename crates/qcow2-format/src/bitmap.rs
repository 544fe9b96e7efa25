//! Persistent bitmaps: directory entries, table entries and the number of table entries. Spec: "Bitmaps".
//!
//! A directory entry:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 8 | offset of the bitmap table, cluster aligned |
//! | 8 | 4 | entries in that table |
//! | 12 | 4 | flags |
//! | 16 | 1 | type, 1: dirty tracking |
//! | 17 | 1 | granularity: log2 of the guest bytes per bit |
//! | 18 | 2 | length of the name |
//! | 20 | 4 | length of the extra data |
//! | 24 | | extra data, name, zeroes up to a multiple of 8 |
//!
//! A bitmap table entry: bits 9-55 hold the host offset of one cluster of bits. If the offset is 0, bit 0
//! tells whether that cluster is all ones or all zeroes. All other bits are reserved.

use crate::bytes::Reader;
use crate::error::{FormatError, FormatErrorKind};
use crate::geometry::Geometry;
use crate::limit;
use crate::text::text_of;
use crate::units::HostOffset;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

const IN_USE: u32 = 1;
const AUTO: u32 = 1 << 1;
const RESERVED_FLAGS: u32 = !(IN_USE | AUTO);
const DIRTY_TRACKING: u8 = 1;

const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const ALL_ONES: u64 = 1;
const RESERVED: u64 = 0xff00_0000_0000_01fe;

/// One entry of the bitmap directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Host offset of the bitmap table, cluster aligned.
    pub table_offset: HostOffset,
    /// Length of the bitmap table; each entry maps one cluster of bits.
    pub table_entries: u32,
    /// True if the bitmap was not saved cleanly. Its bits are then inconsistent and must not be used.
    pub in_use: bool,
    /// True if the bitmap starts recording as soon as the image is opened.
    pub auto: bool,
    /// Undefined flag bits, kept for the round trip; 0 in a valid image.
    pub reserved_flags: u32,
    /// Bitmap type; 1 (dirty tracking) is the only one defined.
    pub kind: u8,
    /// log2 of the guest bytes per bit; QEMU allows 9 to 31.
    pub granularity_bits: u8,
    /// Extra data; QEMU accepts only an empty field.
    pub extra: Vec<u8>,
    /// Its name, 1 to 1023 bytes, unique in the directory.
    pub name: Vec<u8>,
}

/// One decoded entry of a bitmap table: where a cluster of bits is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapTableEntry {
    /// All bits are 0; no cluster is allocated.
    Zeroes,
    /// All bits are 1; no cluster is allocated. QEMU reads this form but never writes it.
    Ones,
    /// Host offset of the cluster of bits. The lowest bit of a byte is the first one.
    Data(HostOffset),
}

impl Bitmap {
    /// A bitmap without a table: consistent (`in_use` clear) and not recording (`auto` clear).
    pub fn new(name: impl Into<Vec<u8>>, granularity_bits: u8) -> Self {
        Self {
            table_offset: HostOffset::default(),
            table_entries: 0,
            in_use: false,
            auto: false,
            reserved_flags: 0,
            kind: DIRTY_TRACKING,
            granularity_bits,
            extra: Vec::new(),
            name: name.into(),
        }
    }

    /// Parses the entry at the start of `bytes`. Returns it and its length in bytes, padding included. The
    /// field values are not checked; see [`validate`](Self::validate). Errors: `BitmapDirectoryBroken` if
    /// `bytes` ends inside the entry.
    pub fn parse(bytes: &[u8]) -> Result<(Self, usize), FormatError> {
        Self::read(bytes).ok_or_else(|| {
            FormatError::new(
                FormatErrorKind::BitmapDirectoryBroken,
                format!("bitmap directory ends inside an entry ({} bytes left)", bytes.len()),
            )
        })
    }

    fn read(bytes: &[u8]) -> Option<(Self, usize)> {
        let mut reader = Reader::new(bytes, 0);
        let table_offset = HostOffset::new(reader.u64()?);
        let table_entries = reader.u32()?;
        let flags = reader.u32()?;
        let kind = reader.u8()?;
        let granularity_bits = reader.u8()?;
        let name_len = reader.u16()?;
        let extra_len = usize::try_from(reader.u32()?).ok()?;
        let extra = reader.take(extra_len)?.to_vec();
        let name = reader.take(name_len.into())?.to_vec();
        let len = reader.position().next_multiple_of(8);
        let bitmap = Self {
            table_offset,
            table_entries,
            in_use: flags & IN_USE != 0,
            auto: flags & AUTO != 0,
            reserved_flags: flags & RESERVED_FLAGS,
            kind,
            granularity_bits,
            extra,
            name,
        };
        (len <= bytes.len()).then_some((bitmap, len))
    }

    /// Parses a whole directory, which must hold exactly `count` entries.
    ///
    /// Errors: `BitmapDirectoryBroken`, `BitmapDirectoryCount`.
    pub fn parse_directory(directory: &[u8], count: u32) -> Result<Vec<Self>, FormatError> {
        let mut bitmaps = Vec::new();
        let mut rest = directory;
        while !rest.is_empty() && bitmaps.len() <= count as usize {
            let (bitmap, len) = Self::parse(rest)?;
            bitmaps.push(bitmap);
            rest = rest.get(len..).unwrap_or_default();
        }
        match bitmaps.len() as u32 {
            found if found == count => Ok(bitmaps),
            found => Err(Self::wrong_count(found, count)),
        }
    }

    /// The error for a directory with `found` entries where the header counts `expected`. Parsing stops one
    /// entry past `expected`, so `found == expected + 1` means "that many or more".
    pub fn wrong_count(found: u32, expected: u32) -> FormatError {
        FormatError::new(
            FormatErrorKind::BitmapDirectoryCount { found, expected },
            format!("bitmap directory has {found} or more entries, the header counts {expected}"),
        )
    }

    /// Appends the entry and its padding to `out`. Errors: `TooLong` for a name above 65535 bytes or extra
    /// data of 4 GiB or more.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), FormatError> {
        let too_long = |len: usize| {
            FormatError::new(
                FormatErrorKind::TooLong(len as u64),
                format!("bitmap: name or extra data of {len} bytes"),
            )
        };
        let name_len = u16::try_from(self.name.len()).map_err(|_| too_long(self.name.len()))?;
        let extra_len = u32::try_from(self.extra.len()).map_err(|_| too_long(self.extra.len()))?;
        let flags = self.reserved_flags & RESERVED_FLAGS
            | if self.in_use { IN_USE } else { 0 }
            | if self.auto { AUTO } else { 0 };
        let start = out.len();
        out.extend_from_slice(&self.table_offset.value().to_be_bytes());
        out.extend_from_slice(&self.table_entries.to_be_bytes());
        out.extend_from_slice(&flags.to_be_bytes());
        out.extend_from_slice(&[self.kind, self.granularity_bits]);
        out.extend_from_slice(&name_len.to_be_bytes());
        out.extend_from_slice(&extra_len.to_be_bytes());
        out.extend_from_slice(&self.extra);
        out.extend_from_slice(&self.name);
        let len = out.len() - start;
        out.resize(start + len.next_multiple_of(8), 0);
        Ok(())
    }

    /// Checks the fields against QEMU's rules for opening an image. `disk_size`: virtual size in bytes.
    ///
    /// Errors: `BitmapExtra` for extra data, `BitmapConstraints` for every other violation.
    pub fn validate(&self, geometry: &Geometry, disk_size: u64) -> Result<(), FormatError> {
        if !self.extra.is_empty() {
            let len = self.extra.len();
            return Err(FormatError::new(
                FormatErrorKind::BitmapExtra(len as u32),
                format!("bitmap '{}': {len} bytes of extra data, allowed are 0", self.name_text()),
            ));
        }
        self.broken_rule(geometry, disk_size).map_or(Ok(()), |rule| {
            let name = self.name_text();
            let message = format!("bitmap '{name}': {rule}");
            Err(FormatError::new(FormatErrorKind::BitmapConstraints(name), message))
        })
    }

    fn broken_rule(&self, geometry: &Geometry, disk_size: u64) -> Option<String> {
        let (entries, bits) = (self.table_entries, self.granularity_bits);
        let offset = self.table_offset;
        let bits_allowed = limit::MIN_GRANULARITY_BITS..=limit::MAX_GRANULARITY_BITS;
        if offset.value() == 0 || !geometry.is_aligned(offset.value()) {
            return Some(format!(
                "table at {offset} is not a multiple of {} above 0",
                geometry.cluster_size()
            ));
        }
        if entries == 0 || entries > limit::MAX_BITMAP_TABLE_ENTRIES {
            return Some(format!(
                "{entries} table entries, allowed are 1 to {}",
                limit::MAX_BITMAP_TABLE_ENTRIES
            ));
        }
        if !bits_allowed.contains(&bits) {
            return Some(format!("granularity_bits is {bits}, allowed are 9 to 31"));
        }
        if self.reserved_flags != 0 {
            return Some(format!("reserved flags {:#x}, allowed are none", self.reserved_flags));
        }
        if self.name.is_empty() || self.name.len() > limit::MAX_BITMAP_NAME.into() {
            return Some(format!("name of {} bytes, allowed are 1 to 1023", self.name.len()));
        }
        if self.kind != DIRTY_TRACKING {
            return Some(format!("type is {}, allowed is 1", self.kind));
        }
        let data_size = u64::from(entries) * geometry.cluster_size();
        if data_size > limit::MAX_BITMAP_DATA_SIZE {
            return Some(format!("{data_size} bytes of bits, allowed are {}", limit::MAX_BITMAP_DATA_SIZE));
        }
        // At most 2^32 bits of at most 2^31 bytes each.
        if !self.in_use && disk_size > (data_size * 8) << bits {
            return Some(format!("covers {} of {disk_size} bytes", (data_size * 8) << bits));
        }
        None
    }

    /// Judges whether the table has as many entries as a disk of `disk_size` bytes needs, as QEMU does when
    /// it reads the bits: not of a bitmap that is in use, whose bits are never read. Errors:
    /// `BitmapConstraints`.
    pub fn validate_table_size(&self, geometry: &Geometry, disk_size: u64) -> Result<(), FormatError> {
        let needed = Self::table_entries_for(geometry, disk_size, self.granularity_bits).unwrap_or(0);
        if self.in_use || u64::from(self.table_entries) == needed {
            return Ok(());
        }
        let name = self.name_text();
        let message =
            format!("bitmap '{name}': {} table entries, its disk needs {needed}", self.table_entries);
        Err(FormatError::new(FormatErrorKind::BitmapConstraints(name), message))
    }

    /// Judges whether a file can be so long that it holds the table, as QEMU does when it reads the bits: not
    /// of a bitmap that is in use. Errors: `BitmapConstraints`.
    pub fn validate_table_place(&self) -> Result<(), FormatError> {
        let (start, len) = (self.table_offset.value(), u64::from(self.table_entries) * 8);
        if self.in_use || start.checked_add(len).is_some_and(|end| end <= limit::MAX_FILE_END) {
            return Ok(());
        }
        let name = self.name_text();
        let message = format!("bitmap '{name}': table at {start:#x}: no file is that long");
        Err(FormatError::new(FormatErrorKind::BitmapConstraints(name), message))
    }

    /// The error of a bitmap whose name another one has: `BitmapConstraints`.
    pub fn same_name(&self) -> FormatError {
        let name = self.name_text();
        let message = format!("bitmap '{name}': another bitmap has this name");
        FormatError::new(FormatErrorKind::BitmapConstraints(name), message)
    }

    /// How many table entries a bitmap of this granularity needs for a disk of `disk_size` bytes; `None` for
    /// a granularity that no number can hold.
    pub fn table_entries_for(geometry: &Geometry, disk_size: u64, granularity_bits: u8) -> Option<u64> {
        let granularity = 1u64.checked_shl(granularity_bits.into())?;
        let bytes = disk_size.div_ceil(granularity).div_ceil(8);
        Some(geometry.clusters_for(bytes))
    }

    /// The name as [text](crate::text). May contain control characters: escape it before
    /// printing.
    pub fn name_text(&self) -> String {
        text_of(&self.name)
    }
}

impl BitmapTableEntry {
    /// Decodes an entry. Errors: `BitmapTableEntry` for reserved bits, an unaligned offset, or an offset
    /// together with the all-ones bit.
    pub fn decode(raw: u64, geometry: &Geometry) -> Result<Self, FormatError> {
        let offset = raw & OFFSET_MASK;
        let ones = raw & ALL_ONES != 0;
        if raw & RESERVED != 0 || !geometry.is_aligned(offset) || (offset != 0 && ones) {
            return Err(FormatError::new(
                FormatErrorKind::BitmapTableEntry(raw),
                format!(
                    "bitmap table entry {raw:#018x}: reserved bits, or an offset that is not cluster aligned"
                ),
            ));
        }
        Ok(match offset {
            0 if ones => Self::Ones,
            0 => Self::Zeroes,
            offset => Self::Data(HostOffset::new(offset)),
        })
    }

    /// The entry's 64 bits.
    pub fn encode(self) -> u64 {
        match self {
            Self::Zeroes => 0,
            Self::Ones => ALL_ONES,
            Self::Data(offset) => offset.value(),
        }
    }
}

#[cfg(test)]
mod tests;
