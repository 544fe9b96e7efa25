//! Random work on images of every geometry, compared with a flat array after every step (invariant I8), and
//! the file judged at the end.

use proptest::prelude::*;
use qcow2_testkit::arbitrary::{Operation, Shape, operations, shapes};
use qcow2_testkit::rng::Rng;
use qcow2_testkit::world::World;
use qcow2_tests::fixtures::codecs;
use qcow2_tests::patience::within;
use std::time::Duration;

/// Longer than any history takes by far.
const PATIENCE: Duration = Duration::from_secs(20);

/// Operations, and after some of them a compressed write.
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
        // What hangs is not made smaller for hours.
        max_shrink_time: 120_000,
        ..ProptestConfig::default()
    })]

    #[test]
    fn a_disk_is_a_flat_array(
        (shape, work) in shapes().prop_flat_map(|shape| {
            (Just(shape), operations(shape.size, shape.cluster_size(), 40))
        }),
        seed in any::<u64>(),
    ) {
        check(shape, seed, &work).map_err(TestCaseError::fail)?;
    }
}

/// Longer runs than proptest has patience for; a failure names its seed. `QCOW2_MODEL_SEEDS` sets how many.
#[test]
fn long_histories_from_seeds() {
    let seeds = std::env::var("QCOW2_MODEL_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(40);
    for seed in 0..seeds {
        let mut rng = Rng::new(seed);
        let shape = Shape::random(&mut rng);
        let work: Vec<_> =
            (0..150).map(|_| Operation::random(&mut rng, shape.size, shape.cluster_size())).collect();
        check(shape, seed, &work).unwrap_or_else(|e| panic!("seed {seed}, {shape:?}: {e}"));
    }
}
