//! The length that the file of an image must at least have.

use super::Walk;
use crate::error::Result;
use ::alloc::vec;
use qcow2_format::refcount::decode_table_entry;

/// How many refcount blocks without a nonzero count are skipped before the search ends.
const MAX_EMPTY_BLOCKS: usize = 64;

impl Walk<'_> {
    /// End of the last cluster in use, in bytes. A complete file is longer than this minus one cluster, since
    /// the last cluster may be short. A shorter file was truncated, for example by an interrupted copy; the
    /// missing part reads as zeroes.
    ///
    /// Disk: reads the refcount table and the last refcount blocks. A block past the end of the file counts
    /// as in use itself. If the file ends before these tables, it may have been longer still. Errors:
    /// `Storage`.
    pub fn used_end(&self) -> Result<u64> {
        let ends = self.header_references().map(|place| place.offset.value().saturating_add(place.len));
        let end = ends.max().unwrap_or(0);
        Ok(end.max(self.counted_end()?))
    }

    /// End of the last cluster whose refcount is not zero, in bytes.
    fn counted_end(&self) -> Result<u64> {
        let (geometry, size) = (self.geometry(), self.geometry().cluster_size());
        let width = geometry.refcount_width();
        let per_word = u64::from(64 / width.bits());
        let mut block = vec![0; size as usize];
        let table = self.refcount_table()?;
        let entries = table.iter().enumerate().rev();
        let blocks =
            entries.filter_map(|(i, &raw)| Some((i as u64, decode_table_entry(raw, geometry).ok()??)));
        for (index, place) in blocks.take(MAX_EMPTY_BLOCKS) {
            if place.value() >= self.file_len {
                return Ok(place.value().saturating_add(size));
            }
            self.read(place, &mut block)?;
            let words = qcow2_format::bytes::words(&block);
            let Some((word, counts)) = (0u64..).zip(words).filter(|&(_, word)| word != 0).last() else {
                continue;
            };
            let slots = word * per_word..(word + 1) * per_word;
            let last = slots.rev().find(|&slot| width.extract(counts, slot) != 0).unwrap_or(0);
            let cluster = index.saturating_mul(size / 8 * per_word).saturating_add(last);
            return Ok(cluster.saturating_add(1).saturating_mul(size));
        }
        Ok(0)
    }
}
