//! Fault simulation: runs a workload once for every storage call and every way that call can fail.
//!
//! Whatever fails: nothing panics; a failed operation leaves each sector old or new; an image that refuses
//! changes returns `Poisoned` and still reads; and after reopening, or a power cut, the image is sound and
//! holds what was flushed.

use super::guest::Guest;
use super::judge::Judge;
use super::start::Start;
use super::work::{SnapshotChange, draw_work, refuses_resize, sectors_around};
use super::{SimOptions, Step, Violation, catch};
use crate::arbitrary::Operation;
use crate::crash::CrashWorld;
use crate::fault::{CHANGING_CALLS, Call, Fault, FaultPlan, FaultStorage};
use crate::model::chain;
use crate::pattern;
use crate::rng::Rng;
use qcow2_core::{ErrorKind, GuestOffset, GuestRange, Image, Storage};
use std::sync::Arc;

/// Steps of a workload.
const STEPS: usize = 14;
/// Power cuts after each run.
const CUTS: usize = 3;
/// Faults that are reported to the caller. Short writes end at a sector, so that each sector is old or new.
const FAULTS: [Fault; 4] = [Fault::Io, Fault::NoSpace, Fault::Short { bytes: 512 }, Fault::LateIo];

/// Counters of a simulation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultReport {
    /// Runs in which a call failed.
    pub runs: u64,
    /// Runs after which the image was poisoned.
    pub poisoned: u64,
    /// Images judged.
    pub images: u64,
}

/// Runs the workload of `seed` once for each of its storage calls and each way that the call can fail.
pub fn fault_seed(seed: u64) -> Result<FaultReport, Box<Violation>> {
    let mut rng = Rng::new(seed);
    let start = Arc::new(Start::draw(&mut rng));
    let steps: Vec<Step> = draw_work(&mut rng, &start.shape, STEPS).into_iter().map(aligned).collect();
    let mut report = FaultReport::default();
    let targets = if start.data.is_some() { 2 } else { 1 };
    for (target, (fault, calls, sticky)) in (0..targets).flat_map(|t| ways().into_iter().map(move |w| (t, w)))
    {
        for nth in 0.. {
            let plan = FaultPlan { calls: calls.to_vec(), nth, sticky, fault };
            let run = Run { start: &start, steps: &steps, target, plan: &plan };
            match catch(|| run.go(&mut report)) {
                Ok(true) => {}
                Ok(false) => break,
                Err(what) => {
                    let what = format!("{plan:?} on storage {target}: {what}");
                    let shape = format!("{:?}", start.shape);
                    return Err(Box::new(Violation { seed, what, shape, steps: steps.clone() }));
                }
            }
        }
    }
    Ok(report)
}

fn ways() -> Vec<(Fault, &'static [Call], bool)> {
    let mut ways: Vec<(Fault, &'static [Call], bool)> = vec![(Fault::Io, &[Call::Read], false)];
    for fault in FAULTS {
        ways.push((fault, &CHANGING_CALLS, false));
        ways.push((fault, &CHANGING_CALLS, true));
    }
    ways.push((Fault::Io, &[Call::Flush], true));
    ways
}

/// The step rounded to whole sectors: only whole sectors are guaranteed to be old or new.
fn aligned(step: Step) -> Step {
    match step {
        Step::Plain(Operation::Write { range, seed }) => {
            Step::Plain(Operation::Write { range: sectors_around(range), seed })
        }
        Step::Plain(Operation::Zero { range, mode }) => {
            Step::Plain(Operation::Zero { range: sectors_around(range), mode })
        }
        other => other,
    }
}

/// One run with one fault plan.
struct Run<'a> {
    start: &'a Arc<Start>,
    steps: &'a [Step],
    target: usize,
    plan: &'a FaultPlan,
}

/// State of a run.
#[derive(Default)]
struct Outcome {
    failed: bool,
    poisoned: bool,
}

