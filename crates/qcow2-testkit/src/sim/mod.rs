//! Crash simulation: random operations on an image of random shape, a power cut at every moment in between,
//! and a judgement of each possible crash image.
//!
//! A seed determines the run: shape, start image, steps, cuts and choices. A violation carries the seed and
//! all of these; [`minimize`] removes steps that are not needed to reproduce it.

mod codec;
mod faults;
mod guest;
mod judge;
mod snapshots;
mod start;
mod work;

pub use codec::RunCodec;
pub use faults::{FaultReport, fault_seed};
pub use work::Step;

use crate::audit::audit;
use crate::crash::{CrashWorld, Event};
use crate::cut::Cut;
use crate::rng::Rng;
use guest::Guest;
use judge::Judge;
use qcow2_core::{Codecs, Image, OpenOptions, Storage};
use start::Start;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use work::{Opener, Work, draw_work};

/// Changes the options with which the image under test is opened.
pub type Configure = Arc<dyn Fn(&mut OpenOptions) + Send + Sync>;

/// An additional check of an image file; the error says what is wrong.
pub type Check = Arc<dyn Fn(&Arc<dyn Storage>) -> Result<(), String> + Send + Sync>;

/// Options of a simulation.
#[derive(Clone)]
pub struct SimOptions {
    /// Steps of a workload, at most.
    pub steps: u64,
    /// Crash images drawn before each change of a storage, at most.
    pub images_per_change: u64,
    /// Crash images drawn before each flush of a storage, at most.
    pub images_per_flush: u64,
    /// One in this many crash images is worked on further.
    pub continue_one_in: u64,
    /// Changes the options of the image under test (not those with which crash images are opened).
    pub configure: Configure,
    /// The additional check, if any.
    pub check: Option<Check>,
    /// The additional check runs on one in this many crash images.
    pub check_one_in: u64,
}

impl Default for SimOptions {
    fn default() -> Self {
        Self {
            steps: 40,
            images_per_change: 2,
            images_per_flush: 12,
            continue_one_in: 16,
            configure: Arc::new(|_| ()),
            check: None,
            check_one_in: 16,
        }
    }
}

/// Counters of a simulation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SimReport {
    /// Seeds run.
    pub seeds: u64,
    /// Steps of their workloads.
    pub steps: u64,
    /// Moments at which the power was cut.
    pub cuts: u64,
    /// Crash images judged.
    pub images: u64,
    /// Crash images that were worked on further.
    pub continued: u64,
}

impl SimReport {
    /// Adds another report's counters.
    pub fn add(&mut self, other: &Self) {
        self.seeds += other.seeds;
        self.steps += other.steps;
        self.cuts += other.cuts;
        self.images += other.images;
        self.continued += other.continued;
    }
}

/// A failed run.
#[derive(Clone, Debug)]
pub struct Violation {
    /// The run's seed.
    pub seed: u64,
    /// What was wrong.
    pub what: String,
    /// The shape of the image.
    pub shape: String,
    /// The steps made; the last one was in flight.
    pub steps: Vec<Step>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "seed {}: {}", self.seed, self.what)?;
        writeln!(f, "  {}", self.shape)?;
        self.steps.iter().enumerate().try_for_each(|(index, step)| writeln!(f, "  step {index}: {step:?}"))
    }
}

/// Runs one seed. The error describes the violation; boxed because of its size.
pub fn run_seed(seed: u64, options: &SimOptions) -> Result<SimReport, Box<Violation>> {
    let mut rng = Rng::new(seed);
    let start = Arc::new(Start::draw(&mut rng));
    let count = rng.between(1, options.steps.max(1));
    let steps = draw_work(&mut rng, &start.shape, count as usize);
    run(seed, rng.next_u64(), &start, &steps, options)
}

/// Reduces a violation to as few steps as it finds: drops steps while some choice of crash images still
/// reproduces it.
pub fn minimize(violation: &Violation, options: &SimOptions) -> Violation {
    let start = Arc::new(Start::draw(&mut Rng::new(violation.seed)));
    let mut best = violation.clone();
    let mut index = 0;
    while index < best.steps.len() {
        let mut fewer = best.steps.clone();
        fewer.remove(index);
        let found = (0..20).find_map(|choice| run(best.seed, choice, &start, &fewer, options).err());
        match found {
            Some(found) => best = *found,
            None => index += 1,
        }
    }
    best
}

/// Limits of a [`run_many`].
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// The first seed; the following ones count up.
    pub first_seed: u64,
    /// How many seeds, at most.
    pub seeds: u64,
    /// No new seed is started after this time.
    pub time: Duration,
    /// Number of threads.
    pub threads: usize,
    /// Stops after this many violations.
    pub violations: usize,
}

