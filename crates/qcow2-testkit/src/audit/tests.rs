use super::*;
use crate::oracle::{Qemu, Tool};

const COPIED: u64 = 1 << 63;

/// A version 3 image with 512-byte clusters: header, refcount table, refcount block, L1 table, L2 table, two
/// data clusters.
fn small() -> PageBytes {
    let mut image = PageBytes::new();
    let put32 = |image: &mut PageBytes, at, value: u32| image.write(at, &value.to_be_bytes());
    image.write(0, b"QFI\xfb");
    put32(&mut image, 4, 3);
    put32(&mut image, 20, 9);
    put64(&mut image, 24, 64 * 512);
    put32(&mut image, 36, 1);
    put64(&mut image, 40, 3 * 512);
    put64(&mut image, 48, 512);
    put32(&mut image, 56, 1);
    put32(&mut image, 96, 4);
    put32(&mut image, 100, 112);
    put64(&mut image, 512, 2 * 512);
    for cluster in 0..7 {
        set_count(&mut image, cluster, 1);
    }
    put64(&mut image, 3 * 512, (4 * 512) | COPIED);
    put64(&mut image, 4 * 512, (5 * 512) | COPIED);
    put64(&mut image, 4 * 512 + 8, (6 * 512) | COPIED);
    image.set_len(7 * 512);
    image
}

fn put64(image: &mut PageBytes, at: u64, value: u64) {
    image.write(at, &value.to_be_bytes());
}

fn set_count(image: &mut PageBytes, cluster: u64, count: u16) {
    image.write(2 * 512 + cluster * 2, &count.to_be_bytes());
}

/// Audits the small image after `damage`.
fn check(damage: impl Fn(&mut PageBytes)) -> Audit {
    let mut image = small();
    damage(&mut image);
    audit(&image, None)
}

/// The first problem after `damage` is of `kind`.
fn finds(kind: ProblemKind, damage: impl Fn(&mut PageBytes)) {
    let audit = check(damage);
    assert_eq!(audit.problems.first().map(|problem| problem.kind), Some(kind), "{audit:?}");
}

#[test]
fn the_small_image_is_sound() {
    assert_eq!(check(|_| ()), Audit::default());
}

#[test]
fn refcounts_are_compared_with_references() {
    finds(ProblemKind::CountTooLow, |image| set_count(image, 4, 0));
    let leaky = check(|image| {
        set_count(image, 0, 2);
        set_count(image, 7, 1);
        set_count(image, 200, 9);
    });
    assert_eq!(leaky, Audit { leaks: 3, ..Audit::default() });
}

#[test]
fn the_dirty_bit_allows_low_refcounts_but_not_sharing() {
    let dirty = |image: &mut PageBytes| put64(image, 72, 1);
    let audit = check(|image| {
        dirty(image);
        set_count(image, 5, 0);
    });
    assert!(audit.is_sound() && audit.dirty && audit.low_counts == 1, "{audit:?}");
    finds(ProblemKind::Shared, |image| {
        dirty(image);
        put64(image, 4 * 512 + 8, (5 * 512) | COPIED);
    });
}

#[test]
fn sharing_is_a_problem_at_any_refcount() {
    finds(ProblemKind::Shared, |image| {
        put64(image, 4 * 512 + 8, 5 * 512);
        put64(image, 4 * 512, 5 * 512);
        set_count(image, 5, 2);
    });
    for metadata in 0..5 {
        finds(ProblemKind::Shared, |image| {
            put64(image, 4 * 512, (metadata * 512) | COPIED);
            if metadata == 0 {
                put64(image, 4 * 512, (4 * 512) | COPIED);
            }
            set_count(image, metadata, 2);
        });
    }
}

