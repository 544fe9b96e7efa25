//! Power cuts do no harm; and if any single ordering rule is off, the simulation finds a violation.
#![allow(clippy::print_stdout, reason = "the story of a violation must be seen")]

use qcow2_core::{CreateOptions, OpenOptions, OrderingRule, Storage, create};
use qcow2_testkit::crash::{CrashWorld, Event};
use qcow2_testkit::pages::PageBytes;
use qcow2_testkit::sim::{Budget, SimOptions, minimize, run_many};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Runs the seeds of `budget` and prints a minimized report of every violation.
fn violations(budget: &Budget, options: &SimOptions) -> usize {
    let (report, violations) = run_many(budget, options);
    for violation in &violations {
        println!("{}", minimize(violation, options));
    }
    println!("{report:?}");
    assert!(report.seeds == budget.seeds || !violations.is_empty(), "not all seeds: {report:?}");
    violations.len()
}

fn seeds(first_seed: u64, seeds: u64) -> Budget {
    // Far longer than it takes; a machine that is too slow fails with a clear message.
    Budget { first_seed, seeds, time: Duration::from_secs(300), threads: 2, violations: 1 }
}

#[test]
fn no_power_cut_corrupts_an_image() {
    assert_eq!(violations(&seeds(1, 600), &SimOptions::default()), 0);
}

/// With `rule` off, some seed must fail.
fn finds(rule: OrderingRule) {
    finds_from(1, rule);
}

/// The same for a rule that few seeds exercise: starts shortly before one that does.
fn finds_from(first_seed: u64, rule: OrderingRule) {
    let configure = move |options: &mut OpenOptions| options.broken_rule = Some(rule);
    let options = SimOptions { configure: Arc::new(configure), ..SimOptions::default() };
    assert!(violations(&seeds(first_seed, 4000), &options) > 0, "{rule:?} is off and no seed fails");
}

#[test]
fn without_refcounts_before_links_a_seed_fails() {
    finds(OrderingRule::RefcountsBeforeLinks);
}

#[test]
fn without_durable_links_at_flush_a_seed_fails() {
    finds(OrderingRule::LinksBeforeFlushReturns);
}

#[test]
fn without_refcount_block_before_table_entry_a_seed_fails() {
    finds_from(440, OrderingRule::BlockBeforeTableEntry);
}

#[test]
fn without_unlink_before_free_a_seed_fails() {
    finds(OrderingRule::UnlinkBeforeFree);
}

#[test]
fn without_l2_table_before_l1_entry_a_seed_fails() {
    finds(OrderingRule::TableBeforeEntry);
}

#[test]
fn without_moved_refcount_table_before_header_a_seed_fails() {
    finds_from(230, OrderingRule::TableBeforeHeader);
}

#[test]
fn without_snapshot_table_before_header_a_seed_fails() {
    finds(OrderingRule::SnapshotBeforeHeader);
}

#[test]
fn without_clearing_copied_flags_for_a_snapshot_a_seed_fails() {
    finds(OrderingRule::CopiedClearedBeforeSnapshot);
}

#[test]
fn without_bitmaps_before_header_a_seed_fails() {
    finds(OrderingRule::BitmapsBeforeHeader);
}

#[test]
fn without_bitmap_in_use_before_a_change_a_seed_fails() {
    finds(OrderingRule::WarningBeforeChange);
}

/// A file that grows by writes may be preallocated beyond its end by the file system for minutes (XFS).
#[test]
fn a_new_image_gets_its_length_before_its_content() {
    let world = CrashWorld::new();
    let disk: Arc<dyn Storage> = world.add(PageBytes::default());
    let lengths = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&lengths);
    world.set_hook(Some(Arc::new(move |event, cut| {
        if event == Event::BeforeChange {
            seen.lock().unwrap().push(cut.everything().storage(0).len().unwrap());
        }
    })));
    create(&disk, None, &CreateOptions::new(1 << 30)).unwrap();
    world.set_hook(None);
    let end = disk.len().unwrap();
    assert_eq!(
        lengths.lock().unwrap().split_first(),
        Some((&0, &[end; 2][..])),
        "all tables in one write, header"
    );
}
