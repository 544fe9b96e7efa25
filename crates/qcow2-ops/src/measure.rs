//! Computes the file size that a new image would have.

use crate::error::{Error, ErrorKind, Result};
use crate::source::{Below, Content, Source};
use qcow2_core::format::bitmap::Bitmap;
use qcow2_core::format::limit::MAX_L1_ENTRIES;
use qcow2_core::format::{Geometry, GeometryFields, Version};
use qcow2_core::{GuestDisk, Preallocation, Refusal};
use std::sync::Arc;

/// The image to measure for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MeasureTarget {
    /// A raw image.
    Raw,
    /// A LUKS container.
    Container {
        /// Length of its header and key slots in bytes.
        area_len: u64,
    },
    /// A qcow2 image.
    Qcow2(MeasureOptions),
}

/// The qcow2 image to measure for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MeasureOptions {
    /// The version, which decides whether the image can have bitmaps.
    pub version: Version,
    /// Cluster size in bytes, a power of two from 512 to 2 MiB.
    pub cluster_size: u64,
    /// Refcount width in bits, a power of two up to 64; 16 in version 2.
    pub refcount_bits: u64,
    /// Use extended L2 entries (subclusters).
    pub extended_l2: bool,
    /// What to allocate up front.
    pub preallocation: Preallocation,
    /// The image has a backing file: every cluster of a measured disk counts as allocated. With
    /// [`Measured::Size`] this has no effect.
    pub has_backing: bool,
    /// Length of the encryption header in bytes; 0 without encryption.
    pub luks_len: u64,
}

impl Default for MeasureOptions {
    fn default() -> Self {
        Self {
            version: Version::V3,
            cluster_size: 65536,
            refcount_bits: 16,
            extended_l2: false,
            preallocation: Preallocation::Off,
            has_backing: false,
            luks_len: 0,
        }
    }
}

impl MeasureOptions {
    /// With this version.
    #[must_use]
    pub fn with_version(self, version: Version) -> Self {
        Self { version, ..self }
    }

    /// With clusters of `bytes`.
    #[must_use]
    pub fn with_cluster_size(self, bytes: u64) -> Self {
        Self { cluster_size: bytes, ..self }
    }

    /// With refcounts of `bits`.
    #[must_use]
    pub fn with_refcount_bits(self, bits: u64) -> Self {
        Self { refcount_bits: bits, ..self }
    }

    /// With extended L2 entries or without.
    #[must_use]
    pub fn with_extended_l2(self, extended_l2: bool) -> Self {
        Self { extended_l2, ..self }
    }

    /// With this much allocated up front.
    #[must_use]
    pub fn with_preallocation(self, preallocation: Preallocation) -> Self {
        Self { preallocation, ..self }
    }

    /// With a backing file or without.
    #[must_use]
    pub fn with_backing(self, has_backing: bool) -> Self {
        Self { has_backing, ..self }
    }

    /// With an encryption header of `bytes`.
    #[must_use]
    pub fn with_luks_len(self, bytes: u64) -> Self {
        Self { luks_len: bytes, ..self }
    }

    /// Checks the options against each other, in QEMU's order, which differs from that of a new image: of
    /// extended L2 entries in version 2 nothing is said. [`measure`] does the same.
    pub fn check(&self) -> std::result::Result<(), Refusal> {
        let (size, bits) = (self.cluster_size, self.refcount_bits);
        if !size.is_power_of_two() || !(512..=2 << 20).contains(&size) {
            return Err(Refusal::ClusterSize(size));
        }
        if self.extended_l2 && size < 16 << 10 {
            return Err(Refusal::ExtendedL2ClusterSize(size));
        }
        if !bits.is_power_of_two() || bits > 64 {
            return Err(Refusal::RefcountBits(bits));
        }
        match self.version < Version::V3 && bits != 16 {
            true => Err(Refusal::RefcountBitsNeedVersion3(bits)),
            false => Ok(()),
        }
    }
}