#[test]
fn copied_flags_are_compared_with_refcounts() {
    finds(ProblemKind::CopiedMismatch, |image| put64(image, 4 * 512, 5 * 512));
    finds(ProblemKind::CopiedMismatch, |image| put64(image, 3 * 512, 4 * 512));
    finds(ProblemKind::CopiedMismatch, |image| set_count(image, 5, 2));
    // A snapshot whose L1 table (cluster 7) references the same L2 table; the snapshot table is in cluster 8.
    let shared = |image: &mut PageBytes, copied: u64, count: u16| {
        put64(image, 7 * 512, 4 * 512);
        put64(image, 8 * 512, 7 * 512);
        image.write(8 * 512 + 8, &1u32.to_be_bytes());
        image.set_len(9 * 512);
        image.write(60, &1u32.to_be_bytes());
        put64(image, 64, 8 * 512);
        put64(image, 3 * 512, (4 * 512) | copied);
        put64(image, 4 * 512, (5 * 512) | copied);
        put64(image, 4 * 512 + 8, (6 * 512) | copied);
        (4..7).for_each(|cluster| set_count(image, cluster, count));
        (7..9).for_each(|cluster| set_count(image, cluster, 1));
    };
    assert_eq!(check(|image| shared(image, 0, 2)), Audit::default());
    finds(ProblemKind::CountTooLow, |image| shared(image, 0, 1));
    finds(ProblemKind::CopiedWhileShared, |image| shared(image, COPIED, 2));
}

#[test]
fn invalid_entries_and_offsets_are_found() {
    finds(ProblemKind::Header, |image| image.write(0, b"x"));
    finds(ProblemKind::Header, |image| image.write(36, &[0; 4]));
    finds(ProblemKind::Broken, |image| put64(image, 3 * 512, (4 * 512 + 1) | COPIED));
    finds(ProblemKind::Broken, |image| put64(image, 4 * 512, (5 * 512 + 2) | COPIED));
    finds(ProblemKind::Broken, |image| put64(image, 4 * 512, (99 * 512) | COPIED));
    finds(ProblemKind::Broken, |image| put64(image, 512, 99 * 512));
    finds(ProblemKind::Broken, |image| image.set_len(6 * 512));
    // The file may end inside the last cluster.
    assert_eq!(check(|image| image.set_len(6 * 512 + 1)), Audit::default());
}

/// Images made by QEMU with every feature are sound and leak nothing.
#[test]
fn images_made_by_qemu_are_sound() {
    let (Some(_), Some(sh)) = (Qemu::find(), Tool::find("sh")) else { return };
    let dir = std::env::temp_dir().join(format!("qcow2-audit-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    for options in [
        "cluster_size=512",
        "cluster_size=4k,refcount_bits=1",
        "cluster_size=4k,refcount_bits=8,compat=v3",
        "cluster_size=4k,refcount_bits=64,lazy_refcounts=on",
        "cluster_size=16k,extended_l2=on,refcount_bits=32",
        "cluster_size=64k,compat=0.10",
        "cluster_size=2M,refcount_bits=4",
        "cluster_size=64k,preallocation=metadata",
        "cluster_size=64k,data_file=d.raw",
    ] {
        let create = format!("rm -f *; qemu-img create -f qcow2 -o {options} i.qcow2 9M");
        let writes = "qemu-io -c 'write -P 1 3k 900k' -c 'write -z 1M 1M' -c 'discard 64k 128k' \
            -c 'write -z -u 4M 64k' -c 'write 8M 512' i.qcow2";
        let mut lines = vec![create.as_str(), writes];
        if !options.contains("data_file") {
            lines.push("qemu-io -c 'write -c -P 3 6M 64k' i.qcow2 || true");
        }
        if !options.contains("refcount_bits=1") && !options.contains("data_file") {
            lines.push("qemu-img snapshot -c a i.qcow2; qemu-img snapshot -c b i.qcow2");
            lines.push("qemu-io -c 'write -P 7 0 300k' i.qcow2; qemu-img snapshot -d a i.qcow2");
        }
        if !options.contains("0.10") {
            lines.push("qemu-img bitmap --add i.qcow2 x; qemu-io -c 'write 5M 1M' i.qcow2");
        }
        lines.push("qemu-img check i.qcow2");
        for line in lines {
            sh.run_in(&dir, &["-c", line]).success();
        }
        let image = PageBytes::from_bytes(&std::fs::read(dir.join("i.qcow2")).unwrap());
        assert!(image.len() > 4096);
        let data_len = std::fs::metadata(dir.join("d.raw")).ok().map(|data| data.len());
        let bitmaps = !options.contains("0.10");
        assert_eq!(audit(&image, data_len), Audit { bitmaps, ..Audit::default() }, "{options}");
    }
    std::fs::remove_dir_all(&dir).unwrap();
}
