//! Damage that is found while an image is in use: the call fails, and the image is marked corrupt.
#![allow(missing_docs, clippy::unwrap_used, clippy::field_reassign_with_default)]

use qcow2_core::format::L2Index;
use qcow2_core::{
    CreateOptions, Damage, DamageObserver, Error, ErrorKind, GuestOffset, GuestRange, HostOffset, Image,
    ImageFormat, L2Slot, NewSnapshot, NoResolver, OpenOptions, OverlapChecks, ResolvedSource, Storage,
    TableKind, create,
};
use qcow2_testkit::arbitrary::{DataFileShape, Shape};
use qcow2_testkit::pages::PageBytes;
use qcow2_testkit::pattern;
use qcow2_testkit::storage::PageStorage;
use qcow2_testkit::world::{Shelf, TOP, create_options};
use std::sync::{Arc, Mutex};

const CLUSTER: u64 = 65536;
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;

fn open(storage: &Arc<PageStorage>, options: &OpenOptions) -> qcow2_core::Result<Arc<Image>> {
    let source = ResolvedSource {
        storage: Arc::clone(storage) as Arc<dyn Storage>,
        format: ImageFormat::Qcow2,
        name: "pages".into(),
        id: None,
        resolver: Arc::new(NoResolver),
    };
    Image::open(source, options)
}

fn writable(checks: OverlapChecks) -> OpenOptions {
    let mut options = OpenOptions::default();
    options.writable = true;
    options.overlap_checks = checks;
    options
}

/// An image with four clusters of data, and the host offset of its L2 table.
fn image(version2: bool) -> (Arc<PageStorage>, u64) {
    let storage = Arc::new(PageStorage::new(PageBytes::new()));
    let mut options = CreateOptions::new(64 << 20);
    if version2 {
        options.version = qcow2_core::format::Version::V2;
    }
    create(&(Arc::clone(&storage) as Arc<dyn Storage>), None, &options).unwrap();
    let image = open(&storage, &writable(OverlapChecks::CACHED)).unwrap();
    image.write_at(GuestOffset::new(0), &[7; 4 * CLUSTER as usize]).unwrap();
    image.close().unwrap();
    let l1 = image.header().l1_table_offset.value();
    (Arc::clone(&storage), word(&storage, l1) & OFFSET_MASK)
}

fn word(storage: &PageStorage, at: u64) -> u64 {
    let mut bytes = [0; 8];
    storage.read_at(HostOffset::new(at), &mut bytes).unwrap();
    u64::from_be_bytes(bytes)
}

fn set_word(storage: &PageStorage, at: u64, value: u64) {
    storage.write_at(HostOffset::new(at), &value.to_be_bytes()).unwrap();
}

fn all_bytes(storage: &PageStorage) -> Vec<u8> {
    let mut bytes = vec![0; storage.len().unwrap() as usize];
    storage.read_at(HostOffset::new(0), &mut bytes).unwrap();
    bytes
}

fn is_marked(storage: &Arc<PageStorage>) -> bool {
    open(storage, &OpenOptions::default()).unwrap().header().is_corrupt()
}

#[test]
fn an_error_has_its_place_as_fields() {
    let place = |storage: &Arc<PageStorage>, offset: u64| {
        let image = open(storage, &OpenOptions::default()).unwrap();
        let error = image.read_at(GuestOffset::new(offset), &mut [0; 512]).unwrap_err();
        (error.kind(), error.place())
    };
    let (storage, l2) = image(false);
    let offset = 2 * CLUSTER + 512;
    set_word(&storage, l2 + 2 * 8, word(&storage, l2 + 2 * 8) | 0x200);
    let (kind, seen) = place(&storage, offset);
    assert_eq!((kind, seen.table), (ErrorKind::Corrupt, Some(TableKind::L2)));
    assert_eq!((seen.guest, seen.host), (Some(GuestOffset::new(offset)), None));
    let l1 = open(&storage, &OpenOptions::default()).unwrap().header().l1_table_offset.value();
    set_word(&storage, l1, word(&storage, l1) | 0x200);
    assert_eq!(place(&storage, offset).1.table, Some(TableKind::L1));
    let past_end = place(&storage, 64 << 20);
    assert_eq!((past_end.0, past_end.1.guest), (ErrorKind::OutOfRange, Some(GuestOffset::new(64 << 20))));
}

