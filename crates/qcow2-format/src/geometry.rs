//! Cluster size, refcount width and L2 entry size of an image, and every conversion between units.
//!
//! All unit conversions belong here. No other code shifts by `cluster_bits`.

use crate::error::{FormatError, FormatErrorKind};
use crate::limit::{MAX_CLUSTER_BITS, MIN_CLUSTER_BITS, MIN_SUBCLUSTER_SIZE};
use crate::refcount::RefcountWidth;
use crate::units::{GuestCluster, GuestOffset, HostCluster, HostOffset, L1Index, L2Index};
use alloc::format;

/// Subclusters per cluster with extended L2 entries.
pub const SUBCLUSTERS: u32 = 32;

/// The header fields that determine a [`Geometry`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GeometryFields {
    /// log2 of the cluster size in bytes, 9..=21.
    pub cluster_bits: u32,
    /// log2 of the refcount width in bits, 0..=6.
    pub refcount_order: u32,
    /// True for 16-byte L2 entries with 32 subclusters; needs `cluster_bits` of at least 14.
    pub extended_l2: bool,
}

/// Cluster size, refcount width and L2 entry size of one image. The values are within their limits.
///
/// ```
/// use qcow2_format::{Geometry, GeometryFields, GuestOffset};
///
/// let geometry = Geometry::new(GeometryFields { cluster_bits: 16, refcount_order: 4, extended_l2: false })?;
/// let offset = GuestOffset::new((512 << 20) + 3 * 65536 + 5);
/// assert_eq!((geometry.l1_index(offset).value(), geometry.l2_index(offset).value()), (1, 3));
/// # Ok::<(), qcow2_format::FormatError>(())
/// ```
///
/// Spec: "General", "Host cluster management".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    cluster_bits: u32,
    refcount_width: RefcountWidth,
    extended_l2: bool,
}

