//! Bodies of the fuzz targets that need several crates; those of the parsers are in `qcow2_testkit::fuzz`.
//!
//! Here any bytes are taken as an image; in `shaped` they decide how a valid image is made and damaged;
//! `judged` has both; in `foreign` they are names, headers and replies, in `server`
//! what clients send. No input may cause a panic, a hang,
//! or much memory use.

mod foreign;
mod judged;
mod server;
mod shaped;

pub use foreign::{luks_header, names, nbd_replies};
pub use judged::{rescue, vet};
pub use server::nbd_requests;
pub use shaped::{damaged_check, damaged_work, repair, work};

use qcow2_codec::{Deflate, Zstd};
use qcow2_core::{
    ClusterCodec, Codecs, ErrorKind, GuestDisk, GuestOffset, GuestRange, HostOffset, Image, ImageFormat,
    Layers, NewSnapshot, NoResolver, OpenOptions, ResolvedSource, Storage, ZeroMode,
};
use qcow2_format::Version;
use qcow2_io::MemoryStorage;
use qcow2_ops::{CheckOptions, CheckReport, Inline, Silent, check};
use qcow2_testkit::fuzz::Target;
use std::sync::{Arc, LazyLock};

/// All targets of this file and those below it.
pub const TARGETS: &[Target] = &[
    Target { name: "expand", seeds: "expand", body: expand },
    Target { name: "open_read", seeds: "images", body: open_read },
    Target { name: "open_write", seeds: "images", body: open_write },
    Target { name: "open_change", seeds: "images", body: open_change },
    Target { name: "check_then_read", seeds: "images", body: check_then_read },
    Target { name: "vet", seeds: "images", body: vet },
    Target { name: "rescue", seeds: "images", body: rescue },
    Target { name: "luks_header", seeds: "luks_header", body: luks_header },
    Target { name: "names", seeds: "names", body: names },
    Target { name: "nbd_replies", seeds: "nbd_replies", body: nbd_replies },
    Target { name: "nbd_requests", seeds: "nbd_requests", body: nbd_requests },
    Target { name: "work", seeds: "decisions", body: work },
    Target { name: "damaged_work", seeds: "decisions", body: damaged_work },
    Target { name: "damaged_check", seeds: "decisions", body: damaged_check },
    Target { name: "repair", seeds: "decisions", body: repair },
];

/// The most extents that are queried, and the most bytes that are read of each.
const MAX_EXTENTS: usize = 200;
const READ_SIZE: u64 = 16 << 10;

static CODECS: LazyLock<Codecs> =
    LazyLock::new(|| Codecs::new(Arc::new(Deflate::default()), Arc::new(Zstd::default())));

/// Takes the bytes as a compressed stream. The first byte chooses the codec and the cluster size.
pub fn expand(data: &[u8]) {
    let Some((&shape, stream)) = data.split_first() else { return };
    let codec = if shape & 1 == 0 { &CODECS.deflate } else { &CODECS.zstd };
    let Some(codec) = codec else { return };
    let mut cluster = vec![0x5a; 512 << (shape >> 1 & 7)];
    if codec.expand(stream, &mut cluster).is_err() {
        return;
    }
    let mut again = vec![0xa5; cluster.len()];
    codec.expand(stream, &mut again).expect("the same stream expands again");
    assert_eq!(cluster, again, "every byte of the cluster is written");
    round_trip(&**codec, &cluster);
}

fn round_trip(codec: &dyn ClusterCodec, cluster: &[u8]) {
    let mut stream = vec![0; cluster.len() - 1];
    let Some(len) = codec.compress(cluster, &mut stream).expect("a cluster can be compressed") else {
        return;
    };
    let mut back = vec![0; cluster.len()];
    codec.expand(&stream[..len], &mut back).expect("our own stream expands");
    assert_eq!(back, cluster);
}

fn storage(data: &[u8]) -> Arc<MemoryStorage> {
    let storage = MemoryStorage::new();
    storage.write_at(HostOffset::new(0), data).expect("memory takes the bytes");
    Arc::new(storage)
}

fn open(storage: Arc<dyn Storage>, writable: bool) -> Option<Arc<Image>> {
    let source = ResolvedSource {
        storage,
        format: ImageFormat::Qcow2,
        name: "image".to_owned(),
        id: None,
        resolver: Arc::new(NoResolver),
    };
    let mut options = OpenOptions::default();
    options.writable = writable;
    options.layers = Layers::TopOnly;
    options.codecs = CODECS.clone();
    Image::open(source, &options).ok()
}

/// Calls `visit` for the extents from `start` on, up to the maximum or the first error.
fn extents(disk: &dyn GuestDisk, start: u64, mut visit: impl FnMut(GuestRange)) -> Result<(), ErrorKind> {
    let mut at = start;
    for _ in 0..MAX_EXTENTS {
        let left = GuestRange::between(GuestOffset::new(at), GuestOffset::new(disk.size()));
        if left.is_empty() {
            break;
        }
        let extent = disk.extent_at(left).map_err(|error| error.kind())?;
        assert!((1..=left.len()).contains(&extent.len), "{extent:?} of {left:?}");
        visit(GuestRange::between(left.start(), GuestOffset::new(at + extent.len)));
        at += extent.len;
    }
    Ok(())
}

/// Reads the beginning of each extent.
fn read_all(image: &Image) {
    let mut buf = Vec::new();
    let _ = extents(image, 0, |range| {
        buf.resize(range.len().min(READ_SIZE) as usize, 0);
        let _ = image.read_at(range.start(), &mut buf);
    });
}

