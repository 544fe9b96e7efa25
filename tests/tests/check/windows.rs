//! The report does not depend on the memory or the number of workers of a check.

use crate::damage::{Base, Bench, Image};
use qcow2_io::{MemoryStorage, OpenFile};
use qcow2_ops::{CheckOptions, CheckReport, Executor, Inline, Silent, check};
use qcow2_testkit::rng::Rng;
use std::fs;
use std::path::Path;

struct Threads(usize);

impl Executor for Threads {
    fn workers(&self) -> usize {
        self.0
    }

    fn run(&self, job: &(dyn Fn(usize) + Sync)) {
        std::thread::scope(|scope| {
            for worker in 0..self.0 {
                scope.spawn(move || job(worker));
            }
        });
    }
}

fn report(path: &Path, counters_size: u64, executor: &dyn Executor) -> CheckReport {
    let storage = OpenFile::read_only().open(path).expect("the image opens");
    let mut options = CheckOptions::default();
    options.counters_size = counters_size;
    options.max_findings = 100_000;
    check(&*storage, &options, executor, &Silent).expect("a report")
}

/// 70 MiB in clusters of 512 bytes are three windows of the smallest size.
#[test]
fn the_report_does_not_depend_on_windows_and_workers() {
    let Some(bench) = Bench::new() else { return };
    let commands = &["snapshot a", "write 20M 1M"];
    for bits in [16, 64] {
        let options = &format!("cluster_size=512,preallocation=metadata,refcount_bits={bits}");
        let path = bench.make(Base { options, size: "70M", commands });
        let mut image = Image::read(&path);
        let mut rng = Rng::new(7);
        let len = image.bytes.len() as u64;
        for _ in 0..400 {
            // Every L1 entry references an L2 table; refcount blocks are damaged through the refcount table.
            let l2 = image.word(image.l1 + rng.below(2200) * 8) & 0xff_ffff_ffff_fe00;
            let block = image.word(image.refcount_table + rng.below(280) * 8);
            match rng.below(3) {
                0 => image.change(l2 + rng.below(64) * 8, |entry| entry ^ 1 << 63),
                1 => image.set(l2 + rng.below(64) * 8, rng.below(len / 512 + 2) * 512),
                _ if block > 0 => image.put(block + rng.below(512), &[rng.next_u64() as u8]),
                _ => {}
            }
        }
        fs::write(&path, &image.bytes).expect("the image can be written");
        let whole = report(&path, u64::MAX, &Inline);
        assert!(whole.corruptions > 200 && whole.leaks > 100, "{whole:#?}");
        assert_eq!(report(&path, 1 << 20, &Inline), whole, "windows, {options}");
        assert_eq!(report(&path, 0, &Threads(3)), whole, "smallest windows and three workers, {options}");
        assert_eq!(report(&path, u64::MAX, &Threads(4)), whole, "workers, {options}");
    }
}

#[test]
fn a_file_that_is_no_image_is_an_error() {
    let storage = MemoryStorage::with_len(4096);
    let error = check(&storage, &CheckOptions::default(), &Inline, &Silent).expect_err("not an image");
    assert_eq!(error.kind(), qcow2_ops::ErrorKind::Metadata);
    let format = error.core_error().and_then(|e| e.format_error()).map(|e| e.kind().clone());
    assert_eq!(format, Some(qcow2_format::FormatErrorKind::NotQcow2));
}
