//! A chain of four layers in storages that lose power and fail, a guest that uses it, and what the chain must
//! read as afterwards.

use qcow2_core::{
    BackingName, CreateOptions, GuestDisk, GuestOffset, GuestRange, HoldObserver, HostOffset, Image,
    ImageFormat, Layers, LiveDisk, OpenOptions, RawDisk, Reference, ResolveError, ResolvedSource, Resolver,
    Storage, StorageError, ZeroMode, create, forward_storage,
};
use qcow2_ops::bitmap::{BitmapAction, change_bitmap};
use qcow2_ops::live::{
    BackupOptions, LiveSnapshotOptions, MiddleLayer, backup, commit_middle, commit_top, external_snapshot,
    on_image,
};
use qcow2_ops::{CallerError, Error, ErrorKind, NewStorage, Progress};
use qcow2_testkit::audit::audit;
use qcow2_testkit::crash::{CrashWorld, Event};
use qcow2_testkit::cut::CrashImage;
use qcow2_testkit::fault::FaultStorage;
use qcow2_testkit::model::chain;
use qcow2_testkit::pages::PageBytes;
use qcow2_testkit::pattern;
use qcow2_testkit::rng::Rng;
use qcow2_testkit::storage::PageStorage;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};

pub(crate) const SECTOR: u64 = 512;
/// The files, in the order of the world. The first four are the chain at the start, from the bottom up.
pub(crate) const NAMES: [&str; 6] = ["base", "low", "middle", "top", "new", "record"];
const TOP: usize = 3;
const NEW: usize = 4;
const RECORD: usize = 5;
type Files = Vec<Arc<dyn Storage>>;

/// What is done to the chain while the guest uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    Snapshot,
    CommitTop,
    /// Commits the layer with this many layers above it.
    CommitMiddle(usize),
    /// Copies what a bitmap marks into the new file.
    Backup,
}

pub(crate) const ACTS: [Act; 5] =
    [Act::Snapshot, Act::CommitTop, Act::CommitMiddle(1), Act::CommitMiddle(2), Act::Backup];

/// Resolves the names of the files.
struct Neighbours(Files);

impl Resolver for Neighbours {
    fn resolve(&self, reference: Reference<'_>, _writable: bool) -> Result<ResolvedSource, ResolveError> {
        let Reference::Backing { name, format } = reference else { return Err(ResolveError::denied("no")) };
        let index = NAMES.iter().position(|known| *known == name);
        let format = ImageFormat::from_name(format.unwrap_or("none"));
        let source = index.map(|index| ResolvedSource { format, ..source(&self.0, index) });
        source.ok_or_else(|| ResolveError::failed(name))
    }
}

fn source(files: &Files, index: usize) -> ResolvedSource {
    let resolver = Arc::new(Neighbours(files.clone()));
    ResolvedSource::new(Arc::clone(&files[index]), ImageFormat::Qcow2, NAMES[index]).with_resolver(resolver)
}

fn content(disk: &dyn GuestDisk) -> Result<Vec<u8>, String> {
    let mut bytes = pattern::unread(disk.size() as usize);
    disk.read_at(GuestOffset::new(0), &mut bytes).map_err(|e| chain(&e))?;
    Ok(bytes)
}

pub(crate) fn range(start: u64, end: u64) -> GuestRange {
    GuestRange::between(GuestOffset::new(start), GuestOffset::new(end))
}

/// The format of a file.
fn format_of(index: usize, raw_base: bool) -> &'static str {
    if index == 0 && raw_base { "raw" } else { "qcow2" }
}

/// The files of a chain, and the content of its top.
pub(crate) struct Start {
    raw_base: bool,
    files: Vec<PageBytes>,
    content: Vec<u8>,
}

