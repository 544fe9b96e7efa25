//! The engine against a flat array, in memory.
#![allow(missing_docs, clippy::unwrap_used, clippy::field_reassign_with_default)]

use qcow2_core::{
    CreateOptions, ErrorKind, ExtentState, GuestOffset, GuestRange, HostOffset, Image, ImageFormat,
    NewEncryption, NoResolver, OpenOptions, OverlapChecks, Preallocation, Refusal, ResolvedSource, Storage,
    ZeroMode, create,
};
use qcow2_io::MemoryStorage;
use qcow2_testkit::arbitrary::{BackingShape, Operation, Shape};
use qcow2_testkit::audit::audit;
use qcow2_testkit::fault::{Call, Fault, FaultPlan, FaultStorage};
use qcow2_testkit::model::{DiscardRule, Model};
use qcow2_testkit::pages::PageBytes;
use qcow2_testkit::pattern;
use qcow2_testkit::storage::PageStorage;
use qcow2_testkit::world::{Shelf, TOP, create_options};
use std::sync::Arc;

/// Opens for writing with options that depend on `seed`.
fn open_as(storage: &Arc<dyn Storage>, seed: u64) -> Arc<Image> {
    let source = ResolvedSource {
        storage: Arc::clone(storage),
        format: ImageFormat::Qcow2,
        name: "memory".into(),
        id: None,
        resolver: Arc::new(NoResolver),
    };
    let mut options = OpenOptions::default();
    options.writable = true;
    options.discard_no_unref = seed & 1 == 1;
    options.discard_freed = seed & 2 == 2;
    options.overlap_checks = if seed & 4 == 4 { OverlapChecks::ALL } else { OverlapChecks::CACHED };
    Image::open(source, &options).unwrap()
}

struct Rng(u64);
impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

#[test]
fn create_from_one_storage_refuses_a_data_file() {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    let source = ResolvedSource::new(Arc::clone(&storage), ImageFormat::Qcow2, "memory");
    let new = CreateOptions::new(1 << 20).with_data_file("data");
    let error = Image::create(source, &new, &OpenOptions::writable()).map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidOption);
    assert!(storage.is_empty().unwrap(), "refused before anything is written");
}

/// Also refusals that only the layout or a missing encryption header causes come before anything is written.
#[test]
fn refused_options_write_nothing() {
    let mut crowded = CreateOptions::new(64 << 30).with_cluster_size(512);
    (crowded.refcount_bits, crowded.preallocation) = (64, Preallocation::Metadata);
    let pending = CreateOptions::new(1 << 20).with_encryption(NewEncryption::Pending);
    for (options, expected) in [
        (crowded, "refcount table would need 33825 clusters of 512 bytes"),
        (pending, "the encryption header has not been made"),
        (
            CreateOptions::new(u64::MAX),
            "size 18446744073709551615 needs too large an l1 table; use larger clusters",
        ),
    ] {
        let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
        let error = create(&storage, None, &options).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidOption);
        let refusal = std::error::Error::source(&error).and_then(|e| e.downcast_ref::<Refusal>());
        assert_eq!(refusal.map(ToString::to_string).as_deref(), Some(expected));
        assert_eq!(storage.len().unwrap(), 0);
    }
}

fn history(options: &CreateOptions, seed: u64) {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    create(&storage, None, options).unwrap();
    let rule = DiscardRule::Zeroes { unit: options.cluster_size };
    let mut model = Model::new(vec![0; options.size as usize], rule);
    let mut rng = Rng(seed * 7919 + 1);
    let mut image = open_as(&storage, seed);
    for step in 0..400 {
        let size = model.bytes().len() as u64;
        let len = (1 + rng.below(200_000)).min(size);
        let at = rng.below(size - len + 1);
        let range = GuestRange::new(GuestOffset::new(at), len).unwrap();
        let operation = match rng.below(9) {
            0..=3 => Operation::Write { range, seed: seed << 20 | step | 1 },
            4 => Operation::Zero {
                range,
                mode: if rng.below(2) == 0 { ZeroMode::KeepAllocated } else { ZeroMode::MayUnmap },
            },
            5 => Operation::Discard(range),
            6 => Operation::Flush,
            7 => {
                let size = 512 * (1 + rng.below(2 * options.size / 512));
                image.resize(size).unwrap();
                model.resize(size);
                Operation::Read(GuestRange::between(GuestOffset::new(0), GuestOffset::new(0)))
            }
            _ => {
                image.close().unwrap();
                drop(image);
                image = open_as(&storage, seed);
                Operation::Reopen
            }
        };
        let done = match operation {
            Operation::Reopen => Ok(()),
            _ => model.step(&*image, &operation),
        };
        done.and_then(|()| model.check_disk(&*image))
            .unwrap_or_else(|error| panic!("seed {seed}, step {step}, {operation:?}: {error}"));
    }
    image.close().unwrap();
}

