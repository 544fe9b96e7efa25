//! Verbs that change a chain in place, with a power cut at every moment and with every storage call failing:
//! the chain must read as before, and its images must be sound.
#![allow(missing_docs, clippy::unwrap_used)]

use qcow2_core::{
    CreateOptions, GuestDisk, GuestOffset, GuestRange, HostOffset, Image, ImageFormat, Layers, NewSnapshot,
    OpenOptions, Reference, ResolveError, ResolvedSource, Resolver, Storage, ZeroMode, create,
};
use qcow2_format::Version;
use qcow2_ops::{
    AmendOptions, CallerError, Chain, CommitOptions, ConvertOptions, ErrorKind, Inline, LayerRole,
    NewBacking, NextLayer, OpenChain, Progress, RebaseOptions, Silent,
};
use qcow2_testkit::audit::audit;
use qcow2_testkit::crash::{CrashWorld, Event};
use qcow2_testkit::cut::CrashImage;
use qcow2_testkit::fault::{CHANGING_CALLS, Fault, FaultPlan, FaultStorage};
use qcow2_testkit::pages::PageBytes;
use qcow2_testkit::pattern;
use qcow2_testkit::rng::Rng;
use qcow2_testkit::storage::PageStorage;
use qcow2_tests::stop::StopsAfter;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Number of chains; `QCOW2_CHAIN_SEEDS` raises it.
fn seeds() -> u64 {
    std::env::var("QCOW2_CHAIN_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(500)
}

/// The images, top first. The last one is not part of the chain, but may have the same backing file.
const NAMES: [&str; 4] = ["top", "middle", "base", "other"];
type Files = Vec<Arc<dyn Storage>>;

/// Resolves the names of the images.
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
    let mut bytes = pattern::unread(disk.size() as usize);
    disk.read_at(GuestOffset::new(0), &mut bytes)?;
    Ok(bytes)
}

impl Start {
    /// The copy must read as the top does, and past the top's end as before.
    fn judge_copy(&self, what: Act, image: &CrashImage) -> Result<(), String> {
        if !matches!(what, Act::Copy) {
            return Ok(());
        }
        let files: Files = (0..NAMES.len()).map(|i| image.storage(i) as Arc<dyn Storage>).collect();
        let seen = open(&files, 3, false, Layers::Follow).and_then(|other| content(&other));
        let seen = seen.map_err(|error| format!("the copy does not read: {error}"))?;
        let (copied, tail) = seen.split_at(self.content.len());
        match copied == self.content && self.beside.get(copied.len()..).is_none_or(|old| old == tail) {
            true => Ok(()),
            false => Err("the copy differs".to_owned()),
        }
    }
}

/// The content of the top's snapshot `id`.
fn snapshot(files: &Files, id: &[u8]) -> qcow2_core::Result<Vec<u8>> {
    let options = OpenOptions::default();
    let choose = |all: &[qcow2_core::format::snapshot::Snapshot]| all.iter().position(|one| one.id == id);
    content(&*Image::open_snapshot(source(files, 0), &options, choose)?)
}

/// An operation on the chain.
#[derive(Clone, Copy, Debug)]
enum Act {
    Commit,
    CommitDeep,
    Rebase(Option<usize>),
    /// Amend the refcount width.
    Width(u64),
    /// Amend to version 2 and back.
    Versions,
    /// Copy the top into the image beside the chain, with copy offload where supported.
    Copy,
}

impl Act {
    /// True if the operation changes the top alone, so that its snapshots must read as before too.
    fn is_amend(self) -> bool {
        matches!(self, Self::Width(_) | Self::Versions)
    }
}

/// Bytes copied by copy offload.
static OFFLOADED: AtomicU64 = AtomicU64::new(0);

/// Whether the work was completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Done {
    All,
    Stopped,
}

/// Size parameters of a chain.
#[derive(Clone, Copy)]
struct Scale {
    /// Range of the disk size in sectors.
    sectors: (u64, u64),
    clusters: [u64; 4],
    /// Largest write in bytes.
    write: u64,
}

/// Cheap to judge.
const SMALL: Scale = Scale { sectors: (20, 120), clusters: [512, 1024, 4096, 8192], write: 9000 };
/// Several copy chunks.
const LARGE: Scale = Scale { sectors: (5000, 9000), clusters: [4096, 16384, 65536, 65536], write: 400_000 };