impl Start {
    pub(crate) fn draw(rng: &mut Rng) -> Self {
        let pages: Vec<Arc<PageStorage>> = NAMES.iter().map(|_| Arc::new(PageStorage::default())).collect();
        let files: Files = pages.iter().map(|p| Arc::clone(p) as Arc<dyn Storage>).collect();
        let size = SECTOR * rng.between(1300, 1700);
        let raw_base = rng.one_in(3);
        for index in 0..=TOP {
            // The layer below the top must not be longer, to be committed into; others may.
            let longest = size + if index < 2 { 100 * SECTOR } else { 0 };
            let size = if index == TOP { size } else { longest - SECTOR * rng.below(400) };
            if index == 0 && raw_base {
                files[0].write_at(HostOffset::new(0), &pattern::bytes(7, 0, size as usize)).unwrap();
                continue;
            }
            let mut options = CreateOptions::new(size);
            options.cluster_size = rng.pick(&[512, 2048, 4096, 65536]);
            options.refcount_bits = rng.pick(&[1, 16]);
            options.lazy_refcounts = rng.one_in(4);
            if index > 0 {
                options = options.with_backing(NAMES[index - 1], format_of(index - 1, raw_base));
            }
            create(&files[index], None, &options).unwrap();
            let image = Image::open(source(&files, index), &OpenOptions::writable()).unwrap();
            for _ in 0..rng.between(4, 14) {
                let start = SECTOR * rng.below(size / SECTOR);
                let end = size.min(start + SECTOR * rng.between(1, 200));
                match rng.one_in(4) {
                    true => image.write_zeroes(range(start, end), ZeroMode::MayUnmap).unwrap(),
                    false => {
                        let bytes = pattern::bytes(rng.next_u64() | 1, start, (end - start) as usize);
                        image.write_at(GuestOffset::new(start), &bytes).unwrap();
                    }
                }
            }
            image.close().unwrap();
        }
        files[RECORD].write_at(HostOffset::new(0), &[TOP as u8; SECTOR as usize]).unwrap();
        let top = Image::open(source(&files, TOP), &OpenOptions::read_only()).unwrap();
        let content = content(&*top).unwrap();
        Self { raw_base, files: pages.iter().map(|p| p.bytes()).collect(), content }
    }
}

/// Counts what happens while requests are held back.
#[derive(Default)]
pub(crate) struct Pauses {
    held: AtomicBool,
    /// True until a file is changed after a pause.
    just_released: AtomicBool,
    /// Changes and flushes of storages.
    changes: AtomicU64,
    flushes: AtomicU64,
    /// The disk at the beginning of each pause.
    moments: Mutex<Vec<Vec<u8>>>,
    most_changes: AtomicU64,
    most_flushes: AtomicU64,
}

impl Pauses {
    /// The most changes and the most flushes in one pause.
    pub(crate) fn most(&self) -> (u64, u64) {
        (self.most_changes.load(Ordering::SeqCst), self.most_flushes.load(Ordering::SeqCst))
    }
}

impl HoldObserver for Stage {
    /// Requests still go on: the last moment for one.
    fn holding(&self) {
        if self.guest.writes_last.load(Ordering::SeqCst) {
            self.guest.step(self);
        }
    }

    fn quiet(&self) {
        let pauses = &self.pauses;
        pauses.moments.lock().unwrap().push(self.guest.current.lock().unwrap().clone());
        pauses.changes.store(0, Ordering::SeqCst);
        pauses.flushes.store(0, Ordering::SeqCst);
        pauses.held.store(true, Ordering::SeqCst);
    }

    fn released(&self) {
        let pauses = &self.pauses;
        pauses.held.store(false, Ordering::SeqCst);
        pauses.just_released.store(true, Ordering::SeqCst);
        pauses.most_changes.fetch_max(pauses.changes.load(Ordering::SeqCst), Ordering::SeqCst);
        pauses.most_flushes.fetch_max(pauses.flushes.load(Ordering::SeqCst), Ordering::SeqCst);
    }
}

/// The guest: what it has written, and what each sector may hold after a power cut.
pub(crate) struct Guest {
    rng: Mutex<Rng>,
    current: Mutex<Vec<u8>>,
    /// The contents of each sector since the last flush, with the one that was flushed.
    versions: Mutex<Vec<Vec<Vec<u8>>>>,
    /// True to change much at a time.
    pub(crate) storms: AtomicBool,
    /// True for a change right before requests are held back.
    pub(crate) writes_last: AtomicBool,
    /// Errors that were not the guest's own, and wrong content.
    pub(crate) wrong: Mutex<Vec<String>>,
    /// True after a failed barrier of its own file.
    poisoned: AtomicBool,
    /// True during a request.
    busy: AtomicBool,
}

impl Guest {
    fn new(content: Vec<u8>, rng: Rng) -> Self {
        let versions = content.chunks(SECTOR as usize).map(|sector| vec![sector.to_vec()]).collect();
        Self {
            rng: Mutex::new(rng),
            current: Mutex::new(content),
            versions: Mutex::new(versions),
            storms: AtomicBool::new(false),
            writes_last: AtomicBool::new(true),
            wrong: Mutex::default(),
            poisoned: AtomicBool::new(false),
            busy: AtomicBool::new(false),
        }
    }