/// File sizes in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Measure {
    /// With the content of the source.
    pub required: u64,
    /// With all clusters allocated.
    pub fully_allocated: u64,
    /// What the bitmaps of the source would take in addition; `None` where source or target can have none.
    pub bitmaps: Option<u64>,
}

/// What to measure.
#[derive(Clone, Copy)]
pub enum Measured<'a> {
    /// An empty disk of this many bytes.
    Size(u64),
    /// The content of a disk.
    Disk(&'a Arc<dyn GuestDisk>),
}

/// Measures an image. For qcow2: all tables for its size, and the clusters in which the source is not known
/// to be zero. Disk: reads tables and the directory of bitmaps, no data. Errors: `InvalidOption` for options
/// that [`MeasureOptions::check`] refuses, with the [`Refusal`] as source, for a size past 2^64 - 1, and for
/// one that needs an L1 table above the limit; `Metadata` for bitmaps that cannot be read; `Extents`.
pub fn measure(what: Measured<'_>, target: &MeasureTarget) -> Result<Measure> {
    let all = match target {
        MeasureTarget::Qcow2(options) => return measure_qcow2(what, options),
        MeasureTarget::Raw => size_of(what)?,
        MeasureTarget::Container { area_len } => {
            let size = match what {
                Measured::Size(size) => size,
                Measured::Disk(_) => size_of(what)?,
            };
            size.checked_add(*area_len).ok_or_else(past_2_64)?
        }
    };
    Ok(Measure { required: all, fully_allocated: all, bitmaps: None })
}

fn measure_qcow2(what: Measured<'_>, options: &MeasureOptions) -> Result<Measure> {
    options.check().map_err(|refusal| {
        Error::new(ErrorKind::InvalidOption, "checking the options of the image").with_source(refusal)
    })?;
    let bitmaps = match what {
        Measured::Disk(disk) => bitmaps_of(disk, options)?,
        Measured::Size(_) => None,
    };
    let size = size_of(what)?;
    let tables = table_bytes(size, options)?;
    let too_large = || Error::new(ErrorKind::InvalidOption, "the image size is too large");
    let luks = options.luks_len.checked_next_multiple_of(options.cluster_size);
    let tables = luks.and_then(|luks| tables.checked_add(luks)).ok_or_else(too_large)?;
    let data = size.checked_next_multiple_of(options.cluster_size).ok_or_else(too_large)?;
    let fully_allocated = tables.checked_add(data).ok_or_else(too_large)?;
    let used = match what {
        _ if matches!(options.preallocation, Preallocation::Falloc | Preallocation::Full) => data,
        Measured::Size(_) => 0,
        Measured::Disk(_) if options.has_backing => data,
        Measured::Disk(disk) => used_clusters(disk, options.cluster_size)? * options.cluster_size,
    };
    Ok(Measure { required: tables + used, fully_allocated, bitmaps })
}

/// Bytes for the bitmaps of a source that can have some.
fn bitmaps_of(disk: &Arc<dyn GuestDisk>, options: &MeasureOptions) -> Result<Option<u64>> {
    let image = disk.as_image().filter(|image| image.header().version >= Version::V3);
    let Some(image) = image.filter(|_| options.version >= Version::V3) else { return Ok(None) };
    let bitmaps = image.bitmaps().map_err(|error| {
        Error::new(ErrorKind::Metadata, "reading the bitmaps of the source").with_source(error)
    })?;
    Ok(Some(measure_bitmaps(&bitmaps, disk.size(), options.cluster_size)))
}