#[test]
fn a_damaged_l2_entry_marks_a_writable_image_corrupt() {
    for (version2, for_writing) in [(false, true), (true, true), (false, false)] {
        let (storage, l2) = image(version2);
        set_word(&storage, l2 + 8, COPIED | 0x51200);
        let mut options = writable(OverlapChecks::CACHED);
        options.writable = for_writing;
        let opened = open(&storage, &options).unwrap();
        let before = all_bytes(&storage);
        let mut sector = [pattern::UNREAD; 512];
        let error = opened.read_at(GuestOffset::new(CLUSTER), &mut sector).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        opened.read_at(GuestOffset::new(0), &mut sector).unwrap();
        assert_eq!(sector, [7; 512], "other data is still read");
        assert_eq!(is_marked(&storage), for_writing && !version2);
        if !for_writing {
            assert!(all_bytes(&storage) == before, "reading writes nothing");
            continue;
        }
        let error = opened.write_at(GuestOffset::new(0), &[8; 512]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Poisoned);
        let again = open(&storage, &writable(OverlapChecks::CACHED)).map(|_| ());
        let kind = again.map_err(|error| error.kind());
        assert_eq!(kind, if version2 { Ok(()) } else { Err(ErrorKind::MarkedCorrupt) });
    }
}

/// Adds a snapshot whose tables lie behind everything else. Returns the host offsets of the snapshot table,
/// its L1 table and its L2 table.
fn add_snapshot(storage: &PageStorage) -> [u64; 3] {
    let end = storage.len().unwrap().next_multiple_of(CLUSTER);
    let (table, l1, l2) = (end, end + CLUSTER, end + 2 * CLUSTER);
    let snapshot = qcow2_core::format::snapshot::Snapshot {
        l1_table_offset: HostOffset::new(l1),
        l1_size: 1,
        id: b"1".to_vec(),
        name: b"one".to_vec(),
        date_seconds: 0,
        date_nanoseconds: 0,
        vm_clock_nanoseconds: 0,
        vm_state_size: 0,
        disk_size: 64 << 20,
        icount: None,
        unknown_extra: Vec::new(),
    };
    let mut bytes = Vec::new();
    snapshot.encode(&mut bytes).unwrap();
    storage.write_at(HostOffset::new(table), &bytes).unwrap();
    set_word(storage, l1, l2);
    storage.write_at(HostOffset::new(l2), &[0; CLUSTER as usize]).unwrap();
    storage.write_at(HostOffset::new(60), &1u32.to_be_bytes()).unwrap();
    set_word(storage, 64, table);
    [table, l1, l2]
}

/// Maps guest data to host offset `place` and writes it under `checks`. Returns true if the write succeeded.
fn is_overwritten(storage: &Arc<PageStorage>, l2: u64, place: u64, checks: OverlapChecks) -> bool {
    let storage = Arc::new(PageStorage::new(storage.bytes()));
    set_word(&storage, l2 + 16, COPIED | place);
    let before = word(&storage, place + 4096);
    let image = open(&storage, &writable(checks)).unwrap();
    let result = image.write_at(GuestOffset::new(2 * CLUSTER + 4096), &[0xee; 512]);
    let overwritten = word(&storage, place + 4096) != before;
    assert_eq!(result.is_ok(), overwritten);
    assert_eq!(is_marked(&storage), !overwritten);
    overwritten
}