/// A chain, and the content of its top.
struct Start {
    files: Vec<PageBytes>,
    content: Vec<u8>,
    /// Content of the image beside the chain.
    beside: Vec<u8>,
    /// Snapshots of the top that must keep their content.
    snapshots: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Start {
    fn draw(rng: &mut Rng, scale: Scale) -> Self {
        let pages: Vec<Arc<PageStorage>> = NAMES.iter().map(|_| Arc::new(PageStorage::default())).collect();
        let files: Files = pages.iter().map(|p| Arc::clone(p) as Arc<dyn Storage>).collect();
        for index in [2, 3, 1, 0] {
            let mut options = CreateOptions::new(512 * rng.between(scale.sectors.0, scale.sectors.1));
            options.cluster_size = rng.pick(&scale.clusters);
            options.refcount_bits = rng.pick(&[1, 16, 64]);
            options = match index {
                0 | 1 => options.with_backing(NAMES[index + 1], "qcow2"),
                3 if rng.one_in(2) => options.with_backing(NAMES[2], "qcow2"),
                _ => options,
            };
            create(&files[index], None, &options).unwrap();
            let disk = open(&files, index, true, Layers::Follow).unwrap();
            let snapshots = if index == 0 && options.refcount_bits > 1 { rng.below(3) } else { 0 };
            for step in 0..rng.between(2, 10) {
                let start = rng.below(disk.size());
                let len = rng.between(1, scale.write).min(disk.size() - start);
                let range = GuestRange::new(GuestOffset::new(start), len).unwrap();
                match rng.one_in(3) {
                    true => disk.write_zeroes(range, ZeroMode::MayUnmap).unwrap(),
                    false => {
                        let bytes = pattern::bytes(rng.next_u64() << 8 | step, start, len as usize);
                        disk.write_at(range.start(), &bytes).unwrap();
                    }
                }
                if step < snapshots {
                    disk.create_snapshot(&NewSnapshot::default()).unwrap();
                }
            }
            if index == 0 && rng.one_in(4) {
                disk.add_bitmap(b"changes", 9).unwrap();
            }
            disk.close().unwrap();
        }
        let top = open(&files, 0, false, Layers::Follow).unwrap();
        let ids = top.snapshots().unwrap().into_iter().map(|snapshot| snapshot.id);
        let snapshots = ids.map(|id| (id.clone(), snapshot(&files, &id).unwrap())).collect();
        let content = content(&top).unwrap();
        let beside = self::content(&open(&files, 3, false, Layers::Follow).unwrap()).unwrap();
        Self { files: pages.iter().map(|p| p.bytes()).collect(), content, beside, snapshots }
    }

    /// The chain in `image` must read as before, and none of its images may be damaged.
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
        for (id, content) in &self.snapshots {
            if !snapshot(&files, id).is_ok_and(|seen| seen == *content) {
                return Err(format!("snapshot {} has changed", id.escape_ascii()));
            }
        }
        match seen.iter().zip(&self.content).position(|(a, b)| a != b) {
            None if seen.len() == self.content.len() => Ok(()),
            None => Err(format!("{} bytes, expected {}", seen.len(), self.content.len())),
            Some(at) => Err(format!("byte {at} differs")),
        }
    }
}

/// Runs the operation. `stop`: first cancelled after this many `should_stop` calls, then run to its end.
/// Errors come from the storages.
fn act(files: &Files, what: Act, stop: Option<u64>) -> Result<(), String> {
    if let Some(left) = stop {
        if attempt(files, what, &StopsAfter::new(left))? == Done::All {
            return Ok(());
        }
        nothing_leaked(files).map_err(|what| format!("stopped: {what}"))?;
    }
    assert_eq!(attempt(files, what, &Silent)?, Done::All);
    nothing_leaked(files)
}

/// No image may have leaked clusters.
fn nothing_leaked(files: &Files) -> Result<(), String> {
    for (name, file) in NAMES.iter().zip(files) {
        let failed = |error: qcow2_core::StorageError| error.to_string();
        let mut bytes = vec![0; file.len().map_err(failed)? as usize];
        file.read_padded(HostOffset::new(0), &mut bytes).map_err(failed)?;
        let leaks = audit(&PageBytes::from_bytes(&bytes), None).leaks;
        if leaks > 0 {
            return Err(format!("{name}: {leaks} clusters are leaked"));
        }
    }
    Ok(())
}

fn text(error: &dyn std::error::Error) -> String {
    qcow2_testkit::model::chain(error)
}

fn open_to(files: &Files, index: usize, writable: bool, layers: Layers) -> Result<Arc<Image>, String> {
    open(files, index, writable, layers).map_err(|error| text(&error))
}

