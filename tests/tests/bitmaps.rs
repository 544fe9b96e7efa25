//! Bitmaps of huge disks in small files: they must cost memory and time by the bits that are set. QEMU reads
//! bitmaps with all bits set, and losing bitmaps gives a warning.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a test may stop")]

use qcow2_core::{Image, OpenOptions};
use qcow2_format::bitmap::{Bitmap, BitmapTableEntry};
use qcow2_format::{Header, HostOffset};
use qcow2_testkit::oracle::{Outcome, Qemu, Tool};
use qcow2_tests::fixtures::{lone_source, storage};
use qcow2_tests::side_by_side::words;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-under-test");
const CLUSTER: u64 = 64 << 10;
/// Kilobytes of data segment that a run may use: 64 MiB.
const MEMORY: u32 = 64 << 10;
/// Time limit of a run. On an idle machine it takes a tenth of a second.
const PATIENCE: Duration = Duration::from_secs(5);

/// Runs the command under these limits.
fn run(folder: &Path, line: &str) -> Outcome {
    let started = Instant::now();
    let script = format!("ulimit -d {MEMORY}; exec {OURS} {line}");
    let outcome = Tool::find("bash").expect("bash").run_in(folder, &["-c", &script]);
    assert!(started.elapsed() < PATIENCE, "took {:?}: {outcome}", started.elapsed());
    outcome
}

fn open(path: &Path) -> Arc<Image> {
    Image::open(lone_source(storage(&fs::read(path).unwrap())), &OpenOptions::default()).unwrap()
}

fn marked(path: &Path, name: &str) -> Vec<(u64, u64)> {
    open(path).bitmap_bits(name.as_bytes()).unwrap().marked_runs().collect()
}

/// Three bitmaps of half a GiB of bits, none of them set.
#[test]
fn empty_and_full_bitmaps_of_a_huge_disk_are_cheap() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    run(folder.path(), "create -q -f qcow2 image 2T").success();
    for name in ["b0", "b1", "b2"] {
        run(folder.path(), &format!("bitmap --add -g 512 image {name}")).success();
    }
    run(folder.path(), "io -f qcow2 -c 'write -q 1T 512' image").success();
    run(folder.path(), "bitmap --merge b0 image b1").success();
    run(folder.path(), "bitmap --clear image b2").success();
    run(folder.path(), "convert --bitmaps -O qcow2 image copy").success();
    run(folder.path(), "resize image --shrink 1536G").success();
    for image in ["image", "copy"] {
        run(folder.path(), &format!("check -q {image}")).success();
        assert_eq!(marked(&at(image), "b0"), [(1 << 40, 512)]);
        assert_eq!(marked(&at(image), "b1"), [(1 << 40, 512)]);
        assert_eq!(marked(&at(image), "b2"), []);
    }
    // The same with all bits set.
    run(folder.path(), "io -f qcow2 -c 'discard -q 0 1G' image").success();
    run(folder.path(), "rebase -u -b '' image").success();
    assert_eq!(marked(&at("image"), "b0"), [(0, 1 << 30), (1 << 40, 512)]);
}

/// A bitmap cluster with all bits set is stored as a flag in the table; QEMU reads it and can continue with
/// it.
#[test]
fn qemu_reads_bitmaps_with_all_bits_set() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let size = (40u64 << 20) + 512;
    for granularity in ["512", "64k"] {
        run(folder.path(), &format!("create -q -f qcow2 -o cluster_size=512 image {size}")).success();
        for name in ["all", "some"] {
            run(folder.path(), &format!("bitmap --add -g {granularity} image {name}")).success();
        }
        run(folder.path(), "bitmap --disable image some").success();
        run(folder.path(), &format!("io -f qcow2 -c 'write -q -z -u 0 {size}' image")).success();
        let Bitmap { table_offset, .. } = open(&path).bitmaps().unwrap().remove(0);
        let first = fs::read(&path).unwrap()[table_offset.value() as usize..][..8].to_vec();
        assert_eq!(first, BitmapTableEntry::Ones.encode().to_be_bytes());
        let img = |line: &str| qemu.img.run_in(folder.path(), &words(line)).success();
        img("check -q image");
        img("bitmap --merge all image some");
        assert_eq!(marked(&path, "some"), [(0, size)]);
        qemu.io.run_in(folder.path(), &["-f", "qcow2", "-c", "write 0 512", "image"]).success();
        assert_eq!(marked(&path, "all"), [(0, size)]);
    }
}

