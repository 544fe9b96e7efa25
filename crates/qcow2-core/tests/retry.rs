//! Procedures that fail at one of their writes: whenever the image still takes changes, the same call made
//! again succeeds, and nothing is lost or leaked. A power cut after the failure leaves a sound image.
#![allow(missing_docs, clippy::unwrap_used, clippy::field_reassign_with_default)]

use qcow2_core::format::Version;
use qcow2_core::{
    AmendProgress, CreateOptions, Error, ErrorKind, GuestOffset, GuestRange, Image, ImageFormat, NewSnapshot,
    NoResolver, OpenOptions, ResolvedSource, Storage, create,
};
use qcow2_testkit::audit::{ProblemKind, audit};
use qcow2_testkit::crash::CrashWorld;
use qcow2_testkit::fault::{Call, Fault, FaultPlan, FaultStorage};
use qcow2_testkit::pages::PageBytes;
use qcow2_testkit::rng::Rng;
use std::ops::ControlFlow;
use std::sync::Arc;

const CLUSTER: u64 = 512;
const SIZE: u64 = 64 << 10;
const FAULTS: [Fault; 4] = [Fault::Io, Fault::NoSpace, Fault::Short { bytes: 512 }, Fault::LateIo];

fn open(storage: Arc<dyn Storage>, writable: bool) -> Result<Arc<Image>, Error> {
    let (format, resolver) = (ImageFormat::Qcow2, Arc::new(NoResolver));
    let mut options = OpenOptions::default();
    options.writable = writable;
    Image::open(ResolvedSource { storage, format, name: "image".into(), id: None, resolver }, &options)
}

fn write(image: &Image, first: u64, end: u64, byte: u8) {
    let bytes = vec![byte; ((end - first) * CLUSTER) as usize];
    image.write_at(GuestOffset::new(first * CLUSTER), &bytes).unwrap();
}

fn discard(image: &Image, first: u64, end: u64) {
    image
        .discard(GuestRange::new(GuestOffset::new(first * CLUSTER), (end - first) * CLUSTER).unwrap())
        .unwrap();
}

fn byte_at(image: &Image, cluster: u64) -> u8 {
    let mut seen = [0xee; CLUSTER as usize];
    image.read_at(GuestOffset::new(cluster * CLUSTER), &mut seen).unwrap();
    assert!(seen.iter().all(|&byte| byte == seen[0]), "cluster {cluster} is mixed");
    seen[0]
}

fn named(name: &str) -> NewSnapshot {
    let mut new = NewSnapshot::default();
    new.name = name.into();
    new
}

/// What fails, what came before it, and what must be true after it, in a new opening of the image.
struct Case<'a> {
    version_2: bool,
    before: &'a dyn Fn(&Image),
    change: &'a dyn Fn(&Image) -> Result<(), Error>,
    after: &'a dyn Fn(&Image),
}

/// Fails `case` at each of its writes in turn. Returns how often it was made again.
#[track_caller]
fn sweep(case: &Case<'_>) -> u64 {
    let mut again = 0;
    for nth in 0.. {
        let mut fired = 0;
        for fault in FAULTS {
            let (hit, repeated) = fail_once(case, nth, fault);
            fired += u64::from(hit);
            again += u64::from(repeated);
        }
        if fired == 0 {
            break;
        }
    }
    again
}

#[track_caller]
fn fail_once(case: &Case<'_>, nth: u64, fault: Fault) -> (bool, bool) {
    let what = format!("call {nth}, {fault:?}");
    let world = CrashWorld::new();
    let disk = world.add(PageBytes::new());
    let storage = Arc::new(FaultStorage::new(disk.clone() as Arc<dyn Storage>));
    let shared: Arc<dyn Storage> = storage.clone();
    let mut options = CreateOptions::new(SIZE).with_cluster_size(CLUSTER);
    match case.version_2 {
        true => options = options.with_version(Version::V2),
        false => options.refcount_bits = 16,
    }
    create(&shared, None, &options).unwrap();
    let image = open(Arc::clone(&shared), true).unwrap();
    write(&image, 0, 48, 1);
    (case.before)(&image);
    image.flush().unwrap();
    // Tables of all kinds wait to be written, and clusters to be freed.
    discard(&image, 8, 16);
    write(&image, 20, 24, 2);
    write(&image, 100, 110, 2);
    let calls = vec![Call::Write, Call::WriteZeroes, Call::Allocate, Call::SetLen];
    storage.set_plan(Some(FaultPlan { calls, nth, sticky: false, fault }));
    let result = (case.change)(&image);
    let hit = storage.fired() > 0;
    storage.set_plan(None);
    let mut rng = Rng::new(nth);
    let cuts = |rng: &mut Rng| {
        let images = world.cut(|cut| {
            let mut images = vec![cut.nothing(), cut.everything()];
            images.extend((0..8).map(|_| cut.sample(rng)));
            images
        });
        for image in images {
            let mut found = audit(&image.disks[0], None);
            // Refcounts go up before copied flags are cleared.
            found.problems.retain(|problem| problem.kind != ProblemKind::CopiedMismatch);
            assert!(found.is_sound(), "{what}: {found:?}");
        }
    };
    cuts(&mut rng);
    let mut repeated = false;
    if let Err(error) = &result {
        assert!(hit, "{what}: {error}");
        if image.flush().is_err_and(|error| error.kind() == ErrorKind::Poisoned) {
            return (hit, false);
        }
        assert_eq!(image.size(), image.header().size, "{what}");
        write(&image, 30, 31, 3);
        (case.change)(&image).unwrap_or_else(|error| panic!("{what}: again: {error}"));
        repeated = true;
        cuts(&mut rng);
    }
    match image.close() {
        Err(error) if error.kind() == ErrorKind::Poisoned => {}
        closed => closed.unwrap(),
    }
    drop(image);
    let found = audit(&disk.live(), None);
    assert!(found.is_sound() && found.leaks == 0, "{what}, again {repeated}: {found:?}");
    let image = open(shared, false).unwrap();
    assert_eq!((byte_at(&image, 2), byte_at(&image, 22)), (1, 2), "{what}");
    (case.after)(&image);
    (hit, repeated)
}