#[test]
fn random_operations_match_a_flat_array() {
    for (cluster_size, refcount_bits, extended) in [
        (512, 16, false),
        (512, 64, false),
        (512, 1, false),
        (4096, 1, false),
        (65536, 16, false),
        (2 << 20, 8, false),
        (16384, 32, true),
        (65536, 16, true),
    ] {
        for seed in 1..4 {
            let mut options = CreateOptions::new(3 * 1024 * 1024 + 512 * 5);
            options.cluster_size = cluster_size;
            options.refcount_bits = refcount_bits;
            options.extended_l2 = extended;
            history(&options, seed);
        }
    }
}

/// The host offset of the cluster at `offset`, and true if it reads as zeroes.
fn place_of(image: &Image, offset: u64) -> (Option<u64>, bool) {
    let range = GuestRange::new(GuestOffset::new(offset), 1).unwrap();
    match image.extent_at(range).unwrap().state {
        ExtentState::Data { host } => (host.map(|host| host.value()), false),
        ExtentState::Zero { host } => (host.map(|host| host.value()), true),
        other => panic!("{other:?}"),
    }
}

#[test]
fn discard_no_unref_keeps_the_host_cluster() {
    for keep in [false, true] {
        let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
        create(&storage, None, &CreateOptions::new(1 << 20)).unwrap();
        let image = open_as(&storage, u64::from(keep) | 2);
        image.write_at(GuestOffset::new(0), &[7; 3 << 16]).unwrap();
        let before: Vec<_> = (0..3).map(|i| place_of(&image, i << 16).0.unwrap()).collect();
        image.discard(GuestRange::new(GuestOffset::new(0), 2 << 16).unwrap()).unwrap();
        let zeroed = GuestRange::new(GuestOffset::new(2 << 16), 1 << 16).unwrap();
        image.write_zeroes(zeroed, ZeroMode::MayUnmap).unwrap();
        for (i, place) in before.iter().enumerate() {
            assert_eq!(place_of(&image, (i as u64) << 16), (keep.then_some(*place), true));
        }
        image.write_at(GuestOffset::new(1 << 16), &[9; 512]).unwrap();
        if keep {
            assert_eq!(place_of(&image, 1 << 16), (Some(before[1]), false));
        }
        let mut seen = [1; 1024];
        image.read_at(GuestOffset::new(1 << 16), &mut seen).unwrap();
        assert!(seen[..512] == [9; 512] && seen[512..] == [0; 512]);
        image.close().unwrap();
    }
}

#[test]
fn vm_state_lies_past_the_disk() {
    for extended in [false, true] {
        let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
        let mut options = CreateOptions::new((1 << 20) + 512);
        options.extended_l2 = extended;
        create(&storage, None, &options).unwrap();
        let image = open_as(&storage, 0);
        let state: Vec<u8> = (0..200_000u32).map(|i| (i % 250) as u8 + 1).collect();
        let far = image.geometry().l2_coverage() * 3 + 4096;
        for offset in [512, far] {
            image.write_vm_state(offset, &state).unwrap();
            image.write_vm_state(offset + 70_000, &state[70_000..70_512]).unwrap();
        }
        image.close().unwrap();
        let image = open_as(&storage, 0);
        let mut seen = vec![9; 200_512];
        for offset in [512, far] {
            image.read_vm_state(offset - 512, &mut seen).unwrap();
            assert!(seen[..512] == [0; 512] && seen[512..] == state[..], "{extended} {offset}");
        }
        let mut disk = vec![9; image.size() as usize];
        image.read_at(GuestOffset::new(0), &mut disk).unwrap();
        assert!(disk.iter().all(|&byte| byte == 0));
        // A disk that grows over the VM state does not expose it.
        image.resize(image.geometry().l2_coverage() * 2).unwrap();
        let mut shown = vec![9; 1 << 20];
        image.read_at(GuestOffset::new(image.geometry().l2_coverage()), &mut shown).unwrap();
        assert!(shown.iter().all(|&byte| byte == 0));
        assert!(image.write_vm_state(1 << 62, &state).is_err());
        image.close().unwrap();
    }
}

