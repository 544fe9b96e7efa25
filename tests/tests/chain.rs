//! Verbs that change a chain in place, with the power cut at every moment, and with every storage call failing: the chain
//! reads as before, and its images are sound.
#![allow(missing_docs, clippy::unwrap_used)]

use qcow2_core::{
    BackingName, CreateOptions, GuestDisk, GuestOffset, GuestRange, Image, ImageFormat, Layers, OpenOptions,
    Reference, ResolveError, ResolvedSource, Resolver, Storage, ZeroMode, create,
};
use qcow2_format::Version;
use qcow2_ops::{AmendOptions, Amended, CommitOptions, Inline, RebaseOptions, Silent, amend};
use qcow2_testkit::audit::audit;
use qcow2_testkit::crash::{CrashWorld, Event};
use qcow2_testkit::cut::CrashImage;
use qcow2_testkit::fault::{CHANGING_CALLS, Fault, FaultPlan, FaultStorage};
use qcow2_testkit::pages::PageBytes;
use qcow2_testkit::pattern;
use qcow2_testkit::rng::Rng;
use qcow2_testkit::storage::PageStorage;
use std::sync::{Arc, Mutex};

const SEEDS: u64 = 600;
/// The images, top first; the last one is no part of the chain.
const NAMES: [&str; 4] = ["top", "middle", "base", "other"];
type Files = Vec<Arc<dyn Storage>>;

/// Opens the images by their names.
struct Neighbours(Files);

impl Resolver for Neighbours {
    fn resolve(&self, reference: Reference<'_>, _writable: bool) -> Result<ResolvedSource, ResolveError> {
        let Reference::Backing { name, .. } = reference else { return Err(ResolveError::denied("no")) };
        let index = NAMES.iter().position(|known| name.ends_with(known));
        index.map(|index| source(&self.0, index)).ok_or_else(|| ResolveError::failed(name))
    }
}

fn source(files: &Files, index: usize) -> ResolvedSource {
    let resolver = Arc::new(Neighbours(files.clone()));
    let (storage, name) = (Arc::clone(&files[index]), NAMES[index].to_owned());
    ResolvedSource { storage, format: ImageFormat::Qcow2, name, id: None, resolver }
}

fn open(files: &Files, index: usize, writable: bool, layers: Layers) -> qcow2_core::Result<Arc<Image>> {
    let mut options = OpenOptions::default();
    (options.writable, options.layers) = (writable, layers);
    Image::open(source(files, index), &options)
}

fn content(disk: &Image) -> qcow2_core::Result<Vec<u8>> {
    let mut bytes = vec![0; disk.size() as usize];
    disk.read_at(GuestOffset::new(0), &mut bytes)?;
    Ok(bytes)
}

/// What is done to the chain.
#[derive(Clone, Copy, Debug)]
enum Act {
    Commit,
    CommitDeep,
    Rebase(Option<usize>),
    /// Another refcount width.
    Width(u64),
    /// To version 2 and back.
    Versions,
}

/// A chain, and what the top reads as.
struct Start {
    files: Vec<PageBytes>,
    content: Vec<u8>,
}

impl Start {
    fn draw(rng: &mut Rng) -> Self {
        let pages: Vec<Arc<PageStorage>> = NAMES.iter().map(|_| Arc::new(PageStorage::default())).collect();
        let files: Files = pages.iter().map(|p| Arc::clone(p) as Arc<dyn Storage>).collect();
        for index in (0..NAMES.len()).rev() {
            let mut options = CreateOptions::new(512 * rng.between(20, 120));
            options.cluster_size = rng.pick(&[512, 1024, 4096, 8192]);
            options.refcount_bits = rng.pick(&[1, 16, 64]);
            let backing =
                |name: &str| BackingName { name: name.to_owned(), format: Some("qcow2".to_owned()) };
            options.backing = (index < 2).then(|| backing(NAMES[index + 1]));
            create(&files[index], None, &options).unwrap();
            let disk = open(&files, index, true, Layers::Follow).unwrap();
            for step in 0..rng.between(2, 10) {
                let start = rng.below(disk.size());
                let len = rng.between(1, 9000).min(disk.size() - start);
                let range = GuestRange::new(GuestOffset::new(start), len).unwrap();
                match rng.one_in(3) {
                    true => disk.write_zeroes(range, ZeroMode::MayUnmap).unwrap(),
                    false => {
                        let bytes = pattern::bytes(rng.next_u64() << 8 | step, start, len as usize);
                        disk.write_at(range.start(), &bytes).unwrap();
                    }
                }
            }
            disk.close().unwrap();
        }
        let content = content(&open(&files, 0, false, Layers::Follow).unwrap()).unwrap();
        Self { files: pages.iter().map(|p| p.bytes()).collect(), content }
    }