    fn note(&self, what: String) {
        self.wrong.lock().unwrap().push(what);
    }

    /// One request, or in a storm one in every region.
    pub(crate) fn step(&self, stage: &Stage) {
        self.busy.store(true, Ordering::SeqCst);
        self.request(stage);
        self.busy.store(false, Ordering::SeqCst);
    }

    fn request(&self, stage: &Stage) {
        if self.storms.load(Ordering::SeqCst) {
            let size = self.current.lock().unwrap().len() as u64;
            (0..size).step_by(64 << 10).for_each(|start| self.write(stage, start, 1, false));
            return;
        }
        let (kind, start, sectors) = {
            let mut rng = self.rng.lock().unwrap();
            let all = self.current.lock().unwrap().len() as u64 / SECTOR;
            (rng.below(8), SECTOR * rng.below(all), rng.pick(&[1, 1, 3, 20, 150]))
        };
        match kind {
            0 => self.flush(stage),
            1 => self.read(stage, start),
            _ => self.write(stage, start, sectors, kind == 2),
        }
    }

    fn read(&self, stage: &Stage, start: u64) {
        let current = self.current.lock().unwrap().clone();
        let end = (start as usize + 40_000).min(current.len());
        let mut seen = pattern::unread(end - start as usize);
        let fired = stage.fired();
        match stage.live().read_at(GuestOffset::new(start), &mut seen) {
            Err(error) => self.judge_error(stage, fired, &error),
            Ok(()) if seen != current[start as usize..end] => self.note(format!("a read at {start}")),
            Ok(()) => {}
        }
    }

    fn write(&self, stage: &Stage, start: u64, sectors: u64, zeroes: bool) {
        let (seed, size) =
            (self.rng.lock().unwrap().next_u64() | 1, self.current.lock().unwrap().len() as u64);
        let end = size.min(start + sectors * SECTOR);
        let bytes = pattern::bytes(if zeroes { 0 } else { seed }, start, (end - start) as usize);
        {
            let mut versions = self.versions.lock().unwrap();
            for (at, sector) in (start / SECTOR..).zip(bytes.chunks(SECTOR as usize)) {
                versions[at as usize].push(sector.to_vec());
            }
        }
        let fired = stage.fired();
        let made = match zeroes {
            true => stage.live().write_zeroes(range(start, end), ZeroMode::MayUnmap),
            false => stage.live().write_at(GuestOffset::new(start), &bytes),
        };
        match made {
            Ok(()) => self.current.lock().unwrap()[start as usize..end as usize].copy_from_slice(&bytes),
            Err(error) => {
                self.judge_error(stage, fired, &error);
                match content(&*stage.live()) {
                    Ok(seen) => *self.current.lock().unwrap() = seen,
                    Err(error) => self.note(format!("after an error: {error}")),
                }
            }
        }
    }

    pub(crate) fn flush(&self, stage: &Stage) {
        let fired = stage.fired();
        if let Err(error) = stage.live().flush() {
            return self.judge_error(stage, fired, &error);
        }
        let current = self.current.lock().unwrap();
        let kept = current.chunks(SECTOR as usize).map(|sector| vec![sector.to_vec()]);
        *self.versions.lock().unwrap() = kept.collect();
    }

    /// The error must come from a fault in the guest's own file, now or before, or from a read of its request
    /// that failed in any layer.
    fn judge_error(&self, stage: &Stage, fired_before: u64, error: &qcow2_core::Error) {
        if stage.reads_fail.load(Ordering::SeqCst) && stage.fired() > fired_before {
            return;
        }
        let own = stage.faulty == Some(stage.top.load(Ordering::SeqCst));
        if own && stage.fired() > fired_before {
            self.poisoned.store(true, Ordering::SeqCst);
        } else if !stage.may_be_poisoned() {
            self.note(format!("an error that is not the guest's own: {}", chain(error)));
        }
    }
}

