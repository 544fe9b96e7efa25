//! The source of a procedure: one disk, or several disks concatenated.

use crate::error::{Error, ErrorKind, Result};
use crate::map::{Layers, MapExtent};
use qcow2_core::{GuestDisk, GuestOffset, GuestRange, Image};
use std::sync::Arc;

/// Concatenated disks. Each is padded with zeroes to a multiple of 512.
pub(crate) struct Source {
    parts: Vec<Part>,
    size: u64,
}

struct Part {
    disk: Arc<dyn GuestDisk>,
    layers: Layers,
    start: u64,
    /// Length in bytes, rounded up to a multiple of 512.
    len: u64,
}

/// Content of a run, as far as tables and holes show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// Data; may be anything.
    Data,
    /// Known to be zero.
    Zero,
    /// Comes from the backing file; only reported if the caller excludes some layers.
    Backing,
}

/// Which ranges count as [`Content::Backing`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Below {
    /// None: all layers are part of the source.
    Nothing,
    /// Ranges that the top layer does not allocate, but that a lower layer can contain.
    OtherLayers,
    /// Ranges that no layer allocates.
    Unallocated,
}

/// Runs that are taken as one at most. Origin: ours; the tables of a small file may have any number of short
/// runs without data side by side.
const MAX_JOINED: usize = 1 << 12;

/// Bytes of a slice of an L2 table; fewer if a cluster is smaller.
const MAX_SLICE: u64 = 4096;

/// A run of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) start: u64,
    pub(crate) len: u64,
    pub(crate) content: Content,
}

impl Run {
    pub(crate) fn end(&self) -> u64 {
        self.start + self.len
    }
}

/// Total size of the disks in bytes, each rounded up to a multiple of 512.
pub(crate) fn total_size(disks: &[Arc<dyn GuestDisk>]) -> Result<u64> {
    let sizes = disks.iter().map(|disk| disk.size().checked_next_multiple_of(SECTOR));
    sizes.into_iter().try_fold(0u64, |total, size| total.checked_add(size?)).ok_or_else(|| {
        Error::new(ErrorKind::InvalidOption, "the total size of the sources exceeds 2^64 - 1 bytes")
    })
}

impl Source {
    pub(crate) fn new(disks: &[Arc<dyn GuestDisk>]) -> Result<Self> {
        let size = total_size(disks)?;
        let (mut parts, mut start) = (Vec::with_capacity(disks.len()), 0);
        for disk in disks {
            let len = disk.size().next_multiple_of(SECTOR);
            parts.push(Part { disk: Arc::clone(disk), layers: Layers::new(disk)?, start, len });
            start += len;
        }
        Ok(Self { parts, size })
    }

    /// Total size of the disks in bytes, a multiple of 512.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// The largest cluster size of any layer in bytes; 0 if no layer has clusters.
    pub(crate) fn cluster_size(&self) -> u64 {
        let mut largest = 0;
        for part in &self.parts {
            let mut layer = Some(&part.disk);
            while let Some(disk) = layer {
                largest = largest.max(disk.cluster_size());
                layer = disk.backing();
            }
        }
        largest
    }

    /// The most bytes of the top layer that one look at its tables finds unallocated, in bytes: those of one
    /// slice of an L2 table. `None` if it has no tables. Origin: the slices that QEMU's cache is made of.
    pub(crate) fn longest_unallocated(&self) -> Option<u64> {
        let geometry = self.parts.first()?.disk.as_image()?.geometry();
        let slice = geometry.cluster_size().min(MAX_SLICE) / geometry.l2_entry_size();
        slice.checked_mul(geometry.cluster_size())
    }

    fn part_at(&self, at: u64) -> &Part {
        let after = self.parts.partition_point(|part| part.start <= at);
        &self.parts[after - 1]
    }

    /// The run at `at` as a map extent, at most `len` bytes. `at` must be inside the source.
    pub(crate) fn extent_at(&self, at: u64, len: u64) -> Result<MapExtent> {
        let part = self.part_at(at);
        let inside = at - part.start;
        let extent = part.layers.extent_at(inside, len.min(part.len - inside)).map_err(|e| {
            Error::new(ErrorKind::Extents, format!("error while reading block status at offset {at}"))
                .with_source(e)
        })?;
        Ok(MapExtent { start: at, ..extent })
    }

    /// Like [`extent_at`](Self::extent_at), but bytes past the end of a short backing file count as allocated
    /// zeroes.
    pub(crate) fn state_at(&self, at: u64, len: u64) -> Result<MapExtent> {
        let extent = self.extent_at(at, len)?;
        let past_a_layer = self.part_at(at).layers.is_past_a_layer(&extent);
        Ok(MapExtent { present: extent.present || past_a_layer, ..extent })
    }

    /// The image of the disk at `at`, if it has no layer below it, and the range of it that is left there, at
    /// most `len` bytes. Where it has no data it reads as zeroes.
    fn sole_image(&self, at: u64, len: u64) -> Option<(&Image, GuestRange)> {
        let part = self.part_at(at);
        let start = at - part.start;
        let image = part.disk.as_image().filter(|_| part.layers.disk(1).is_none())?;
        let len = part.disk.size().checked_sub(start)?.min(len);
        let range = GuestRange::between(GuestOffset::new(start), GuestOffset::new(start + len));
        (len > 0).then_some((image, range))
    }

    /// Content of the run at `at`, at most `len` bytes. `below` selects what is `Backing`. `at` must be
    /// inside the source.
    pub(crate) fn content_at(&self, at: u64, len: u64, below: Below) -> Result<Run> {
        Ok(self.stored_at(at, len, below)?.0)
    }

