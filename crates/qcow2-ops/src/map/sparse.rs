//! Detects an image whose data area was preallocated but not written.

use qcow2_core::format::refcount::{RefcountWidth, decode_table_entry};
use qcow2_core::{Image, Storage};
use std::sync::Arc;

/// The data storage, if the image file has far more clusters with a refcount than disk space in use. Data
/// clusters may then be holes. The threshold is QEMU's, so that both show the same map.
pub(super) fn find_sparse_storage(image: &Image) -> qcow2_core::Result<Option<Arc<dyn Storage>>> {
    let storage = image.storage();
    let Some(used_bytes) = storage.used_bytes()? else {
        return Ok(None);
    };
    let cluster_size = image.geometry().cluster_size();
    let real = used_bytes / cluster_size;
    let threshold = (real.saturating_mul(10) / 9).max(real + 2);
    let clusters = storage.len()?.div_ceil(cluster_size);
    let sparse = clusters >= threshold && count_used_clusters(image, clusters, threshold)? >= threshold;
    Ok(if sparse { image.data_storage().cloned() } else { None })
}

/// Number of the first `clusters` clusters with a refcount; stops at `enough`. Reads no more refcount blocks
/// than the used disk space can hold, so that a small crafted file cannot cause unbounded reads.
fn count_used_clusters(image: &Image, clusters: u64, enough: u64) -> qcow2_core::Result<u64> {
    let (header, geometry, storage) = (image.header(), image.geometry(), image.storage());
    let per_block = geometry.refcount_block_entries();
    let table_entries = u64::from(header.refcount_table_clusters) * geometry.cluster_size() / 8;
    let mut blocks_left = storage.used_bytes()?.unwrap_or(0) / SMALLEST_SPACE + SPARE_BLOCKS;
    let mut block = vec![0; usize::try_from(geometry.cluster_size()).unwrap_or(0)];
    let mut count = 0;
    for index in 0..clusters.div_ceil(per_block).min(table_entries) {
        let Some(entry) = header.refcount_table_offset.checked_add(index * 8) else { break };
        let mut raw = [0; 8];
        storage.read_padded(entry, &mut raw)?;
        // A misaligned block is skipped; reporting it is a check's job.
        let Ok(Some(offset)) = decode_table_entry(u64::from_be_bytes(raw), &geometry) else { continue };
        if count >= enough || blocks_left == 0 {
            break;
        }
        blocks_left -= 1;
        storage.read_padded(offset, &mut block)?;
        let slots = per_block.min(clusters - index * per_block);
        count += count_refcounts(&block, geometry.refcount_width(), slots);
    }
    Ok(count)
}

/// Number of non-zero refcounts among the first `slots` of a refcount block.
fn count_refcounts(block: &[u8], width: RefcountWidth, slots: u64) -> u64 {
    let mut count = 0;
    let per_word = u64::from(64 / width.bits());
    for (index, bytes) in (0..).zip(block.chunks_exact(8)) {
        let mut word = [0; 8];
        word.copy_from_slice(bytes);
        let (word, first) = (u64::from_be_bytes(word), index * per_word);
        if word != 0 {
            let used = (0..per_word).filter(|&slot| first + slot < slots && width.extract(word, slot) != 0);
            count += used.count() as u64;
        }
    }
    count
}

/// Typical smallest allocation unit of a file system, in bytes.
const SMALLEST_SPACE: u64 = 4096;
/// Number of refcount blocks that may be read in any case.
const SPARE_BLOCKS: u64 = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_refcounts_of_any_width() {
        let width = |order| RefcountWidth::from_order(order).unwrap();
        let block = [0x00, 0x01, 0x00, 0x00, 0x00, 0x00, 0x00, 0x02, 0xff, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(count_refcounts(&block, width(4), 8), 3);
        assert_eq!(count_refcounts(&block, width(4), 4), 2);
        assert_eq!(count_refcounts(&block, width(0), 128), 10);
        assert_eq!(count_refcounts(&block, width(6), 2), 2);
    }
}