/// A chain in use.
pub(crate) struct Stage {
    pub(crate) world: Arc<CrashWorld>,
    pub(crate) faults: Vec<Arc<FaultStorage>>,
    files: Files,
    raw_base: bool,
    live: Mutex<Option<Arc<LiveDisk>>>,
    pub(crate) guest: Guest,
    pub(crate) pauses: Pauses,
    /// The file whose calls fail, if any do.
    pub(crate) faulty: Option<usize>,
    /// True if those calls are reads.
    pub(crate) reads_fail: AtomicBool,
    /// True if those calls are flushes.
    pub(crate) flushes_fail: AtomicBool,
    /// The file of the top.
    pub(crate) top: AtomicUsize,
    pub(crate) discarded: AtomicUsize,
    judging: Mutex<Rng>,
    /// The content when the bitmap was added.
    unmarked: Mutex<Option<Vec<u8>>>,
}

impl Stage {
    pub(crate) fn new(start: &Start, rng: &mut Rng, faulty: Option<usize>) -> Arc<Self> {
        let world = CrashWorld::new();
        let faults: Vec<_> =
            start.files.iter().map(|b| Arc::new(FaultStorage::new(world.add(b.clone())))).collect();
        let stage = Arc::new_cyclic(|stage| Self {
            world,
            files: (0..).zip(&faults).map(|(index, f)| Stepping::made(index, f, stage)).collect(),
            faults,
            raw_base: start.raw_base,
            live: Mutex::default(),
            guest: Guest::new(start.content.clone(), Rng::new(rng.next_u64())),
            pauses: Pauses::default(),
            faulty,
            reads_fail: AtomicBool::new(false),
            flushes_fail: AtomicBool::new(false),
            top: AtomicUsize::new(TOP),
            discarded: AtomicUsize::new(0),
            judging: Mutex::new(Rng::new(rng.next_u64())),
            unmarked: Mutex::default(),
        });
        let options = OpenOptions::writable().with_exchangeable(true);
        let image = Image::open(source(&stage.files, TOP), &options).unwrap();
        *stage.live.lock().unwrap() = Some(Arc::new(LiveDisk::observed(image, stage.clone())));
        stage
    }

    pub(crate) fn live(&self) -> Arc<LiveDisk> {
        Arc::clone(self.live.lock().unwrap().as_ref().unwrap())
    }

    /// Ends the circle of the disk and its observer.
    pub(crate) fn end(&self) {
        let live = self.live.lock().unwrap().take();
        drop(live);
        self.world.set_hook(None);
    }

    /// A barrier of the top's file that failed is the guest's own error, whoever made it: the top takes no
    /// changes any more.
    fn has_failed_barrier(&self) -> bool {
        self.flushes_fail.load(Ordering::SeqCst) && self.fired() > 0
    }

    /// From now on nothing fails. True if the top may have stopped taking changes.
    pub(crate) fn stop_failing(&self) -> bool {
        let poisoned = self.may_be_poisoned();
        self.guest.poisoned.store(poisoned, Ordering::SeqCst);
        self.faults.iter().for_each(|fault| fault.set_plan(None));
        poisoned
    }

    fn may_be_poisoned(&self) -> bool {
        self.faulty == Some(self.top.load(Ordering::SeqCst))
            && (self.guest.poisoned.load(Ordering::SeqCst) || self.has_failed_barrier())
    }

    fn fired(&self) -> u64 {
        self.faulty.map_or(0, |index| self.faults[index].fired())
    }

    /// Judges the images of every event from now on, and counts the events of pauses.
    pub(crate) fn watch(self: &Arc<Self>, judged: bool) {
        let stage = Arc::downgrade(self);
        self.world.set_hook(Some(Arc::new(move |event, cut| {
            let Some(stage) = stage.upgrade() else { return };
            if stage.pauses.held.load(Ordering::SeqCst) {
                match event {
                    Event::BeforeChange => stage.pauses.changes.fetch_add(1, Ordering::SeqCst),
                    Event::BeforeFlush => stage.pauses.flushes.fetch_add(1, Ordering::SeqCst),
                    Event::AfterFlush => 0,
                };
            }
            if judged && stage.guest.wrong.lock().unwrap().is_empty() {
                let image = cut.sample(&mut stage.judging.lock().unwrap());
                if let Err(what) = stage.judge(&image) {
                    stage.guest.note(format!("{event:?}, change {}: {what}", cut.change()));
                }
            }
        })));
    }

