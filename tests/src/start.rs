//! The folder of images in which the command lines that are compared with qemu-img begin.
#![allow(clippy::unwrap_used, reason = "helpers of a test")]

use crate::side_by_side::words;
use qcow2_testkit::oracle::Tool;
use qcow2_testkit::rng::Rng;
use std::fs;
use std::path::Path;

const MIB: u64 = 1 << 20;

/// Creates the start folder of every command line in `folder`, which must be empty.
///
/// # Panics
///
/// If a command fails, or qemu-io is missing beside qemu-img.
pub fn make_start(qemu_img: &Tool, folder: &Path) {
    let qemu_io = Tool::find("qemu-io").expect("qemu-io beside qemu-img");
    let img = |line: &str| drop(qemu_img.run_in(folder, &words(line)).success());
    let io = |line: &str| drop(qemu_io.run_in(folder, &words(line)).success());
    let sparse = |name: &str, len: u64| fs::File::create(folder.join(name)).unwrap().set_len(len).unwrap();
    img("create -q -f qcow2 t.qcow2 1M");
    img("create -q -f qcow2 base.qcow2 1500k");
    img("create -q -f qcow2 x8 8M");
    img("create -q -f qcow2 s.qcow2 4M");
    io("-c 'write -P 5 1M 64k' -c 'write -z 2M 64k' s.qcow2");
    img("snapshot -c sn s.qcow2");
    io("-c 'write -P 8 1M 4k' s.qcow2");
    img("create -q -f qcow2 -b s.qcow2 -F qcow2 o.qcow2");
    io("-c 'write -P 6 1536k 64k' o.qcow2");
    img("create -q -f qcow2 -u -b gone -F raw orphan.qcow2 1M");
    img("convert -c -O qcow2 s.qcow2 comp.qcow2");
    for name in ["bm.qcow2", "used.qcow2"] {
        img(&format!("create -q -f qcow2 {name} 4M"));
        img(&format!("bitmap --add {name} b0"));
        img(&format!("bitmap --add --disable -g 4k {name} b1"));
        io(&format!("-c 'write -P 5 1M 64k' {name}"));
    }
    set_in_use(&folder.join("used.qcow2"));
    img("create -q -f qcow2 -o extended_l2=on ext.qcow2 4M");
    io("-c 'write -P 7 3k 5k' ext.qcow2");
    img("create -q -f qcow2 -o data_file=df.raw df.qcow2 2M");
    io("-c 'write -P 7 3k 5k' df.qcow2");
    make_chains(&img, &io);
    make_damaged(&img, &io, folder);
    fs::create_dir(folder.join("dir")).unwrap();
    img("create -q -f qcow2 -u -b nbd://127.0.0.1:1/x -F raw nbdback.qcow2 1M");
    img("create -q -f qcow2 -u -b foo:bar -F raw fooback.qcow2 1M");
    for (name, len) in [("r.raw", MIB), ("base.raw", MIB), ("h.raw", 4 * MIB), ("odd.raw", 4 * MIB + 1)] {
        sparse(name, len);
    }
    for (name, len) in [("odd2.raw", 1_500_000), ("zero", 0), ("tiny0", 3)] {
        sparse(name, len);
    }
    io("-f raw -c 'write -P 5 1M 100k' h.raw");
    let name = r#"'json:{"driver":"raw","file":{"driver":"file","filename":"h.raw"}}'"#;
    img(&format!("create -q -f qcow2 -u -b {name} -F raw jsback.qcow2 4M"));
    io("-c 'write -P 3 512k 64k' jsback.qcow2");
    fs::write(folder.join("tiny"), "abc").unwrap();
    let mut random = [0; 1000];
    Rng::new(7).fill(&mut random);
    fs::write(folder.join("rnd"), random).unwrap();
    let whole = fs::read(folder.join("s.qcow2")).unwrap();
    fs::write(folder.join("trunc.qcow2"), &whole[..102_400]).unwrap();
}

