//! The header fields that an audit needs, parsed without the format crate.

use crate::pages::PageBytes;
use qcow2_format::l2::L2Format;
use qcow2_format::{Geometry, GeometryFields};

/// The largest L1 table: 32 MiB. Origin: QEMU.
const MAX_L1_ENTRIES: u64 = 4 << 20;
/// The largest refcount table: 8 MiB. Origin: QEMU.
const MAX_REFCOUNT_TABLE: u64 = 8 << 20;

pub(super) struct RawHeader {
    pub(super) l2: L2Format,
    pub(super) dirty: bool,
    pub(super) corrupt: bool,
    pub(super) l1_offset: u64,
    pub(super) l1_entries: u64,
    pub(super) refcount_table_offset: u64,
    pub(super) refcount_table_clusters: u64,
    pub(super) snapshot_count: u64,
    pub(super) snapshots_offset: u64,
    /// Offset and size of the bitmap directory, if the extension exists and its autoclear bit is set.
    pub(super) bitmaps: Option<(u64, u64)>,
    /// Offset and length of the LUKS header, if any.
    pub(super) crypt: Option<(u64, u64)>,
}

/// Reads big-endian numbers at fixed offsets.
struct Fields(Vec<u8>);

impl Fields {
    fn u32(&self, at: usize) -> u64 {
        let bytes = self.0.get(at..at + 4).and_then(|b| b.try_into().ok());
        u64::from(u32::from_be_bytes(bytes.unwrap_or_default()))
    }

    fn u64(&self, at: usize) -> u64 {
        self.u32(at) << 32 | self.u32(at + 4)
    }
}

impl RawHeader {
    pub(super) fn parse(image: &PageBytes) -> Result<Self, String> {
        let mut bytes = vec![0; 4096];
        image.read(0, &mut bytes);
        let fields = Fields(bytes);
        let version = fields.u32(4);
        if fields.u32(0) != 0x5146_49fb || !(2..=3).contains(&version) {
            return Err(format!("magic {:#x}, version {version}", fields.u32(0)));
        }
        let (incompatible, autoclear) = if version == 3 { (fields.u64(72), fields.u64(88)) } else { (0, 0) };
        if incompatible >> 5 != 0 {
            return Err(format!("unknown incompatible features {incompatible:#x}"));
        }
        let geometry = Geometry::new(GeometryFields {
            cluster_bits: fields.u32(20) as u32,
            refcount_order: if version == 3 { fields.u32(96) as u32 } else { 4 },
            extended_l2: incompatible & 16 != 0,
        })
        .map_err(|error| error.to_string())?;
        let header_len = if version == 3 { fields.u32(100) } else { 72 };
        let header = Self {
            l2: L2Format { geometry, zero_flag: version == 3, external_data: incompatible & 4 != 0 },
            dirty: incompatible & 1 != 0,
            corrupt: incompatible & 2 != 0,
            l1_offset: fields.u64(40),
            l1_entries: fields.u32(36),
            refcount_table_offset: fields.u64(48),
            refcount_table_clusters: fields.u32(56),
            snapshot_count: fields.u32(60),
            snapshots_offset: fields.u64(64),
            bitmaps: extension(&fields, header_len, 0x2385_2875)
                .filter(|_| autoclear & 1 != 0)
                .map(|at| (fields.u64(at + 16), fields.u64(at + 8))),
            crypt: extension(&fields, header_len, 0x0537_be77).map(|at| (fields.u64(at), fields.u64(at + 8))),
        };
        header.check(fields.u64(24))
    }

    fn check(self, disk_size: u64) -> Result<Self, String> {
        let geometry = self.l2.geometry;
        if self.l1_entries > MAX_L1_ENTRIES || self.l1_entries < geometry.l1_entries_for(disk_size) {
            return Err(format!("l1 table has {} entries, disk is {disk_size} bytes", self.l1_entries));
        }
        let table_bytes = self.refcount_table_clusters * geometry.cluster_size();
        if table_bytes == 0 || table_bytes > MAX_REFCOUNT_TABLE {
            return Err(format!("refcount table has {} clusters", self.refcount_table_clusters));
        }
        for offset in [self.refcount_table_offset, self.snapshots_offset] {
            if !geometry.is_aligned(offset) {
                return Err(format!("table at {offset:#x} is not cluster aligned"));
            }
        }
        Ok(self)
    }
}

/// Offset of the content of header extension `wanted`.
fn extension(fields: &Fields, header_len: u64, wanted: u64) -> Option<usize> {
    let mut at = header_len as usize;
    while at + 8 <= fields.0.len() {
        let kind = fields.u32(at);
        if kind == 0 {
            return None;
        }
        if kind == wanted {
            return Some(at + 8);
        }
        at += 8 + fields.u32(at + 4).next_multiple_of(8) as usize;
    }
    None
}