    /// Like [`content_at`](Self::content_at), with the runs behind it that are no data either. An error of
    /// these is met again where they begin.
    pub(crate) fn joined_at(&self, at: u64, len: u64, below: Below) -> Result<Run> {
        let mut run = self.content_at(at, len, below)?;
        let end = at + len;
        for _ in 0..MAX_JOINED {
            if run.content == Content::Data || run.end() >= end {
                break;
            }
            let zeroes = run.content == Content::Zero && below != Below::Unallocated;
            let more = match self.sole_image(run.end(), end - run.end()).filter(|_| zeroes) {
                Some((image, range)) => image.len_without_data(range).unwrap_or(0),
                None => {
                    let next = self.content_at(run.end(), end - run.end(), below).ok();
                    next.filter(|next| next.content == run.content).map_or(0, |next| next.len)
                }
            };
            if more == 0 {
                break;
            }
            run.len += more;
        }
        Ok(run)
    }

    /// Like [`content_at`](Self::content_at), with the depth of the layer that stores the bytes uncompressed,
    /// if one does.
    pub(crate) fn stored_at(&self, at: u64, len: u64, below: Below) -> Result<(Run, Option<u32>)> {
        let extent = self.extent_at(at, len)?;
        let content = match extent {
            MapExtent { depth: 1.., .. } if below == Below::OtherLayers => Content::Backing,
            MapExtent { present: false, .. } if below == Below::Unallocated => Content::Backing,
            MapExtent { zero: true, .. } => Content::Zero,
            _ => Content::Data,
        };
        // A filter sees all requests, and none that the system makes by itself.
        let filtered = self.part_at(at).disk.filtered().is_some();
        let plain = content == Content::Data && extent.host.is_some() && !filtered;
        let stored = plain.then_some(extent.depth);
        Ok((Run { start: at, len: extent.len, content }, stored))
    }

    /// Layer `depth` of the disk at `at`, the offset within that disk, and the number of bytes left in it.
    pub(crate) fn layer_at(&self, at: u64, depth: u32) -> Option<(&Arc<dyn GuestDisk>, u64, u64)> {
        let part = self.part_at(at);
        let inside = at - part.start;
        // `None` in the padding after the end of a raw disk, where no layer has bytes to copy.
        Some((part.layers.disk(depth)?, inside, part.disk.size().checked_sub(inside)?))
    }

    /// Fills `buf` from `at`, across disk boundaries if necessary. The whole range must be inside the source.
    pub(crate) fn read_at(&self, at: u64, buf: &mut [u8]) -> qcow2_core::Result<()> {
        let (mut at, mut rest) = (at, buf);
        while !rest.is_empty() {
            let part = self.part_at(at);
            let inside = at - part.start;
            let len = (part.len - inside).min(rest.len() as u64) as usize;
            let (now, later) = rest.split_at_mut(len);
            let stored = part.disk.size().saturating_sub(inside).min(len as u64) as usize;
            if stored > 0 {
                part.disk.read_at(GuestOffset::new(inside), &mut now[..stored])?;
            }
            now[stored..].fill(0);
            at += len as u64;
            rest = later;
        }
        Ok(())
    }
}

pub(crate) const SECTOR: u64 = 512;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestDisk;

    fn disk(disk: TestDisk) -> Arc<dyn GuestDisk> {
        Arc::new(disk)
    }

    #[test]
    fn disks_of_any_size_are_concatenated() {
        let sizes = [1, 511, 0, 512, 513, 4096];
        let disks: Vec<_> =
            (1u8..).zip(sizes).map(|(byte, size)| disk(TestDisk::data(vec![byte; size]))).collect();
        let source = Source::new(&disks).unwrap();
        let mut expected = Vec::new();
        for (byte, size) in (1u8..).zip(sizes) {
            expected.extend(vec![byte; size]);
            expected.resize(expected.len().next_multiple_of(512), 0);
        }
        assert_eq!(source.size(), expected.len() as u64);
        for start in [0, 1, 500, 512, 1023, 1500, 2048] {
            for len in [0, 1, 512, 2000] {
                let mut buf = vec![9; len];
                source.read_at(start as u64, &mut buf).unwrap();
                assert_eq!(buf, expected[start..start + len], "{start}+{len}");
            }
        }
    }

    #[test]
    fn content_depends_on_the_excluded_layers() {
        let base = Arc::new(TestDisk::empty(1536, 512));
        base.set_states("dz-");
        let mut top = TestDisk::empty(2560, 512).with_backing(&base);
        top.cluster_size = 512;
        top.set_states("---z-");
        let source = Source::new(&[disk(top)]).unwrap();
        let runs = |below| {
            let (mut at, mut text) = (0, String::new());
            while at < source.size() {
                let run = source.content_at(at, source.size() - at, below).unwrap();
                assert_eq!(run.start, at);
                text += &format!("{:?}{} ", run.content, run.len);
                at = run.end();
            }
            text
        };
        assert_eq!(runs(Below::Nothing), "Data512 Zero512 Zero512 Zero512 Zero512 ");
        assert_eq!(runs(Below::OtherLayers), "Backing512 Backing512 Backing512 Zero512 Zero512 ");
        assert_eq!(runs(Below::Unallocated), "Data512 Zero512 Backing512 Zero512 Backing512 ");
    }

    #[test]
    fn failed_block_status_is_an_extents_error() {
        let bad = TestDisk { unknown: Some(512..1024), ..TestDisk::data(vec![1; 2048]) };
        let source = Source::new(&[disk(TestDisk::data(vec![1; 512])), disk(bad)]).unwrap();
        assert_eq!(source.content_at(0, 99, Below::Nothing).unwrap().len, 99);
        let error = source.content_at(1024, 512, Below::Nothing).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Extents);
        assert!(error.to_string().contains("offset 1024"), "{error}");
    }
}
