//! No power cut does harm; and with any one ordering rule switched off, the simulation says so.
#![allow(clippy::print_stdout, reason = "the story of a violation must be seen")]

use qcow2_core::{CreateOptions, OpenOptions, OrderingRule, Storage, create};
use qcow2_testkit::crash::{CrashWorld, Event};
use qcow2_testkit::pages::PageBytes;
use qcow2_testkit::sim::{Budget, SimOptions, minimize, run_many};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Runs the seeds of `budget`, and prints the shortest story of every violation.
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
    // Far longer than it takes: a machine that is too slow for the seeds says so.
    Budget { first_seed, seeds, time: Duration::from_secs(300), threads: 2, violations: 1 }
}

#[test]
fn no_power_cut_does_harm() {
    assert_eq!(violations(&seeds(1, 600), &SimOptions::default()), 0);
}

/// With `rule` switched off, some seed must go wrong.
fn finds(rule: OrderingRule) {
    finds_from(1, rule);
}

/// The same, for what few seeds come across: starts shortly before one that does.
fn finds_from(first_seed: u64, rule: OrderingRule) {
    let configure = move |options: &mut OpenOptions| options.broken_rule = Some(rule);
    let options = SimOptions { configure: Arc::new(configure), ..SimOptions::default() };
    assert!(
        violations(&seeds(first_seed, 4000), &options) > 0,
        "{rule:?} is switched off and nobody notices"
    );
}

#[test]
fn finds_links_before_refcounts() {
    finds(OrderingRule::RefcountsBeforeLinks);
}

#[test]
fn finds_a_flush_that_returns_before_its_links_are_durable() {
    finds(OrderingRule::LinksBeforeFlushReturns);
}

#[test]
fn finds_a_table_entry_before_its_refcount_block() {
    finds_from(440, OrderingRule::BlockBeforeTableEntry);
}

#[test]
fn finds_a_free_before_the_unlink() {
    finds(OrderingRule::UnlinkBeforeFree);
}

#[test]
fn finds_an_entry_before_its_l2_table() {
    finds(OrderingRule::TableBeforeEntry);
}

#[test]
fn finds_a_header_before_the_moved_refcount_table() {
    finds_from(230, OrderingRule::TableBeforeHeader);
}

#[test]
fn finds_a_header_before_the_snapshot_that_it_leads_to() {
    finds(OrderingRule::SnapshotBeforeHeader);
}

#[test]
fn finds_a_snapshot_whose_clusters_may_be_written_in_place() {
    finds(OrderingRule::CopiedClearedBeforeSnapshot);
}

#[test]
fn finds_a_header_before_the_bitmaps_that_it_leads_to() {
    finds(OrderingRule::BitmapsBeforeHeader);
}

#[test]
fn finds_a_change_before_its_warning() {
    finds(OrderingRule::WarningBeforeChange);
}

/// A file that grows by its writes may be given more room than it needs, and keep it for minutes (XFS).
#[test]
fn a_new_image_is_as_long_as_its_tables_before_anything_is_written() {
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
        Some((&0, &[end; 4][..])),
        "tables, blocks, L1, header"
    );
}