/// Changes the image at `path`, which has one bitmap, to one with 65535 bitmaps that share one table: every
/// entry references one cluster filled with `bits`, or has the all-ones flag.
fn share_bits(path: &Path, bits: Option<u8>) {
    let mut bytes = fs::read(path).unwrap();
    let mut header = Header::parse(&bytes).unwrap();
    let mut place = |new: &[u8]| {
        let offset = (bytes.len() as u64).next_multiple_of(CLUSTER);
        bytes.resize(offset as usize, 0);
        bytes.extend_from_slice(new);
        HostOffset::new(offset)
    };
    let shared = match bits {
        Some(byte) => BitmapTableEntry::Data(place(&[byte; CLUSTER as usize])),
        None => BitmapTableEntry::Ones,
    };
    let mut bitmap = open(path).bitmaps().unwrap().remove(0);
    bitmap.table_offset = place(&shared.encode().to_be_bytes().repeat(bitmap.table_entries as usize));
    let mut directory = Vec::new();
    for number in 0..65_535 {
        bitmap.name = format!("b{number}").into_bytes();
        bitmap.encode(&mut directory).unwrap();
    }
    let extension = header.extensions.bitmaps.as_mut().unwrap();
    extension.directory_offset = place(&directory);
    (extension.count, extension.directory_size) = (65_535, directory.len() as u64);
    // Every cluster is allocated.
    let word = |at: u64| u64::from_be_bytes(bytes[at as usize..][..8].try_into().unwrap());
    let block = word(header.refcount_table_offset.value()) as usize;
    for cluster in 0..bytes.len().div_ceil(CLUSTER as usize) {
        bytes[block + 2 * cluster..][..2].copy_from_slice(&[0, 1]);
    }
    let start = header.encode_cluster().unwrap();
    bytes[..start.len()].copy_from_slice(&start);
    fs::write(path, &bytes).unwrap();
}

/// 65535 bitmaps, each of half a GiB of bits, in a file of a few MB.
#[test]
fn bitmaps_that_share_clusters_are_cheap() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let tells = |outcome: &Outcome| outcome.stderr.contains("they share clusters");
    for bits in [Some(0x55), Some(0), None] {
        run(folder.path(), "create -q -f qcow2 image 2T").success();
        run(folder.path(), "bitmap --add -g 512 image b0").success();
        share_bits(&path, bits);
        let before = fs::read(&path).unwrap();
        for line in ["bitmap --merge b1 image b2", "convert --bitmaps -O qcow2 image copy", "resize image 3T"]
        {
            let outcome = run(folder.path(), line).expect_code(1);
            assert!(tells(&outcome), "{bits:?}: {outcome}");
        }
        // A write to the disk loses the damaged bitmaps, with a warning.
        let write = "io -f qcow2 -c 'write -q 0 512' image";
        let outcome = run(folder.path(), write).success();
        assert!(tells(&outcome) && outcome.stderr.contains("bitmaps are damaged, and lost"), "{outcome}");
        assert!(open(&path).bitmaps().unwrap().is_empty());
        assert_eq!(run(folder.path(), write).success().stderr, "");
        fs::write(&path, before).unwrap();
        let outcome = run(folder.path(), "rebase -u -b '' image").success();
        assert!(tells(&outcome), "{outcome}");
    }
}

/// There is no valid form of a bitmap without bits: an image with one does not open for writing any more.
#[test]
fn a_disk_with_bitmaps_does_not_shrink_to_nothing() {
    let folder = tempfile::tempdir().unwrap();
    run(folder.path(), "create -q -f qcow2 image 4M").success();
    run(folder.path(), "bitmap --add image b0").success();
    let image = folder.path().join("image");
    let before = fs::read(&image).unwrap();
    assert_ne!(run(folder.path(), "io -f qcow2 -c 'truncate 0' image").code, Some(0));
    assert_eq!(fs::read(&image).unwrap(), before);
    run(folder.path(), "bitmap --remove image b0").success();
    run(folder.path(), "io -f qcow2 -c 'truncate 0' image").success();
    run(folder.path(), "check -q image").success();
}
