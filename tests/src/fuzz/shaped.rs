//! Targets whose bytes are decisions: an image of any shape, single damaged fields, and the work that
//! follows.

use super::{CODECS, read_all, report};
use qcow2_core::{
    GuestDisk, GuestOffset, GuestRange, Image, ImageFormat, Layers, NewSnapshot, OpenOptions, Result,
    Storage, ZeroMode,
};
use qcow2_ops::repair::{RepairMode, check_and_repair};
use qcow2_ops::{CallerError, Inline, Silent};
use qcow2_testkit::pattern;
use qcow2_testkit::rng::Rng;
use qcow2_testkit::shaped::{Shaped, act, draw, tiny_shape};
use qcow2_testkit::tables::{MARK, Tables};
use qcow2_testkit::world::{TOP, World, keys};
use std::sync::Arc;

/// Random operations on a valid image, each compared with the model; closed, the image is sound.
pub fn work(data: &[u8]) {
    let mut rng = Rng::from_bytes(data);
    let shape = tiny_shape(&mut rng);
    let done = World::new(shape, CODECS.clone(), 1).and_then(|mut world| {
        for step in 0..rng.between(1, 24) {
            act(&mut world, &mut rng, step)?;
        }
        world.finish()
    });
    if let Err(error) = done {
        panic!("{shape:?}: {error}");
    }
}

pub(super) fn shaped(rng: &mut Rng) -> Shaped {
    draw(rng, &CODECS).unwrap_or_else(|error| panic!("a valid image: {error}"))
}

fn open(shaped: &Shaped, change: impl Fn(&mut OpenOptions)) -> Result<Arc<Image>> {
    let mut options = OpenOptions::default();
    options.codecs = CODECS.clone();
    options.keys = keys(&shaped.shape);
    change(&mut options);
    Image::open(shaped.shelf.source(TOP, ImageFormat::Qcow2), &options)
}

/// Work on an image with damaged fields: header and tables stay whole, or the image is marked; an image that
/// is opened for reading is read, and not written to.
pub fn damaged_work(data: &[u8]) {
    let mut rng = Rng::from_bytes(data);
    let shaped = shaped(&mut rng);
    let kinds = shaped.damage(&mut rng, 3);
    let bytes = shaped.bytes();
    if let Ok(image) = open(&shaped, |_| ()) {
        read_all(&image);
        drop(image);
        assert!(shaped.bytes().to_vec() == bytes.to_vec(), "reading never writes");
    }
    let before = Tables::find(bytes);
    let Ok(image) = open(&shaped, |options| options.writable = true) else { return };
    let mut done = Vec::new();
    for _ in 0..rng.between(1, 8) {
        done.push(change(&image, &mut rng));
    }
    if !rng.one_in(4) {
        done.push(("close", image.close().is_ok()));
    }
    drop(image);
    if let Err(error) = before.judge(&Tables::find(shaped.bytes())) {
        panic!("{error}; damaged: {kinds:?}, then {done:?}");
    }
}

/// One change; what it was and whether it succeeded.
fn change(image: &Image, rng: &mut Rng) -> (&'static str, bool) {
    let (size, cluster) = (image.size(), image.cluster_size());
    // A damaged size may be anything.
    let clusters = size.div_ceil(cluster).clamp(1, 256);
    let (first, count) = (rng.below(clusters), rng.between(1, 5));
    let (start, end) = (first * cluster, size.min((first + count) * cluster));
    let range = GuestRange::between(GuestOffset::new(start.min(end)), GuestOffset::new(end));
    let marks = MARK.repeat((range.len() / 8) as usize);
    match rng.below(16) {
        0..=5 => ("write", image.write_at(range.start(), &marks).is_ok()),
        6 => {
            let part = &marks[..marks.len().min(cluster as usize)];
            ("compressed write", image.write_compressed(range.start(), part).is_ok())
        }
        7 => ("zeroes", image.write_zeroes(range, ZeroMode::MayUnmap).is_ok()),
        8 => ("kept zeroes", image.write_zeroes(range, ZeroMode::KeepAllocated).is_ok()),
        9 => ("discard", image.discard(range).is_ok()),
        10 => ("flush", image.flush().is_ok()),
        11 => ("snapshot", image.create_snapshot(&NewSnapshot::default()).is_ok()),
        12 | 13 => {
            let Some(first) = image.snapshots().ok().and_then(|all| all.first().cloned()) else {
                return ("no snapshot", false);
            };
            match rng.one_in(2) {
                true => ("delete", image.delete_snapshot(&first).is_ok()),
                false => ("apply", image.apply_snapshot(&first).is_ok()),
            }
        }
        14 => ("resize", image.resize(rng.between(1, clusters * 2) * cluster).is_ok()),
        _ => bitmaps(image, rng),
    }
}

fn bitmaps(image: &Image, rng: &mut Rng) -> (&'static str, bool) {
    let Some(first) = image.bitmaps().ok().and_then(|all| all.first().cloned()) else {
        return ("bitmap added", image.add_bitmap(b"fuzz", 10).is_ok());
    };
    match rng.below(3) {
        0 => ("bitmap removed", image.remove_bitmap(&first.name).is_ok()),
        1 => ("bitmap cleared", image.clear_bitmap(&first.name).is_ok()),
        _ => ("bitmap added", image.add_bitmap(b"fuzz", 10).is_ok()),
    }
}

