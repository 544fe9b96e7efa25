//! Every limit of the format, with its origin. A value past its limit is refused before anything is
//! allocated.

/// The smallest `cluster_bits` (512 bytes). Origin: the specification.
pub const MIN_CLUSTER_BITS: u32 = 9;
/// The largest `cluster_bits` (2 MiB). Origin: QEMU; the specification leaves it open.
pub const MAX_CLUSTER_BITS: u32 = 21;
/// The smallest `cluster_bits` with extended L2 entries: subclusters are at least 512 bytes. Origin: QEMU.
pub const MIN_CLUSTER_BITS_EXTENDED: u32 = 14;
/// The smallest subcluster in bytes. Origin: QEMU.
pub const MIN_SUBCLUSTER_SIZE: u64 = 512;
/// The largest `refcount_order` (64-bit refcounts). Origin: the specification.
pub const MAX_REFCOUNT_ORDER: u32 = 6;
/// Length of a version 2 header in bytes. Origin: the specification.
pub const HEADER_LEN_V2: usize = 72;
/// The smallest version 3 `header_length`. Origin: the specification.
pub const MIN_HEADER_LEN_V3: usize = 104;
/// The version 3 `header_length` that this crate writes: all the fields it knows, padded to 8.
pub const HEADER_LEN_V3: usize = 112;
/// Bytes of an L1 table, of the active state or of a snapshot: 32 MiB. Origin: QEMU.
pub const MAX_L1_TABLE_SIZE: u64 = 32 << 20;
/// Entries of an L1 table.
pub const MAX_L1_ENTRIES: u64 = MAX_L1_TABLE_SIZE / 8;
/// Bytes of the refcount table: 8 MiB. Origin: QEMU.
pub const MAX_REFCOUNT_TABLE_SIZE: u64 = 8 << 20;
/// Internal snapshots per image. Origin: QEMU.
pub const MAX_SNAPSHOTS: u32 = 65_536;
/// Bytes of the snapshot table: 64 MiB. Origin: QEMU.
pub const MAX_SNAPSHOT_TABLE_SIZE: u64 = 1024 * MAX_SNAPSHOTS as u64;
/// Bytes of extra data in one snapshot table entry. Origin: QEMU.
pub const MAX_SNAPSHOT_EXTRA: u32 = 1024;
/// Bytes of a backing file name. Origin: the specification.
pub const MAX_BACKING_NAME: u32 = 1023;
/// Bytes of a backing format name. Origin: QEMU.
pub const MAX_BACKING_FORMAT: u32 = 15;
/// Persistent bitmaps per image. Origin: QEMU.
pub const MAX_BITMAPS: u32 = 65_535;
/// Bytes of the bitmap directory. Origin: QEMU.
pub const MAX_BITMAP_DIRECTORY_SIZE: u64 = 1024 * MAX_BITMAPS as u64;
/// Bytes of a bitmap's name. Origin: QEMU.
pub const MAX_BITMAP_NAME: u16 = 1023;
/// Entries of one bitmap table. Origin: QEMU.
pub const MAX_BITMAP_TABLE_ENTRIES: u32 = 0x800_0000;
/// Bytes of one bitmap's bits: 512 MiB. Origin: QEMU.
pub const MAX_BITMAP_DATA_SIZE: u64 = 512 << 20;
/// The smallest bitmap `granularity_bits` (512 bytes). Origin: QEMU.
pub const MIN_GRANULARITY_BITS: u8 = 9;
/// The largest bitmap `granularity_bits` (2 GiB). Origin: QEMU.
pub const MAX_GRANULARITY_BITS: u8 = 31;
/// The largest host offset that L1, L2 and bitmap table entries can hold. Origin: the specification (56-bit
/// offset fields).
pub const MAX_HOST_OFFSET: u64 = (1 << 56) - 1;
/// The largest end of a table in the image file. Origin: file offsets are signed 64-bit numbers.
pub const MAX_FILE_OFFSET: u64 = i64::MAX as u64;
/// The end of the longest file that QEMU reads: [`MAX_FILE_OFFSET`] rounded down to whole GiB. Origin: QEMU.
pub const MAX_FILE_END: u64 = MAX_FILE_OFFSET & !((1 << 30) - 1);
/// The largest number of L1 entries a virtual size may need before it is "too big". Origin: QEMU.
pub const MAX_SIZE_L1_ENTRIES: u64 = i32::MAX as u64;
/// Bytes of the largest disk that QEMU opens or makes: 2^63 rounded down to whole GiB. Origin: QEMU.
pub const MAX_DISK_SIZE: u64 = i64::MAX as u64 & !((1 << 30) - 1);
