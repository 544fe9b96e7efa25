//! A disk that fills up and gets space again: a change that does not fit fails, and nothing else is lost.
//! Changes in place keep working; others work again once there is space.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may stop, and says what it did")]

use qcow2_core::{
    CreateOptions, Error, GuestOffset, GuestRange, Image, Layers, NewSnapshot, OpenOptions, StorageErrorKind,
    ZeroMode, create,
};
use qcow2_ops::{CheckOptions, Inline, Silent, check};
use qcow2_testkit::pattern;
use qcow2_testkit::rng::Rng;
use qcow2_testkit::room::RoomStorage;
use qcow2_testkit::storage::PageStorage;
use qcow2_tests::fixtures::lone_source;
use std::sync::Arc;

const SIZE: u64 = 3 << 20;

/// A disk, its expected content, and the number of refused changes.
struct Run {
    room: Arc<RoomStorage>,
    image: Arc<Image>,
    model: Vec<u8>,
    rng: Rng,
    refused: u64,
}

impl Run {
    fn new(seed: u64, (cluster_size, refcount_bits): (u64, u64)) -> Self {
        let room = Arc::new(RoomStorage::new(Arc::new(PageStorage::default()), u64::MAX));
        let storage: Arc<dyn qcow2_core::Storage> = room.clone();
        let mut options = CreateOptions::new(SIZE);
        (options.cluster_size, options.refcount_bits) = (cluster_size, refcount_bits);
        create(&storage, None, &options).unwrap();
        let mut open = OpenOptions::default();
        open.writable = true;
        open.layers = Layers::TopOnly;
        let image = Image::open(lone_source(storage), &open).unwrap();
        let (mut rng, mut model) = (Rng::new(seed), vec![0; SIZE as usize]);
        let written = rng.below(SIZE) as usize;
        model[..written].fill(1);
        image.write_at(GuestOffset::new(0), &model[..written]).unwrap();
        Self { room, image, model, rng, refused: 0 }
    }

    fn range(&mut self) -> GuestRange {
        let len = self.rng.between(1, 150_000);
        let start = self.rng.below(SIZE - len);
        GuestRange::between(GuestOffset::new(start), GuestOffset::new(start + len))
    }

    /// Takes or deletes a snapshot; without space nothing changes.
    fn snapshot(&mut self) {
        let before = self.image.snapshots().unwrap();
        let done = match before.first().filter(|_| before.len() > 2) {
            Some(oldest) => self.image.delete_snapshot(oldest),
            None => self.image.create_snapshot(&NewSnapshot::default()).map(drop),
        };
        if let Err(error) = done {
            assert!(is_full(&error), "{error:?}");
            assert_eq!(self.image.snapshots().unwrap(), before);
            self.refused += 1;
        }
    }

    /// One change; if space runs out, each affected sector must read as old or new.
    fn step(&mut self) {
        let range = self.range();
        let (start, len) = (range.start().value() as usize, range.len() as usize);
        let mut wanted = vec![0; len];
        let done = if self.rng.one_in(6) {
            let mode = self.rng.pick(&[ZeroMode::MayUnmap, ZeroMode::KeepAllocated]);
            self.image.write_zeroes(range, mode)
        } else {
            wanted.fill(self.rng.between(1, 255) as u8);
            self.image.write_at(range.start(), &wanted)
        };
        let model = &mut self.model[start..start + len];
        match done {
            Ok(()) => model.copy_from_slice(&wanted),
            Err(error) => {
                assert!(is_full(&error), "{error:?}");
                self.refused += 1;
                let mut seen = pattern::unread(len);
                self.image.read_at(range.start(), &mut seen).unwrap();
                for (at, seen) in seen.iter().enumerate() {
                    assert!([model[at], wanted[at]].contains(seen), "byte {}", start + at);
                }
                model.copy_from_slice(&seen);
            }
        }
    }

    fn check_content(&self) {
        let mut seen = pattern::unread(SIZE as usize);
        self.image.read_at(GuestOffset::new(0), &mut seen).unwrap();
        assert!(seen == self.model, "another disk");
    }
}

fn is_full(error: &Error) -> bool {
    error.storage_error().is_some_and(|error| error.kind() == StorageErrorKind::NoSpace)
}

#[test]
fn a_full_disk_refuses_changes_and_recovers() {
    let (mut refused, mut seeds) = (0, 0);
    // All shapes but the last add refcount blocks, and the first grows the refcount table.
    for shape in [(512, 64), (512, 16), (2048, 64), (65536, 16)] {
        for seed in 0..40 {
            let mut run = Run::new(seed, shape);
            for round in 0..4 {
                let free = run.rng.below(200);
                run.room.set_free(free);
                for _ in 0..12 {
                    run.step();
                    if run.rng.one_in(8) {
                        run.snapshot();
                    }
                    if run.rng.one_in(4) {
                        run.image.flush().unwrap_or_else(|e| panic!("{shape:?} {seed} {round}: {e:?}"));
                    }
                }
                run.image.flush().unwrap_or_else(|e| panic!("{shape:?} {seed} {round}: {e:?}"));
                run.check_content();
            }
            run.room.set_free(u64::MAX >> 1);
            let all = GuestRange::between(GuestOffset::new(0), GuestOffset::new(SIZE));
            run.image.write_at(all.start(), &vec![9; SIZE as usize]).unwrap();
            run.model.fill(9);
            run.check_content();
            run.image.close().unwrap();
            let found = check(&*run.room, &CheckOptions::default(), &Inline, &Silent).unwrap();
            let problems = (found.corruptions, found.leaks, found.check_errors);
            assert_eq!(problems, (0, 0, 0), "{shape:?} {seed}: {:?}", found.findings);
            (refused, seeds) = (refused + run.refused, seeds + 1);
        }
    }
    println!("{refused} changes refused in {seeds} runs");
    assert!(refused > 200, "{refused}");
}
