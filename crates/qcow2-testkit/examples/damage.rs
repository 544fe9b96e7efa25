//! Builds a small image without the engine, damages it, and audits it: `cargo run -p qcow2-testkit --example
//! damage`.
#![allow(clippy::print_stdout, reason = "an example shows what it does")]

use qcow2_testkit::audit::audit;
use qcow2_testkit::builder::{Builder, Built, Cluster};
use qcow2_testkit::pages::PageBytes;

fn main() {
    let image = || {
        let builder = Builder::new(12, 1 << 20);
        builder.cluster(0, Cluster::Data(vec![1; 4096])).cluster(5, Cluster::Zero).build()
    };
    judge("as it was made", &image());
    let mut leaked = image();
    leaked.set_refcount(5, 7);
    judge("a refcount too high", &leaked);
    let mut shared = image();
    let first = shared.l2_entry(0);
    let (entry, second) = (shared.read_u64(first), shared.l2_entry(1));
    shared.patch_u64(second, entry);
    judge("two guest clusters in one place", &shared);
}

fn judge(what: &str, image: &Built) {
    let found = audit(&PageBytes::from_bytes(&image.bytes), None);
    println!("{what}: {} leaks, {} problems", found.leaks, found.problems.len());
    for problem in &found.problems {
        println!("  {:?}: {}", problem.kind, problem.message);
    }
}
