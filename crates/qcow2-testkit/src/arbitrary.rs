//! Random geometries and operations as values: drawn by proptest, or from a seed for long runs.

use crate::pattern;
use crate::rng::Rng;
use proptest::prelude::*;
use qcow2_core::{GuestDisk, GuestOffset, GuestRange, Result, SectorNumbering, ZeroMode};

/// The backing file of an overlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackingShape {
    /// Bytes of the backing disk, a multiple of 512; may be shorter or longer than the overlay.
    pub size: u64,
    /// True for a qcow2 image, false for a raw file.
    pub qcow2: bool,
}

/// An external data file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataFileShape {
    /// True for a raw data file: its bytes equal the guest disk (`data_file_raw`).
    pub raw: bool,
}

/// Everything that determines how an image is created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Version 3 (`compat=1.1`) or 2 (`compat=0.10`).
    pub version3: bool,
    /// log2 of the cluster size, 9 to 21.
    pub cluster_bits: u32,
    /// log2 of the refcount width in bits, 0 to 6.
    pub refcount_order: u32,
    /// Extended L2 entries: clusters have 32 subclusters.
    pub extended_l2: bool,
    /// Lazy refcounts.
    pub lazy_refcounts: bool,
    /// Compress with zstd instead of deflate.
    pub zstd: bool,
    /// The external data file, if any.
    pub data_file: Option<DataFileShape>,
    /// The backing file, if any.
    pub backing: Option<BackingShape>,
    /// Encryption of the guest data with a [toy cipher](crate::toy), and how its sectors are numbered.
    pub encryption: Option<SectorNumbering>,
    /// Bytes of the disk, a multiple of 512.
    pub size: u64,
}

impl Shape {
    /// An image of `size` bytes with QEMU's default options.
    pub fn plain(size: u64) -> Self {
        Self {
            version3: true,
            cluster_bits: 16,
            refcount_order: 4,
            extended_l2: false,
            lazy_refcounts: false,
            zstd: false,
            data_file: None,
            backing: None,
            encryption: None,
            size,
        }
    }

    /// Bytes in a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The nearest shape that the format allows: version 2 has no options, extended L2 entries need clusters
    /// of at least 16 KiB, a raw data file excludes a backing file and encryption.
    pub fn legalized(mut self) -> Self {
        if !self.version3 {
            let Self { size, cluster_bits, backing, encryption, .. } = self;
            self = Self { version3: false, cluster_bits, backing, encryption, ..Self::plain(size) };
        }
        if self.extended_l2 {
            self.cluster_bits = self.cluster_bits.max(14);
        }
        if let Some(file) = self.data_file.as_mut().filter(|_| self.encryption.is_some()) {
            file.raw = false;
        }
        if self.data_file.is_some_and(|file| file.raw) {
            self.backing = None;
        }
        self.size = self.size.max(512) & !511;
        self
    }

    /// A random legal shape. Disks are small enough for a byte-array model (up to about 4 MiB) and, with
    /// small clusters, large enough for several L2 tables.
    pub fn random(rng: &mut Rng) -> Self {
        let cluster_bits = rng.pick(CLUSTER_BITS);
        let size = random_size(rng, cluster_bits);
        let backing_size = if rng.one_in(2) { size } else { random_size(rng, cluster_bits) };
        let shape = Self {
            version3: !rng.one_in(5),
            cluster_bits,
            refcount_order: rng.between(0, 6) as u32,
            extended_l2: rng.one_in(3),
            lazy_refcounts: rng.one_in(4),
            zstd: rng.one_in(3),
            data_file: rng.one_in(4).then(|| DataFileShape { raw: rng.one_in(2) }),
            backing: rng.one_in(2).then(|| BackingShape { size: backing_size, qcow2: rng.one_in(2) }),
            encryption: rng.pick(ENCRYPTIONS),
            size,
        };
        shape.legalized()
    }
}

/// Most images are not encrypted.
pub(crate) const ENCRYPTIONS: &[Option<SectorNumbering>] =
    &[None, None, None, None, Some(SectorNumbering::Guest), Some(SectorNumbering::Host)];

/// Small clusters are drawn more often: a small disk then has more tables.
const CLUSTER_BITS: &[u32] = &[9, 9, 9, 10, 12, 12, 14, 14, 16, 16, 18, 21];

fn random_size(rng: &mut Rng, cluster_bits: u32) -> u64 {
    size_from(cluster_bits, rng.between(1, 400), rng.below(8) * 512)
}