impl Run<'_> {
    /// Runs the steps and judges the result. False if the workload never made the call that the plan fails.
    fn go(&self, report: &mut FaultReport) -> Result<bool, String> {
        let world = CrashWorld::new();
        let mut storages = vec![Arc::new(FaultStorage::new(world.add(self.start.image.clone())))];
        if let Some(data) = &self.start.data {
            storages.push(Arc::new(FaultStorage::new(world.add(data.clone()))));
        }
        storages[self.target].set_plan(Some(self.plan.clone()));
        let fired = || storages[self.target].fired() > 0;
        let mut guest = Guest::new(&self.start.guest);
        let mut outcome = Outcome::default();
        let mut image = self.open(&storages, &mut outcome)?;
        for step in self.steps {
            let Some(disk) = &image else { break };
            let result = self.step(disk, step, &mut guest);
            outcome.note(result, fired())?;
            if !outcome.failed && matches!(step, Step::Plain(Operation::Reopen)) {
                image = self.open(&storages, &mut outcome)?;
            }
        }
        if let Some(disk) = image {
            let result = self.durably(&disk, &mut guest, Image::close);
            outcome.note(result, fired())?;
        }
        let fired = fired();
        report.runs += u64::from(fired);
        report.poisoned += u64::from(outcome.poisoned);
        self.judge(&world, &guest, outcome.failed, report)?;
        Ok(fired)
    }

    fn open(
        &self,
        storages: &[Arc<FaultStorage>],
        outcome: &mut Outcome,
    ) -> Result<Option<Arc<Image>>, String> {
        let storage = |index: usize| storages.get(index).cloned().map(|s| s as Arc<dyn Storage>);
        let Some(image) = storage(0) else { return Ok(None) };
        let opened = Image::open(self.start.source(image, storage(1)), &self.start.open_options());
        let fired = storages[self.target].fired() > 0;
        match opened {
            Ok(image) => Ok(Some(image)),
            Err(error) => outcome.note(Err(error), fired).map(|()| None),
        }
    }

    fn step(&self, disk: &Image, step: &Step, guest: &mut Guest) -> qcow2_core::Result<()> {
        let Some(step) = step.clipped(disk.size()) else { return Ok(()) };
        match step {
            Step::Resize(_) if refuses_resize(disk) => Ok(()),
            Step::Resize(size) => {
                guest.start_resize(size, self.start.backing());
                let result = disk.resize(size);
                guest.finish_resize(disk.size());
                result
            }
            Step::MakeEmpty => {
                let mut below = self.start.backing().to_vec();
                below.resize(disk.size() as usize, 0);
                let all = GuestRange::between(GuestOffset::new(0), GuestOffset::new(disk.size()));
                self.change(disk, all, &below, guest, Image::make_empty)
            }
            Step::Plain(Operation::Read(range)) => {
                disk.read_at(range.start(), &mut pattern::unread(range.len() as usize))
            }
            Step::Plain(operation @ Operation::Write { range, seed }) => {
                let bytes = pattern::bytes(seed, range.start().value(), range.len() as usize);
                self.change(disk, range, &bytes, guest, |disk| operation.run(disk).map(drop))
            }
            Step::Plain(operation @ (Operation::Zero { range, .. } | Operation::Discard(range))) => {
                let zeroes = vec![0; range.len() as usize];
                self.change(disk, range, &zeroes, guest, |disk| operation.run(disk).map(drop))
            }
            Step::Plain(Operation::Flush) => self.durably(disk, guest, |disk| disk.flush()),
            Step::Plain(Operation::Reopen) => self.durably(disk, guest, Image::close),
            Step::TakeSnapshot(_) | Step::ApplySnapshot(_) | Step::DeleteSnapshot(_) => {
                self.snapshot(disk, step, guest)
            }
            Step::Compressed { offset, seed } => {
                let end = (offset + self.start.shape.cluster_size()).min(disk.size());
                let range = GuestRange::between(GuestOffset::new(offset), GuestOffset::new(end));
                let bytes = pattern::bytes(seed, offset, range.len() as usize);
                let write = |disk: &Image| match disk.write_compressed(range.start(), &bytes) {
                    // The cluster is allocated already, or there is a data file: nothing has changed.
                    Err(error) if error.kind() == ErrorKind::Unsupported => Ok(()),
                    other => other,
                };
                self.change(disk, range, &bytes, guest, write)
            }
        }
    }

    /// Makes a change that may fail. Afterwards each sector must read as old or new, and keep that content.
    fn change(
        &self,
        disk: &Image,
        range: GuestRange,
        bytes: &[u8],
        guest: &mut Guest,
        make: impl FnOnce(&Image) -> qcow2_core::Result<()>,
    ) -> qcow2_core::Result<()> {
        let around = sectors_around(range);
        guest.start_write(range.start().value(), bytes);
        let result = make(disk);
        let mut seen = pattern::unread(around.len() as usize);
        // The read itself may be the failing call; the content then stays unknown.
        if disk.read_at(around.start(), &mut seen).is_ok() {
            if let Err(what) = guest.judge_at(around.start().value(), &seen) {
                panic!("after {result:?}: {what}");
            }
            guest.finish(around.start().value(), &seen);
        }
        result
    }

    /// Changes snapshots; if that fails, the change may or may not have happened.
    fn snapshot(&self, disk: &Image, step: Step, guest: &mut Guest) -> qcow2_core::Result<()> {
        // After a failed step, what a snapshot holds is unknown until it is read.
        let mut seen = pattern::unread(disk.size() as usize);
        disk.read_at(GuestOffset::new(0), &mut seen)?;
        if let Err(what) = guest.judge(&seen) {
            panic!("before {step:?}: {what}");
        }
        guest.finish(0, &seen);
        let Some(change) = SnapshotChange::start(step, guest) else { return Ok(()) };
        let result = change.make(disk);
        match &result {
            Ok(()) => change.finish(guest),
            Err(error) if change.is_refusal(error) => {
                change.undo(guest);
                return Ok(());
            }
            // Later steps continue with what the image reports, unless it refuses further changes.
            Err(_) if disk.flush().is_ok() => change.settle(disk, guest),
            Err(_) => {}
        }
        result
    }

    fn durably(
        &self,
        disk: &Image,
        guest: &mut Guest,
        make: impl FnOnce(&Image) -> qcow2_core::Result<()>,
    ) -> qcow2_core::Result<()> {
        guest.start_flush();
        make(disk)?;
        guest.finish_flush();
        Ok(())
    }

    /// Judges the files as they are, and as a power cut would leave them.
    fn judge(
        &self,
        world: &CrashWorld,
        guest: &Guest,
        failed: bool,
        report: &mut FaultReport,
    ) -> Result<(), String> {
        let mut rng = Rng::new(self.plan.nth);
        let mut judge =
            Judge::new(Arc::clone(self.start), SimOptions { continue_one_in: 4, ..SimOptions::default() });
        judge.raw = !failed;
        let mut images = vec![world.cut(|cut| cut.everything())];
        images.extend((0..CUTS).map(|_| world.cut(|cut| cut.sample(&mut rng))));
        for image in &images {
            report.images += 1;
            judge.judge(image, guest, &mut rng)?;
        }
        Ok(())
    }
}

impl Outcome {
    /// Records a step's result. An error is allowed once a fault has fired; `Poisoned` only after another
    /// error.
    fn note(&mut self, result: qcow2_core::Result<()>, fired: bool) -> Result<(), String> {
        let Err(error) = result else { return Ok(()) };
        if !fired {
            return Err(format!("fails although no call failed: {}", chain(&error)));
        }
        match error.kind() {
            ErrorKind::Poisoned if !self.failed => return Err("poisoned without an error before".to_owned()),
            ErrorKind::Poisoned => self.poisoned = true,
            ErrorKind::Storage | ErrorKind::NoSpace => {}
            kind => return Err(format!("a storage failure is reported as {kind:?}: {}", chain(&error))),
        }
        self.failed = true;
        Ok(())
    }
}