#[test]
fn guest_data_is_not_written_over_metadata() {
    let (storage, l2) = image(false);
    let [table, snapshot_l1, snapshot_l2] = add_snapshot(&storage);
    let header = open(&storage, &OpenOptions::default()).unwrap().header();
    let refcount_table = header.refcount_table_offset.value();
    let block = word(&storage, refcount_table);
    for (place, kind) in [
        (header.l1_table_offset.value(), OverlapChecks::ACTIVE_L1),
        (l2, OverlapChecks::ACTIVE_L2),
        (refcount_table, OverlapChecks::REFCOUNT_TABLE),
        (block, OverlapChecks::REFCOUNT_BLOCK),
        (table, OverlapChecks::SNAPSHOT_TABLE),
        (snapshot_l1, OverlapChecks::INACTIVE_L1),
        (snapshot_l2, OverlapChecks::INACTIVE_L2),
    ] {
        assert!(!is_overwritten(&storage, l2, place, OverlapChecks::ALL), "{kind:?}");
        assert!(!is_overwritten(&storage, l2, place, kind), "{kind:?} alone");
        assert!(!is_overwritten(&storage, l2, place, OverlapChecks::CACHED), "{kind:?} by default");
        // The snapshots' L1 tables are short here, so their L2 tables are guarded by default too.
        if kind != OverlapChecks::INACTIVE_L2 {
            assert!(is_overwritten(&storage, l2, place, OverlapChecks::ALL.without(kind)), "not {kind:?}");
        }
        assert!(is_overwritten(&storage, l2, place, OverlapChecks::NONE), "{kind:?}");
    }
}

/// Whoever chooses to protect snapshots' L2 tables gets no writes where these cannot be found.
#[test]
fn nothing_is_written_where_tables_to_protect_are_not_known() {
    let (storage, _) = image(false);
    let [table, snapshot_l1, _] = add_snapshot(&storage);
    set_word(&storage, table, snapshot_l1 + 512);
    let write = |checks| {
        let storage = Arc::new(PageStorage::new(storage.bytes()));
        let written = open(&storage, &writable(checks)).unwrap().write_at(GuestOffset::new(0), &[1; 512]);
        assert!(!is_marked(&storage), "nothing that was to be written to is wrong");
        written.map_err(|error| error.kind())
    };
    assert_eq!(write(OverlapChecks::ALL), Err(ErrorKind::InvalidOption));
    assert_eq!(write(OverlapChecks::INACTIVE_L2), Err(ErrorKind::InvalidOption));
    assert_eq!(write(OverlapChecks::CACHED), Ok(()));
}