/// Images that need repair. Their clusters are, in order: header, refcount table, refcount block, L1 table,
/// L2 table, data, data.
fn make_damaged(img: &dyn Fn(&str), io: &dyn Fn(&str), folder: &Path) {
    img("create -q -f qcow2 whole.qcow2 4M");
    io("-c 'write -P 7 0 128k' whole.qcow2");
    let whole = fs::read(folder.join("whole.qcow2")).unwrap();
    let make = |name: &str, changes: &[(usize, &[u8])]| {
        let mut bytes = whole.clone();
        for (at, new) in changes {
            bytes.resize(bytes.len().max(at + new.len()), 0);
            bytes[*at..at + new.len()].copy_from_slice(new);
        }
        fs::write(folder.join(name), bytes).unwrap();
    };
    let (count, l1, l2) = (|cluster: usize| 0x20000 + 2 * cluster, 0x30000, 0x40000);
    let end: (usize, &[u8]) = (10 * 65536 - 1, &[0]);
    make("leak.qcow2", &[end, (count(8), &[0, 1])]);
    make("low.qcow2", &[(l2 + 8, &whole[l2..l2 + 8])]);
    make("high.qcow2", &[(count(5), &[0, 2])]);
    make("mixed.qcow2", &[end, (count(8), &[0, 1]), (count(5), &[0, 2])]);
    make("free.qcow2", &[(count(5), &[0, 0])]);
    make("flag.qcow2", &[(l2, &[0])]);
    make("l1flag.qcow2", &[(l1, &[0])]);
    make("reserved.qcow2", &[(l2, &[0x81])]);
    make("marked.qcow2", &[(79, &[2])]);
    make("dirty.qcow2", &[(79, &[1])]);
    make("dirtyleak.qcow2", &[(79, &[1]), end, (count(8), &[0, 1])]);
}

/// Chains for the verbs that change images in place.
fn make_chains(img: &dyn Fn(&str), io: &dyn Fn(&str)) {
    img("create -q -f raw b2.raw 2M");
    io("-f raw -c 'write -P 2 0 1900k' b2.raw");
    img("create -q -f qcow2 -b o.qcow2 -F qcow2 top.qcow2");
    io("-c 'write -P 3 512k 64k' -c 'write -z 1M 64k' top.qcow2");
    img("create -q -f qcow2 -b b2.raw -F raw long.qcow2 3M");
    io("-c 'write -P 4 0 64k' -c 'write -P 4 2944k 64k' -c 'write -z 1M 64k' long.qcow2");
    img("create -q -f qcow2 -b b2.raw -F raw short.qcow2 1M");
    io("-c 'write -P 4 960k 64k' short.qcow2");
    img("create -q -f qcow2 -o cluster_size=4k -b short.qcow2 -F qcow2 mid.qcow2 3M");
    io("-c 'write -P 9 100k 9k' -c 'write -P 9 2M 5k' mid.qcow2");
    img("create -q -f qcow2 -o compat=0.10 v2.qcow2 2M");
    io("-c 'write -P 9 0 100k' v2.qcow2");
    img("create -q -f qcow2 -o compat=0.10 v2s.qcow2 2M");
    io("-c 'write -P 9 0 100k' v2s.qcow2");
    img("snapshot -c a v2s.qcow2");
    img("create -q -f qcow2 -o compat=0.10 -b b2.raw -F raw v2o.qcow2 4M");
    io("-c 'write -z 1M 64k' -c 'write -P 6 3M 1k' v2o.qcow2");
    img("create -q -f qcow2 -o extended_l2=on -b b2.raw -F raw exto.qcow2 2M");
    io("-c 'write -P 6 1M 3k' -c 'write -z 10k 20k' exto.qcow2");
    img("create -q -f qcow2 shared.qcow2 1M");
    io("-c 'write -P 9 0 64k' shared.qcow2");
    img("snapshot -c a shared.qcow2");
    img("snapshot -c b shared.qcow2");
    img("create -q -f qcow2 sz.qcow2 1M");
    io("-c 'write -P 3 0 1M' sz.qcow2");
    img("snapshot -c small sz.qcow2");
    img("resize -q sz.qcow2 3M");
    io("-c 'write -P 4 1M 2M' sz.qcow2");
    img("snapshot -c big sz.qcow2");
    img("resize -q --shrink sz.qcow2 2M");
    img("create -q -f qcow2 shrunk.qcow2 2M");
    io("-c 'write -P 9 0 2M' shrunk.qcow2");
    img("resize -q --shrink shrunk.qcow2 100k");
}

/// Marks the first bitmap of the image at `path` as in use, as a crash leaves it.
fn set_in_use(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    // The bitmaps extension starts at byte 504 and ends with the offset of the directory.
    let directory = u64::from_be_bytes(bytes[528..536].try_into().unwrap()) as usize;
    bytes[directory + 15] |= 1;
    fs::write(path, bytes).unwrap();
}
