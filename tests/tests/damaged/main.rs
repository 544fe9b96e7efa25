//! Damages tables of an image and then works on it: undamaged data and tables must survive.
//!
//! A seed makes an image with snapshots, damages entries of its L1, L2, refcount and snapshot tables in ways
//! that a parser accepts, and works on it in one process. Every guest cluster whose mapping was not touched
//! must read as the model expects, in the disk and in every intact snapshot, and no intact table may lose its
//! refcount. Data consists of bytes that are not valid entries, so a table that was overwritten or freed is
//! detected. Tables that no operation has business with stay byte for byte.

#![allow(clippy::unwrap_used, clippy::field_reassign_with_default)]

mod known;
mod layout;

use known::Known;
use layout::{Kind, Layout};
use qcow2_core::{
    CreateOptions, GuestDisk, GuestOffset, GuestRange, HostOffset, Image, ImageFormat, Layers, NewSnapshot,
    NoResolver, OpenOptions, Reference, ResolveError, ResolvedSource, Resolver, Storage, ZeroMode, create,
};
use qcow2_ops::repair::{RepairMode, check_and_repair};
use qcow2_ops::{CallerError, Inline, Silent};
use qcow2_testkit::pages::PageBytes;
use qcow2_testkit::rng::Rng;
use qcow2_testkit::storage::PageStorage;
use qcow2_tests::fixtures::codecs;
use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Expected content of a disk or snapshot: one byte for each cluster, or `None` if unknown.
type Model = Vec<Option<u8>>;

/// The files of an image.
#[derive(Clone)]
struct Files {
    storage: Arc<PageStorage>,
    /// Its external data file.
    data: Option<Arc<PageStorage>>,
}

impl Files {
    fn new(options: &CreateOptions) -> Self {
        let new = || Arc::new(PageStorage::new(PageBytes::new()));
        let files = Self { storage: new(), data: options.data_file.is_some().then(new) };
        let data = files.data.clone().map(|data| data as Arc<dyn Storage>);
        create(&(Arc::clone(&files.storage) as Arc<dyn Storage>), data.as_ref(), options).unwrap();
        files
    }

    fn source(&self) -> ResolvedSource {
        let storage = Arc::clone(&self.storage) as Arc<dyn Storage>;
        ResolvedSource::new(storage, ImageFormat::Qcow2, "memory").with_resolver(Arc::new(self.clone()))
    }
}

impl Resolver for Files {
    fn resolve(&self, reference: Reference<'_>, writable: bool) -> Result<ResolvedSource, ResolveError> {
        match (reference, &self.data) {
            (Reference::DataFile { .. }, Some(data)) => {
                Ok(ResolvedSource::new(Arc::clone(data) as Arc<dyn Storage>, ImageFormat::Raw, "data"))
            }
            (reference, _) => NoResolver.resolve(reference, writable),
        }
    }
}

/// Which operations an image sees besides writes, resizes and snapshots: bitmaps rule out going back to a
/// snapshot, and other versions and refcounts rule out much.
#[derive(Clone, Copy, Debug, Default)]
struct Extras {
    bitmaps: bool,
    amends: bool,
}

/// An image under test.
struct World {
    files: Files,
    storage: Arc<PageStorage>,
    extras: Extras,
    /// The tables after the damage.
    known: Option<Known>,
    /// Guest clusters that the damage reached: work goes there more often than chance has it.
    reached: Vec<u64>,
    image: Arc<Image>,
    rng: Rng,
    cluster: u64,
    disk: Model,
    /// Content that is durable, whatever happens to unflushed changes.
    durable: Model,
    /// The operations made, for failure messages.
    log: Vec<String>,
    /// Content of the snapshots, by id.
    snapshots: Vec<(Vec<u8>, Model)>,
    /// Host clusters that have more owners than references since the damage.
    doubtful: BTreeSet<u64>,
    /// Table clusters that had a refcount after the damage.
    counted: BTreeSet<u64>,
}