/// Writeback is by sector: changes one entry in every sector of a table (many sectors of a large one), in one
/// open image, and in an image that is reopened for each.
#[test]
fn every_changed_sector_of_a_table_is_written_back() {
    for (cluster_size, extended) in
        [(512, false), (4096, false), (65536, false), (65536, true), (2 << 20, false)]
    {
        let storage = Arc::new(PageStorage::new(PageBytes::new()));
        let shared: Arc<dyn Storage> = storage.clone();
        let entries = 512 / if extended { 16 } else { 8 };
        let sectors = cluster_size / 512;
        let mut options = CreateOptions::new(sectors * entries * cluster_size);
        (options.cluster_size, options.extended_l2) = (cluster_size, extended);
        create(&shared, None, &options).unwrap();
        let places: Vec<u64> = (0..sectors).step_by((sectors / 128).max(1) as usize).collect();
        let mut image = open_as(&shared, 0);
        for (index, sector) in places.iter().enumerate() {
            let at = sector * entries * cluster_size + 512 * (sector % 3).min(cluster_size / 512 - 1);
            image.write_at(GuestOffset::new(at), &pattern::bytes(*sector + 1, at, 512)).unwrap();
            if index % 5 == 0 {
                image.close().unwrap();
                image = open_as(&shared, 0);
            }
        }
        image.close().unwrap();
        let image = open_as(&shared, 0);
        for sector in &places {
            let at = sector * entries * cluster_size + 512 * (sector % 3).min(cluster_size / 512 - 1);
            let mut seen = pattern::unread(512);
            image.read_at(GuestOffset::new(at), &mut seen).unwrap();
            assert!(
                seen == pattern::bytes(*sector + 1, at, 512),
                "{cluster_size} {extended}: sector {sector}"
            );
        }
        let found = audit(&storage.bytes(), None);
        assert!(found.is_sound() && found.leaks == 0, "{cluster_size} {extended}: {found:?}");
    }
}

/// The backing file ends inside a cluster of the overlay: before, inside and after the bytes of a partial
/// write.
#[test]
fn copy_on_write_handles_a_backing_file_that_ends_in_the_cluster() {
    for extended_l2 in [false, true] {
        for end in [512, 1000, 4096, 20_000, 32_768, 65_000] {
            for (start, len) in
                [(0, 512), (4096, 512), (19_900, 200), (20_100, 5000), (33_000, 100), (65_024, 512)]
            {
                let shelf = Shelf::default();
                let below = pattern::bytes(1, 0, 65_536 + end);
                shelf.put("base.raw", &below);
                let backing = BackingShape { size: below.len() as u64, qcow2: false };
                let shape = Shape { backing: Some(backing), extended_l2, ..Shape::plain(4 * 65_536) };
                create(&(shelf.file(TOP) as Arc<dyn Storage>), None, &create_options(&shape)).unwrap();
                let mut options = OpenOptions::default();
                options.writable = true;
                let image = Image::open(shelf.source(TOP, ImageFormat::Qcow2), &options).unwrap();
                let mut content = below;
                content.resize(4 * 65_536, 0);
                let mut model = Model::new(content, DiscardRule::Ignored);
                let start = GuestOffset::new(65_536 + start);
                let range = GuestRange::new(start, len).unwrap();
                model.step(&*image, &Operation::Write { range, seed: 9 }).unwrap();
                let checked = model.check_disk(&*image);
                checked.unwrap_or_else(|e| panic!("end {end}, write at {start}, {extended_l2}: {e}"));
            }
        }
    }
}