/// Size in bytes of the persistent bitmaps of a disk of `disk_size` bytes: bits, tables and directory, in
/// whole clusters of `cluster_size` bytes.
fn measure_bitmaps(bitmaps: &[Bitmap], disk_size: u64, cluster_size: u64) -> u64 {
    let clusters = |bytes: u64| bytes.div_ceil(cluster_size);
    let mut directory = 0;
    let each: u64 = bitmaps
        .iter()
        .map(|bitmap| {
            let data = clusters(disk_size.div_ceil(1 << bitmap.granularity_bits.min(63)).div_ceil(8));
            directory += (BITMAP_ENTRY_LEN + bitmap.name.len() as u64).next_multiple_of(8);
            data + clusters(data * 8)
        })
        .sum();
    (each + clusters(directory)) * cluster_size
}

fn size_of(what: Measured<'_>) -> Result<u64> {
    let size = match what {
        Measured::Size(size) => size,
        Measured::Disk(disk) => disk.size(),
    };
    size.checked_next_multiple_of(512).ok_or_else(past_2_64)
}

fn past_2_64() -> Error {
    Error::new(ErrorKind::InvalidOption, "the size exceeds 2^64 - 1 bytes")
}

/// Size of the header, the L1 table, the L2 tables, and the refcount table and blocks of a full image.
fn table_bytes(size: u64, options: &MeasureOptions) -> Result<u64> {
    let invalid = |text: String| Error::new(ErrorKind::InvalidOption, text);
    let fields = GeometryFields {
        cluster_bits: options.cluster_size.trailing_zeros(),
        refcount_order: options.refcount_bits.trailing_zeros(),
        extended_l2: options.extended_l2,
    };
    let geometry = Geometry::new(fields)
        .map_err(|e| invalid("invalid cluster size or refcount width".to_owned()).with_source(e))?;
    let l1_entries = geometry.l1_entries_for(size);
    if l1_entries > MAX_L1_ENTRIES {
        return Err(invalid(format!(
            "size {size} needs {l1_entries} l1 entries, allowed are {MAX_L1_ENTRIES}"
        )));
    }
    let guest_clusters = size.div_ceil(options.cluster_size);
    let counted = 1 + geometry.clusters_for(l1_entries * 8) + l1_entries + guest_clusters;
    // Blocks and table also count their own clusters, so iterate until the numbers are stable.
    let (mut blocks, mut table) = (0, 0);
    loop {
        let needed = (counted + blocks + table).div_ceil(geometry.refcount_block_entries());
        let entries = needed.div_ceil(options.cluster_size / 8);
        if (needed, entries) == (blocks, table) {
            break;
        }
        (blocks, table) = (needed, entries);
    }
    Ok((counted - guest_clusters + blocks + table) * options.cluster_size)
}

/// Number of clusters of the target that would hold data.
fn used_clusters(disk: &Arc<dyn GuestDisk>, cluster_size: u64) -> Result<u64> {
    let source = Source::new(std::slice::from_ref(disk))?;
    let (mut at, mut clusters) = (0, 0);
    while at < source.size() {
        let run = source.joined_at(at, source.size() - at, Below::Nothing)?;
        at = run.end();
        if run.content == Content::Data {
            let end = at.next_multiple_of(cluster_size);
            clusters += (end - run.start / cluster_size * cluster_size) / cluster_size;
            at = end.min(source.size());
        }
    }
    Ok(clusters)
}