/// Runs seeds until the budget is used up.
pub fn run_many(budget: &Budget, options: &SimOptions) -> (SimReport, Vec<Violation>) {
    let next = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let total = Mutex::new((SimReport::default(), Vec::new()));
    let started = Instant::now();
    let worker = || {
        while !stop.load(Ordering::Relaxed) && started.elapsed() < budget.time {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= budget.seeds {
                break;
            }
            let result = run_seed(budget.first_seed.wrapping_add(number), options);
            let mut total = locked(&total);
            match result {
                Ok(report) => total.0.add(&report),
                Err(violation) => total.1.push(*violation),
            }
            stop.fetch_or(total.1.len() >= budget.violations, Ordering::Relaxed);
        }
    };
    std::thread::scope(|scope| {
        (0..budget.threads.max(1)).for_each(|_| drop(scope.spawn(worker)));
    });
    total.into_inner().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The codecs of simulated images.
fn codecs() -> Codecs {
    Codecs::new(Arc::new(RunCodec), Arc::new(RunCodec))
}

/// Draws and judges crash images at every event of the world.
struct Explorer {
    guest: Arc<Mutex<Guest>>,
    judge: Judge,
    rng: Rng,
    options: SimOptions,
    report: SimReport,
    violation: Option<String>,
}

impl Explorer {
    fn look(&mut self, event: Event, cut: &Cut<'_>) {
        if self.violation.is_some() {
            return;
        }
        let (wanted, combinations) = match (event, cut.combinations()) {
            // Nothing changed since the previous flush.
            (Event::BeforeChange | Event::BeforeFlush, 1) => return,
            (Event::BeforeChange, n) => (self.options.images_per_change, n),
            (Event::BeforeFlush, n) => (self.options.images_per_flush, n),
            (Event::AfterFlush, n) => (1, n),
        };
        self.report.cuts += 1;
        let guest = Arc::clone(&self.guest);
        let guest = locked(&guest);
        for number in 0..wanted.min(combinations) {
            let image = if combinations <= wanted { cut.image(number) } else { cut.sample(&mut self.rng) };
            self.report.images += 1;
            if let Err(what) = self.judge.judge(&image, &guest, &mut self.rng) {
                self.violation = Some(format!("{event:?}, change {}: {what}", cut.change()));
                return;
            }
        }
    }
}

fn run(
    seed: u64,
    choice: u64,
    start: &Arc<Start>,
    steps: &[Step],
    options: &SimOptions,
) -> Result<SimReport, Box<Violation>> {
    let guest = Arc::new(Mutex::new(Guest::new(&start.guest)));
    let explorer = Arc::new(Mutex::new(Explorer {
        guest: Arc::clone(&guest),
        judge: Judge::new(Arc::clone(start), options.clone()),
        rng: Rng::new(choice),
        options: options.clone(),
        report: SimReport::default(),
        violation: None,
    }));
    let made = AtomicU64::new(0);
    let result = catch(|| drive(start, steps, &guest, &explorer, options, &made));
    let made = made.into_inner() as usize;
    let mut explorer = locked(&explorer);
    // The explorer's violation came first; the workload may have failed because of it.
    match explorer.violation.take().map_or(result, Err) {
        Ok(()) => {
            let continued = explorer.judge.continued;
            Ok(SimReport { seeds: 1, steps: made as u64, continued, ..explorer.report })
        }
        Err(what) => {
            let steps = steps[..steps.len().min(made + 1)].to_vec();
            Err(Box::new(Violation { seed, what, shape: format!("{:?}", start.shape), steps }))
        }
    }
}

/// Runs the steps in a world with the explorer's hook set.
fn drive(
    start: &Start,
    steps: &[Step],
    guest: &Arc<Mutex<Guest>>,
    explorer: &Arc<Mutex<Explorer>>,
    options: &SimOptions,
    made: &AtomicU64,
) -> Result<(), String> {
    let world = CrashWorld::new();
    let image = world.add(start.image.clone());
    let data = start.data.as_ref().map(|bytes| world.add(bytes.clone()));
    let hook = Arc::clone(explorer);
    world.set_hook(Some(Arc::new(move |event, cut: &Cut<'_>| locked(&hook).look(event, cut))));
    let open: Opener<'_> = Box::new(|open_options: &OpenOptions| {
        let data = data.clone().map(|data| data as Arc<dyn Storage>);
        let source = start.source(Arc::clone(&image) as Arc<dyn Storage>, data);
        Image::open(source, open_options).map_err(|error| crate::model::chain(&error))
    });
    let mut work = Work::start(start, Arc::clone(guest), open, &options.configure)?;
    for step in steps {
        work.step(step)?;
        if let Some(what) = locked(explorer).violation.clone() {
            return Err(what);
        }
        // Judge again after the step, as a flush promises more once it has returned.
        if matches!(step, Step::Plain(crate::arbitrary::Operation::Flush)) {
            world.cut(|cut| locked(explorer).look(Event::AfterFlush, cut));
        }
        made.fetch_add(1, Ordering::Relaxed);
    }
    work.close()?;
    world.cut(|cut| locked(explorer).look(Event::AfterFlush, cut));
    let (before, after) = (audit(&start.image, None), audit(&image.live(), None));
    if before.bitmaps && (!after.bitmaps || after.bitmaps_in_use > 0) {
        return Err("a bitmap was lost without a crash".to_owned());
    }
    let leaked = after.leaks.saturating_sub(before.leaks);
    if leaked > 0 { Err(format!("{leaked} clusters leaked without a crash")) } else { Ok(()) }
}

/// Runs `work`; a panic becomes an error.
fn catch<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        Err(format!("panic: {}", text.unwrap_or("of an unknown kind")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_run_clean() {
        let budget =
            Budget { first_seed: 0, seeds: 400, time: Duration::from_secs(300), threads: 1, violations: 3 };
        let (report, violations) = run_many(&budget, &SimOptions::default());
        for violation in &violations {
            println!("{}", minimize(violation, &SimOptions::default()));
        }
        assert!(violations.is_empty());
        assert!(report.seeds == 400 && report.images > 1000, "{report:?}");
        println!("{report:?}");
    }
}