/// Closes `images` in any case and evaluates the result of the procedure.
fn finish<T>(result: Result<T, qcow2_ops::Error>, images: &[&Image]) -> Result<Done, String> {
    let done = match result {
        Ok(_) => Ok(Done::All),
        Err(error) if error.kind() == ErrorKind::Stopped => Ok(Done::Stopped),
        Err(error) => Err(text(&error)),
    };
    let closed: Vec<_> = images.iter().map(|image| image.close()).collect();
    let done = done?;
    closed.into_iter().collect::<Result<(), _>>().map_err(|error| text(&error)).map(|()| done)
}

fn attempt(files: &Files, what: Act, progress: &dyn Progress) -> Result<Done, String> {
    match what {
        Act::Commit => commit(files, 1, progress),
        Act::CommitDeep => commit(files, 2, progress),
        Act::Width(bits) => amend_top(files, progress, |options| options.refcount_bits = Some(bits)),
        Act::Versions => {
            for change in [
                |options: &mut AmendOptions| options.refcount_bits = Some(16),
                |options: &mut AmendOptions| options.version = Some(Version::V2),
                |options: &mut AmendOptions| options.version = Some(Version::V3),
            ] {
                if amend_top(files, progress, change)? == Done::Stopped {
                    return Ok(Done::Stopped);
                }
            }
            Ok(Done::All)
        }
        Act::Rebase(to) => rebase(files, to, progress),
        Act::Copy => {
            let (top, other) =
                (open_to(files, 0, false, Layers::Follow)?, open_to(files, 3, true, Layers::Follow)?);
            other.resize(top.size().max(other.size())).map_err(|error| text(&error))?;
            let mut options = ConvertOptions::default();
            options.offload = true;
            let top: Arc<dyn GuestDisk> = top;
            let copied = qcow2_ops::convert(&[top], &*other, &options, &Inline, progress);
            OFFLOADED
                .fetch_add(copied.as_ref().map_or(0, |report| report.offloaded_bytes), Ordering::Relaxed);
            finish(copied, &[&other])
        }
    }
}

fn commit(files: &Files, last: usize, progress: &dyn Progress) -> Result<Done, String> {
    let options = CommitOptions::default().with_base(Some(NAMES[last].to_owned())).with_empty_top(last == 1);
    finish(qcow2_ops::commit(&Layered(files), &options, &Inline, progress), &[])
}

/// The chain, layer by layer.
struct Layered<'a>(&'a Files);

impl OpenChain for Layered<'_> {
    fn open_top(&self) -> Result<ResolvedSource, CallerError> {
        Ok(source(self.0, 0))
    }

    fn look_below(
        &self,
        _: &ResolvedSource,
        depth: usize,
        base: Option<&str>,
    ) -> Result<NextLayer, CallerError> {
        Ok(match base {
            _ if depth + 2 == NAMES.len() => NextLayer::None,
            Some(base) if base != NAMES[depth + 1] => NextLayer::Middle,
            _ => NextLayer::Base,
        })
    }

    fn open_below(&self, _: &ResolvedSource, depth: usize, _: bool) -> Result<ResolvedSource, CallerError> {
        Ok(source(self.0, depth))
    }

    fn open_layer(
        &self,
        _: ResolvedSource,
        depth: usize,
        role: LayerRole,
    ) -> Result<Arc<dyn GuestDisk>, CallerError> {
        let layers = if role == LayerRole::Base { Layers::Follow } else { Layers::NoBacking };
        Ok(open_to(self.0, depth, role != LayerRole::Middle, layers)?)
    }
}

fn rebase(files: &Files, to: Option<usize>, progress: &dyn Progress) -> Result<Done, String> {
    let mut top = Chain::new(open_to(files, 0, true, Layers::Follow)?);
    top.layers = (0..3).map(|layer| Some(NAMES[layer].to_owned())).collect();
    // Long enough to reach into another sector of the header.
    let name = |to: usize| "./".repeat(100 * (to - 2)) + NAMES[to];
    let options = to.map_or_else(RebaseOptions::default, |to| RebaseOptions::onto(name(to), "qcow2"));
    finish(qcow2_ops::rebase(top, &Onto { files, to }, &options, &Inline, progress), &[])
}

/// The layer that is to be the new backing file.
struct Onto<'a> {
    files: &'a Files,
    to: Option<usize>,
}

impl NewBacking for Onto<'_> {
    fn is_format(&self, format: &str) -> bool {
        format == "qcow2"
    }

    fn open(&self) -> Result<Chain, CallerError> {
        let to = self.to.ok_or("there is none")?;
        let mut chain = Chain::new(open_to(self.files, to, false, Layers::Follow)?);
        chain.layers = vec![Some(NAMES[to].to_owned())];
        Ok(chain)
    }
}

