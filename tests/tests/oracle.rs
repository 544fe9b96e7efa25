//! QEMU's tools as oracle over every mix of features: they find our images clean and read the same bytes, we
//! read theirs, and either continues where the other stopped.
//!
//! `QCOW2_ORACLE_ALL=1` runs every mix instead of a sample; `QCOW2_ORACLE_OPERATIONS` sets the length of the
//! histories.
#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a test may stop, and says what it did")]

use qcow2_core::{GuestOffset, Image, ImageFormat, OpenOptions, ZeroMode};
use qcow2_testkit::arbitrary::{BackingShape, DataFileShape, Operation, Shape};
use qcow2_testkit::audit::audit;
use qcow2_testkit::oracle::Qemu;
use qcow2_testkit::pages::PageBytes;
use qcow2_testkit::pattern;
use qcow2_testkit::rng::Rng;
use qcow2_testkit::world::{Shelf, TOP, World};
use qcow2_tests::fixtures::codecs;
use std::fs;
use std::path::Path;
use std::sync::Arc;

/// The default run takes one in this many mixes.
const SAMPLE: usize = 6;

fn asked(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

/// Every legal mix of features, on disks of a few clusters with a partial last one.
fn every_shape() -> Vec<Shape> {
    let mut shapes = Vec::new();
    let data_files = [None, Some(DataFileShape { raw: false }), Some(DataFileShape { raw: true })];
    for cluster_bits in [9, 12, 16, 21] {
        let size = (9u64 << cluster_bits).clamp(200 << 10, 6 << 20) - 512;
        let backings = [
            None,
            Some(BackingShape { size: (size / 2) & !511, qcow2: false }),
            Some(BackingShape { size: size + 4096, qcow2: true }),
        ];
        for mix in 0..2 * 3 * 2 * 3 * 2 * 3 {
            let mut rest = mix;
            let mut digit = |radix: usize| {
                let digit = rest % radix;
                rest /= radix;
                digit
            };
            let shape = Shape {
                version3: digit(2) == 0,
                refcount_order: [0, 4, 6][digit(3)],
                extended_l2: digit(2) == 1,
                data_file: data_files[digit(3)],
                zstd: digit(2) == 1,
                backing: backings[digit(3)],
                cluster_bits,
                ..Shape::plain(size)
            };
            if shape == shape.legalized() {
                shapes.push(shape);
            }
        }
    }
    shapes
}

/// The mixes of this run: all, or a sample that differs between the tests.
fn shapes_of_run(salt: usize) -> Vec<Shape> {
    let all = every_shape();
    if asked("QCOW2_ORACLE_ALL").is_some_and(|value| value > 0) {
        return all;
    }
    all.into_iter()
        .enumerate()
        .filter(|(index, _)| (index + salt).is_multiple_of(SAMPLE))
        .map(|(_, shape)| shape)
        .collect()
}

/// QEMU finds the image in `folder` clean, and reads `content`.
fn qemu_agrees(qemu: &Qemu, folder: &Path, content: &[u8], shape: &Shape) {
    qemu.img.run_in(folder, &["check", "-f", "qcow2", TOP]).success();
    qemu.img.run_in(folder, &["convert", "-f", "qcow2", "-O", "raw", TOP, "seen.raw"]).success();
    let seen = fs::read(folder.join("seen.raw")).unwrap();
    assert_eq!(seen.len(), content.len(), "{shape:?}");
    let wrong = seen.iter().zip(content).position(|(a, b)| a != b);
    assert_eq!(wrong, None, "QEMU reads another byte: {shape:?}");
}

/// Random operations by our engine, then QEMU checks and reads.
fn ours(qemu: &Qemu, shape: Shape, seed: u64, operations: u64) {
    let mut world = World::new(shape, codecs(), seed).unwrap();
    let mut rng = Rng::new(seed);
    let step =
        |result: Result<(), String>| result.unwrap_or_else(|what| panic!("seed {seed}, {shape:?}: {what}"));
    for _ in 0..operations {
        step(world.step(&Operation::random(&mut rng, shape.size, shape.cluster_size())));
        // With one-bit refcounts two streams cannot share a cluster; that refusal is fine.
        if rng.one_in(8) {
            step(world.compress(rng.below(shape.size.div_ceil(shape.cluster_size())), rng.below(64)));
        }
    }
    let (shelf, model) = world.finish().unwrap_or_else(|what| panic!("seed {seed}, {shape:?}: {what}"));
    let folder = tempfile::tempdir().unwrap();
    shelf.save(folder.path()).unwrap();
    qemu_agrees(qemu, folder.path(), model.bytes(), &shape);
}

/// The options of `qemu-img create` for `shape`.
fn create_arguments(shape: &Shape) -> Vec<String> {
    let mut options = format!("cluster_size={}", shape.cluster_size());
    if shape.version3 {
        options += &format!(",compat=1.1,refcount_bits={}", 1u64 << shape.refcount_order);
        options += if shape.extended_l2 { ",extended_l2=on" } else { "" };
        options += if shape.zstd { ",compression_type=zstd" } else { "" };
    } else {
        options += ",compat=0.10";
    }
    if let Some(file) = shape.data_file {
        options += &format!(",data_file=top.data,data_file_raw={}", if file.raw { "on" } else { "off" });
    }
    let mut arguments: Vec<String> = ["create", "-f", "qcow2", "-o", &options].map(String::from).to_vec();
    if shape.backing.is_some() {
        arguments.extend(["-b", "base.raw", "-F", "raw"].map(String::from));
    }
    arguments.extend([TOP.to_owned(), shape.size.to_string()]);
    arguments
}

/// The qemu-io command for `operation`, rounded to whole sectors; `None` if it changes nothing.
fn qemu_command(operation: &Operation) -> Option<String> {
    let range = operation.range();
    let start = range.start().value() & !511;
    let place = format!("{start} {}", range.end().value().next_multiple_of(512) - start);
    match operation {
        Operation::Write { seed, .. } => Some(format!("write -P {} {place}", seed % 255 + 1)),
        Operation::Zero { mode: ZeroMode::MayUnmap, .. } => Some(format!("write -z -u {place}")),
        Operation::Zero { .. } => Some(format!("write -z {place}")),
        Operation::Discard(_) => Some(format!("discard {place}")),
        _ => None,
    }
}

/// Random operations by qemu-io: compressed clusters first, while all are unallocated.
fn qemu_works(qemu: &Qemu, folder: &Path, shape: &Shape, rng: &mut Rng, compress: bool) {
    let mut commands = Vec::new();
    let size = shape.cluster_size();
    for index in (0..shape.size / size).filter(|_| compress && shape.data_file.is_none()) {
        if rng.one_in(4) {
            commands.push(format!("write -c -P {} {} {size}", rng.between(1, 200), index * size));
        }
    }
    let operations = (0..20).map(|_| Operation::random(rng, shape.size, size));
    commands.extend(operations.filter_map(|operation| qemu_command(&operation)));
    let mut arguments = vec!["-f".to_owned(), "qcow2".to_owned()];
    commands.into_iter().for_each(|command| arguments.extend(["-c".to_owned(), command]));
    arguments.push(TOP.to_owned());
    qemu.io.run_in(folder, &arguments).success();
}

/// What QEMU reads from the image in `folder`.
fn qemu_reads(qemu: &Qemu, folder: &Path) -> Vec<u8> {
    qemu.img.run_in(folder, &["convert", "-f", "qcow2", "-O", "raw", TOP, "seen.raw"]).success();
    fs::read(folder.join("seen.raw")).unwrap()
}

/// The files of `folder` in memory.
fn load(folder: &Path) -> Shelf {
    let shelf = Shelf::default();
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        shelf.put(entry.file_name().to_str().unwrap(), &fs::read(entry.path()).unwrap());
    }
    shelf
}