/// Length of a bitmap directory entry before the name, in bytes. Spec: "Bitmap directory".
const BITMAP_ENTRY_LEN: u64 = 24;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestDisk;

    #[track_caller]
    fn check(size: u64, change: impl FnOnce(&mut MeasureOptions), required: u64, full: u64) {
        let mut options = MeasureOptions::default();
        change(&mut options);
        let seen = measure_qcow2(Measured::Size(size), &options).unwrap();
        assert_eq!((seen.required, seen.fully_allocated), (required, full), "{size}");
    }

    /// Numbers from qemu-img measure.
    #[test]
    fn sizes_match_qemu_img() {
        check(0, |_| {}, 196_608, 196_608);
        check(513, |_| {}, 327_680, 393_216);
        check(1 << 30, |_| {}, 393_216, 1_074_135_040);
        check(1 << 20, |o| o.extended_l2 = true, 327_680, 1_376_256);
        check(1 << 40, |o| o.cluster_size = 2 << 20, 12_582_912, 1_099_524_210_688);
        check(1 << 30, |o| o.cluster_size = 512, 21_385_216, 1_095_127_040);
        check(1 << 30, |o| o.refcount_bits = 64, 524_288, 1_074_266_112);
        check(1 << 30, |o| o.preallocation = Preallocation::Full, 1_074_135_040, 1_074_135_040);
        check(1 << 30, |o| o.has_backing = true, 393_216, 1_074_135_040);
        let huge = measure_qcow2(Measured::Size(4 << 60), &MeasureOptions::default());
        assert_eq!(huge.unwrap_err().kind(), ErrorKind::InvalidOption);
        let raw = measure(Measured::Size(i64::MAX as u64), &MeasureTarget::Raw).unwrap();
        assert_eq!(raw.required, 1 << 63);
        let container = measure(Measured::Size(100), &MeasureTarget::Container { area_len: 4096 }).unwrap();
        assert_eq!(container.fully_allocated, 4196);
    }

    #[test]
    fn impossible_options_are_refused() {
        use Refusal::*;
        let options = MeasureOptions::default;
        for (options, refusal) in [
            (options().with_cluster_size(0), ClusterSize(0)),
            (options().with_cluster_size(3), ClusterSize(3)),
            (options().with_cluster_size(4 << 20), ClusterSize(4 << 20)),
            (options().with_cluster_size(8192).with_extended_l2(true), ExtendedL2ClusterSize(8192)),
            (options().with_refcount_bits(0), RefcountBits(0)),
            (options().with_refcount_bits(1 << 32), RefcountBits(1 << 32)),
            (options().with_refcount_bits(8).with_version(Version::V2), RefcountBitsNeedVersion3(8)),
        ] {
            let error = measure(Measured::Size(512), &MeasureTarget::Qcow2(options)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidOption);
            let source = std::error::Error::source(&error).and_then(|source| source.downcast_ref());
            assert_eq!(source, Some(&refusal));
        }
    }

    /// Numbers from qemu-img measure: bits, tables and directory each take whole clusters.
    #[test]
    fn bitmap_sizes_match_qemu_img() {
        let bitmaps = |list: &[(&str, u64)]| -> Vec<Bitmap> {
            list.iter().map(|(name, granularity)| Bitmap::new(*name, granularity.ilog2() as u8)).collect()
        };
        let short = bitmaps(&[("b0", 65_536), ("b1", 4096)]);
        assert_eq!(measure_bitmaps(&short, 4 << 20, 65_536), 327_680);
        assert_eq!(measure_bitmaps(&short, 4 << 20, 512), 2560);
        let long = bitmaps(&[("long-name-of-a-bitmap", 512), ("b", 65_536)]);
        for (cluster_size, bytes) in
            [(512, 80_496_640), (4096, 79_421_440), (65_536, 79_495_168), (2 << 20, 88_080_384)]
        {
            assert_eq!(measure_bitmaps(&long, 300 << 30, cluster_size), bytes, "{cluster_size}");
        }
        assert_eq!(measure_bitmaps(&[], 4 << 20, 65_536), 0);
    }

    #[test]
    fn partly_used_clusters_count_once() {
        let disk = TestDisk::data(vec![1; 8 * 512]);
        disk.set_states("dz-dz--d");
        let disk: Arc<dyn GuestDisk> = Arc::new(disk);
        assert_eq!(used_clusters(&disk, 512).unwrap(), 3);
        assert_eq!(used_clusters(&disk, 1024).unwrap(), 3);
        assert_eq!(used_clusters(&disk, 2048).unwrap(), 2);
        assert_eq!(used_clusters(&disk, 65536).unwrap(), 1);
    }
}
