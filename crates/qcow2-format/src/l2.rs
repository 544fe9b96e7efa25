//! L2 table entries, compressed cluster descriptors and subcluster bitmaps. Spec: "Cluster mapping",
//! "Standard Cluster Descriptor", "Compressed Clusters Descriptor", "Extended L2 Entries".
//!
//! | bits of the first word | standard | compressed |
//! |---|---|---|
//! | 63 | copied | 0 |
//! | 62 | 0 | 1 |
//! | 0 | reads as zeroes (version 3, not extended) | byte-exact host offset in bits 0..x, |
//! | 9-55 | host offset, cluster aligned | further 512-byte sectors in bits x..62, |
//! | others | reserved, 0 | x = 62 - (cluster_bits - 8) |
//!
//! With extended L2 entries a second word holds the subcluster bitmap: bits 0-31 allocated, bits 32-63 reads
//! as zeroes. In an external data file host offset 0 is valid; the entry is allocated if the copied flag is
//! set and the zero flag is not. Without extended entries a cluster is decoded as one subcluster of the same
//! size, so that the engine handles a single case.

use crate::error::{FormatError, FormatErrorKind};
use crate::geometry::Geometry;
use crate::limit::MAX_HOST_OFFSET;
use crate::units::{HostOffset, L2Index};
use alloc::format;

mod mend;
mod scan;
mod shape;

pub use mend::L2Mend;
pub use scan::{L2Fault, L2Item};
pub use shape::{L2Shape, MAX_CUT};

const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// The same flags in the first byte of a big-endian entry.
const COPIED_BYTE: u8 = 0x80;
const COMPRESSED_BYTE: u8 = 0x40;
const ZERO: u64 = 1;
const RESERVED: u64 = 0x3f00_0000_0000_01fe;
const SECTOR: u64 = 512;

/// The parameters for decoding the L2 entries of an image.
///
/// ```
/// use qcow2_format::l2::{L2Entry, L2Format};
/// use qcow2_format::{Geometry, GeometryFields};
///
/// let fields = GeometryFields { cluster_bits: 16, refcount_order: 4, extended_l2: false };
/// let format = L2Format { geometry: Geometry::new(fields)?, zero_flag: true, external_data: false };
/// let L2Entry::Compressed(stream) = format.decode(0x4000_0000_0005_004f, 0)? else { panic!() };
/// assert_eq!((stream.host.value(), stream.len), (0x5004f, 512 - 0x4f));
/// # Ok::<(), qcow2_format::FormatError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L2Format {
    /// The image's geometry.
    pub geometry: Geometry,
    /// True if the zero flag is defined (version 3).
    pub zero_flag: bool,
    /// True if guest data is in an external data file, where host offset 0 is valid.
    pub external_data: bool,
}

/// A decoded L2 entry: the mapping of one guest cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L2Entry {
    /// Not compressed: unallocated, zero, data, or a mix of these with subclusters.
    Standard(ClusterEntry),
    /// The whole cluster is stored as one compressed stream.
    Compressed(CompressedCluster),
}

/// The mapping of an uncompressed cluster. Bit `i` of `allocated` and `zero` belongs to subcluster `i`;
/// without extended L2 entries only bit 0 is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClusterEntry {
    /// Host offset of the cluster; `None` if no host cluster is allocated.
    pub host: Option<HostOffset>,
    /// True if the host cluster's refcount is exactly one, so that it may be written in place.
    pub copied: bool,
    /// Subclusters stored in the host cluster. Never set without `host`, never together with `zero`.
    pub allocated: u32,
    /// Subclusters that read as zeroes.
    pub zero: u32,
}

/// Allocation state of one subcluster (of the whole cluster without extended L2 entries).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SubclusterState {
    /// Read from the backing file, or zeroes if there is none.
    Unallocated,
    /// Reads as zeroes.
    Zero,
    /// Stored in the host cluster.
    Data,
}

/// Location of a compressed stream in the image file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompressedCluster {
    /// Host offset of the first byte; any alignment.
    pub host: HostOffset,
    /// Upper bound of the stream's length in bytes. Ends on a 512-byte sector; the stream itself may be
    /// shorter.
    pub len: u64,
}

impl ClusterEntry {
    /// No host cluster; all subclusters are read from the backing file.
    pub const UNALLOCATED: Self = Self { host: None, copied: false, allocated: 0, zero: 0 };

    /// The state of subcluster `index`, which must be below [`Geometry::subclusters`].
    pub const fn state(&self, index: u32) -> SubclusterState {
        if self.zero >> index & 1 == 1 {
            SubclusterState::Zero
        } else if self.allocated >> index & 1 == 1 {
            SubclusterState::Data
        } else {
            SubclusterState::Unallocated
        }
    }
}

impl L2Format {
    /// Mask of all subclusters of a cluster: 1, or 32 set bits with extended L2 entries.
    pub const fn all_subclusters(&self) -> u32 {
        if self.geometry.extended_l2() { u32::MAX } else { 1 }
    }