/// Rewrites a part of the disk with its own content, so that there are unflushed changes and clusters waiting
/// to be freed.
fn rewrite(disk: &Image) -> qcow2_core::Result<()> {
    let mut bytes = pattern::unread(disk.size() as usize / 3);
    let start = GuestOffset::new(disk.size() / 4);
    disk.read_at(start, &mut bytes)?;
    disk.write_at(start, &bytes)?;
    let zeroes = GuestRange::between(GuestOffset::new(disk.size() / 2), GuestOffset::new(disk.size()));
    let mut tail = pattern::unread(zeroes.len() as usize);
    disk.read_at(zeroes.start(), &mut tail)?;
    match tail.iter().all(|&byte| byte == 0) {
        true => disk.write_zeroes(zeroes, ZeroMode::MayUnmap),
        false => Ok(()),
    }
}

/// Amends the top until nothing is left to do.
fn amend_top(
    files: &Files,
    progress: &dyn Progress,
    change: impl Fn(&mut AmendOptions),
) -> Result<Done, String> {
    let mut options = AmendOptions::default();
    change(&mut options);
    let open = || -> Result<Arc<dyn GuestDisk>, CallerError> {
        let top = open_to(files, 0, true, Layers::Follow)?;
        rewrite(&top).map_err(|error| text(&error))?;
        Ok(top)
    };
    let top = open().map_err(|error| error.to_string())?;
    finish(qcow2_ops::amend(top, &open, &options, None, progress), &[])
}

/// The chain and operation of seed `seed`. Half of the small chains are cancelled once first.
fn draw(seed: u64, scale: Scale) -> (Start, Act, Rng) {
    let mut rng = Rng::new(seed);
    let mut start = Start::draw(&mut rng, scale);
    let act = rng.pick(&[
        Act::Commit,
        Act::CommitDeep,
        Act::Rebase(None),
        Act::Rebase(Some(2)),
        Act::Rebase(Some(3)),
        Act::Width(8),
        Act::Width(64),
        Act::Versions,
        Act::Copy,
        Act::Copy,
        Act::Copy,
    ]);
    if !act.is_amend() {
        // The operation may change what lies below a snapshot.
        start.snapshots.clear();
    }
    (start, act, rng)
}

/// Violations found so far.
type Found = Mutex<Vec<String>>;

/// A world with the files of a start; every event is judged from now on.
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
fn a_power_cut_keeps_the_content_of_the_chain() {
    for seed in 0..seeds() {
        let (start, what, mut rng) = draw(seed, SMALL);
        let start = Arc::new(start);
        let stop = rng.one_in(2).then(|| rng.below(4));
        let (world, files, wrong) = world(&start, rng);
        act(&files, what, stop).unwrap_or_else(|error| panic!("seed {seed}, {what:?}, {stop:?}: {error}"));
        drop(files);
        assert_eq!(*wrong.lock().unwrap(), Vec::<String>::new(), "seed {seed}, {what:?}");
        world.set_hook(None);
        world
            .cut(|cut| start.judge(&cut.nothing()).and_then(|()| start.judge_copy(what, &cut.nothing())))
            .unwrap_or_else(|error| panic!("seed {seed}, {what:?}, in the end: {error}"));
    }
    assert!(OFFLOADED.load(Ordering::Relaxed) > 0, "no bytes were copied by offload");
}

/// Cancelled at every `should_stop` call, with a power cut then, and run again to its end.
#[test]
fn a_cancel_keeps_the_content_of_the_chain() {
    for seed in 0..seeds() / 60 {
        for left in 0.. {
            let (start, what, _) = draw(seed, LARGE);
            let world = CrashWorld::new();
            let add = |bytes: &PageBytes| world.add(bytes.clone()) as Arc<dyn Storage>;
            let files: Files = start.files.iter().map(add).collect();
            let failed =
                |error: String| -> String { format!("seed {seed}, {what:?}, stopped after {left}: {error}") };
            let judge =
                || world.cut(|cut| start.judge(&cut.everything()).and_then(|()| start.judge(&cut.nothing())));
            let done = attempt(&files, what, &StopsAfter::new(left)).map_err(failed).unwrap();
            judge().and_then(|()| nothing_leaked(&files)).map_err(failed).unwrap();
            if done == Done::All {
                break;
            }
            act(&files, what, None).and_then(|()| judge()).map_err(failed).unwrap();
            world.cut(|cut| start.judge_copy(what, &cut.nothing())).map_err(failed).unwrap();
        }
    }
}

#[test]
fn a_storage_error_keeps_the_content_of_the_chain() {
    for seed in 0..seeds() / 16 {
        for target in 0..3 {
            for nth in 0.. {
                let (start, what, _) = draw(seed, SMALL);
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
                let done = attempt(&storages, what, &Silent);
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