/// A check of a damaged image, then reading it: as the target of the same name on any bytes.
pub fn damaged_check(data: &[u8]) {
    let mut rng = Rng::from_bytes(data);
    let shaped = shaped(&mut rng);
    shaped.damage(&mut rng, 3);
    super::check_then_read(&shaped.bytes().to_vec());
}

/// The guest's clusters; `None` for one that cannot be read, and none at all if the image does not open.
fn clusters(shaped: &Shaped) -> Vec<Option<Vec<u8>>> {
    let Ok(image) = open(shaped, |_| ()) else { return Vec::new() };
    let (size, cluster) = (image.size(), image.cluster_size());
    let read = |index: u64| {
        let start = index * cluster;
        let mut bytes = pattern::unread(cluster.min(size - start) as usize);
        image.read_at(GuestOffset::new(start), &mut bytes).ok().map(|()| bytes)
    };
    (0..size.div_ceil(cluster).min(128)).map(read).collect()
}

/// The guest's clusters with each of several damages alone in place. `whole`: the file before them.
fn clusters_by_damage(
    shaped: &Shaped,
    whole: &[u8],
    steps: &[(&'static str, Vec<u8>)],
) -> Vec<Vec<Option<Vec<u8>>>> {
    let now = shaped.bytes().to_vec();
    let befores = std::iter::once(whole).chain(steps.iter().map(|(_, bytes)| &bytes[..]));
    let alone = |(before, (_, after)): (&[u8], &(&str, Vec<u8>))| {
        let mut bytes = whole.to_vec();
        for (byte, (was, is)) in bytes.iter_mut().zip(before.iter().zip(after)) {
            *byte = if was == is { *byte } else { *is };
        }
        shaped.shelf.put(TOP, &bytes);
        clusters(shaped)
    };
    let read = befores.zip(steps).map(alone).collect();
    shaped.shelf.put(TOP, &now);
    read
}

/// Tells of a guest cluster whether its L1 entry names another table than in `whole`, the file before it was
/// damaged.
fn moved_tables(shaped: &Shaped, whole: &[u8]) -> impl Fn(usize) -> bool + use<> {
    let now = shaped.bytes().to_vec();
    let entry = |bytes: &[u8], index: usize| {
        let at = u64::from_be_bytes(whole[40..48].try_into().expect("eight bytes")) as usize + 8 * index;
        let entry =
            bytes.get(at..at + 8).map(|entry| u64::from_be_bytes(entry.try_into().expect("eight bytes")));
        entry.unwrap_or(0) & 0x00ff_ffff_ffff_fe00
    };
    let entries = u32::from_be_bytes(whole[36..40].try_into().expect("four bytes")) as usize;
    let moved: Vec<bool> = (0..entries).map(|index| entry(whole, index) != entry(&now, index)).collect();
    let per_table = (1usize << shaped.shape.cluster_bits) / if shaped.shape.extended_l2 { 16 } else { 8 };
    move |index| moved.get(index / per_table).copied().unwrap_or(false)
}

/// A repair of a damaged image settles: what was right reads the same afterwards, and a second repair finds
/// what the first left.
///
/// Where one damage hides another, a cluster may be right by chance: behind a wrong L1 entry another table
/// may have the same there, and what the right table has may be damaged. So a cluster counts as right if it
/// is right with all damages and with each of them alone. Nor is it right where its L1 entry names another
/// table than before: outside the file all tables are empty, so clusters that were never written read the
/// same there, and a lost table may well be put in its place.
pub fn repair(data: &[u8]) {
    let mut rng = Rng::from_bytes(data);
    let shaped = shaped(&mut rng);
    let (bytes, whole) = (shaped.bytes().to_vec(), clusters(&shaped));
    let steps = shaped.damage_in_steps(&mut rng, 2);
    let kinds: Vec<_> = steps.iter().map(|(kind, _)| *kind).collect();
    let damaged = clusters(&shaped);
    let moved = moved_tables(&shaped, &bytes);
    let run = || {
        let file: Arc<dyn Storage> = shaped.shelf.file(TOP);
        let reopen = || -> std::result::Result<Arc<dyn GuestDisk>, CallerError> {
            Ok(open(&shaped, |options| {
                (options.writable, options.for_repair, options.layers) = (true, true, Layers::TopOnly);
            })?)
        };
        check_and_repair(&*file, Some(RepairMode::All), &reopen, &Inline, &Silent).is_ok()
    };
    let bad =
        || report(&*shaped.shelf.file(TOP), u64::MAX).map(|report| report.corruptions + report.check_errors);
    if bad().is_none() {
        return;
    }
    let mut left = None;
    for pass in ["first", "second"] {
        if !run() {
            return;
        }
        let now = clusters(&shaped);
        let lost: Vec<usize> = (0..whole.len())
            .filter(|&index| {
                let was = &whole[index];
                !moved(index)
                    && was.is_some()
                    && damaged.get(index) == Some(was)
                    && now.get(index) != Some(was)
            })
            .collect();
        if !lost.is_empty() {
            let by_damage = clusters_by_damage(&shaped, &bytes, &steps);
            for index in lost {
                let by_chance = by_damage.iter().any(|read| read.get(index) != whole.get(index));
                assert!(by_chance, "{pass} repair of {kinds:?}: guest cluster {index} was right");
            }
        }
        let found = bad();
        assert!(left.is_none_or(|left| left == found), "{kinds:?}: {left:?} were left, now {found:?} are");
        left = Some(found);
    }
}