fn open(shelf: &Shelf, writable: bool) -> Arc<Image> {
    let mut options = OpenOptions::default();
    options.writable = writable;
    options.codecs = codecs();
    Image::open(shelf.source(TOP, ImageFormat::Qcow2), &options).unwrap()
}

fn we_read(shelf: &Shelf) -> Vec<u8> {
    let image = open(shelf, false);
    let mut seen = pattern::unread(image.size() as usize);
    image.read_at(GuestOffset::new(0), &mut seen).unwrap();
    seen
}

/// Random operations by QEMU, then we check; then operations by us, and QEMU checks; then QEMU continues.
fn theirs(qemu: &Qemu, shape: Shape, seed: u64) {
    let mut rng = Rng::new(seed);
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    if let Some(backing) = shape.backing {
        fs::write(folder.join("base.raw"), qcow2_testkit::pattern::bytes(5, 0, backing.size as usize))
            .unwrap();
    }
    qemu.img.run_in(folder, &create_arguments(&shape)).success();
    qemu_works(qemu, folder, &shape, &mut rng, true);
    let mut content = qemu_reads(qemu, folder);
    let shelf = load(folder);
    assert!(we_read(&shelf) == content, "seed {seed}, {shape:?}: our content of QEMU's image differs");

    let image = open(&shelf, true);
    for number in 0..20 {
        let operation = Operation::random(&mut rng, shape.size, shape.cluster_size());
        let range = operation.range();
        operation.run(&*image).unwrap();
        let part = &mut content[range.start().value() as usize..range.end().value() as usize];
        match operation {
            Operation::Write { seed, .. } => qcow2_testkit::pattern::fill(seed, range.start().value(), part),
            Operation::Zero { .. } => part.fill(0),
            Operation::Discard(_) => image.read_at(range.start(), part).unwrap(),
            _ => {}
        }
        let mut seen = pattern::unread(part.len());
        image.read_at(range.start(), &mut seen).unwrap();
        assert!(seen == part, "seed {seed}, {shape:?}: step {number}, {operation:?}");
    }
    image.close().unwrap();
    let data_len = shape.data_file.map(|_| shelf.file("top.data").bytes().len());
    let found = audit(&shelf.file(TOP).bytes(), data_len);
    assert!(found.is_sound() && found.leaks == 0, "seed {seed}, {shape:?}: {found:?}");
    shelf.save(folder).unwrap();
    qemu_agrees(qemu, folder, &content, &shape);

    qemu_works(qemu, folder, &shape, &mut rng, false);
    qemu.img.run_in(folder, &["check", TOP]).success();
    assert!(we_read(&load(folder)) == qemu_reads(qemu, folder), "seed {seed}, {shape:?}: after all");
    let image = PageBytes::from_bytes(&fs::read(folder.join(TOP)).unwrap());
    assert!(audit(&image, None).is_sound(), "seed {seed}, {shape:?}: the audit objects to what QEMU left");
}

