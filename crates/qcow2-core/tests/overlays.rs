//! New overlays on a disk that is open: nothing is read again, one write before the first barrier, and an
//! overlay that was made in one go behaves as one that was created, and opened afterwards.
#![allow(missing_docs, clippy::unwrap_used, clippy::field_reassign_with_default)]

use qcow2_core::{
    CreateOptions, ErrorKind, GuestDisk, GuestOffset, GuestRange, Image, ImageFormat, Keyring, NoResolver,
    OpenOptions, Preallocation, RawDisk, ResolvedSource, Storage, create,
};
use qcow2_io::TraceStorage;
use qcow2_testkit::arbitrary::{BackingShape, Operation, Shape};
use qcow2_testkit::audit::audit;
use qcow2_testkit::crash::{CrashWorld, Event};
use qcow2_testkit::fault::{CHANGING_CALLS, Fault, FaultPlan, FaultStorage};
use qcow2_testkit::model::{DiscardRule, Model};
use qcow2_testkit::pages::PageBytes;
use qcow2_testkit::pattern;
use qcow2_testkit::rng::Rng;
use qcow2_testkit::storage::PageStorage;
use qcow2_testkit::toy::ToyKeyring;
use qcow2_testkit::world::create_options;
use std::sync::{Arc, Mutex};

const SIZE: u64 = 1 << 20;

fn source(storage: Arc<dyn Storage>) -> ResolvedSource {
    let (format, resolver) = (ImageFormat::Qcow2, Arc::new(NoResolver));
    ResolvedSource { storage, format, name: "memory".into(), id: None, resolver }
}

/// A raw disk of `size` bytes and its content.
fn base(size: u64) -> (Arc<dyn GuestDisk>, Vec<u8>) {
    let content = pattern::bytes(77, 0, size as usize);
    let storage = PageStorage::new(PageBytes::from_bytes(&content));
    (Arc::new(RawDisk::new(Arc::new(storage), false).unwrap()), content)
}

fn on_base(size: u64) -> CreateOptions {
    CreateOptions::new(size).with_backing("base.raw", "raw")
}

fn content(disk: &dyn GuestDisk) -> Vec<u8> {
    let mut bytes = pattern::unread(disk.size() as usize);
    disk.read_at(GuestOffset::new(0), &mut bytes).unwrap();
    bytes
}

/// `options` for every cluster size, and for the other properties that change the layout.
fn layouts() -> Vec<CreateOptions> {
    let mut all: Vec<_> = (9..=21).map(|bits| on_base(SIZE).with_cluster_size(1 << bits)).collect();
    all.push(on_base(SIZE).with_refcount_bits(64).with_cluster_size(512));
    all.push(on_base(SIZE).with_refcount_bits(1));
    all.push(on_base(1 << 40));
    all
}

#[test]
fn one_write_before_the_first_barrier() {
    for new in layouts() {
        let world = CrashWorld::new();
        let storage = world.add(PageBytes::new());
        let events = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&events);
        world.set_hook(Some(Arc::new(move |event, _| seen.lock().unwrap().push(event))));
        let (below, _) = base(SIZE);
        Image::create_on(&source(storage), &new, &OpenOptions::default(), below).unwrap();
        world.set_hook(None);
        use Event::{AfterFlush, BeforeChange, BeforeFlush};
        let expected = [
            &[BeforeChange, BeforeChange, BeforeFlush, AfterFlush][..], // length, tables
            &[BeforeChange, BeforeFlush, AfterFlush],                   // header
        ];
        assert_eq!(*events.lock().unwrap(), expected.concat(), "{new:?}");
    }
}

#[test]
fn neither_the_base_nor_the_new_file_is_read() {
    let (_, bytes) = base(SIZE);
    let below = Arc::new(TraceStorage::new(Arc::new(PageStorage::new(PageBytes::from_bytes(&bytes)))));
    let disk: Arc<dyn GuestDisk> =
        Arc::new(RawDisk::new(Arc::clone(&below) as Arc<dyn Storage>, false).unwrap());
    let reads = below.counts().reads;
    for new in layouts() {
        let top = Arc::new(TraceStorage::new(Arc::new(PageStorage::default())));
        let made = source(Arc::clone(&top) as Arc<dyn Storage>);
        Image::create_on(&made, &new, &OpenOptions::default(), Arc::clone(&disk)).unwrap();
        assert_eq!((top.counts().reads, below.counts().reads), (0, reads), "{new:?}");
    }
}