fn open(files: &Files, writable: bool, seed: u64) -> qcow2_core::Result<Arc<Image>> {
    let mut options = OpenOptions::default();
    (options.writable, options.codecs) = (writable, codecs());
    (options.discard_freed, options.discard_no_unref) = (seed & 1 == 0, seed & 6 == 6);
    if seed & 8 == 8 {
        options.l2_cache_size = Some(4096);
        options.refcount_cache_size = Some(4096);
    }
    Image::open(files.source(), &options)
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let (cluster, clusters) = rng.pick(&[(512, 600), (512, 200), (4096, 900), (65536, 40)]);
        let mut options = CreateOptions::new(cluster * clusters);
        options.cluster_size = cluster;
        options.refcount_bits = rng.pick(&[16, 16, 8, 64]);
        options.data_file = rng.one_in(8).then(|| "data".to_owned());
        let extras = Extras { bitmaps: rng.one_in(3), amends: rng.one_in(3) };
        let files = Files::new(&options);
        let (image, storage) = (open(&files, true, 0).unwrap(), Arc::clone(&files.storage));
        let (disk, durable) = (vec![Some(0); clusters as usize], vec![Some(0); clusters as usize]);
        let (doubtful, counted) = (BTreeSet::new(), BTreeSet::new());
        Self {
            files,
            storage,
            extras,
            known: None,
            reached: Vec::new(),
            image,
            rng,
            cluster,
            disk,
            durable,
            log: Vec::new(),
            snapshots: Vec::new(),
            doubtful,
            counted,
        }
    }

    fn reopen(&mut self, seed: u64) -> bool {
        match open(&self.files, true, seed) {
            Ok(image) => self.image = image,
            Err(_) => return false,
        }
        true
    }

    fn range(&mut self) -> (u64, u64) {
        let clusters = self.disk.len() as u64;
        let reached: Vec<u64> = self.reached.iter().copied().filter(|&index| index < clusters).collect();
        let first = match !reached.is_empty() && self.rng.one_in(3) {
            true => self.rng.pick(&reached),
            false => self.rng.below(clusters),
        };
        (first, (1 + self.rng.below(12)).min(clusters - first))
    }

    /// Sets whole clusters to `value`, if the change succeeded.
    fn set(&mut self, first: u64, count: u64, value: u8, result: qcow2_core::Result<()>) {
        for index in first..first + count {
            let known = self.disk[index as usize].is_some() && result.is_ok() && !self.is_doubtful(index);
            self.disk[index as usize] = known.then_some(value);
            self.durable[index as usize] = None;
        }
    }

    /// True if a guest cluster is stored where another owner may write.
    fn is_doubtful(&self, index: u64) -> bool {
        let Some(range) = GuestRange::new(GuestOffset::new(index * self.cluster), self.cluster) else {
            return true;
        };
        match self.image.extent_at(range).map(|extent| extent.state) {
            Ok(qcow2_core::ExtentState::Data { host: Some(host) }) => {
                self.doubtful.contains(&(host.value() / self.cluster))
            }
            Ok(qcow2_core::ExtentState::Compressed) | Err(_) => !self.doubtful.is_empty(),
            Ok(_) => false,
        }
    }

    fn write(&mut self, first: u64, count: u64) {
        let value = self.rng.pick(&[0x0a, 0x1a, 0x2a, 0x3a]);
        let bytes = vec![value; (count * self.cluster) as usize];
        let result = self.image.write_at(GuestOffset::new(first * self.cluster), &bytes);
        self.set(first, count, value, result);
    }

    fn compress(&mut self, index: u64) {
        let cluster = vec![0x1a; self.cluster as usize];
        if self.image.write_compressed(GuestOffset::new(index * self.cluster), &cluster).is_ok() {
            self.set(index, 1, 0x1a, Ok(()));
        }
    }

    fn work(&mut self) {
        let (first, count) = self.range();
        let range = GuestRange::new(GuestOffset::new(first * self.cluster), count * self.cluster).unwrap();
        let work = self.rng.below(if self.extras.bitmaps || self.extras.amends { 18 } else { 14 });
        let before = self.disk.iter().flatten().count();
        self.work_on(work, first, count, range);
        let after = self.disk.iter().flatten().count();
        self.log.push(format!("work {work} on {first}+{count}: {before} -> {after} known"));
    }

    fn work_on(&mut self, work: u64, first: u64, count: u64, range: GuestRange) {
        match work {
            0..=4 => self.write(first, count),
            5 => self.compress(first),
            6 | 7 => {
                let result = self.image.discard(range);
                self.set(first, count, 0, result);
            }
            8 => {
                let mode = self.rng.pick(&[ZeroMode::KeepAllocated, ZeroMode::MayUnmap]);
                let result = self.image.write_zeroes(range, mode);
                self.set(first, count, 0, result);
            }
            9 => self.flush(),
            10 => self.snapshot(),
            11 => self.delete(),
            12 => self.apply(),
            13 => self.resize(),
            _ if self.extras.bitmaps && self.rng.one_in(2) => self.bitmap(),
            _ if self.extras.amends => self.amend(),
            _ => {}
        }
    }

    /// Whatever comes of it: the guest's data has nothing to do with bitmaps.
    fn bitmap(&mut self) {
        let name: &[u8] = self.rng.pick(&[b"b0", b"b1"]);
        match self.rng.below(5) {
            0 | 1 => drop(self.image.add_bitmap(name, self.rng.pick(&[9, 16]))),
            2 => drop(self.image.remove_bitmap(name)),
            3 => drop(self.image.clear_bitmap(name)),
            _ => {
                if let Ok(bits) = self.image.bitmap_bits(b"b0") {
                    drop(self.image.merge_bitmap(b"b1", &bits));
                }
            }
        }
    }

    /// Another version, or refcounts of another width. The guest sees no difference, done or refused.
    fn amend(&mut self) {
        if self.image.flush().is_err() {
            return;
        }
        self.durable = self.disk.clone();
        let mut on = |_, _| ControlFlow::Continue(());
        let done = match self.rng.below(4) {
            0 => self.image.upgrade(),
            1 => self.image.downgrade(&mut on),
            _ => self.image.set_refcount_bits(self.rng.pick(&[8, 16, 16, 32, 64]), &mut on),
        };
        if let (Ok(()), Some(known)) = (done, &mut self.known) {
            known.amended();
        }
        // It takes no changes any more.
        self.reopen(0);
    }

    /// Repairs the image, which nobody has open. Returns whether it was done.
    fn repair(&self) -> bool {
        let reopen = || -> Result<Arc<dyn GuestDisk>, CallerError> {
            let mut options = OpenOptions::default();
            (options.writable, options.for_repair, options.layers) = (true, true, Layers::TopOnly);
            Ok(Image::open(self.files.source(), &options)?)
        };
        check_and_repair(&*self.storage, Some(RepairMode::All), &reopen, &Inline, &Silent).is_ok()
    }

    fn flush(&mut self) {
        if self.image.flush().is_ok() {
            self.durable = self.disk.clone();
        }
    }

    fn snapshot(&mut self) {
        if let Ok(snapshot) = self.image.create_snapshot(&NewSnapshot::default()) {
            self.snapshots.push((snapshot.id, self.disk.clone()));
        }
    }

    fn pick_snapshot(&mut self) -> Option<(usize, qcow2_core::format::snapshot::Snapshot)> {
        let all = self.image.snapshots().ok().filter(|all| !all.is_empty())?;
        let at = self.rng.below(all.len() as u64) as usize;
        let ours = self.snapshots.iter().position(|(id, _)| *id == all[at].id)?;
        Some((ours, all[at].clone()))
    }

    fn delete(&mut self) {
        let Some((ours, snapshot)) = self.pick_snapshot() else { return };
        match self.image.delete_snapshot(&snapshot) {
            Ok(()) => {
                let (id, _) = self.snapshots.remove(ours);
                if let Some(known) = &mut self.known {
                    known.deleted(&id);
                }
            }
            Err(error) => self.log.push(format!("snapshot {ours} stays: {error}")),
        }
    }

    fn apply(&mut self) {
        if let Some((ours, snapshot)) = self.pick_snapshot() {
            let before = self.image.size();
            match self.image.apply_snapshot(&snapshot) {
                Ok(()) => {
                    self.disk = self.snapshots[ours].1.clone();
                    self.durable = self.disk.clone();
                }
                // Refused, so nothing has changed.
                Err(_) if self.image.size() == before => {}
                Err(_) => self.disk = vec![None; (self.image.size() / self.cluster) as usize],
            }
        }
    }

    fn resize(&mut self) {
        let old = self.disk.len() as u64;
        let size = (old / 2 + self.rng.below(old)).max(1);
        let result = self.image.resize(size * self.cluster);
        let now = (self.image.size() / self.cluster) as usize;
        let kept = (old.min(size) as usize).min(now);
        self.disk.truncate(kept);
        self.durable.truncate(kept);
        self.durable.resize(now, None);
        // A damaged entry may lie past the old end.
        let known = result.is_ok() && self.doubtful.is_empty();
        self.disk.resize(now, known.then_some(0));
    }

    /// Damages a few entries; the content of all clusters that depend on them or their targets becomes
    /// unknown.
    fn damage(&mut self) {
        let layout = Layout::read(&self.storage.bytes());
        for _ in 0..1 + self.rng.below(3) {
            self.damage_entry(&layout);
        }
        let now = self.storage.bytes();
        self.counted = layout.counted_tables(&now);
        self.known = Some(Known::read(&now));
        // Guest clusters stored in a doubtful cluster, and those whose mapping was changed.
        let fill = |model: &mut Model, state: usize| {
            for (index, byte) in model.iter_mut().enumerate() {
                if layout.is_lost(&now, state, index as u64, &self.doubtful) {
                    *byte = None;
                }
            }
        };
        let before = self.disk.clone();
        fill(&mut self.disk, 0);
        let reached = (0..).zip(before.iter().zip(&self.disk)).filter(|(_, (old, new))| old != new);
        self.reached = reached.map(|(index, _)| index).collect();
        self.durable = self.disk.clone();
        for (id, model) in &mut self.snapshots {
            match layout.state_of(id).filter(|state| layout.is_listed(&now, *state)) {
                Some(state) => fill(model, state),
                None => model.fill(None),
            }
        }
    }

    fn damage_entry(&mut self, layout: &Layout) {
        let kind = self.rng.pick(&[
            Kind::L1,
            Kind::L2,
            Kind::L2,
            Kind::L2,
            Kind::Count,
            Kind::Count,
            Kind::Table,
            Kind::Snapshot,
            Kind::Bitmap,
        ]);
        let target = layout.any_cluster(&mut self.rng);
        let change = match kind {
            Kind::Count => layout.change_count(target, self.rng.pick(&[0, 0, 1, 2])),
            Kind::L2 => {
                let flags = self.rng.pick(&[0, 1 << 63, 1 << 63, 1 << 62]);
                // A compressed stream of a few sectors, inside a cluster or across its end.
                let sectors = if flags == 1 << 62 { self.rng.below(3) << layout.sector_shift() } else { 0 };
                layout.change_l2(&mut self.rng, flags | sectors | (target * self.cluster))
            }
            Kind::L1 => {
                let flags = self.rng.pick(&[0, 1 << 63]);
                layout.change_l1(&mut self.rng, flags | (target * self.cluster))
            }
            Kind::Snapshot => layout.change_snapshot(&mut self.rng, target * self.cluster),
            Kind::Bitmap => layout.change_bitmap(&mut self.rng, target * self.cluster),
            Kind::Table => layout.change_table(&mut self.rng, target * self.cluster),
        };
        let Some((at, bytes)) = change else { return };
        self.log.push(format!("{kind:?} at {at:#x}: {bytes:02x?}, cluster {target}"));
        self.storage.write_at(HostOffset::new(at), &bytes).unwrap();
        self.doubtful.extend(layout.doubt(kind, at, target));
    }

    /// All known content must read back, and every intact table must keep its refcount.
    fn check(&self) -> Result<(), String> {
        let bytes = self.storage.bytes();
        self.known.as_ref().map_or(Ok(()), |known| known.check(&bytes))?;
        let image = open(&self.files, false, 0).map_err(|e| format!("cannot be opened: {e}"))?;
        check_disk(&*image, &self.durable, self.cluster).map_err(|e| format!("disk as stored: {e}"))?;
        check_disk(&*self.image, &self.disk, self.cluster).map_err(|e| format!("disk: {e}"))?;
        for (id, model) in self.snapshots.iter().filter(|(_, model)| model.iter().any(Option::is_some)) {
            let mut options = OpenOptions::default();
            options.codecs = codecs();
            let disk = Image::open_snapshot(self.files.source(), &options, |all| {
                all.iter().position(|s| s.id == *id)
            });
            let name = String::from_utf8_lossy(id).into_owned();
            let disk = disk.map_err(|e| format!("snapshot {name} cannot be opened: {e}"))?;
            check_disk(&*disk, model, self.cluster).map_err(|e| format!("snapshot {name}: {e}"))?;
        }
        let end = Layout::read(&bytes);
        let lost = end
            .tables()
            .into_iter()
            .filter(|cluster| self.counted.contains(cluster))
            .find(|&cluster| end.count(&bytes, cluster) == 0);
        lost.map_or(Ok(()), |cluster| Err(format!("a table in host cluster {cluster} has lost its refcount")))
    }
}