    /// The chain as it is in `image` reads as it should, and no image of it is damaged.
    fn judge(&self, image: &CrashImage) -> Result<(), String> {
        for (name, bytes) in NAMES.iter().zip(&image.disks) {
            let audit = audit(bytes, None);
            if !audit.is_sound() {
                return Err(format!("{name}: {:?}", audit.problems));
            }
        }
        let files: Files = (0..NAMES.len()).map(|i| image.storage(i) as Arc<dyn Storage>).collect();
        let seen = open(&files, 0, false, Layers::Follow).and_then(|top| content(&top));
        let seen = seen.map_err(|error| format!("the chain does not read: {error}"))?;
        match seen.iter().zip(&self.content).position(|(a, b)| a != b) {
            None if seen.len() == self.content.len() => Ok(()),
            None => Err(format!("{} bytes, expected {}", seen.len(), self.content.len())),
            Some(at) => Err(format!("byte {at} differs")),
        }
    }
}

/// Does it. Errors are the storages'.
fn act(files: &Files, act: Act) -> Result<(), String> {
    let failed = |error: &dyn std::fmt::Display| error.to_string();
    match act {
        Act::Commit | Act::CommitDeep => {
            let last = if matches!(act, Act::Commit) { 1 } else { 2 };
            let above = (0..last)
                .map(|i| open(files, i, i == 0, Layers::NoBacking).map(|image| image as Arc<dyn GuestDisk>));
            let above = above.collect::<Result<Vec<_>, _>>().map_err(|e| failed(&e))?;
            let base = open(files, last, true, Layers::Follow).map_err(|e| failed(&e))?;
            let mut options = CommitOptions::default();
            options.empty_top = last == 1;
            let disk: Arc<dyn GuestDisk> = base.clone();
            qcow2_ops::commit(&above, &disk, &options, &Inline, &Silent).map_err(|e| failed(&e))?;
            base.close().map_err(|e| failed(&e))?;
            above[0].as_image().unwrap().close().map_err(|e| failed(&e))
        }
        Act::Width(bits) => amend_top(files, |options| options.refcount_bits = Some(bits)),
        Act::Versions => {
            amend_top(files, |options| options.refcount_bits = Some(16))?;
            amend_top(files, |options| options.version = Some(Version::V2))?;
            amend_top(files, |options| options.version = Some(Version::V3))
        }
        Act::Rebase(to) => {
            let top = open(files, 0, true, Layers::Follow).map_err(|e| failed(&e))?;
            let new =
                to.map(|to| open(files, to, false, Layers::Follow)).transpose().map_err(|e| failed(&e))?;
            let new = new.map(|image| image as Arc<dyn GuestDisk>);
            let mut options = RebaseOptions::default();
            options.shared = (to == Some(2)).then_some((1, 0));
            qcow2_ops::rebase(&top, new.as_ref(), &options, &Inline, &Silent).map_err(|e| failed(&e))?;
            // Long enough to reach into another sector of the header.
            let name = |to: usize| BackingName {
                name: "./".repeat(100 * (to - 2)) + NAMES[to],
                format: Some("qcow2".to_owned()),
            };
            top.change_backing(to.map(name).as_ref()).map_err(|e| failed(&e))?;
            top.close().map_err(|e| failed(&e))
        }
    }
}

