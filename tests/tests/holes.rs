//! Small files with large tables in holes, and with one damaged stream for all entries: what can be known
//! without a read is not read. The tests count reads and runs, not seconds.
#![allow(clippy::unwrap_used, reason = "a test may stop")]

use qcow2_codec::{Deflate, Zstd};
use qcow2_core::{
    Codecs, DiskExtent, ExtentState, GuestDisk, GuestOffset, GuestRange, HostOffset, Image, ImageFormat,
    NoResolver, OpenOptions, ResolvedSource, Storage, forward_storage,
};
use qcow2_format::{CompressionType, Header, IncompatibleFeatures, Version};
use qcow2_ops::measure::{MeasureOptions, MeasureTarget, Measured, measure};
use qcow2_ops::rescue::{RescueFiles, RescueOptions, rescue};
use qcow2_ops::{CheckOptions, Inline, Silent, check, checksum};
use qcow2_testkit::fault::{Call, Fault, FaultPlan, FaultStorage};
use qcow2_testkit::storage::PageStorage;
use std::sync::Arc;

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;

/// A sparse file with these parts, and its header. The refcount table is in cluster 1, the L1 table in 3.
fn file(bits: u32, clusters: u64, l1: &[u64], parts: &[(u64, Vec<u64>)], zstd: bool) -> Arc<dyn Storage> {
    let mut header = Header::new(Version::V3, bits);
    header.refcount_table_offset = HostOffset::new(1 << bits);
    header.refcount_table_clusters = 1;
    (header.l1_table_offset, header.l1_size) = (HostOffset::new(3 << bits), l1.len() as u32);
    header.size = (l1.len() as u64 * ((1 << bits) / 8)) << bits;
    if zstd {
        header.compression_type = CompressionType::Zstd;
        header.features.incompatible.set(IncompatibleFeatures::COMPRESSION_TYPE, true);
    }
    let file = PageStorage::default();
    file.write_at(HostOffset::new(0), &header.encode_cluster().unwrap()).unwrap();
    file.set_len(clusters << bits).unwrap();
    for (at, words) in parts.iter().chain([&(3 << bits, l1.to_vec())]) {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
        file.write_at(HostOffset::new(*at), &bytes).unwrap();
    }
    Arc::new(file)
}

/// Counts the reads of `file`.
fn counted(file: &Arc<dyn Storage>) -> Arc<FaultStorage> {
    let counted = Arc::new(FaultStorage::new(Arc::clone(file)));
    let (calls, nth) = (vec![Call::Read], u64::MAX);
    counted.set_plan(Some(FaultPlan { calls, nth, sticky: false, fault: Fault::Io }));
    counted
}

/// The same bytes, of which nothing is known to be a hole.
struct Opaque {
    inner: Arc<dyn Storage>,
}

impl Storage for Opaque {
    forward_storage!(inner: len read_at write_at write_zeroes discard allocate set_len flush);
}

fn open(storage: Arc<dyn Storage>, writable: bool) -> Arc<Image> {
    let mut options = OpenOptions::default();
    options.writable = writable;
    let (format, resolver) = (ImageFormat::Qcow2, Arc::new(NoResolver));
    Image::open(ResolvedSource { storage, format, name: "image".to_owned(), id: None, resolver }, &options)
        .unwrap()
}

/// All extents, and how many there were before equal neighbours were joined.
fn extents(image: &Image) -> (Vec<DiskExtent>, usize) {
    let (mut all, mut at, mut count) = (Vec::<DiskExtent>::new(), 0, 0);
    while at < image.size() {
        let range = GuestRange::between(GuestOffset::new(at), GuestOffset::new(image.size()));
        let extent = image.extent_at(range).unwrap();
        (at, count) = (at + extent.len, count + 1);
        match all.last_mut() {
            Some(last) if last.state == extent.state && extent.state == ExtentState::Unallocated => {
                last.len += extent.len;
            }
            _ => all.push(extent),
        }
    }
    (all, count)
}