    /// Opens the chain that the record and the links in `image` describe: it must be sound, and every sector
    /// must be what was flushed last or what was written since.
    pub(crate) fn judge(&self, image: &CrashImage) -> Result<(), String> {
        let mut record = [0];
        image.disks[RECORD].read(0, &mut record);
        let files: Files = (0..NAMES.len()).map(|i| image.storage(i) as Arc<dyn Storage>).collect();
        let opened = Image::open(source(&files, record[0].into()), &OpenOptions::read_only());
        let top = opened.map_err(|e| format!("{}: {}", NAMES[usize::from(record[0])], chain(&e)))?;
        let mut layer = Some(usize::from(record[0]));
        while let Some(index) = layer {
            let found = audit(&image.disks[index], None);
            if !found.is_sound() {
                return Err(format!("{}: {:?}", NAMES[index], found.problems));
            }
            let options = OpenOptions::read_only().with_layers(Layers::TopOnly);
            let opened = Image::open(source(&files, index), &options).map_err(|e| chain(&e))?;
            let below = opened.backing_reference().filter(|(_, format)| format.as_deref() == Some("qcow2"));
            layer = below.and_then(|(name, _)| NAMES.iter().position(|known| *known == name));
        }
        let seen = content(&*top)?;
        let versions = self.guest.versions.lock().unwrap();
        if seen.len() != versions.len() * SECTOR as usize {
            return Err(format!("{} bytes", seen.len()));
        }
        let mut sectors = versions.iter().zip(seen.chunks(SECTOR as usize));
        match sectors.position(|(versions, seen)| !versions.iter().any(|version| version == seen)) {
            Some(at) => Err(format!("sector {at} is lost (the top is {})", NAMES[usize::from(record[0])])),
            None => Ok(()),
        }
    }

    /// The guest's whole disk must be what it has written.
    pub(crate) fn check_content(&self) -> Result<(), String> {
        match content(&*self.live())? == *self.guest.current.lock().unwrap() {
            true => Ok(()),
            false => Err("the disk differs from what was written".to_owned()),
        }
    }

    fn record(&self, index: usize) -> Result<(), CallerError> {
        self.files[RECORD].write_at(HostOffset::new(0), &[index as u8; SECTOR as usize])?;
        self.files[RECORD].flush()?;
        self.top.store(index, Ordering::SeqCst);
        Ok(())
    }

    fn open(
        &self,
        index: usize,
        below: Option<&Arc<dyn GuestDisk>>,
    ) -> Result<Arc<dyn GuestDisk>, CallerError> {
        if format_of(index, self.raw_base) == "raw" {
            return Ok(Arc::new(RawDisk::new(Arc::clone(&self.files[index]), true)?));
        }
        let options = OpenOptions::writable();
        Ok(match below {
            Some(below) => Image::open_on(&source(&self.files, index), &options, Arc::clone(below))?,
            None => Image::open(source(&self.files, index), &options)?,
        })
    }

    /// Runs the procedure. The guest goes on at every look at `progress`.
    pub(crate) fn act(&self, what: Act, progress: &dyn Progress) -> Result<(), Error> {
        let live = self.live();
        match what {
            Act::Snapshot => {
                let options = LiveSnapshotOptions::new(NAMES[self.top.load(Ordering::SeqCst)], "qcow2");
                let moment = Mutex::new(Vec::new());
                let record = || {
                    *moment.lock().unwrap() = self.guest.current.lock().unwrap().clone();
                    self.record(NEW)
                };
                let taken = external_snapshot(&live, &NewFile(self), &record, &options)?;
                if content(&*taken.old).is_ok_and(|old| old != *moment.lock().unwrap()) {
                    self.guest.note("the old top is not what it was at the snapshot".to_owned());
                }
                Ok(())
            }
            Act::CommitTop => {
                let into = self.top.load(Ordering::SeqCst) - 1;
                let record = || self.record(into);
                let report =
                    commit_top(&live, &|below: Option<&_>| self.open(into, below), &record, progress)?;
                assert!(report.held_regions <= 8, "{} regions were copied in the pause", report.held_regions);
                Ok(())
            }
            Act::CommitMiddle(depth) => {
                let layer = MiddleLayer {
                    depth,
                    link: BackingName {
                        name: NAMES[TOP - depth - 1].into(),
                        format: Some(format_of(TOP - depth - 1, self.raw_base).into()),
                    },
                    base: &|below: Option<&_>| self.open(TOP - depth - 1, below),
                    overlay: &|below: Option<&_>| self.open(TOP - depth + 1, below),
                };
                let report = commit_middle(&live, &layer, progress)?;
                let mut layer = live.layer();
                while let Some(below) = layer.backing().and_then(|node| node.as_live()).map(LiveDisk::layer) {
                    assert!(!Arc::ptr_eq(&below, &report.middle), "the committed layer is still read");
                    layer = below;
                }
                Ok(())
            }
            Act::Backup => self.backup(&live, progress),
        }
    }