fn names(image: &Image) -> Vec<String> {
    image.snapshots().unwrap().iter().map(|s| String::from_utf8(s.name.clone()).unwrap()).collect()
}

fn go_on(_: u64, _: u64) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

#[test]
fn snapshots() {
    let nothing = |_: &Image| {};
    let create = |image: &Image| image.create_snapshot(&named("a")).map(drop);
    let created = sweep(&Case {
        version_2: false,
        before: &nothing,
        change: &create,
        after: &|image| assert!(names(image).iter().all(|name| name == "a") && !names(image).is_empty()),
    });
    let before = |image: &Image| create(image).unwrap();
    let delete = |image: &Image| match image.snapshots().unwrap().first() {
        Some(snapshot) => image.delete_snapshot(snapshot),
        None => image.flush(),
    };
    let deleted = sweep(&Case {
        version_2: false,
        before: &before,
        change: &delete,
        after: &|image| assert!(names(image).is_empty()),
    });
    let apply = |image: &Image| {
        image.apply_snapshot(&image.snapshots().unwrap()[0])?;
        image.write_at(GuestOffset::new(20 * CLUSTER), &[2; 4 * CLUSTER as usize])
    };
    let applied = sweep(&Case {
        version_2: false,
        before: &before,
        change: &apply,
        after: &|image| {
            assert_eq!((byte_at(image, 10), byte_at(image, 105)), (1, 0));
        },
    });
    assert!(created > 4 && deleted > 4 && applied > 4, "{created} {deleted} {applied}");
}

#[test]
fn sizes() {
    for size in [SIZE / 2 + 512, 70 << 10, 16 << 20] {
        let again = sweep(&Case {
            version_2: false,
            before: &|_| {},
            change: &|image| image.resize(size),
            after: &|image| assert_eq!(image.size(), size),
        });
        assert!(again > 4, "{again} of {size}");
    }
}

#[test]
fn bitmaps() {
    let before = |image: &Image| {
        image.add_bitmap(b"a", 9).unwrap();
        image.add_bitmap(b"b", 10).unwrap();
    };
    let marked = |image: &Image| {
        for name in [b"a", b"b"] {
            let bits = image.bitmap_bits(name).unwrap();
            assert!(bits.is_marked(22 * CLUSTER) && bits.is_marked(10 * CLUSTER));
            assert!(!bits.is_marked(40 * CLUSTER));
        }
    };
    let again =
        sweep(&Case { version_2: false, before: &before, change: &|image| image.close(), after: &marked });
    assert!(again > 4, "{again}");
    let reopened = |image: &Image| {
        before(image);
        image.flush().unwrap();
    };
    sweep(&Case {
        version_2: false,
        before: &reopened,
        change: &|image| match image.bitmaps().unwrap().len() {
            1 => Ok(()),
            _ => image.remove_bitmap(b"a"),
        },
        after: &|image| assert_eq!(image.bitmaps().unwrap().len(), 1),
    });
}

