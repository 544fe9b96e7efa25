//! Benchmarks of the engine's own work, with the image in memory: lookup, preparing a write, reading.
#![allow(missing_docs, clippy::unwrap_used)]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use qcow2_core::{
    CreateOptions, GuestDisk, GuestOffset, GuestRange, Image, ImageFormat, NoResolver, OpenOptions,
    ResolvedSource, Storage, create,
};
use qcow2_io::MemoryStorage;
use std::hint::black_box;
use std::sync::Arc;

const SIZE: u64 = 64 << 20;

fn image(extended_l2: bool) -> Arc<Image> {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    let mut options = CreateOptions::new(SIZE);
    options.extended_l2 = extended_l2;
    create(&storage, None, &options).unwrap();
    let mut options = OpenOptions::default();
    options.writable = true;
    let (format, resolver) = (ImageFormat::Qcow2, Arc::new(NoResolver));
    let source = ResolvedSource { storage, format, name: "memory".into(), id: None, resolver };
    let image = Image::open(source, &options).unwrap();
    for at in (0..SIZE / 2).step_by(1 << 20) {
        image.write_at(GuestOffset::new(at), &vec![7; 1 << 20]).unwrap();
    }
    image
}

/// Pseudo-random offsets in the first half of the disk.
fn offsets() -> impl Iterator<Item = GuestOffset> {
    (0u64..).map(|i| GuestOffset::new(i.wrapping_mul(2_654_435_761) % (SIZE / 2 / 4096) * 4096))
}

fn benches(criterion: &mut Criterion) {
    for (name, extended) in [("standard", false), ("extended", true)] {
        let image = image(extended);
        let mut group = criterion.benchmark_group(name);
        group.throughput(Throughput::Elements(1));
        let mut at = offsets();
        group.bench_function("lookup", |b| {
            b.iter(|| {
                let range = GuestRange::new(at.next().unwrap(), 4096).unwrap();
                black_box(image.pin().extent_at(range).unwrap());
            });
        });
        group.bench_function("prepare write in place", |b| {
            b.iter(|| {
                let range = GuestRange::new(at.next().unwrap(), 4096).unwrap();
                black_box(image.prepare_write(range).unwrap().range());
            });
        });
        group.bench_function("prepare allocating write, given back", |b| {
            let range = GuestRange::new(GuestOffset::new(SIZE / 2 + (1 << 20)), 64 << 10).unwrap();
            b.iter(|| black_box(image.prepare_write(range).unwrap().range()));
        });
        let mut buf = vec![0; 4096];
        group.bench_function("read 4 KiB", |b| {
            b.iter(|| image.read_at(at.next().unwrap(), &mut buf).unwrap())
        });
    }
}

/// The overlays share one base, and what it has cached.
fn overlays(criterion: &mut Criterion) {
    let base: Arc<dyn GuestDisk> = image(false);
    let new = CreateOptions::new(SIZE).with_backing("base.qcow2", "qcow2");
    criterion.bench_function("create an overlay on an open chain", |b| {
        b.iter(|| {
            let storage = Arc::new(MemoryStorage::new());
            let source = ResolvedSource::new(storage, ImageFormat::Qcow2, "memory");
            Image::create_on(&source, &new, &OpenOptions::default(), Arc::clone(&base)).unwrap()
        });
    });
}

criterion_group!(engine, benches, overlays);
criterion_main!(engine);