/// A metadata cluster with refcount 0 looks free, and must not be allocated.
#[test]
fn a_metadata_cluster_with_refcount_0_is_not_allocated() {
    let (storage, l2) = image(false);
    let header = open(&storage, &OpenOptions::default()).unwrap().header();
    let refcount_table = header.refcount_table_offset.value();
    let block = word(&storage, refcount_table);
    for place in [0, refcount_table, block, header.l1_table_offset.value(), l2] {
        let storage = Arc::new(PageStorage::new(storage.bytes()));
        storage.write_at(HostOffset::new(block + 2 * (place / CLUSTER)), &[0, 0]).unwrap();
        let before = word(&storage, place);
        let image = open(&storage, &writable(OverlapChecks::CACHED)).unwrap();
        let error = image.write_at(GuestOffset::new(8 * CLUSTER), &[0xee; CLUSTER as usize]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{place:#x}");
        assert!(is_marked(&storage), "{place:#x}");
        // The header's first word never changes.
        assert_eq!(word(&storage, place), before, "{place:#x}");
    }
}

/// Host offsets of the metadata in the image from `image`: header, L1 table, refcount table, refcount block.
fn tables(storage: &Arc<PageStorage>) -> [u64; 4] {
    let header = open(storage, &OpenOptions::default()).unwrap().header();
    let refcount_table = header.refcount_table_offset.value();
    [0, header.l1_table_offset.value(), refcount_table, word(storage, refcount_table)]
}

fn cluster_at(storage: &PageStorage, at: u64) -> Vec<u8> {
    let mut bytes = vec![0xee; CLUSTER as usize];
    storage.read_at(HostOffset::new(at), &mut bytes).unwrap();
    bytes
}

fn freeing() -> OpenOptions {
    let mut options = writable(OverlapChecks::CACHED);
    options.discard_freed = true;
    options
}

/// A damaged L2 entry points to metadata and is then overwritten, discarded or zeroed: the entry changes, the
/// metadata stays allocated.
#[test]
fn metadata_is_not_freed_because_an_l2_entry_points_to_it() {
    let range = GuestRange::new(GuestOffset::new(CLUSTER), CLUSTER).unwrap();
    let (whole, _) = image(false);
    for flags in [0, 1 << 62] {
        for place in tables(&whole) {
            for work in 0..3 {
                let (storage, l2) = image(false);
                set_word(&storage, l2 + 8, flags | place);
                if flags | place == 0 {
                    continue;
                }
                let before = cluster_at(&storage, place);
                let opened = open(&storage, &freeing()).unwrap();
                match work {
                    0 => opened.write_at(range.start(), &vec![9; CLUSTER as usize]),
                    1 => opened.discard(range),
                    _ => opened.write_zeroes(range, qcow2_core::ZeroMode::MayUnmap),
                }
                .unwrap();
                opened.flush().unwrap();
                opened.flush().unwrap();
                // Enough writes to reuse what was freed.
                opened.write_at(GuestOffset::new(16 * CLUSTER), &vec![8; 8 * CLUSTER as usize]).unwrap();
                opened.close().unwrap();
                let after = cluster_at(&storage, place);
                let same = before.iter().zip(&after).filter(|(a, b)| a == b).count();
                // Only a few entries of the metadata change: it was not overwritten by data.
                assert!(same > CLUSTER as usize - 512, "{flags:#x} {place:#x} {work}: {same} bytes are left");
                let mut seen = vec![0xee; CLUSTER as usize];
                let again = open(&storage, &OpenOptions::default()).unwrap();
                again.read_at(range.start(), &mut seen).unwrap();
                assert!(seen.iter().all(|&byte| byte == if work == 0 { 9 } else { 0 }));
                again.read_at(GuestOffset::new(20 * CLUSTER), &mut seen).unwrap();
                assert!(seen.iter().all(|&byte| byte == 8));
            }
        }
    }
}

/// An L1 entry, the header or the refcount table points to other metadata: writes of tables there are
/// refused.
#[test]
fn tables_are_not_written_over_other_metadata() {
    let (whole, _) = image(false);
    let [_, l1, refcount_table, block] = tables(&whole);
    for (field, value) in [
        (l1, COPIED | refcount_table),
        (l1, refcount_table),
        (l1, COPIED | block),
        (l1, COPIED | l1),
        (40, 0),
        (40, refcount_table),
        (40, block),
        (refcount_table, l1),
    ] {
        let (storage, _) = image(false);
        set_word(&storage, field, value);
        let before = all_bytes(&storage);
        let opened = open(&storage, &freeing()).unwrap();
        let error = opened.write_at(GuestOffset::new(30 * CLUSTER), &[9; 512]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{field:#x} {value:#x}");
        assert_eq!(opened.flush().unwrap_err().kind(), ErrorKind::Poisoned);
        drop(opened);
        assert!(is_marked(&storage));
        storage.write_at(HostOffset::new(72), &before[72..80]).unwrap();
        let changed = before.iter().zip(all_bytes(&storage)).position(|(a, b)| *a != b);
        assert_eq!(changed, None, "{field:#x} {value:#x}");
    }
}

#[test]
fn shrinking_succeeds_over_a_data_cluster_with_refcount_0() {
    let (storage, l2) = image(false);
    let [.., block] = tables(&storage);
    let host = word(&storage, l2 + 24) & OFFSET_MASK;
    storage.write_at(HostOffset::new(block + host / CLUSTER * 2), &[0, 0]).unwrap();
    let opened = open(&storage, &freeing()).unwrap();
    opened.resize(2 * CLUSTER).unwrap();
    opened.close().unwrap();
    let again = open(&storage, &OpenOptions::default()).unwrap();
    assert_eq!(again.size(), 2 * CLUSTER);
    let mut seen = vec![0xee; 2 * CLUSTER as usize];
    again.read_at(GuestOffset::new(0), &mut seen).unwrap();
    assert!(seen.iter().all(|&byte| byte == 7));
}

/// The last cluster in use counts as free, and so the end of the file does. Cutting it off would lose it.
#[test]
fn shrinking_cuts_off_no_bytes_that_count_as_free() {
    for damaged in [false, true] {
        let (storage, l2) = image(false);
        let [.., block] = tables(&storage);
        let last = word(&storage, l2) & OFFSET_MASK;
        // The first guest cluster moves behind all others.
        let end = storage.len().unwrap().next_multiple_of(CLUSTER);
        storage.write_at(HostOffset::new(end), &[7; CLUSTER as usize]).unwrap();
        set_word(&storage, l2, COPIED | end);
        storage.write_at(HostOffset::new(block + last / CLUSTER * 2), &[0, 0]).unwrap();
        if !damaged {
            storage.write_at(HostOffset::new(block + end / CLUSTER * 2), &[0, 1]).unwrap();
        }
        let opened = open(&storage, &freeing()).unwrap();
        opened.resize(CLUSTER).unwrap();
        opened.close().unwrap();
        assert_eq!(storage.len().unwrap(), end + CLUSTER);
        let mut seen = vec![0xee; CLUSTER as usize];
        let again = open(&storage, &OpenOptions::default()).unwrap();
        again.read_at(GuestOffset::new(0), &mut seen).unwrap();
        assert!(seen.iter().all(|&byte| byte == 7), "damaged: {damaged}");
    }
}

/// Deleting or applying a snapshot with damaged tables fails, and changes nothing but the corrupt bit.
#[test]
fn a_snapshot_that_cannot_be_freed_stays_linked() {
    for apply in [false, true] {
        for damage in 0..3 {
            let (storage, l2) = image(false);
            let opened = open(&storage, &freeing()).unwrap();
            let snapshot = opened.create_snapshot(&NewSnapshot::default()).unwrap();
            opened.close().unwrap();
            let [_, l1, refcount_table, block] = tables(&storage);
            match damage {
                0 => set_word(&storage, l2 + 8, 1 << 62),
                1 => {
                    let host = word(&storage, l2 + 24) & OFFSET_MASK;
                    storage.write_at(HostOffset::new(block + host / CLUSTER * 2), &[0, 0]).unwrap();
                }
                _ if apply => set_word(&storage, l1, refcount_table),
                _ => set_word(&storage, snapshot.l1_table_offset.value(), refcount_table),
            }
            let before = all_bytes(&storage);
            let opened = open(&storage, &freeing()).unwrap();
            let result =
                if apply { opened.apply_snapshot(&snapshot) } else { opened.delete_snapshot(&snapshot) };
            assert_eq!(result.unwrap_err().kind(), ErrorKind::Corrupt, "{apply} {damage}");
            drop(opened);
            let again = open(&storage, &OpenOptions::default()).unwrap();
            assert_eq!(again.snapshots().unwrap(), std::slice::from_ref(&snapshot));
            let after = all_bytes(&storage);
            for table in [l2, l1, snapshot.l1_table_offset.value(), refcount_table] {
                let place = table as usize..(table + CLUSTER) as usize;
                assert!(before[place.clone()] == after[place], "{apply} {damage}: table at {table:#x}");
            }
        }
    }
}

/// A repair sets copied flags only in clusters that are L2 tables and nothing else.
#[test]
fn copied_flag_repair_skips_l2_tables_with_another_owner() {
    let (storage, l2) = image(false);
    let [_, l1, refcount_table, _] = tables(&storage);
    let mut options = freeing();
    options.for_repair = true;
    // An L1 entry claims that the refcount table is an L2 table.
    set_word(&storage, l1, refcount_table);
    let before = all_bytes(&storage);
    let opened = open(&storage, &options).unwrap();
    assert_eq!(opened.repair_refcounts(false).unwrap_err().kind(), ErrorKind::Corrupt);
    opened.repair_copied_flags().unwrap();
    let place = refcount_table as usize..(refcount_table + CLUSTER) as usize;
    assert!(before[place.clone()] == all_bytes(&storage)[place]);
    // An L2 entry claims that the L2 table is guest data: two owners, so its flags stay as they are.
    let (storage, _) = image(false);
    set_word(&storage, l2 + 8, l2);
    let opened = open(&storage, &options).unwrap();
    opened.repair_refcounts(false).unwrap();
    opened.repair_copied_flags().unwrap();
    drop(opened);
    assert_eq!(word(&storage, l2) & COPIED, COPIED, "the flags of the table were written");
    assert_eq!(word(&storage, l2 + 8), l2);
}

/// An image with a data file and two clusters, whose second L2 entry is `entry` (with extended L2 entries
/// also `subclusters`).
fn with_data_file(entry: u64, subclusters: Option<u64>) -> Shelf {
    let shelf = Shelf::default();
    let mut shape = Shape { data_file: Some(DataFileShape { raw: false }), ..Shape::plain(4 * CLUSTER) };
    shape.extended_l2 = subclusters.is_some();
    let data: Arc<dyn Storage> = shelf.file("top.data");
    create(&(shelf.file(TOP) as Arc<dyn Storage>), Some(&data), &create_options(&shape)).unwrap();
    let image = Image::open(shelf.source(TOP, ImageFormat::Qcow2), &writable(OverlapChecks::CACHED)).unwrap();
    image.write_at(GuestOffset::new(0), &[7; 2 * CLUSTER as usize]).unwrap();
    image.close().unwrap();
    let storage = shelf.file(TOP);
    let l2 = word(&storage, image.header().l1_table_offset.value()) & OFFSET_MASK;
    match subclusters {
        None => set_word(&storage, l2 + 8, entry),
        Some(bits) => {
            set_word(&storage, l2 + 16, entry);
            set_word(&storage, l2 + 24, bits);
        }
    }
    shelf
}

#[test]
fn a_data_file_entry_with_another_host_than_guest_offset_is_damage() {
    const ALL: u64 = 0xffff_ffff;
    for subclusters in [None, Some(ALL)] {
        // The host offset of the first cluster, and one past the end of the data file.
        for place in [0, 2 * CLUSTER] {
            let shelf = with_data_file(COPIED | place, subclusters);
            let opened = Image::open(shelf.source(TOP, ImageFormat::Qcow2), &OpenOptions::default()).unwrap();
            let mut seen = [9; 512];
            let error = opened.read_at(GuestOffset::new(CLUSTER), &mut seen).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{place:#x} {subclusters:?}");
            assert!(!marked(&shelf), "reading marks nothing");

            let options = writable(OverlapChecks::CACHED);
            let opened = Image::open(shelf.source(TOP, ImageFormat::Qcow2), &options).unwrap();
            let before = shelf.file("top.data").bytes().to_vec();
            let error = opened.write_at(GuestOffset::new(CLUSTER), &[8; 512]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{place:#x} {subclusters:?}");
            assert!(shelf.file("top.data").bytes().to_vec() == before && marked(&shelf));
        }
    }
}

/// What says that the cluster is zeroes is in the entry with the wrong offset.
#[test]
fn zeroes_with_a_wrong_host_offset_in_the_data_file_are_damage() {
    for (entry, subclusters) in
        [(COPIED | (2 * CLUSTER) | 1, None), (COPIED | (2 * CLUSTER), Some(0xffff_ffff << 32))]
    {
        let shelf = with_data_file(entry, subclusters);
        let opened = Image::open(shelf.source(TOP, ImageFormat::Qcow2), &OpenOptions::default()).unwrap();
        let error = opened.read_at(GuestOffset::new(CLUSTER), &mut [9; 512]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{entry:#x} {subclusters:?}");
        let error =
            opened.extent_at(GuestRange::new(GuestOffset::new(CLUSTER), CLUSTER).unwrap()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{entry:#x} {subclusters:?}");
    }
}

fn marked(shelf: &Shelf) -> bool {
    let source = shelf.source(TOP, ImageFormat::Qcow2);
    Image::open(source, &OpenOptions::default()).unwrap().header().is_corrupt()
}

/// Damaged entries of clusters without data: a read of the last one does not use its host offset, but a write
/// would.
#[test]
fn a_write_refuses_a_wrong_host_offset_in_the_data_file() {
    const ZERO: u64 = 1;
    const ALL_ZERO: u64 = 0xffff_ffff << 32;
    for (entry, subclusters) in
        [(COPIED | (2 * CLUSTER) | ZERO, None), (COPIED | (2 * CLUSTER), Some(ALL_ZERO)), (COPIED, Some(0))]
    {
        // The damaged entry is the first or the second one of the write.
        for start in [CLUSTER + 512, CLUSTER - 512] {
            let shelf = with_data_file(entry, subclusters);
            let options = writable(OverlapChecks::CACHED);
            let opened = Image::open(shelf.source(TOP, ImageFormat::Qcow2), &options).unwrap();
            let mut expected = shelf.file("top.data").bytes().to_vec();
            let error = opened.write_at(GuestOffset::new(start), &[8; 1024]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{entry:#x} {subclusters:?}");
            // Zeroes are looked up before anything is written, what is unallocated only when it is needed.
            if start < CLUSTER && subclusters == Some(0) {
                expected[start as usize..CLUSTER as usize].fill(8);
            }
            let seen = shelf.file("top.data").bytes().to_vec();
            assert!(seen == expected && marked(&shelf), "{entry:#x} {subclusters:?} at {start:#x}");
        }
    }
}

/// A compressed entry in an image with a data file: the cluster that a write would allocate belongs to
/// another guest cluster there.
#[test]
fn a_compressed_entry_with_a_data_file_is_damage() {
    for write in [CLUSTER, 512] {
        let shelf = with_data_file(1 << 62, None);
        let options = writable(OverlapChecks::CACHED);
        let opened = Image::open(shelf.source(TOP, ImageFormat::Qcow2), &options).unwrap();
        let before = shelf.file("top.data").bytes().to_vec();
        let error = opened.write_at(GuestOffset::new(CLUSTER), &vec![8; write as usize]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{write}");
        assert!(shelf.file("top.data").bytes().to_vec() == before && marked(&shelf));
    }
}

/// A change of the refcount width fails early if the refcount table or a block is other metadata.
#[test]
fn a_damaged_refcount_structure_refuses_another_width() {
    let (whole, l2) = image(false);
    let [_, l1, refcount_table, block] = tables(&whole);
    for (field, value) in [
        (refcount_table + 8 * 900, refcount_table),
        (refcount_table + 8 * 900, block),
        (48, l2),
        (48, l1),
        (48, 1 << 30),
    ] {
        let (storage, _) = image(false);
        set_word(&storage, field, value);
        let before = all_bytes(&storage);
        let opened = open(&storage, &freeing()).unwrap();
        let error =
            opened.set_refcount_bits(32, &mut |_, _| std::ops::ControlFlow::Continue(())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{field:#x} {value:#x}");
        assert!(is_marked(&storage));
        storage.write_at(HostOffset::new(72), &before[72..80]).unwrap();
        assert!(all_bytes(&storage) == before, "{field:#x} {value:#x}");
    }
}

/// A failed snapshot raises no refcount.
#[test]
fn a_refused_snapshot_leaks_nothing() {
    let (storage, _) = image(false);
    let [_, l1, refcount_table, block] = tables(&storage);
    set_word(&storage, refcount_table + 24, l1);
    let before = cluster_at(&storage, block);
    let opened = open(&storage, &freeing()).unwrap();
    let error = opened.create_snapshot(&NewSnapshot::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(cluster_at(&storage, block) == before && is_marked(&storage));
}

/// A bitmap claims the refcount table as its table: shrinking could not free it, and fails before it
/// deallocates anything.
#[test]
fn a_refused_shrink_deallocates_nothing() {
    let (storage, _) = image(false);
    let [_, _, refcount_table, _] = tables(&storage);
    let opened = open(&storage, &freeing()).unwrap();
    opened.add_bitmap(b"b", 16).unwrap();
    opened.close().unwrap();
    let directory = open(&storage, &OpenOptions::default()).unwrap().header().extensions.bitmaps.unwrap();
    set_word(&storage, directory.directory_offset.value(), refcount_table);
    let opened = open(&storage, &freeing()).unwrap();
    assert_eq!(opened.resize(CLUSTER).unwrap_err().kind(), ErrorKind::Corrupt);
    drop(opened);
    let again = open(&storage, &OpenOptions::default()).unwrap();
    assert_eq!(again.size(), 64 << 20);
    let mut seen = vec![0xee; 4 * CLUSTER as usize];
    again.read_at(GuestOffset::new(0), &mut seen).unwrap();
    assert!(seen.iter().all(|&byte| byte == 7));
}

/// Notes what it is told.
#[derive(Default)]
struct Notes(Mutex<Vec<(Option<Damage>, bool)>>);

impl DamageObserver for Notes {
    fn damage_found(&self, error: &Error, marked: bool) {
        self.0.lock().unwrap().push((error.damage(), marked));
    }
}

#[test]
fn an_error_says_what_is_wrong_as_a_value_and_the_observer_hears_of_the_first_one() {
    let (storage, l2) = image(false);
    set_word(&storage, l2 + 8, COPIED | 0x51200);
    let entry = L2Slot { table: HostOffset::new(l2), index: L2Index::new(1) };
    let misplaced = |to_change| {
        let (offset, zero) = (HostOffset::new(0x51200), false);
        Some(Damage::ClusterOffset { entry, offset, zero, to_change })
    };
    for for_writing in [false, true] {
        let notes = Arc::new(Notes::default());
        let mut options = writable(OverlapChecks::CACHED);
        options.writable = for_writing;
        options.damage_observer = Some(Arc::clone(&notes) as Arc<dyn DamageObserver>);
        let opened = open(&storage, &options).unwrap();
        let seen = match for_writing {
            true => opened.write_at(GuestOffset::new(CLUSTER + 512), &[1; 512]),
            false => opened.read_at(GuestOffset::new(CLUSTER + 512), &mut [0; 512]),
        };
        let wanted = misplaced(for_writing.then_some(GuestOffset::new(CLUSTER)));
        assert_eq!(seen.unwrap_err().damage(), wanted);
        let again = opened.read_at(GuestOffset::new(CLUSTER), &mut [0; 512]).unwrap_err();
        assert_eq!(again.damage(), misplaced(None));
        assert_eq!(*notes.0.lock().unwrap(), [(wanted, for_writing)]);
    }
    let (storage, l2) = image(false);
    let [_, l1, refcount_table, _] = tables(&storage);
    set_word(&storage, l2, COPIED | l1);
    let opened = open(&storage, &freeing()).unwrap();
    let error = opened.write_at(GuestOffset::new(0), &[1; 512]).unwrap_err();
    let (offset, kinds) = (HostOffset::new(l1), OverlapChecks::ACTIVE_L1);
    assert_eq!(error.damage(), Some(Damage::Overlap { offset, kinds }));
    let (storage, _) = image(false);
    set_word(&storage, refcount_table, 0x20200);
    let opened = open(&storage, &freeing()).unwrap();
    let error = opened.create_snapshot(&NewSnapshot::default()).unwrap_err();
    let offset = HostOffset::new(0x20200);
    assert_eq!(error.damage(), Some(Damage::RefcountBlockOffset { index: 0, offset }));
    assert!(is_marked(&storage));
}
