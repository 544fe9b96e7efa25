//! Random operations on images of every geometry, compared with a flat array after every step (invariant I8);
//! the file is audited at the end.

use proptest::prelude::*;
use qcow2_testkit::arbitrary::{Operation, Shape, operations, shapes};
use qcow2_testkit::rng::Rng;
use qcow2_testkit::world::World;
use qcow2_tests::fixtures::codecs;
use qcow2_tests::patience::within;
use std::time::Duration;

/// Much longer than any history takes.
const PATIENCE: Duration = Duration::from_secs(20);

/// Runs the operations, with a compressed write after some of them.
fn check(shape: Shape, seed: u64, work: &[Operation]) -> Result<(), String> {
    let (what, work) = (format!("seed {seed}, {shape:?}"), work.to_vec());
    within(PATIENCE, &what, move || run(shape, seed, &work))
}

fn run(shape: Shape, seed: u64, work: &[Operation]) -> Result<(), String> {
    let mut world = World::new(shape, codecs(), seed)?;
    let mut rng = Rng::new(seed);
    let clusters = shape.size.div_ceil(shape.cluster_size());
    for operation in work {
        world.step(operation)?;
        if rng.one_in(6) {
            world.compress(rng.below(clusters), rng.below(64))?;
        }
    }
    world.finish().map(|_| ())
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 128,
        max_shrink_iters: 4096,
        // A hanging case must not be shrunk for hours.
        max_shrink_time: 120_000,
        ..ProptestConfig::default()
    })]

    #[test]
    fn a_disk_reads_as_a_flat_array(
        (shape, work) in shapes().prop_flat_map(|shape| {
            (Just(shape), operations(shape.size, shape.cluster_size(), 40))
        }),
        seed in any::<u64>(),
    ) {
        check(shape, seed, &work).map_err(TestCaseError::fail)?;
    }
}

/// Longer runs than proptest is suited for; a failure prints its seed. `QCOW2_MODEL_SEEDS` sets the number.
#[test]
fn long_histories_read_as_a_flat_array() {
    let seeds = std::env::var("QCOW2_MODEL_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(40);
    for seed in 0..seeds {
        let mut rng = Rng::new(seed);
        let shape = Shape::random(&mut rng);
        let work: Vec<_> =
            (0..150).map(|_| Operation::random(&mut rng, shape.size, shape.cluster_size())).collect();
        check(shape, seed, &work).unwrap_or_else(|e| panic!("seed {seed}, {shape:?}: {e}"));
    }
}