fn check_disk(disk: &dyn GuestDisk, model: &Model, cluster: u64) -> Result<(), String> {
    let mut seen = vec![0; cluster as usize];
    for (index, byte) in (0u64..).zip(model) {
        let Some(byte) = byte else { continue };
        seen.fill(0xee);
        disk.read_at(GuestOffset::new(index * cluster), &mut seen)
            .map_err(|e| format!("guest cluster {index}: {}", qcow2_testkit::model::chain(&e)))?;
        if let Some(other) = seen.iter().find(|&seen| seen != byte) {
            return Err(format!("guest cluster {index}: {other:#x} where {byte:#x} was written"));
        }
    }
    Ok(())
}

/// Runs one seed. Returns how many guest clusters could be judged, and whether a change was refused.
fn run(seed: u64) -> Result<(usize, bool), String> {
    let mut world = World::new(seed);
    for _ in 0..20 + world.rng.below(20) {
        world.work();
    }
    world.image.close().unwrap();
    world.durable = world.disk.clone();
    world.check().map_err(|e| format!("before the damage: {e}"))?;
    let built = world.log.len();
    world.damage();
    if world.reopen(seed) {
        for _ in 0..10 + world.rng.below(50) {
            world.work();
        }
        if world.rng.one_in(2) && world.image.close().is_ok() {
            world.durable = world.disk.clone();
        }
    }
    world.check().map_err(|e| format!("{e}\n{}", world.log[built..].join("\n")))?;
    let refused = open(&world.files, false, 0).map_err(|e| e.to_string())?.header().is_corrupt();
    if world.rng.one_in(3) {
        world.log.push("repair".to_owned());
        (world.disk, world.known) = (world.durable.clone(), None);
        world.image = open(&world.files, false, 0).map_err(|e| e.to_string())?;
        if world.repair() {
            world.counted.clear();
            world.image = open(&world.files, false, 0).map_err(|e| e.to_string())?;
            world.check().map_err(|e| format!("{e}\n{}", world.log[built..].join("\n")))?;
        }
    }
    Ok((world.disk.iter().flatten().count(), refused))
}