const BITS: u32 = 21;
const CLUSTER: u64 = 1 << BITS;
const ENTRIES: u64 = CLUSTER / 8;
const TABLES: u64 = 64;

/// A table of 2 MiB for each entry, from cluster 8 on, in holes but for `parts`.
fn holes(parts: &[(u64, Vec<u64>)]) -> Arc<dyn Storage> {
    let l1: Vec<u64> = (0..TABLES).map(|index| COPIED | (8 + index) << BITS).collect();
    file(BITS, 16 + TABLES, &l1, parts, false)
}

#[test]
fn tables_in_holes_are_not_read() {
    let file = holes(&[]);
    let reads = counted(&file);
    let image = open(Arc::clone(&reads) as _, false);
    let (all, count) = extents(&image);
    assert!(all.len() == 1 && count < 4, "{count} runs");
    let disk: Arc<dyn GuestDisk> = image;
    checksum(&disk, &Inline, &Silent).unwrap();
    assert!(reads.counted() < 32, "{} reads", reads.counted());

    let reads = counted(&file);
    let report = check(&*reads, &CheckOptions::default(), &Inline, &Silent).unwrap();
    assert!(reads.counted() < 32, "{} reads", reads.counted());
    let opaque = Opaque { inner: Arc::clone(&file) };
    assert_eq!(check(&opaque, &CheckOptions::default(), &Inline, &Silent).unwrap(), report);

    let reads = counted(&file);
    let files = RescueFiles::new(Arc::clone(&reads) as _, Codecs::default());
    let rescued = rescue(&files, &RescueOptions::default(), &Silent).unwrap();
    assert_eq!(rescued.disk().size(), (TABLES * ENTRIES) << BITS);
    assert!(reads.counted() < 64, "{} reads", reads.counted());
}

/// The same extents as of a file that does not tell its holes.
#[test]
fn what_is_between_holes_is_found() {
    let data = COPIED | 600 << BITS;
    let at = |table: u64, entry: u64| (8 + table) * CLUSTER + entry * 8;
    for parts in [
        vec![],
        vec![(at(7, 0), vec![data])],
        vec![(at(0, ENTRIES - 1), vec![data]), (at(TABLES - 1, 5), vec![1])],
        // A table whose first half is a hole, and data that begins inside a page.
        vec![
            (at(3, ENTRIES / 2), vec![0; 512]),
            (at(3, ENTRIES / 2 + 7), vec![1, 1]),
            (at(9, 600), vec![data]),
        ],
    ] {
        let file = holes(&parts);
        let expected = extents(&open(Arc::new(Opaque { inner: Arc::clone(&file) }), false)).0;
        assert_eq!(extents(&open(file, false)).0, expected, "{parts:?}");
    }
    // Tables in the reverse order, one used twice, one past the end, one that ends there.
    let mut l1: Vec<u64> = (0..64).map(|index| COPIED | (80 - index) << BITS).collect();
    (l1[5], l1[9], l1[20], l1[30]) = (l1[6], COPIED | 900 << BITS, 0, COPIED | 81 << BITS);
    let file = file(BITS, 82, &l1, &[(70 * CLUSTER + 800, vec![1])], false);
    let expected = extents(&open(Arc::new(Opaque { inner: Arc::clone(&file) }), false)).0;
    assert_eq!(extents(&open(file, false)).0, expected);
}