#[test]
fn what_cannot_be_opened_again_is_refused_before_anything_is_written() {
    let (below, _) = base(SIZE);
    let mut keeps = OpenOptions::default();
    keeps.discard_no_unref = true;
    let plain = OpenOptions::default();
    for (new, options) in [
        (CreateOptions::new(SIZE), &plain),
        (CreateOptions::new(SIZE).with_backing("", "raw"), &plain),
        (on_base(SIZE).with_data_file("data"), &plain),
        (on_base(SIZE).with_preallocation(Preallocation::Full), &plain),
        (on_base(SIZE).with_version(qcow2_core::format::Version::V2), &keeps),
    ] {
        let storage: Arc<dyn Storage> = Arc::new(PageStorage::default());
        let made = Image::create_on(&source(Arc::clone(&storage)), &new, options, Arc::clone(&below));
        assert_eq!(made.map(drop).unwrap_err().kind(), ErrorKind::InvalidOption, "{new:?}");
        assert!(storage.is_empty().unwrap(), "{new:?}");
    }
}

/// Runs the same operations on an overlay that was made in one go and on one that was created and opened:
/// both files must be the same, byte for byte, and read as the model.
fn same_as_opened(new: &CreateOptions, keys: Option<Arc<dyn Keyring>>, backing: u64, seed: u64) {
    let (below, mut bytes) = base(backing);
    bytes.resize(new.size as usize, 0);
    let mut options = OpenOptions::default();
    options.writable = true;
    options.keys = keys;
    options.discard_freed = seed & 1 == 1;
    let files: [Arc<PageStorage>; 2] = Default::default();
    let [made, opened] = files.each_ref().map(|file| source(Arc::clone(file) as Arc<dyn Storage>));
    create(&opened.storage, None, new).unwrap();
    let images = [
        Image::create_on(&made, new, &options, Arc::clone(&below)).unwrap(),
        Image::open_on(&opened, &options, below).unwrap(),
    ];
    let rule = match new.version {
        qcow2_core::format::Version::V2 => DiscardRule::Ignored,
        _ => DiscardRule::Zeroes { unit: new.cluster_size },
    };
    let mut models = [(); 2].map(|()| Model::new(bytes.clone(), rule));
    let mut rng = Rng::new(seed);
    for step in 0..60 {
        let operation = Operation::random(&mut rng, new.size, new.cluster_size);
        if matches!(operation, Operation::Reopen) {
            continue;
        }
        for (image, model) in images.iter().zip(&mut models) {
            let done = model.step(&**image, &operation);
            done.unwrap_or_else(|error| panic!("seed {seed}, step {step}, {operation:?}: {error}"));
        }
        if rng.one_in(10) {
            images.iter().for_each(|image| image.flush().unwrap());
        }
    }
    for (image, model) in images.iter().zip(&models) {
        model.check_disk(&**image).unwrap();
        image.close().unwrap();
    }
    let [made, opened] = files.map(|file| file.bytes());
    let report = audit(&made, None);
    assert!(report.is_sound(), "seed {seed}: {report:?}");
    assert!(made.to_vec() == opened.to_vec(), "seed {seed}: the files differ, {new:?}");
}

#[test]
fn an_overlay_behaves_as_one_that_was_created_and_opened() {
    for seed in 0..80 {
        let mut rng = Rng::new(seed);
        let mut shape = Shape { data_file: None, ..Shape::random(&mut rng) };
        let backing = shape.backing.map_or(shape.size, |backing| backing.size);
        shape.backing = Some(BackingShape { size: backing, qcow2: false });
        let shape = shape.legalized();
        let keys = shape.encryption.map(|numbering| Arc::new(ToyKeyring(numbering)) as Arc<dyn Keyring>);
        same_as_opened(&create_options(&shape), keys, backing, seed);
    }
}

/// Whatever is on the medium after a power cut is no image, or the whole overlay.
#[test]
fn a_power_cut_leaves_no_image_or_the_whole_overlay() {
    let (below, bytes) = base(SIZE);
    let (mut none, mut whole) = (0, 0);
    for new in layouts().into_iter().filter(|new| new.size == SIZE) {
        let world = CrashWorld::new();
        let storage = world.add(PageBytes::new());
        let cuts = Arc::new(Mutex::new(Vec::new()));
        let (seen, rng) = (Arc::clone(&cuts), Mutex::new(Rng::new(new.cluster_size)));
        world.set_hook(Some(Arc::new(move |_, cut| {
            let mut seen = seen.lock().unwrap();
            seen.extend([cut.everything(), cut.nothing()].map(|image| image.storage(0)));
            seen.extend((0..12).map(|_| cut.sample(&mut rng.lock().unwrap()).storage(0)));
        })));
        drop(Image::create_on(&source(storage), &new, &OpenOptions::default(), Arc::clone(&below)).unwrap());
        world.set_hook(None);
        world.cut(|cut| cuts.lock().unwrap().push(cut.nothing().storage(0)));
        for cut in cuts.lock().unwrap().drain(..) {
            let file = source(Arc::clone(&cut) as Arc<dyn Storage>);
            match Image::open_on(&file, &OpenOptions::writable(), Arc::clone(&below)) {
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::Format, "{error}");
                    none += 1;
                }
                Ok(image) => {
                    let name = image.backing_reference();
                    assert_eq!(name, Some(("base.raw".to_owned(), Some("raw".to_owned()))));
                    assert!(content(&*image) == bytes, "{new:?}");
                    let report = audit(&cut.bytes(), None);
                    assert!(report.is_sound() && report.leaks == 0, "{new:?}: {report:?}");
                    image.write_at(GuestOffset::new(700), &[9; 70_000]).unwrap();
                    image.close().unwrap();
                    assert!(audit(&cut.bytes(), None).is_sound(), "{new:?}");
                    whole += 1;
                }
            }
        }
    }
    assert!(none > 500 && whole > 50, "{none} and {whole}");
}