fn size_from(cluster_bits: u32, clusters: u64, odd: u64) -> u64 {
    let size = (clusters << cluster_bits).min(4 << 20);
    (size - odd.min(size - 512)) & !511
}

/// Legal shapes for proptest; see [`Shape::random`] for their range.
pub fn shapes() -> impl Strategy<Value = Shape> {
    let cluster_bits = proptest::sample::select(CLUSTER_BITS);
    let switches = (proptest::bool::weighted(0.8), any::<bool>(), any::<bool>(), any::<bool>());
    let files = (proptest::option::of(any::<bool>()), proptest::option::of((any::<bool>(), 1..400u64)));
    let encryption = proptest::sample::select(ENCRYPTIONS);
    let sizes = (1..400u64, 0..8u64);
    (cluster_bits, 0..=6u32, switches, files, encryption, sizes).prop_map(
        |(
            cluster_bits,
            refcount_order,
            (version3, extended_l2, lazy_refcounts, zstd),
            files,
            encryption,
            (clusters, odd),
        )| {
            let (data_file, backing) = files;
            let size_of = |clusters| size_from(cluster_bits, clusters, odd * 512);
            let shape = Shape {
                version3,
                cluster_bits,
                refcount_order,
                extended_l2,
                lazy_refcounts,
                zstd,
                data_file: data_file.map(|raw| DataFileShape { raw }),
                backing: backing.map(|(qcow2, clusters)| BackingShape { size: size_of(clusters), qcow2 }),
                encryption,
                size: size_of(clusters),
            };
            shape.legalized()
        },
    )
}

/// One operation on a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Read and compare with the model.
    Read(GuestRange),
    /// Write the [`pattern`] of `seed`.
    Write {
        /// The guest range.
        range: GuestRange,
        /// Seed of the content.
        seed: u64,
    },
    /// Writes zeroes.
    Zero {
        /// The guest range.
        range: GuestRange,
        /// Whether clusters may be deallocated.
        mode: ZeroMode,
    },
    /// Discard the range.
    Discard(GuestRange),
    /// Flush.
    Flush,
    /// Close the disk and open it again. A disk cannot do that itself; the caller that runs the operations
    /// does.
    Reopen,
}

impl Operation {
    /// A random operation on a disk of `size` bytes with clusters of `cluster_size` bytes.
    pub fn random(rng: &mut Rng, size: u64, cluster_size: u64) -> Self {
        let range = random_range(rng, size, cluster_size);
        let may_unmap = rng.one_in(2);
        Self::draw(rng.below(100) as u32, range, rng.below(64), may_unmap)
    }

    /// Maps random numbers to an operation: `kind` is below 100, `content` is any number.
    fn draw(kind: u32, range: GuestRange, content: u64, may_unmap: bool) -> Self {
        match kind {
            0..20 => Self::Read(range),
            20..65 => Self::Write { range, seed: content },
            65..78 => {
                let mode = if may_unmap { ZeroMode::MayUnmap } else { ZeroMode::KeepAllocated };
                Self::Zero { range, mode }
            }
            78..90 => Self::Discard(range),
            90..96 => Self::Flush,
            _ => Self::Reopen,
        }
    }

    /// The bytes it reads or writes; empty for `Flush` and `Reopen`.
    pub fn range(&self) -> GuestRange {
        match *self {
            Self::Read(range) | Self::Discard(range) => range,
            Self::Write { range, .. } | Self::Zero { range, .. } => range,
            Self::Flush | Self::Reopen => GuestRange::between(GuestOffset::new(0), GuestOffset::new(0)),
        }
    }

    /// Runs it on `disk`; returns the data of a read. `Reopen` only flushes.
    pub fn run(&self, disk: &dyn GuestDisk) -> Result<Option<Vec<u8>>> {
        match *self {
            Self::Read(range) => {
                let mut buf = pattern::unread(range.len() as usize);
                disk.read_at(range.start(), &mut buf)?;
                return Ok(Some(buf));
            }
            Self::Write { range, seed } => {
                let buf = pattern::bytes(seed, range.start().value(), range.len() as usize);
                write_whole_or_in_parts(disk, range.start(), &buf, seed >> 2)?;
            }
            Self::Zero { range, mode } => disk.write_zeroes(range, mode)?,
            Self::Discard(range) => disk.discard(range)?,
            Self::Flush | Self::Reopen => disk.flush()?,
        }
        Ok(None)
    }
}