#[test]
fn qemu_reads_our_images() {
    let Some(qemu) = Qemu::find() else { return };
    let shapes = shapes_of_run(0);
    for (seed, shape) in (1..).zip(&shapes) {
        ours(&qemu, *shape, seed, 40);
    }
    println!("{} mixes of features", shapes.len());
    assert!(shapes.len() > 30);
}

#[test]
fn we_read_images_of_qemu_and_both_continue() {
    let Some(qemu) = Qemu::find() else { return };
    let shapes = shapes_of_run(3);
    for (seed, shape) in (1..).zip(&shapes) {
        theirs(&qemu, *shape, seed);
    }
    println!("{} mixes of features", shapes.len());
    assert!(shapes.len() > 30);
}

/// Long histories: cluster size x refcount width x extended L2 x backing.
#[test]
fn long_histories_pass_qemu_img_check() {
    let Some(qemu) = Qemu::find() else { return };
    let operations = asked("QCOW2_ORACLE_OPERATIONS").unwrap_or(60);
    let mut images = 0;
    for cluster_bits in [9, 12, 16, 21] {
        let size = (12u64 << cluster_bits).clamp(300 << 10, 10 << 20) - 512;
        for (refcount_order, extended_l2, backed) in [0, 4, 6].into_iter().flat_map(|order| {
            [(order, false, false), (order, false, true), (order, true, false), (order, true, true)]
        }) {
            let backing = backed.then_some(BackingShape { size: (size / 2) & !511, qcow2: images % 4 == 1 });
            let shape = Shape { cluster_bits, refcount_order, extended_l2, backing, ..Shape::plain(size) };
            if shape == shape.legalized() {
                images += 1;
                ours(&qemu, shape, images, operations);
            }
        }
    }
    println!("{images} images of {operations} operations");
    assert_eq!(images, 4 * 3 * 2 + 2 * 3 * 2);
}