/// A storage call that fails makes the whole call fail; the file is no image then, or the whole overlay.
#[test]
fn a_failing_call_is_reported_and_leaves_no_other_image() {
    let (below, bytes) = base(SIZE);
    for fault in [Fault::Io, Fault::NoSpace, Fault::LateIo, Fault::Short { bytes: 1000 }] {
        for nth in 0.. {
            let file = Arc::new(PageStorage::default());
            let faulty = Arc::new(FaultStorage::new(Arc::clone(&file) as Arc<dyn Storage>));
            faulty.set_plan(Some(FaultPlan { calls: CHANGING_CALLS.to_vec(), nth, sticky: false, fault }));
            let made = source(Arc::clone(&faulty) as Arc<dyn Storage>);
            let made = Image::create_on(&made, &on_base(SIZE), &OpenOptions::default(), Arc::clone(&below));
            if faulty.fired() == 0 {
                made.unwrap();
                assert_eq!(nth, 5, "length, tables, barrier, header, barrier");
                break;
            }
            made.map(drop).unwrap_err();
            let file = source(file);
            if let Ok(image) = Image::open_on(&file, &OpenOptions::default(), Arc::clone(&below)) {
                assert!(content(&*image) == bytes, "{fault:?} {nth}");
            }
        }
    }
}

/// Bytes of memory that this process uses, where the system tells.
fn memory_used() -> Option<u64> {
    let pages = std::fs::read_to_string("/proc/self/statm").ok()?;
    pages.split(' ').nth(1)?.parse::<u64>().ok().map(|pages| pages * 4096)
}

/// Each has its own content, none changes another or the base, and an idle one needs little memory.
#[test]
fn thousands_of_overlays_share_one_base() {
    const COUNT: u64 = 2000;
    // The base is an image of 1 TiB with a raw disk below.
    let (bottom, bytes) = base(SIZE);
    let lower: Arc<dyn Storage> = Arc::new(PageStorage::default());
    let size = 1 << 40;
    let below: Arc<dyn GuestDisk> =
        Image::create_on(&source(lower), &on_base(size), &OpenOptions::default(), bottom).unwrap();
    below.write_at(GuestOffset::new(4096), &[0xbb; 4096]).unwrap();
    let mut expected = bytes[..16384].to_vec();
    expected[4096..8192].fill(0xbb);
    let new = CreateOptions::new(size).with_backing("middle.qcow2", "qcow2");
    let files: Vec<_> = (0..COUNT).map(|_| Arc::new(PageStorage::default())).collect();
    let before = memory_used();
    let overlays: Vec<_> = files
        .iter()
        .map(|file| {
            let file = source(Arc::clone(file) as Arc<dyn Storage>);
            Image::create_on(&file, &new, &OpenOptions::default(), Arc::clone(&below)).unwrap()
        })
        .collect();
    assert_eq!(Arc::strong_count(&below), 1 + COUNT as usize);
    let idle = memory_used().zip(before).map(|(now, before)| now.saturating_sub(before) / COUNT);
    let stored: usize = files.iter().map(|file| file.bytes().used() as usize).sum();
    println!("per idle overlay: {idle:?} bytes of memory, of which the file {}", stored / COUNT as usize);
    for (id, overlay) in (1u64..).zip(&overlays) {
        overlay.write_at(GuestOffset::new(id % 16 * 512), &id.to_le_bytes()).unwrap();
    }
    let busy = memory_used().zip(before).map(|(now, before)| now.saturating_sub(before) / COUNT);
    println!("per overlay that was written to: {busy:?} bytes of memory");
    for (id, overlay) in (1u64..).zip(&overlays) {
        let mut seen = pattern::unread(16384);
        overlay.read_at(GuestOffset::new(0), &mut seen).unwrap();
        let mut expected = expected.clone();
        let at = (id % 16 * 512) as usize;
        expected[at..at + 8].copy_from_slice(&id.to_le_bytes());
        assert!(seen == expected, "overlay {id}");
        overlay.close().unwrap();
    }
    let mut seen = pattern::unread(16384);
    below.read_at(GuestOffset::new(0), &mut seen).unwrap();
    assert!(seen == expected, "the base has changed");
    let range = GuestRange::new(GuestOffset::new(0), 4096).unwrap();
    assert!(below.extent_at(range).unwrap().len > 0);
}
