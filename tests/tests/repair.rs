//! Repairs with a power cut at every moment, cancelled, or on a failing storage: the guest content stays,
//! there are no more errors than before, and another repair finishes the job.
#![allow(clippy::unwrap_used, reason = "a test may stop")]

use qcow2_core::{
    CreateOptions, GuestOffset, GuestRange, HostOffset, Image, ImageFormat, Layers, NewSnapshot, NoResolver,
    OpenOptions, ResolvedSource, Storage, ZeroMode, create,
};
use qcow2_ops::repair::{RepairMode, repair};
use qcow2_ops::{CheckOptions, CheckReport, Error, ErrorKind, Inline, Progress, Silent, check};
use qcow2_testkit::audit::{Audit, Problem, ProblemKind, audit};
use qcow2_testkit::crash::{CrashWorld, Event};
use qcow2_testkit::fault::{CHANGING_CALLS, Fault, FaultPlan, FaultStorage};
use qcow2_testkit::pages::PageBytes;
use qcow2_testkit::pattern;
use qcow2_testkit::rng::Rng;
use qcow2_testkit::storage::PageStorage;
use qcow2_tests::stop::StopsAfter;
use std::sync::{Arc, Mutex};

/// Number of images; `QCOW2_REPAIR_SEEDS` raises it.
fn seeds() -> u64 {
    std::env::var("QCOW2_REPAIR_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(150)
}

fn open(storage: Arc<dyn Storage>, change: impl Fn(&mut OpenOptions)) -> qcow2_core::Result<Arc<Image>> {
    let mut options = OpenOptions::default();
    change(&mut options);
    let (format, resolver) = (ImageFormat::Qcow2, Arc::new(NoResolver));
    Image::open(ResolvedSource { storage, format, name: "image".to_owned(), id: None, resolver }, &options)
}

fn content(storage: Arc<dyn Storage>) -> Result<Vec<u8>, String> {
    let read = |storage| -> qcow2_core::Result<Vec<u8>> {
        let image = open(storage, |_| ())?;
        let mut bytes = pattern::unread(image.size() as usize);
        image.read_at(GuestOffset::new(0), &mut bytes)?;
        Ok(bytes)
    };
    read(storage).map_err(|error| qcow2_testkit::model::chain(&error))
}

/// An image with wrong refcounts and copied flags, and its guest content.
struct Damaged {
    bytes: PageBytes,
    content: Vec<u8>,
    harm: u64,
}

/// Errors that could lose data: refcounts that are too low, and shared clusters that would be written in
/// place.
fn harm(found: &Audit) -> u64 {
    let unshared = |problem: &&Problem| problem.kind == ProblemKind::CopiedWhileShared;
    found.low_counts + found.problems.iter().filter(unshared).count() as u64
}

impl Damaged {
    fn draw(rng: &mut Rng) -> Self {
        let file = Arc::new(PageStorage::default());
        let storage = Arc::clone(&file) as Arc<dyn Storage>;
        let mut options = CreateOptions::new(512 * rng.between(20, 120));
        options.cluster_size = rng.pick(&[512, 1024, 4096]);
        create(&storage, None, &options).unwrap();
        let image = open(Arc::clone(&storage), |options| options.writable = true).unwrap();
        for step in 0..rng.between(2, 8) {
            let start = rng.below(image.size());
            let range =
                GuestRange::new(GuestOffset::new(start), rng.between(1, 9000).min(image.size() - start))
                    .unwrap();
            match rng.one_in(4) {
                true => image.write_zeroes(range, ZeroMode::MayUnmap).unwrap(),
                false => {
                    image
                        .write_at(range.start(), &pattern::bytes(step + 1, start, range.len() as usize))
                        .unwrap();
                }
            }
            if rng.one_in(4) {
                image.create_snapshot(&NewSnapshot::default()).unwrap();
            }
        }
        image.close().unwrap();
        let content = content(Arc::clone(&storage)).unwrap();
        (0..rng.between(1, 6)).for_each(|_| damage(&*storage, options.cluster_size, rng));
        let bytes = file.bytes();
        let harm = harm(&audit(&bytes, None));
        Self { bytes, content, harm }
    }

    /// The guest content is the same, and there are no more harmful errors than before.
    fn judge(&self, image: &PageBytes) -> Result<(), String> {
        let found = audit(image, None);
        let repairable =
            [ProblemKind::CountTooLow, ProblemKind::CopiedWhileShared, ProblemKind::CopiedMismatch];
        let known = found.problems.iter().all(|problem| repairable.contains(&problem.kind));
        if !known || harm(&found) > self.harm {
            return Err(format!("more harm than before: {found:?}"));
        }
        match content(Arc::new(PageStorage::new(image.clone())))? == self.content {
            true => Ok(()),
            false => Err("another disk".to_owned()),
        }
    }

    /// [`judge`](Self::judge), and another repair leaves no error.
    fn judge_to_the_end(&self, image: &PageBytes) -> Result<(), String> {
        self.judge(image)?;
        let file = Arc::new(PageStorage::new(image.clone()));
        run(&(Arc::clone(&file) as Arc<dyn Storage>), &Silent).map_err(|error| error.to_string())?;
        self.judge_repaired(&file.bytes())
    }

    fn judge_repaired(&self, image: &PageBytes) -> Result<(), String> {
        self.judge(image)?;
        let found = audit(image, None);
        let fine = found.is_sound() && found.leaks == 0 && !found.dirty && !found.corrupt;
        if fine { Ok(()) } else { Err(format!("not repaired: {found:?}")) }
    }
}

fn number(storage: &dyn Storage, at: u64, len: usize) -> u64 {
    let mut bytes = [0; 8];
    storage.read_padded(HostOffset::new(at), &mut bytes[8 - len..]).unwrap();
    u64::from_be_bytes(bytes)
}

/// Makes one refcount or one copied flag wrong, or (rarely) drops a whole refcount block.
fn damage(storage: &dyn Storage, cluster: u64, rng: &mut Rng) {
    let clusters = storage.len().unwrap().div_ceil(cluster);
    let block = number(storage, number(storage, 48, 8), 8);
    if block == 0 {
        return;
    }
    let one = block + rng.between(1, clusters.min(cluster / 2) - 1) * 2;
    let write = |at: u64, bytes: &[u8]| storage.write_at(HostOffset::new(at), bytes).unwrap();
    let flip = |at: u64| write(at, &(number(storage, at, 8) ^ 1 << 63).to_be_bytes());
    let l1 = number(storage, 40, 8);
    match rng.below(20) {
        0 => write(number(storage, 48, 8), &[0; 8]),
        1..3 => write(one, &[0, 0]),
        3..5 => write(one, &(number(storage, one, 2) as u16).saturating_sub(1).to_be_bytes()),
        5..12 => write(one, &(number(storage, one, 2) as u16 + 1).to_be_bytes()),
        12..15 if number(storage, l1, 8) != 0 => flip(l1),
        _ => {
            let table = number(storage, l1, 8) & 0x00ff_ffff_ffff_fe00;
            let at = table + rng.below(cluster / 8) * 8;
            if table > 0 && number(storage, at, 8) & 0x00ff_ffff_ffff_fe00 > 0 {
                flip(at);
            }
        }
    }
}

/// Checks and repairs everything, as the command does.
fn run(storage: &Arc<dyn Storage>, progress: &dyn Progress) -> Result<CheckReport, Error> {
    let report = check(&**storage, &CheckOptions::default(), &Inline, progress)?;
    let image = open(Arc::clone(storage), |options| {
        (options.writable, options.for_repair, options.layers) = (true, true, Layers::TopOnly);
    });
    let failed = |error| Error::new(ErrorKind::Write, "the image").with_source(error);
    let image = image.map_err(failed)?;
    let repaired = repair(&image, &report, RepairMode::All, &Inline, progress);
    let closed = image.close();
    repaired?;
    closed.map_err(failed)?;
    Ok(report)
}

#[test]
fn a_power_cut_during_repair_does_no_harm() {
    let mut damaged = 0;
    for seed in 0..seeds() {
        let mut rng = Rng::new(seed);
        let start = Arc::new(Damaged::draw(&mut rng));
        let world = CrashWorld::new();
        let file = world.add(start.bytes.clone());
        let state = Arc::new(Mutex::new((rng, Vec::new())));
        let (seen, judge) = (Arc::clone(&state), Arc::clone(&start));
        world.set_hook(Some(Arc::new(move |event, cut| {
            let (rng, wrong) = &mut *seen.lock().unwrap();
            for _ in 0..if event == Event::BeforeFlush { 4 } else { 1 } {
                let image = &cut.sample(rng).disks[0];
                let found = if rng.one_in(4) { judge.judge_to_the_end(image) } else { judge.judge(image) };
                wrong.extend(found.err().map(|what| format!("{event:?}, change {}: {what}", cut.change())));
            }
        })));
        let report = run(&(file as Arc<dyn Storage>), &Silent).unwrap();
        damaged += u64::from(report.corruptions > 0 || report.leaks > 0);
        world.set_hook(None);
        let wrong = std::mem::take(&mut state.lock().unwrap().1);
        assert_eq!(wrong, Vec::<String>::new(), "seed {seed}");
        let end = world.cut(|cut| start.judge_repaired(&cut.nothing().disks[0]));
        end.unwrap_or_else(|what| panic!("seed {seed}, in the end: {what}"));
    }
    assert!(damaged > seeds() / 2, "{damaged} images had damage");
}

#[test]
fn a_cancelled_repair_does_no_harm() {
    let (mut stopped, mut half) = (0, 0);
    for seed in 0..seeds() / 3 {
        let start = Damaged::draw(&mut Rng::new(seed));
        for left in 0.. {
            let file = Arc::new(PageStorage::new(start.bytes.clone()));
            let done = run(&(Arc::clone(&file) as Arc<dyn Storage>), &StopsAfter::new(left));
            let image = file.bytes();
            start.judge_to_the_end(&image).unwrap_or_else(|what| panic!("seed {seed}, after {left}: {what}"));
            match done {
                Ok(_) => {
                    start
                        .judge_repaired(&image)
                        .unwrap_or_else(|what| panic!("seed {seed}, after {left}: {what}"));
                    break;
                }
                Err(error) => assert_eq!(error.kind(), ErrorKind::Stopped, "seed {seed}, after {left}"),
            }
            stopped += 1;
            // Refcounts are right, copied flags are not.
            let found = audit(&image, None);
            half += u64::from(image.to_vec() != start.bytes.to_vec() && !found.is_sound());
        }
    }
    assert!(stopped > 10 && half > 0, "{stopped} stopped, {half} of them between two steps");
}

#[test]
fn a_storage_error_during_repair_does_no_harm() {
    for seed in 0..seeds() / 10 {
        let start = Damaged::draw(&mut Rng::new(seed));
        for nth in 0.. {
            let world = CrashWorld::new();
            let file = Arc::new(FaultStorage::new(world.add(start.bytes.clone())));
            let fault = [Fault::Io, Fault::Short { bytes: 512 }, Fault::LateIo][(nth % 3) as usize];
            file.set_plan(Some(FaultPlan { calls: CHANGING_CALLS.to_vec(), nth, sticky: true, fault }));
            let done = run(&(Arc::clone(&file) as Arc<dyn Storage>), &Silent);
            let fired = file.fired() > 0;
            assert_eq!(done.is_err(), fired, "seed {seed}, call {nth}: {done:?}");
            for image in world.cut(|cut| [cut.everything(), cut.nothing()]) {
                let judged = start.judge_to_the_end(&image.disks[0]);
                judged.unwrap_or_else(|what| panic!("seed {seed}, call {nth}: {what}"));
            }
            if !fired {
                break;
            }
        }
    }
}