/// Amends the top until it is as asked for.
fn amend_top(files: &Files, change: impl Fn(&mut AmendOptions)) -> Result<(), String> {
    let mut options = AmendOptions::default();
    change(&mut options);
    loop {
        let top = open(files, 0, true, Layers::Follow).map_err(|error| error.to_string())?;
        match amend(&top, &options, &Silent).map_err(|error| error.to_string())? {
            Amended::Again => {}
            Amended::Done => return top.close().map_err(|error| error.to_string()),
        }
    }
}

fn draw(seed: u64) -> (Start, Act, Rng) {
    let mut rng = Rng::new(seed);
    let start = Start::draw(&mut rng);
    let act = rng.pick(&[
        Act::Commit,
        Act::CommitDeep,
        Act::Rebase(None),
        Act::Rebase(Some(2)),
        Act::Rebase(Some(3)),
        Act::Width(8),
        Act::Width(64),
        Act::Versions,
    ]);
    (start, act, rng)
}

/// What judges have found.
type Found = Mutex<Vec<String>>;

/// The world of a start, whose every moment is judged from now on.
fn world(start: &Arc<Start>, rng: Rng) -> (Arc<CrashWorld>, Files, Arc<Found>) {
    let world = CrashWorld::new();
    let files = start.files.iter().map(|bytes| world.add(bytes.clone()) as Arc<dyn Storage>).collect();
    let (wrong, rng) = (Arc::new(Found::default()), Mutex::new(rng));
    let (start, found) = (Arc::clone(start), Arc::clone(&wrong));
    world.set_hook(Some(Arc::new(move |event, cut| {
        let images = match event {
            Event::BeforeFlush => 4,
            _ => 1,
        };
        let mut found = found.lock().unwrap();
        for _ in 0..images {
            if found.is_empty()
                && let Err(what) = start.judge(&cut.sample(&mut rng.lock().unwrap()))
            {
                found.push(format!("{event:?}, change {}: {what}", cut.change()));
            }
        }
    })));
    (world, files, wrong)
}

#[test]
fn a_power_cut_leaves_the_chain_as_it_was() {
    for seed in 0..SEEDS {
        let (start, what, rng) = draw(seed);
        let start = Arc::new(start);
        let (world, files, wrong) = world(&start, rng);
        act(&files, what).unwrap_or_else(|error| panic!("seed {seed}, {what:?}: {error}"));
        drop(files);
        assert_eq!(*wrong.lock().unwrap(), Vec::<String>::new(), "seed {seed}, {what:?}");
        world.set_hook(None);
        world
            .cut(|cut| start.judge(&cut.nothing()))
            .unwrap_or_else(|error| panic!("seed {seed}, {what:?}, in the end: {error}"));
    }
}

#[test]
fn a_failing_storage_leaves_the_chain_as_it_was() {
    for seed in 0..SEEDS / 20 {
        for target in 0..3 {
            for nth in 0.. {
                let (start, what, _) = draw(seed);
                let world = CrashWorld::new();
                let files: Vec<_> =
                    start.files.iter().map(|b| Arc::new(FaultStorage::new(world.add(b.clone())))).collect();
                let fault = [Fault::Io, Fault::NoSpace, Fault::Short { bytes: 512 }][(nth % 3) as usize];
                files[target].set_plan(Some(FaultPlan {
                    calls: CHANGING_CALLS.to_vec(),
                    nth,
                    sticky: true,
                    fault,
                }));
                let storages: Files = files.iter().map(|f| Arc::clone(f) as Arc<dyn Storage>).collect();
                let done = act(&storages, what);
                let fired = files[target].fired() > 0;
                assert_eq!(done.is_err(), fired, "seed {seed}, {what:?}, call {nth} of {target}: {done:?}");
                world
                    .cut(|cut| start.judge(&cut.everything()).and_then(|()| start.judge(&cut.nothing())))
                    .unwrap_or_else(|error| panic!("seed {seed}, {what:?}, call {nth} of {target}: {error}"));
                if !fired {
                    break;
                }
            }
        }
    }
}