/// Zeroes written to a part of a cluster become zeroes of the overlay, so that bytes written below it later
/// do not show, unless that would take bytes from the backing file.
#[test]
fn zeroes_at_the_edges_of_clusters_hide_what_is_below() {
    for (extended_l2, discard_no_unref, mode) in [
        (false, false, ZeroMode::KeepAllocated),
        (false, true, ZeroMode::MayUnmap),
        (true, false, ZeroMode::MayUnmap),
    ] {
        let shelf = Shelf::default();
        // The third cluster, and so its last subcluster, has data at its end; the others are zeroes.
        shelf.put("base.raw", &[]);
        shelf.file("base.raw").set_len(8 << 16).unwrap();
        shelf.file("base.raw").write_at(HostOffset::new((3 << 16) - 512), &[7; 512]).unwrap();
        let backing = BackingShape { size: 8 << 16, qcow2: false };
        let shape = Shape { backing: Some(backing), extended_l2, ..Shape::plain(7 << 16 | 512) };
        create(&(shelf.file(TOP) as Arc<dyn Storage>), None, &create_options(&shape)).unwrap();
        let mut options = OpenOptions::default();
        (options.writable, options.discard_no_unref) = (true, discard_no_unref);
        let image = Image::open(shelf.source(TOP, ImageFormat::Qcow2), &options).unwrap();
        // Inside one cluster, across two, before and at bytes of the backing file, at the end of the disk.
        for (start, len) in [(600, 100), (65_000, 1000), ((3 << 16) - 1024, 512), (7 << 16 | 1, 511)] {
            image.write_zeroes(GuestRange::new(GuestOffset::new(start), len).unwrap(), mode).unwrap();
        }
        assert_eq!(place_of(&image, 600), (None, true));
        assert_eq!(place_of(&image, 65_000), (None, true));
        assert_eq!(place_of(&image, 66_000 - 1), (None, true));
        assert_eq!(place_of(&image, 7 << 16), (None, true));
        let (copied, _) = place_of(&image, (3 << 16) - 1024);
        assert!(copied.is_some(), "the bytes below must stay");
        shelf.file("base.raw").write_at(HostOffset::new(0), &[9; 8 << 16]).unwrap();
        let seen = |at: u64, len: usize| {
            let mut seen = vec![1; len];
            image.read_at(GuestOffset::new(at), &mut seen).unwrap();
            seen
        };
        let unit: u64 = if extended_l2 { 2048 } else { 1 << 16 };
        assert_eq!(seen(0, unit as usize), vec![0; unit as usize]);
        assert_eq!(seen((1 << 16) - unit, 2 * unit as usize), vec![0; 2 * unit as usize]);
        assert_eq!(seen((3 << 16) - unit, unit as usize - 512), vec![0; unit as usize - 512]);
        assert_eq!(seen((3 << 16) - 512, 512), vec![7; 512]);
        assert_eq!(seen(4 << 16, 512), vec![9; 512]);
        assert_eq!(seen(7 << 16, 512), vec![0; 512]);
        image.close().unwrap();
    }
}

/// A flush that cannot write a table fails; the next one writes it, and nothing is lost or leaked.
#[test]
fn a_failed_write_of_tables_is_repeated_by_the_next_flush() {
    let mut failed = 0;
    for nth in 0.. {
        let memory: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
        let mut options = CreateOptions::new(1 << 20).with_cluster_size(512);
        options.refcount_bits = 64;
        create(&memory, None, &options).unwrap();
        let storage = Arc::new(FaultStorage::new(Arc::clone(&memory)));
        let image = open_as(&(storage.clone() as Arc<dyn Storage>), 0);
        // Tables of every kind change: L1, many L2 tables, refcount blocks and the refcount table; clusters
        // are unlinked.
        image.write_at(GuestOffset::new(0), &[1; 64 << 10]).unwrap();
        image.flush().unwrap();
        image.discard(GuestRange::new(GuestOffset::new(0), 8 << 10).unwrap()).unwrap();
        image.write_at(GuestOffset::new(60 << 10), &[2; 64 << 10]).unwrap();
        let fault = [Fault::Io, Fault::NoSpace, Fault::Short { bytes: 512 }][nth as usize % 3];
        storage.set_plan(Some(FaultPlan { calls: vec![Call::Write], nth, sticky: false, fault }));
        let flushed = image.flush();
        if storage.fired() == 0 {
            flushed.unwrap();
            break;
        }
        failed += 1;
        assert!(matches!(flushed.unwrap_err().kind(), ErrorKind::Storage | ErrorKind::NoSpace));
        image.write_at(GuestOffset::new(128 << 10), &[3; 512]).unwrap();
        image.flush().unwrap();
        image.close().unwrap();
        let image = open_as(&memory, 0);
        let mut seen = vec![9; 256 << 10];
        image.read_at(GuestOffset::new(0), &mut seen).unwrap();
        let parts = [(8, 0), (52, 1), (64, 2), (4, 0)].map(|(kib, byte)| vec![byte; kib << 10]);
        let mut wanted = [parts.concat(), vec![3; 512]].concat();
        wanted.resize(seen.len(), 0);
        assert!(seen == wanted, "call {nth}");
        image.close().unwrap();
        let mut bytes = pattern::unread(memory.len().unwrap() as usize);
        memory.read_at(HostOffset::new(0), &mut bytes).unwrap();
        let report = audit(&PageBytes::from_bytes(&bytes), None);
        assert!(report.is_sound() && report.leaks == 0, "call {nth}: {report:?}");
    }
    assert!(failed > 3, "only {failed} writes in a flush");
}

