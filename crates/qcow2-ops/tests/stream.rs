//! Reading images from streams within the memory limit.
#![allow(clippy::unwrap_used, reason = "tests may panic")]

use qcow2_core::{CreateOptions, GuestDisk, GuestOffset, RawDisk, create};
use qcow2_io::MemoryStorage;
use qcow2_ops::stream::MAX_HELD;
use qcow2_ops::{ErrorKind, Silent, StreamedImage};
use std::io::Read;
use std::sync::Arc;

const CLUSTER: u64 = 2 << 20;
/// The header's L1 table offset.
const L1_FIELD: std::ops::Range<usize> = 40..48;

/// An empty image whose L1 table is in host cluster `l1`, after clusters that nothing refers to before.
fn late_image(l1: u64) -> impl Read {
    let storage = Arc::new(MemoryStorage::new());
    let mut options = CreateOptions::new(8 << 20);
    options.cluster_size = CLUSTER;
    create(&(Arc::clone(&storage) as _), None, &options).unwrap();
    let mut front = storage.to_vec();
    front.resize(front.len().next_multiple_of(CLUSTER as usize), 0);
    front[L1_FIELD].copy_from_slice(&(l1 * CLUSTER).to_be_bytes());
    let unknown = l1 * CLUSTER - front.len() as u64;
    let unknown = std::io::repeat(7).take(unknown);
    std::io::Cursor::new(front).chain(unknown).chain(std::io::repeat(0).take(CLUSTER))
}

#[test]
fn held_clusters_are_limited() {
    let copy = |l1| {
        let target = RawDisk::new(Arc::new(MemoryStorage::with_len(8 << 20)), true).unwrap();
        let mut input = late_image(l1);
        StreamedImage::open(&mut input).unwrap().copy_to(&target, None, &Silent)?;
        let mut bytes = vec![1; 8 << 20];
        target.read_at(GuestOffset::new(0), &mut bytes).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 0));
        Ok::<(), qcow2_ops::Error>(())
    };
    let most = MAX_HELD / CLUSTER;
    copy(most - 4).unwrap();
    let error = copy(most + 8).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("would have to be held in memory"), "{error}");
}