    /// Copies what a bitmap marks to a copy of the disk as it was when the bitmap was added.
    fn backup(&self, live: &LiveDisk, progress: &dyn Progress) -> Result<(), Error> {
        if self.unmarked.lock().unwrap().is_none() {
            let add = BitmapAction::Add { granularity: Some(4096) };
            on_image(live, |image| change_bitmap(image, "b", &add, None))?;
            *self.unmarked.lock().unwrap() = self.pauses.moments.lock().unwrap().last().cloned();
        }
        let bytes = self.unmarked.lock().unwrap().clone().unwrap();
        (0..6).for_each(|_| self.guest.step(self));
        let failed = |error| Error::new(ErrorKind::Write, "copying").with_source(error);
        self.files[NEW].write_at(HostOffset::new(0), &bytes).map_err(failed)?;
        let target: Arc<dyn GuestDisk> = Arc::new(RawDisk::new(Arc::clone(&self.files[NEW]), true).unwrap());
        self.pauses.moments.lock().unwrap().clear();
        backup(live, &target, &BackupOptions::marked("b", true), progress)?;
        let moment = self.pauses.moments.lock().unwrap()[0].clone();
        if content(&*target).is_ok_and(|seen| seen != moment) {
            self.guest.note("the backup is not the disk as it was at the moment".to_owned());
        }
        Ok(())
    }
}

/// A file that lets the guest flush right after requests go on, before the procedure does anything more: what
/// a flush by the guest alone makes durable must be enough then.
struct Stepping {
    index: usize,
    inner: Arc<FaultStorage>,
    stage: Weak<Stage>,
}

impl Stepping {
    fn made(index: usize, inner: &Arc<FaultStorage>, stage: &Weak<Stage>) -> Arc<dyn Storage> {
        Arc::new(Self { index, inner: Arc::clone(inner), stage: Weak::clone(stage) })
    }

    fn turn(&self) {
        let Some(stage) = self.stage.upgrade() else { return };
        let other = stage.top.load(Ordering::SeqCst) != self.index;
        let guests = stage.guest.busy.load(Ordering::SeqCst);
        if other && !guests && stage.pauses.just_released.swap(false, Ordering::SeqCst) {
            stage.guest.flush(&stage);
        }
    }
}

impl Storage for Stepping {
    forward_storage!(inner: len read_at write_zeroes discard allocate set_len extent_at limits used_bytes);

    fn write_at(&self, offset: HostOffset, buf: &[u8]) -> Result<(), StorageError> {
        self.turn();
        self.inner.write_at(offset, buf)
    }

    fn write_vectored_at(&self, offset: HostOffset, bufs: &[&[u8]]) -> Result<(), StorageError> {
        self.turn();
        self.inner.write_vectored_at(offset, bufs)
    }

    fn flush(&self) -> Result<(), StorageError> {
        self.turn();
        self.inner.flush()
    }
}

/// The file of the overlay.
struct NewFile<'a>(&'a Stage);

impl NewStorage for NewFile<'_> {
    fn make(&self) -> Result<Arc<dyn Storage>, CallerError> {
        self.0.guest.step(self.0);
        Ok(Arc::clone(&self.0.files[NEW]))
    }

    fn discard(&self) {
        self.0.discarded.fetch_add(1, Ordering::SeqCst);
        // Not through the fault: what a caller deletes is gone.
        self.0.faults[NEW].set_plan(None);
        self.0.files[NEW].set_len(0).unwrap();
    }
}

/// Lets the guest go on whenever the procedure looks.
pub(crate) struct Meanwhile<'a>(pub(crate) &'a Stage);

impl Progress for Meanwhile<'_> {
    fn set_total(&self, _bytes: u64) {}

    fn advance(&self, _bytes: u64) {}

    fn should_stop(&self) -> bool {
        if !self.0.pauses.held.load(Ordering::SeqCst) {
            self.0.guest.step(self.0);
        }
        false
    }
}