/// A ticket for the first part of a range keeps only its own clusters, so that the same thread can prepare
/// the rest.
#[test]
fn a_range_is_prepared_ticket_by_ticket() {
    let (told, done) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
        create(&storage, None, &CreateOptions::new(1 << 20)).unwrap();
        let image = open_as(&storage, 0);
        let range = |first: u64, end: u64| {
            GuestRange::between(GuestOffset::new(first << 16), GuestOffset::new(end << 16))
        };
        // Data, allocated zeroes, nothing, data elsewhere in the file.
        image.write_at(GuestOffset::new(0), &[1; 2 << 16]).unwrap();
        image.write_zeroes(range(1, 2), ZeroMode::KeepAllocated).unwrap();
        image.write_at(GuestOffset::new(4 << 16), &[1; 2 << 16]).unwrap();
        image.write_at(GuestOffset::new(3 << 16), &[1; 1 << 16]).unwrap();
        let (mut at, mut tickets) = (0, Vec::new());
        while at < 6 {
            let ticket = image.prepare_write(range(at, 6)).unwrap();
            at += ticket.range().len() >> 16;
            tickets.push(ticket);
        }
        told.send(tickets.len()).unwrap();
    });
    let tickets = done.recv_timeout(std::time::Duration::from_secs(10)).expect("the thread waits for itself");
    assert_eq!(tickets, 4);
}

/// After a failed barrier nobody knows what is on disk, and the system may have dropped it: no later flush
/// may succeed.
#[test]
fn a_failed_barrier_poisons() {
    for nth in 0..2 {
        let memory: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
        create(&memory, None, &CreateOptions::new(1 << 20)).unwrap();
        let storage = Arc::new(FaultStorage::new(Arc::clone(&memory)));
        let image = open_as(&(storage.clone() as Arc<dyn Storage>), 0);
        image.write_at(GuestOffset::new(0), &[1; 512]).unwrap();
        let fault = Fault::Io;
        storage.set_plan(Some(FaultPlan { calls: vec![Call::Flush], nth, sticky: false, fault }));
        image.flush().unwrap_err();
        assert_eq!(storage.fired(), 1, "barrier {nth}");
        assert_eq!(image.flush().unwrap_err().kind(), ErrorKind::Poisoned, "barrier {nth}");
        let again = image.write_at(GuestOffset::new(0), &[2; 512]);
        assert_eq!(again.unwrap_err().kind(), ErrorKind::Poisoned, "barrier {nth}");
    }
}

/// An event loop has many writes in flight on one thread.
#[test]
fn one_thread_holds_several_tickets() {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    create(&storage, None, &CreateOptions::new(1 << 20)).unwrap();
    let image = open_as(&storage, 0);
    let tickets: Vec<_> = (0..4)
        .map(|i| image.prepare_write(GuestRange::new(GuestOffset::new(i << 17), 4096).unwrap()).unwrap())
        .collect();
    let mut seen = [9; 512];
    image.read_at(GuestOffset::new(0), &mut seen).unwrap();
    assert_eq!(seen, [0; 512], "nothing is visible before the commit");
    for ticket in tickets {
        for piece in ticket.pieces() {
            match piece {
                qcow2_core::Piece::Guest { host } => storage.write_at(host, &[7; 4096]).unwrap(),
                qcow2_core::Piece::Bytes { host, bytes } => storage.write_at(host, bytes).unwrap(),
                qcow2_core::Piece::Zeroes { host, len } => {
                    storage.write_zeroes(host, len, ZeroMode::KeepAllocated).unwrap();
                }
                other => panic!("{other:?}"),
            }
        }
        ticket.commit().unwrap();
    }
    for i in 0..4 {
        image.read_at(GuestOffset::new(i << 17), &mut seen).unwrap();
        assert_eq!(seen, [7; 512]);
    }
    image.close().unwrap();
}