/// Opens the image read-only and reads its extents.
pub fn open_read(data: &[u8]) {
    let storage = storage(data);
    let Some(image) = open(Arc::clone(&storage) as _, false) else { return };
    read_all(&image);
    drop(image);
    assert_eq!(storage.to_vec(), data, "reading never writes");
}

/// Opens the image for writing, if it can be opened so, and changes it a little. If a check found no damage
/// before, the data read back equals what was written, and a check finds no damage afterwards.
pub fn open_write(data: &[u8]) {
    let storage = storage(data);
    let sound = |storage: &dyn Storage| {
        report(storage, u64::MAX).is_some_and(|r| r.corruptions == 0 && r.check_errors == 0)
    };
    let was_sound = sound(&*storage);
    let Some(image) = open(Arc::clone(&storage) as _, true) else { return };
    let complete = change(&image, was_sound);
    read_all(&image);
    let closed = image.close().is_ok();
    drop(image);
    if was_sound && complete && closed {
        assert!(sound(&*storage), "{:#?}", report(&*storage, u64::MAX));
    }
}

/// Opens the image for writing and changes its snapshots and bitmaps. If a check found no damage before, the
/// content is the same and a check finds no damage afterwards.
pub fn open_change(data: &[u8]) {
    let storage = storage(data);
    let sound = |storage: &dyn Storage| {
        report(storage, u64::MAX).is_some_and(|r| r.corruptions == 0 && r.check_errors == 0)
    };
    let was_sound = sound(&*storage);
    let Some(image) = open(Arc::clone(&storage) as _, true) else { return };
    let complete = change_snapshots(&image, was_sound).is_ok() & change_bitmaps(&image).is_ok();
    read_all(&image);
    let closed = image.close().is_ok();
    drop(image);
    if was_sound && complete && closed {
        assert!(sound(&*storage), "{:#?}", report(&*storage, u64::MAX));
    }
}

/// Applies the first snapshot, takes one, and deletes the first and the last. A damaged image may map its own
/// tables as guest data, so its content may change.
fn change_snapshots(image: &Image, sound: bool) -> qcow2_core::Result<()> {
    let snapshots = image.snapshots()?;
    let went_back = snapshots.first().map_or(Ok(()), |first| image.apply_snapshot(first));
    let taken = image.create_snapshot(&NewSnapshot::default())?;
    let before = first_bytes(image);
    let _ = image.write_at(GuestOffset::new(0), &[0x77; 700]);
    image.apply_snapshot(&taken)?;
    if sound {
        assert_eq!(first_bytes(image), before, "a snapshot keeps the content it was taken with");
    }
    for snapshot in snapshots.first().into_iter().chain([&taken]) {
        image.delete_snapshot(snapshot)?;
    }
    went_back
}

fn first_bytes(image: &Image) -> Option<[u8; 700]> {
    let mut bytes = [0; 700];
    image.read_at(GuestOffset::new(0), &mut bytes).is_ok().then_some(bytes)
}

/// Adds, merges, clears and removes bitmaps, with writes in between.
fn change_bitmaps(image: &Image) -> qcow2_core::Result<()> {
    let bitmaps = image.bitmaps()?;
    image.add_bitmap(b"fuzz", 12)?;
    let _ = image.write_at(GuestOffset::new(0), &[0x78; 700]);
    for bitmap in &bitmaps {
        let bits = image.bitmap_bits(&bitmap.name);
        let _ = bits.and_then(|bits| image.merge_bitmap(b"fuzz", &bits));
    }
    if let Some(first) = bitmaps.first() {
        let _ = image.clear_bitmap(&first.name);
        let _ = image.enable_bitmap(&first.name, !first.auto);
        image.remove_bitmap(&first.name)?;
    }
    image.resize((image.size() / 2).next_multiple_of(512))
}

/// Writes at several offsets. Returns true if all writes succeeded.
fn change(image: &Image, sound: bool) -> bool {
    let (size, cluster) = (image.size(), image.cluster_size());
    let mut complete = true;
    for start in [0, cluster, cluster * 3 + 100, size.saturating_sub(700)] {
        let Some(range) = GuestRange::new(GuestOffset::new(start), 700).filter(|r| r.end().value() <= size)
        else {
            continue;
        };
        let written = image.write_at(range.start(), &[0x77; 700]).is_ok();
        let mut buf = [0; 700];
        if image.read_at(range.start(), &mut buf).is_ok() && written && sound {
            assert_eq!(buf, [0x77; 700], "at {start:#x}");
        }
        complete &= written;
    }
    let up_to = |end: u64| GuestRange::between(GuestOffset::new(0), GuestOffset::new(size.min(end)));
    complete &= image.write_zeroes(up_to(cluster), ZeroMode::MayUnmap).is_ok();
    complete &= image.discard(up_to(cluster * 2)).is_ok();
    complete && image.flush().is_ok()
}

/// Checks the image twice, with windows of different sizes. If the check finds nothing, every extent can be
/// queried.
pub fn check_then_read(data: &[u8]) {
    let storage = storage(data);
    let Some(report) = report(&*storage, u64::MAX) else { return };
    assert_eq!(
        self::report(&*storage, 0).as_ref(),
        Some(&report),
        "the report does not depend on the window size"
    );
    let clean = report.corruptions == 0 && report.check_errors == 0;
    let Some(image) = open(storage, false) else { return };
    let header = image.header();
    if clean && header.version >= Version::V3 && !header.has_data_file() {
        assert_eq!(extents(&*image, 0, |_| ()), Ok(()), "{report:?}");
    }
}

fn report(storage: &dyn Storage, counters_size: u64) -> Option<CheckReport> {
    let mut options = CheckOptions::default();
    options.counters_size = counters_size;
    options.max_findings = 50;
    check(storage, &options, &Inline, &Silent).ok()
}