/// `QCOW2_DAMAGE_SECONDS` runs that long, from `QCOW2_SEED` or the clock, instead of a few fixed seeds.
#[test]
fn intact_tables_and_data_survive_work_on_damaged_images() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seconds = number("QCOW2_DAMAGE_SECONDS");
    let clock = || std::time::UNIX_EPOCH.elapsed().map_or(1, |now| now.as_nanos() as u64);
    let first = number("QCOW2_SEED").unwrap_or_else(|| if seconds.is_some() { clock() } else { 1 });
    let (mut known, mut refused, mut seeds) = (0, 0u64, 0);
    let end = Instant::now() + Duration::from_secs(seconds.unwrap_or(0));
    for seed in first.. {
        if seconds.map_or(seeds == 600, |_| Instant::now() > end) {
            break;
        }
        let (clusters, was_refused) = run(seed).unwrap_or_else(|e| panic!("QCOW2_SEED={seed}: {e}"));
        known += clusters;
        refused += u64::from(was_refused);
        seeds += 1;
    }
    println!("{seeds} images, {known} clusters judged, {refused} images marked");
    // Guards against a vacuous pass: the test must know enough clusters, and not all changes may be refused.
    assert!(known as u64 > seeds * 50 && refused * 20 > seeds && refused * 10 < seeds * 9);
}
