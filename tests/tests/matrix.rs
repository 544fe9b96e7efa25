//! Random operations on real files of every geometry, with and without a backing file; then qemu-img checks
//! the image and its content is compared with a flat array.
//!
//! `QCOW2_MATRIX_OPS` sets the number of operations per image (10000 for a campaign), `QCOW2_SEED` the seed.
#![allow(missing_docs, clippy::unwrap_used, clippy::field_reassign_with_default)]

use qcow2_core::walk::{Walk, read_header};
use qcow2_core::{CreateOptions, GuestOffset, GuestRange, Image, ImageFormat, OpenOptions, ZeroMode, create};
use qcow2_io::{Create, OpenFile, Policy, SourceOptions, open_source};
use qcow2_testkit::oracle::Tool;
use qcow2_testkit::pattern;
use qcow2_testkit::rng::Rng;
use std::path::Path;
use std::sync::Arc;

const SIZE: u64 = (24 << 20) + 512 * 7;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn open(path: &Path) -> Arc<Image> {
    let options =
        SourceOptions::new(OpenFile::writable()).with_format(ImageFormat::Qcow2).with_policy(Policy::Allow);
    let mut open = OpenOptions::default();
    open.writable = true;
    open.discard_freed = true;
    Image::open(open_source(path, &options).unwrap(), &open).unwrap()
}

/// One random operation on image and model.
fn step(image: &Image, model: &mut [u8], rng: &mut Rng) {
    let longest = if rng.one_in(20) { 2 << 20 } else { 40_000 };
    let len = 1 + rng.below(longest);
    let at = rng.below(SIZE - len + 1);
    let (guest, place) = (GuestOffset::new(at), at as usize..(at + len) as usize);
    let range = GuestRange::new(guest, len).unwrap();
    match rng.below(10) {
        0..=4 => {
            rng.fill(&mut model[place.clone()]);
            image.write_at(guest, &model[place]).unwrap();
        }
        5 => {
            let mode = if rng.one_in(2) { ZeroMode::KeepAllocated } else { ZeroMode::MayUnmap };
            image.write_zeroes(range, mode).unwrap();
            model[place].fill(0);
        }
        6 => {
            image.discard(range).unwrap();
            let mut seen = pattern::unread(len as usize);
            image.read_at(guest, &mut seen).unwrap();
            let fine =
                seen.iter().zip(&model[place.clone()]).all(|(&now, &before)| now == 0 || now == before);
            assert!(fine, "a discarded byte is what it was, or zero");
            model[place].copy_from_slice(&seen);
        }
        7 => image.flush().unwrap(),
        _ => {
            let mut seen = pattern::unread(len as usize);
            image.read_at(guest, &mut seen).unwrap();
            assert!(seen == model[place], "{len} bytes at {at:#x}");
        }
    }
}

fn check(folder: &Path, qemu: &Tool, options: &CreateOptions, seed: u64, count: u64) {
    let mut rng = Rng::new(seed);
    let mut model = vec![0; SIZE as usize];
    if options.backing_file.is_some() {
        // Shorter than the disk, and no multiple of a cluster.
        let len = SIZE as usize / 4 * 3 / 512 * 512 + 512;
        rng.fill(&mut model[..len]);
        std::fs::write(folder.join("base.raw"), &model[..len]).unwrap();
    }
    let path = folder.join("image.qcow2");
    let _ = std::fs::remove_file(&path);
    let storage = OpenFile::writable().with_create(Create::New).open(&path).unwrap();
    create(&storage, None, options).unwrap();
    drop(storage);
    let mut image = open(&path);
    for _ in 0..count {
        step(&image, &mut model, &mut rng);
        if rng.one_in(500) {
            image.close().unwrap();
            drop(image);
            image = open(&path);
        }
    }
    image.close().unwrap();
    drop(image);
    let storage = OpenFile::read_only().open(&path).unwrap();
    let header = read_header(&*storage).unwrap();
    let walk = Walk::new(&*storage, &header).unwrap();
    let missing = walk.used_end().unwrap().saturating_sub(walk.file_len());
    assert!(missing < options.cluster_size, "{missing} bytes are said to be missing");
    std::fs::write(folder.join("model.raw"), &model).unwrap();
    qemu.run_in(folder, &["check", "image.qcow2"]).success();
    qemu.run_in(folder, &["compare", "-f", "qcow2", "-F", "raw", "image.qcow2", "model.raw"]).success();
}

#[test]
fn qemu_agrees_after_random_operations_on_every_geometry() {
    let Some(qemu) = Tool::find("qemu-img") else { return };
    let folder = tempfile::tempdir().unwrap();
    let (seed, count) = (number("QCOW2_SEED", 1), number("QCOW2_MATRIX_OPS", 120));
    for (cluster_size, extended_l2) in
        [(512, false), (4096, false), (65536, false), (65536, true), (2 << 20, false), (2 << 20, true)]
    {
        for refcount_bits in [1, 16, 64] {
            for backed in [false, true] {
                let mut options = CreateOptions::new(SIZE);
                options.cluster_size = cluster_size;
                options.extended_l2 = extended_l2;
                options.refcount_bits = refcount_bits;
                if backed {
                    options = options.with_backing("base.raw", "raw");
                }
                check(folder.path(), &qemu, &options, seed, count);
            }
        }
    }
}

/// A mapping table larger than a refcount block covers still needs contiguous clusters.
#[test]
fn tables_longer_than_a_refcount_block_covers_are_contiguous() {
    let Some(qemu) = Tool::find("qemu-img") else { return };
    let ours = Tool::at(env!("CARGO_BIN_EXE_qcow2-under-test"));
    let folder = tempfile::tempdir().unwrap();
    let run = |args: &str| {
        let args: Vec<&str> = args.split(' ').collect();
        ours.run_in(folder.path(), &args).success();
    };
    for (bits, size) in [(16, "700M"), (64, "300M"), (64, "9G"), (1, "9G")] {
        run(&format!("create -q -f qcow2 -o cluster_size=512,refcount_bits={bits} t.qcow2 5M"));
        let write = ["-f", "qcow2", "-c", "write -P 5 100k 3M", "t.qcow2"];
        ours.run_in(folder.path(), &[&["io"][..], &write].concat()).success();
        run(&format!("resize -q t.qcow2 {size}"));
        if bits > 1 {
            run("snapshot -c kept t.qcow2");
        }
        let read = ["-f", "qcow2", "-c", "read -P 5 100k 3M", "-c", "write -P 6 200M 1M", "t.qcow2"];
        let seen = ours.run_in(folder.path(), &[&["io"][..], &read].concat()).success();
        assert!(!seen.stdout.contains("failed"), "{bits} bits, {size}: {seen}");
        qemu.run_in(folder.path(), &["check", "t.qcow2"]).success();
        let len = std::fs::metadata(folder.path().join("t.qcow2")).unwrap().len();
        assert!(len < 64 << 20, "{bits} bits, {size}: the file has {len} bytes");
        std::fs::remove_file(folder.path().join("t.qcow2")).unwrap();
    }
}