/// Zero clusters and unallocated ones by turns in one table for all are as many extents as there are entries,
/// and one run of zeroes.
#[test]
fn runs_without_data_are_one() {
    let turns: Vec<u64> = (0..8192).map(|index| index % 2).collect();
    let mut last = turns.clone();
    last[8000] = COPIED | 40 << 16;
    let mut l1 = vec![COPIED | 8 << 16; 1024];
    (l1[1000], l1[1001], l1[1002]) = (COPIED | 9 << 16, 0, COPIED | 10 << 16);
    let parts = [(8 << 16, turns), (9 << 16, last), (40 << 16, vec![7; 8192])];
    let image = open(file(16, 64, &l1, &parts, false), false);
    let range = |start: u64| GuestRange::between(GuestOffset::new(start), GuestOffset::new(image.size()));
    let data = (1000 * 8192 + 8000) << 16;
    let (mut at, mut runs) = (0, Vec::new());
    while at < image.size() {
        match image.len_without_data(range(at)).unwrap() {
            0 => {
                assert_eq!(at, data);
                at += 1 << 16;
            }
            len => {
                runs.push(len);
                at += len;
            }
        }
    }
    assert!(runs.len() <= 1024 * 16 + 16, "{} runs", runs.len());
    assert_eq!(image.len_without_data(range(data - 100)).unwrap(), 100);
    let disk: Arc<dyn GuestDisk> = image;
    let target = MeasureTarget::Qcow2(MeasureOptions::default());
    let measured = measure(Measured::Disk(&disk), &target);
    let empty = measure(Measured::Size(disk.size()), &target);
    assert_eq!(measured.unwrap().required, empty.unwrap().required + (1 << 16));
}

/// What was written and not flushed is in no table of the file yet.
#[test]
fn an_image_that_is_written_to_is_not_taken_for_its_holes() {
    let l1: Vec<u64> = (0..8).map(|index| COPIED | (8 + index) << 16).collect();
    let block: Vec<u64> = vec![0x0001_0001_0001_0001; 8];
    let parts = [(1 << 16, vec![2 << 16]), (2 << 16, block)];
    let image = open(file(16, 24, &l1, &parts, false), true);
    let place = GuestOffset::new((5 * 8192) << 16);
    image.write_at(place, &[7; 65_536]).unwrap();
    let data =
        extents(&image).0.into_iter().filter(|extent| matches!(extent.state, ExtentState::Data { .. }));
    assert_eq!(data.map(|extent| extent.len).collect::<Vec<_>>(), [65_536]);
    image.close().unwrap();
}

/// Thousands of entries that lead to one stream that does not expand, to holes, and to what is no stream.
#[test]
fn damaged_streams_are_read_once_or_not_at_all() {
    let size = 1u64 << 16;
    let table = |host: &dyn Fn(u64) -> u64| -> Vec<u64> {
        (0..8192).map(|index| COMPRESSED | 127 << 54 | host(index)).collect()
    };
    let frame = u64::from_be_bytes([0x28, 0xb5, 0x2f, 0xfd, 0xff, 0xff, 0xff, 0xff]);
    let l1 = [8, 9, 10].map(|cluster| COPIED | (cluster * size));
    let parts = [
        (8 * size, table(&|_| 100 * size)),
        (9 * size, table(&|index| 200 * size + index * 3)),
        (10 * size, table(&|index| 102 * size + index)),
        (100 * size, vec![frame; 8192]),
        (102 * size, vec![0x0123_4567_89ab_cdef; 2 * 8192]),
    ];
    let reads = counted(&file(16, 400, &l1, &parts, true));
    let codecs = Codecs::new(Arc::new(Deflate::default()), Arc::new(Zstd::default()));
    let files = RescueFiles::new(Arc::clone(&reads) as _, codecs);
    let rescued = rescue(&files, &RescueOptions::default(), &Silent).unwrap();
    let (disk, before) = (rescued.disk(), reads.counted());
    let mut buf = vec![1; size as usize];
    for cluster in 0..2 * 8192 {
        disk.read_at(GuestOffset::new(cluster * size), &mut buf).unwrap();
        assert!(buf.iter().all(|&byte| byte == 0));
    }
    let few = reads.counted() - before;
    assert!(few < 16, "{few} reads");
    for cluster in 2 * 8192..3 * 8192 {
        disk.read_at(GuestOffset::new(cluster * size), &mut buf).unwrap();
    }
    let one_each = reads.counted() - before - few;
    assert!(one_each < 8192 + 16, "{one_each} reads");
    assert_eq!(rescued.report().lost.bytes, 3 * 8192 * size);
}
