//! Layers of a disk that is used are exchanged: with a power cut at every moment, with every storage call
//! failing once, with many threads, and with the work that is done while requests are held back counted.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]
#![allow(clippy::disallowed_methods, reason = "tests run real threads, and are lengthened by a variable")]

mod threads;
mod world;

use qcow2_core::ErrorKind as CoreErrorKind;
use qcow2_testkit::fault::{Call, Fault, FaultPlan};
use qcow2_testkit::rng::Rng;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use world::{ACTS, Act, Meanwhile, Stage, Start};

/// Number of chains; `QCOW2_LIVE_SEEDS` raises it.
fn seeds() -> u64 {
    std::env::var("QCOW2_LIVE_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(12)
}

/// The chain of seed `seed` in use.
fn draw(seed: u64, faulty: Option<usize>) -> Arc<Stage> {
    let mut rng = Rng::new(seed);
    let start = Start::draw(&mut rng);
    let stage = Stage::new(&start, &mut rng, faulty);
    stage.guest.storms.store(seed % 3 == 2, Ordering::SeqCst);
    stage
}

fn check_nothing_wrong(stage: &Stage, what: &str) {
    let wrong = stage.guest.wrong.lock().unwrap();
    assert!(wrong.is_empty(), "{what}: {wrong:#?}");
}

#[test]
fn a_power_cut_keeps_all_that_was_flushed() {
    for seed in 0..seeds() {
        for act in ACTS {
            let stage = draw(seed, None);
            let what = format!("seed {seed}, {act:?}");
            stage.watch(true);
            (0..3).for_each(|_| stage.guest.step(&stage));
            stage.act(act, &Meanwhile(&stage)).unwrap_or_else(|error| panic!("{what}: {error:?}"));
            check_nothing_wrong(&stage, &what);
            (0..6).for_each(|_| stage.guest.step(&stage));
            stage.guest.flush(&stage);
            stage.check_content().unwrap_or_else(|error| panic!("{what}: {error}"));
            check_nothing_wrong(&stage, &what);
            let hold = stage.live().layer();
            hold.as_image().unwrap().close().unwrap();
            stage.world.cut(|cut| stage.judge(&cut.nothing())).unwrap_or_else(|e| panic!("{what}: {e}"));
            check_nothing_wrong(&stage, &what);
            stage.end();
        }
    }
}

/// Runs `act` with the call number `nth` of `calls` on file `faulty` failing. True if it failed.
fn fail(seed: u64, act: Act, faulty: usize, calls: &[Call], nth: u64) -> bool {
    let what = format!("seed {seed}, {act:?}, call {nth} of {calls:?} on {}", world::NAMES[faulty]);
    let stage = draw(seed, Some(faulty));
    stage.watch(false);
    stage.reads_fail.store(calls == [Call::Read], Ordering::SeqCst);
    stage.flushes_fail.store(calls == [Call::Flush], Ordering::SeqCst);
    let fault = [Fault::Io, Fault::NoSpace, Fault::LateIo][(nth % 3) as usize];
    let plan = FaultPlan { calls: calls.to_vec(), nth, sticky: false, fault };
    stage.faults[faulty].set_plan(Some(plan));
    let before = stage.top.load(Ordering::SeqCst);
    let done = stage.act(act, &Meanwhile(&stage));
    let fired = stage.faults[faulty].fired() > 0 || stage.discarded.load(Ordering::SeqCst) > 0;
    let poisoned = stage.stop_failing();
    check_nothing_wrong(&stage, &what);
    assert!(fired || done.is_ok(), "{what}: without a fault: {done:?}");
    let discarded = stage.discarded.load(Ordering::SeqCst) > 0;
    assert_eq!(discarded, act == Act::Snapshot && done.is_err(), "{what}: {done:?}");
    if done.is_err() {
        assert_eq!(stage.top.load(Ordering::SeqCst), before, "{what}");
    }
    assert!(stage.live().layer().as_image().is_some(), "{what}: something stands above the top");
    stage.check_content().unwrap_or_else(|error| panic!("{what}: {error}"));
    (0..4).for_each(|_| stage.guest.step(&stage));
    stage.guest.flush(&stage);
    check_nothing_wrong(&stage, &what);
    if let Err(error) = &done
        && !poisoned
    {
        // The old chain is as good as before: it can be tried again.
        let kind = error.core_error().map(|error| error.kind());
        assert_ne!(kind, Some(CoreErrorKind::Poisoned), "{what}: {error:?}");
        stage.act(act, &Meanwhile(&stage)).unwrap_or_else(|error| panic!("{what}: again: {error:?}"));
        stage.guest.flush(&stage);
        check_nothing_wrong(&stage, &what);
    }
    stage.check_content().unwrap_or_else(|error| panic!("{what}: {error}"));
    let cut = |image: &_| stage.judge(image).unwrap_or_else(|error| panic!("{what}: {error}"));
    stage.world.cut(|now| {
        cut(&now.everything());
        cut(&now.nothing());
    });
    stage.end();
    fired
}

#[test]
fn a_storage_error_leaves_the_old_chain_in_use() {
    let writes = [Call::Write, Call::WriteZeroes, Call::Discard, Call::Allocate, Call::SetLen];
    let mut count = 0;
    for seed in 0..seeds() / 6 {
        for act in ACTS {
            for faulty in 0..world::NAMES.len() {
                for calls in [&writes[..], &[Call::Flush], &[Call::Read]] {
                    count += (0..).take_while(|nth| fail(seed, act, faulty, calls, *nth)).count();
                }
            }
        }
    }
    assert!(count > 100, "{count} faults");
}

/// What is done while requests are held back does not grow with what was written before; only with the last
/// regions of a commit, and with what is written right before, which has to be flushed.
#[test]
fn little_is_done_while_requests_are_held_back() {
    for seed in 0..seeds() {
        for act in ACTS {
            let stage = draw(seed, None);
            stage.guest.writes_last.store(false, Ordering::SeqCst);
            stage.watch(false);
            (0..20).for_each(|_| stage.guest.step(&stage));
            stage.act(act, &Meanwhile(&stage)).unwrap();
            let (changes, flushes) = stage.pauses.most();
            let most = match act {
                // The record with its flush. All that is left for the flush of the top are refcounts of
                // clusters that the flush before it has unlinked.
                Act::Snapshot => (4, 3),
                // The last regions, the tables of a flush, the record.
                Act::CommitTop => (100, 4),
                // A new bitmap; nothing for the backup itself.
                Act::Backup => (4, 3),
                // The same as for a snapshot, and the steps of the header.
                Act::CommitMiddle(_) => (8, 8),
            };
            let what = format!("seed {seed}, {act:?}: {changes} changes, {flushes} flushes");
            assert!(changes <= most.0 && flushes <= most.1, "{what}");
            check_nothing_wrong(&stage, &what);
            stage.end();
        }
    }
}