#[test]
fn versions() {
    let zeroes = |image: &Image| {
        let range = GuestRange::new(GuestOffset::new(40 * CLUSTER), 2 * CLUSTER).unwrap();
        image.write_zeroes(range, qcow2_core::ZeroMode::KeepAllocated).unwrap();
        image.create_snapshot(&named("a")).unwrap();
    };
    let down = |image: &Image| {
        let progress: &mut AmendProgress<'_> = &mut go_on;
        let result = image.downgrade(progress);
        if image.header().version == Version::V2 {
            let error = image.flush().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Poisoned, "zero flags must not get into version 2");
        }
        result
    };
    sweep(&Case {
        version_2: false,
        before: &zeroes,
        change: &down,
        after: &|image| {
            assert_eq!(image.header().version, Version::V2);
        },
    });
    let with_bitmap = |image: &Image| image.add_bitmap(b"a", 9).unwrap();
    sweep(&Case {
        version_2: false,
        before: &with_bitmap,
        change: &down,
        after: &|image| {
            assert_eq!(image.header().version, Version::V2);
        },
    });
    let snapshot = |image: &Image| drop(image.create_snapshot(&named("a")).unwrap());
    sweep(&Case {
        version_2: true,
        before: &snapshot,
        change: &|image| image.upgrade(),
        after: &|image| {
            assert_eq!(image.header().version, Version::V3);
        },
    });
    sweep(&Case {
        version_2: false,
        before: &snapshot,
        change: &|image| image.set_refcount_bits(64, &mut go_on),
        after: &|_| {},
    });
}

/// The bytes that a cluster may have after a power cut: those of the last flush that succeeded, and all later
/// ones.
type Allowed = Vec<Vec<u8>>;

fn check_cuts(world: &CrashWorld, allowed: &Allowed, rng: &mut Rng, what: &str) {
    let images = world.cut(|cut| [cut.nothing(), cut.everything(), cut.sample(rng), cut.sample(rng)]);
    for image in images {
        let mut found = audit(&image.disks[0], None);
        found.problems.retain(|problem| problem.kind != ProblemKind::CopiedMismatch);
        assert!(found.is_sound(), "{what}: {found:?}");
        let disk = open(image.storage(0), false).unwrap();
        for (cluster, bytes) in (0..).zip(allowed) {
            let seen = byte_at(&disk, cluster);
            assert!(bytes.contains(&seen), "{what}: cluster {cluster} is {seen}, allowed are {bytes:?}");
        }
    }
}

#[test]
fn histories_with_failing_flushes() {
    let rounds = std::env::var("ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(30);
    let mut failed = 0;
    for seed in 1..=rounds {
        failed += history(seed);
    }
    assert!(failed > rounds, "only {failed} flushes failed");
}

fn history(seed: u64) -> u64 {
    let world = CrashWorld::new();
    let storage = Arc::new(FaultStorage::new(world.add(PageBytes::new()) as Arc<dyn Storage>));
    let shared: Arc<dyn Storage> = storage.clone();
    let mut options = CreateOptions::new(SIZE).with_cluster_size(CLUSTER);
    options.refcount_bits = if seed.is_multiple_of(2) { 64 } else { 16 };
    create(&shared, None, &options).unwrap();
    let mut image = open(Arc::clone(&shared), true).unwrap();
    let mut rng = Rng::new(seed);
    let mut allowed: Allowed = vec![vec![0]; (SIZE / CLUSTER) as usize];
    let mut failed = 0;
    for step in 0..60 {
        let what = format!("seed {seed}, step {step}");
        let first = rng.below(SIZE / CLUSTER - 20);
        let end = first + 1 + rng.below(20);
        let range = GuestRange::new(GuestOffset::new(first * CLUSTER), (end - first) * CLUSTER).unwrap();
        let mut set = |byte| (first..end).for_each(|at| allowed[at as usize].push(byte));
        match rng.below(8) {
            0..4 => {
                let byte = 1 + rng.below(250) as u8;
                write(&image, first, end, byte);
                set(byte);
            }
            4 => {
                discard(&image, first, end);
                set(0);
            }
            5 => {
                image.write_zeroes(range, qcow2_core::ZeroMode::MayUnmap).unwrap();
                set(0);
            }
            _ => {
                let calls = vec![Call::Write];
                let fault = FAULTS[rng.below(4) as usize];
                storage.set_plan(Some(FaultPlan {
                    calls,
                    nth: rng.below(6),
                    sticky: rng.below(2) == 0,
                    fault,
                }));
                let result = match rng.below(6) {
                    0 => image.create_snapshot(&named("a")).map(drop),
                    1 => image.snapshots().and_then(|all| {
                        all.first().map_or(image.flush(), |first| image.delete_snapshot(first))
                    }),
                    _ => image.flush(),
                };
                storage.set_plan(None);
                match result {
                    Ok(()) => allowed.iter_mut().for_each(|all| *all = vec![*all.last().unwrap()]),
                    Err(_) => failed += 1,
                }
            }
        }
        check_cuts(&world, &allowed, &mut rng, &what);
        let probe = image.write_at(GuestOffset::new(0), &[]);
        if probe.is_err_and(|error| error.kind() == ErrorKind::Poisoned) {
            shared.flush().unwrap();
            image = open(Arc::clone(&shared), true).unwrap();
            for (at, all) in (0..).zip(&mut allowed) {
                *all = vec![byte_at(&image, at)];
            }
        }
    }
    image.close().unwrap();
    failed
}