    /// Decodes an entry. `raw`: its first word. `bitmap`: its second word; ignored without extended L2
    /// entries. Reserved bits are ignored (see [`reserved_bits`](Self::reserved_bits)).
    ///
    /// The subcluster bitmap of a compressed cluster is ignored too: its stream holds the whole cluster. A
    /// check reports it.
    ///
    /// Errors: `Misaligned`, `ZeroFlagInVersion2`, `SubclusterBitmap`, `CompressedOffset`.
    #[inline]
    pub fn decode(&self, raw: u64, bitmap: u64) -> Result<L2Entry, FormatError> {
        if raw & COMPRESSED != 0 {
            return self.decode_compressed(raw).map(L2Entry::Compressed);
        }
        let offset = raw & OFFSET_MASK;
        let copied = raw & COPIED != 0;
        if !self.geometry.is_aligned(offset) {
            return Err(self.misaligned(offset));
        }
        let zero_flag_set = self.has_zero_flag(raw);
        let assigned = offset != 0 || (self.external_data && copied && !zero_flag_set);
        let host = assigned.then_some(HostOffset::new(offset));
        let (allocated, zero) = if self.geometry.extended_l2() {
            (bitmap as u32, (bitmap >> 32) as u32)
        } else if zero_flag_set {
            (0, 1)
        } else {
            (u32::from(assigned), 0)
        };
        if zero != 0 && !self.zero_flag {
            return Err(zero_in_version_2(raw));
        }
        if allocated & zero != 0 || (allocated != 0 && host.is_none()) {
            return Err(contradicting_bitmap(raw, bitmap));
        }
        Ok(L2Entry::Standard(ClusterEntry { host, copied: copied && assigned, allocated, zero }))
    }

    // Errors are made out of line: every read of a machine decodes entries, and none of them is damaged.
    #[cold]
    fn misaligned(&self, offset: u64) -> FormatError {
        FormatError::new(
            FormatErrorKind::Misaligned(offset),
            format!("cluster offset {offset:#x} is not a multiple of {}", self.geometry.cluster_size()),
        )
    }

    fn decode_compressed(&self, raw: u64) -> Result<CompressedCluster, FormatError> {
        let shift = self.compressed_shift();
        let offset = raw & ((1 << shift) - 1);
        if offset > MAX_HOST_OFFSET {
            return Err(FormatError::new(
                FormatErrorKind::CompressedOffset(offset),
                format!("compressed cluster offset {offset:#x} is past {MAX_HOST_OFFSET:#x}"),
            ));
        }
        let sectors = (raw & !(COPIED | COMPRESSED)) >> shift;
        Ok(CompressedCluster { host: HostOffset::new(offset), len: (sectors + 1) * SECTOR - offset % SECTOR })
    }

    /// Whether the first word of an entry has the zero flag, which extended L2 entries do not have.
    pub const fn has_zero_flag(&self, raw: u64) -> bool {
        raw & ZERO != 0 && raw & COMPRESSED == 0 && !self.geometry.extended_l2()
    }

    const fn compressed_shift(&self) -> u32 {
        62 - (self.geometry.cluster_bits() - 8)
    }

    /// Encodes an entry as two words; the second is 0 without extended L2 entries.
    ///
    /// The `len` of a compressed stream is rounded up to the end of its last sector. `None` if the stream
    /// starts past the offset field or is longer than the sector field allows.
    pub fn encode(&self, entry: &L2Entry) -> Option<(u64, u64)> {
        match entry {
            L2Entry::Standard(entry) => Some(self.encode_standard(entry)),
            L2Entry::Compressed(stream) => self.encode_compressed(stream).map(|raw| (raw, 0)),
        }
    }

    fn encode_standard(&self, entry: &ClusterEntry) -> (u64, u64) {
        let host = entry.host.map_or(0, HostOffset::value);
        let raw = host | if entry.copied { COPIED } else { 0 };
        if self.geometry.extended_l2() {
            (raw, u64::from(entry.allocated) | u64::from(entry.zero) << 32)
        } else {
            (raw | if entry.zero != 0 { ZERO } else { 0 }, 0)
        }
    }

    fn encode_compressed(&self, stream: &CompressedCluster) -> Option<u64> {
        let shift = self.compressed_shift();
        let first = stream.host.value();
        let last = first.checked_add(stream.len.checked_sub(1)?)?;
        let sectors = last / SECTOR - first / SECTOR;
        let fits = first >> shift == 0 && first <= MAX_HOST_OFFSET && sectors >> (62 - shift) == 0;
        fits.then_some(COMPRESSED | sectors << shift | first)
    }

    /// The reserved bits set in the first word of a raw entry; 0 in a valid image.
    pub const fn reserved_bits(&self, raw: u64) -> u64 {
        if raw & COMPRESSED != 0 { 0 } else { raw & RESERVED }
    }

    /// True if the copied flag of a raw first word is set. For checks, which look at broken entries too.
    pub const fn has_copied_flag(raw: u64) -> bool {
        raw & COPIED != 0
    }

    /// Clears the copied flag of all standard entries of a table. Returns whether any entry changed.
    pub fn clear_copied_flags(&self, table: &mut [u8]) -> bool {
        let mut changed = false;
        for entry in table.chunks_exact_mut(self.geometry.l2_entry_size() as usize) {
            if entry[0] & (COPIED_BYTE | COMPRESSED_BYTE) == COPIED_BYTE {
                entry[0] &= !COPIED_BYTE;
                changed = true;
            }
        }
        changed
    }

    /// Toggles the copied flag of entry `index`. Panics if `index` is outside the table.
    pub fn flip_copied_flag(&self, table: &mut [u8], index: L2Index) {
        table[(index.value() * self.geometry.l2_entry_size()) as usize] ^= COPIED_BYTE;
    }
}

#[cold]
fn zero_in_version_2(raw: u64) -> FormatError {
    FormatError::new(
        FormatErrorKind::ZeroFlagInVersion2,
        format!("zero cluster entry {raw:#x} in a version 2 image"),
    )
}

#[cold]
fn contradicting_bitmap(raw: u64, bitmap: u64) -> FormatError {
    FormatError::new(
        FormatErrorKind::SubclusterBitmap(bitmap),
        format!("subcluster bitmap {bitmap:#018x} contradicts itself or entry {raw:#x}"),
    )
}

#[cfg(test)]
mod tests;