/// Writes `buf` at `offset`, in one call or (one `draw` in three) with `write_parts` in 2 to 8 sector-aligned
/// parts, some in descending order.
pub fn write_whole_or_in_parts(
    disk: &dyn GuestDisk,
    offset: GuestOffset,
    buf: &[u8],
    draw: u64,
) -> Result<()> {
    if !draw.is_multiple_of(3) || buf.is_empty() {
        return disk.write_at(offset, buf);
    }
    let step = (buf.len() as u64).div_ceil(2 + draw / 3 % 7).next_multiple_of(512);
    let (end, mut parts, mut at) = (offset.value() + buf.len() as u64, Vec::new(), offset.value());
    while at < end {
        let next = (at + step).next_multiple_of(512).min(end);
        let inside = (at - offset.value()) as usize..(next - offset.value()) as usize;
        parts.push((GuestOffset::new(at), &buf[inside]));
        at = next;
    }
    if draw.is_multiple_of(5) {
        parts.reverse();
    }
    disk.write_parts(&parts)
}

/// A random range: its ends lie on, just beside, or far from cluster boundaries, and it is short more often
/// than long.
fn random_range(rng: &mut Rng, size: u64, cluster_size: u64) -> GuestRange {
    let near = |rng: &mut Rng| rng.pick(&[0, 0, 0, 1, 511, 512, 513, cluster_size / 2, cluster_size - 1]);
    let start = rng.below(size / cluster_size + 1) * cluster_size + near(rng);
    let longest = rng.pick(&[1, 2, 2, 5, 40]) * cluster_size;
    let len = if rng.one_in(2) { rng.between(1, 4) * cluster_size } else { rng.between(1, longest) };
    clamp(start, len, size)
}

fn clamp(start: u64, len: u64, size: u64) -> GuestRange {
    let start = start.min(size.saturating_sub(1));
    let end = start.saturating_add(len.max(1)).min(size);
    GuestRange::between(GuestOffset::new(start), GuestOffset::new(end))
}

/// Up to `most` operations for proptest; see [`Operation::random`] for their range.
pub fn operations(size: u64, cluster_size: u64, most: usize) -> impl Strategy<Value = Vec<Operation>> {
    let start = prop_oneof![
        (0..=size / cluster_size).prop_map(move |cluster| cluster * cluster_size),
        0..size.max(1),
        (0..=size / cluster_size).prop_map(move |cluster| (cluster * cluster_size + 512).min(size)),
    ];
    let len = prop_oneof![
        1..=cluster_size,
        (1..=4u64).prop_map(move |clusters| clusters * cluster_size),
        1..=cluster_size * 40,
    ];
    let one = (0..100u32, start, len, 0..64u64, any::<bool>()).prop_map(
        move |(kind, start, len, content, may_unmap)| {
            Operation::draw(kind, clamp(start, len, size), content, may_unmap)
        },
    );
    proptest::collection::vec(one, 1..=most)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn check(shape: Shape) {
        assert_eq!(shape, shape.legalized(), "a drawn shape is legal");
        assert!(shape.size >= 512 && shape.size.is_multiple_of(512) && shape.size <= 4 << 20, "{shape:?}");
        assert!(shape.version3 || (shape.refcount_order == 4 && shape.data_file.is_none()), "{shape:?}");
        assert!(!shape.extended_l2 || shape.cluster_bits >= 14, "{shape:?}");
    }

    #[test]
    fn seeds_draw_legal_shapes_of_every_feature_mix() {
        let mut rng = Rng::new(1);
        let mut seen = BTreeSet::new();
        for _ in 0..3000 {
            let shape = Shape::random(&mut rng);
            check(shape);
            seen.insert((
                shape.version3,
                shape.extended_l2,
                shape.data_file.is_some(),
                shape.backing.is_some(),
            ));
        }
        assert_eq!(seen.len(), 8 + 2, "every mix of features that is legal: {seen:?}");
    }

    #[test]
    fn seeds_draw_ranges_inside_the_disk() {
        let mut rng = Rng::new(2);
        for _ in 0..5000 {
            let shape = Shape::random(&mut rng);
            let range = Operation::random(&mut rng, shape.size, shape.cluster_size()).range();
            assert!(range.end().value() <= shape.size, "{range:?} in {shape:?}");
        }
    }

    proptest! {
        #[test]
        fn proptest_draws_legal_shapes(shape in shapes()) {
            check(shape);
        }

        #[test]
        fn proptest_draws_ranges_inside_the_disk(list in operations(66_048, 4096, 50)) {
            for operation in list {
                prop_assert!(operation.range().end().value() <= 66_048);
            }
        }
    }
}