impl Geometry {
    /// Checks the fields against their limits. Errors: `ClusterBits`, `SubclusterSize`, `RefcountOrder`.
    pub fn new(fields: GeometryFields) -> Result<Self, FormatError> {
        let bits = fields.cluster_bits;
        if !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&bits) {
            return Err(FormatError::new(
                FormatErrorKind::ClusterBits(bits),
                format!(
                    "header: cluster_bits is {bits}, allowed are {MIN_CLUSTER_BITS} to {MAX_CLUSTER_BITS}"
                ),
            ));
        }
        let subcluster_size = (1u64 << bits) / u64::from(SUBCLUSTERS);
        if fields.extended_l2 && subcluster_size < MIN_SUBCLUSTER_SIZE {
            return Err(FormatError::new(
                FormatErrorKind::SubclusterSize(subcluster_size),
                format!(
                    "header: subclusters of {subcluster_size} bytes, allowed are {MIN_SUBCLUSTER_SIZE} and more"
                ),
            ));
        }
        let refcount_width = RefcountWidth::from_order(fields.refcount_order)?;
        Ok(Self { cluster_bits: bits, refcount_width, extended_l2: fields.extended_l2 })
    }

    /// The same geometry with refcounts of 2^`order` bits. Errors: `RefcountOrder`.
    pub fn with_refcount_order(&self, order: u32) -> Result<Self, FormatError> {
        Self::new(GeometryFields {
            cluster_bits: self.cluster_bits,
            refcount_order: order,
            extended_l2: self.extended_l2(),
        })
    }

    /// log2 of the cluster size in bytes.
    pub const fn cluster_bits(&self) -> u32 {
        self.cluster_bits
    }

    /// Cluster size in bytes: a power of two from 512 to 2 MiB.
    pub const fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Width of one refcount.
    pub const fn refcount_width(&self) -> RefcountWidth {
        self.refcount_width
    }

    /// True if L2 entries are 16 bytes with a subcluster bitmap.
    pub const fn extended_l2(&self) -> bool {
        self.extended_l2
    }

    /// Size of an L2 entry in bytes: 8 or 16.
    pub const fn l2_entry_size(&self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// Entries in an L2 table, which is one cluster.
    pub const fn l2_entries(&self) -> u64 {
        1 << self.l2_bits()
    }

    const fn l2_bits(&self) -> u32 {
        self.cluster_bits - if self.extended_l2 { 4 } else { 3 }
    }

    /// Subclusters per cluster: 32 with extended L2 entries, else 1 (the cluster itself).
    pub const fn subclusters(&self) -> u32 {
        if self.extended_l2 { SUBCLUSTERS } else { 1 }
    }

    /// Subcluster size in bytes. The subcluster is the unit of allocation state and of copy-on-write.
    pub const fn subcluster_size(&self) -> u64 {
        if self.extended_l2 { self.cluster_size() >> 5 } else { self.cluster_size() }
    }

    /// Index of the subcluster that holds `offset` within its cluster: 0..[`subclusters`](Self::subclusters).
    pub const fn subcluster_index(&self, offset: GuestOffset) -> u32 {
        (self.in_cluster(offset.value()) / self.subcluster_size()) as u32
    }

    /// The guest cluster that holds `offset`.
    pub const fn guest_cluster(&self, offset: GuestOffset) -> GuestCluster {
        GuestCluster::new(offset.value() >> self.cluster_bits)
    }

    /// Guest offset of a cluster's first byte. High bits are lost for cluster numbers that no guest offset
    /// has.
    pub const fn guest_offset(&self, cluster: GuestCluster) -> GuestOffset {
        GuestOffset::new(cluster.value() << self.cluster_bits)
    }

    /// The host cluster that holds `offset`.
    pub const fn host_cluster(&self, offset: HostOffset) -> HostCluster {
        HostCluster::new(offset.value() >> self.cluster_bits)
    }

    /// Host offset of a cluster's first byte, or `None` past 2^64 - 1.
    pub const fn host_offset(&self, cluster: HostCluster) -> Option<HostOffset> {
        if cluster.value() > u64::MAX >> self.cluster_bits {
            return None;
        }
        Some(HostOffset::new(cluster.value() << self.cluster_bits))
    }

    /// Size of `count` clusters in bytes, saturating at `u64::MAX`.
    pub const fn bytes_of(&self, count: u64) -> u64 {
        count.saturating_mul(self.cluster_size())
    }

    /// Number of whole clusters below byte `end`; `end` must be a multiple of the cluster size.
    pub const fn clusters_below(&self, end: u64) -> u64 {
        end >> self.cluster_bits
    }

    /// `value` modulo the cluster size: the offset within its cluster.
    pub const fn in_cluster(&self, value: u64) -> u64 {
        value & (self.cluster_size() - 1)
    }

    /// True if `value` is a multiple of the cluster size.
    pub const fn is_aligned(&self, value: u64) -> bool {
        self.in_cluster(value) == 0
    }

    /// `value` rounded down to a multiple of the cluster size.
    pub const fn align_down(&self, value: u64) -> u64 {
        value & !(self.cluster_size() - 1)
    }

    /// `value` rounded up to a multiple of the cluster size, or `None` past 2^64 - 1.
    pub const fn align_up(&self, value: u64) -> Option<u64> {
        match value.checked_add(self.cluster_size() - 1) {
            Some(v) => Some(self.align_down(v)),
            None => None,
        }
    }

    /// Number of clusters that `len` bytes occupy, rounded up.
    pub const fn clusters_for(&self, len: u64) -> u64 {
        (len >> self.cluster_bits) + if self.in_cluster(len) == 0 { 0 } else { 1 }
    }

    /// Index of the L1 entry for `offset`.
    pub const fn l1_index(&self, offset: GuestOffset) -> L1Index {
        L1Index::new(offset.value() >> (self.cluster_bits + self.l2_bits()))
    }

    /// Index of the L2 entry for `offset`, within its L2 table.
    pub const fn l2_index(&self, offset: GuestOffset) -> L2Index {
        L2Index::new((offset.value() >> self.cluster_bits) & (self.l2_entries() - 1))
    }

    /// Guest bytes covered by one L1 entry, that is by one L2 table.
    pub const fn l2_coverage(&self) -> u64 {
        1 << (self.cluster_bits + self.l2_bits())
    }

    /// First guest offset covered by an L1 entry, or `None` past 2^64 - 1.
    pub const fn l1_start(&self, index: L1Index) -> Option<GuestOffset> {
        match index.value().checked_mul(self.l2_coverage()) {
            Some(v) => Some(GuestOffset::new(v)),
            None => None,
        }
    }

    /// Number of L1 entries for a disk of `size` bytes.
    pub const fn l1_entries_for(&self, size: u64) -> u64 {
        size.div_ceil(self.l2_coverage())
    }

    /// Refcounts in one refcount block, which is one cluster.
    pub const fn refcount_block_entries(&self) -> u64 {
        1 << self.refcount_block_bits()
    }

    const fn refcount_block_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.refcount_width.order()
    }

    /// Index of the refcount table entry whose block counts `cluster`.
    pub const fn refcount_table_index(&self, cluster: HostCluster) -> u64 {
        cluster.value() >> self.refcount_block_bits()
    }

    /// Index of `cluster`'s refcount within its refcount block.
    pub const fn refcount_block_slot(&self, cluster: HostCluster) -> u64 {
        cluster.value() & (self.refcount_block_entries() - 1)
    }

    /// First cluster counted by the block of refcount table entry `table_index`, or `None` past 2^64 - 1.
    pub const fn refcount_block_first(&self, table_index: u64) -> Option<HostCluster> {
        match table_index.checked_mul(self.refcount_block_entries()) {
            Some(v) => Some(HostCluster::new(v)),
            None => None,
        }
    }
}

#[cfg(test)]
mod tests;
