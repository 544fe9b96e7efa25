//! Output of `info`, `map`, `check` and `compare` for many kinds of images: the same as qemu-img's, as JSON
//! and as text.
//!
//! The output is compared as text, so keys and their order must match too.
#![allow(clippy::unwrap_used, reason = "helpers of a test")]

use qcow2_testkit::oracle::Tool;
use qcow2_tests::side_by_side::{SideBySide, words};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// One image: its name, creation options, and what is done to it afterwards.
struct Sample {
    name: &'static str,
    create: &'static str,
    then: &'static [Step],
}

enum Step {
    /// A qemu-io command on the image.
    Io(&'static str),
    /// A qemu-img command line, with `@` for the image.
    Img(&'static str),
    /// Sets a byte of the image file.
    Poke { offset: usize, byte: u8 },
}

use Step::{Img, Io, Poke};

const fn sample(name: &'static str, create: &'static str, then: &'static [Step]) -> Sample {
    Sample { name, create, then }
}

/// Every kind of cluster.
const MIXED: &[Step] = &[
    Io("write -P 1 0 64k"),
    Io("write -P 2 100k 300k"),
    Io("write -z 200k 64k"),
    Io("write -P 3 1M 3k"),
    Io("discard 320k 64k"),
];

const SAMPLES: &[Sample] = &[
    sample("empty", "-f qcow2 @ 4M", &[]),
    sample("zero-length", "-f qcow2 @ 0", &[]),
    sample("odd-size", "-f qcow2 @ 1000001", &[Io("write -P 1 999000 500")]),
    sample("huge-empty", "-f qcow2 @ 1P", &[Io("write -P 1 900T 64k")]),
    sample("plain", "-f qcow2 @ 4M", MIXED),
    sample("v2", "-f qcow2 -o compat=0.10 @ 4M", MIXED),
    sample("v2-small-clusters", "-f qcow2 -o compat=0.10,cluster_size=512 @ 4M", MIXED),
    sample("clusters-512", "-f qcow2 -o cluster_size=512 @ 4M", MIXED),
    sample("clusters-1k", "-f qcow2 -o cluster_size=1k,refcount_bits=1 @ 4M", MIXED),
    sample("clusters-4k", "-f qcow2 -o cluster_size=4k @ 4M", MIXED),
    sample("clusters-16k", "-f qcow2 -o cluster_size=16k,refcount_bits=32 @ 4M", MIXED),
    sample("clusters-256k", "-f qcow2 -o cluster_size=256k @ 4M", MIXED),
    sample("clusters-2m", "-f qcow2 -o cluster_size=2M @ 40M", MIXED),
    sample("refcounts-1", "-f qcow2 -o refcount_bits=1 @ 4M", MIXED),
    sample("refcounts-2", "-f qcow2 -o refcount_bits=2 @ 4M", MIXED),
    sample("refcounts-4", "-f qcow2 -o refcount_bits=4,cluster_size=4k @ 4M", MIXED),
    sample("refcounts-8", "-f qcow2 -o refcount_bits=8 @ 4M", MIXED),
    sample("refcounts-64", "-f qcow2 -o refcount_bits=64 @ 4M", MIXED),
    sample("lazy", "-f qcow2 -o lazy_refcounts=on @ 4M", MIXED),
    sample("dirty", "-f qcow2 -o lazy_refcounts=on @ 4M", &[Io("write 0 64k"), Poke { offset: 79, byte: 1 }]),
    sample("corrupt", "-f qcow2 @ 4M", &[Io("write 0 64k"), Poke { offset: 79, byte: 2 }]),
    sample("extended", "-f qcow2 -o extended_l2=on @ 4M", MIXED),
    sample("extended-16k", "-f qcow2 -o extended_l2=on,cluster_size=16k @ 4M", MIXED),
    sample("extended-reserved", "-f qcow2 -o extended_l2=on,preallocation=metadata @ 4M", MIXED),
    sample("extended-untouched", "-f qcow2 -o extended_l2=on,preallocation=metadata @ 4M", &[]),
    sample("reserved-metadata", "-f qcow2 -o preallocation=metadata @ 4M", MIXED),
    sample("reserved-falloc", "-f qcow2 -o preallocation=falloc @ 4M", MIXED),
    sample("reserved-full", "-f qcow2 -o preallocation=full @ 4M", &[Io("write -z 1M 64k")]),
    sample("zstd", "-f qcow2 -o compression_type=zstd @ 4M", MIXED),
    sample(
        "zstd-compressed",
        "-f qcow2 -o compression_type=zstd @ 4M",
        &[Io("write -c -P 1 0 64k"), Io("write -c -P 2 128k 64k"), Io("write -P 3 1M 64k")],
    ),
    sample(
        "compressed",
        "-f qcow2 @ 4M",
        &[Io("write -c -P 1 0 64k"), Io("write -c -P 2 64k 64k"), Io("write -P 9 4k 4k")],
    ),
    sample("compressed-2m", "-f qcow2 -o cluster_size=2M @ 8M", &[Io("write -c -P 1 2M 2M")]),
    sample(
        "compressed-extended",
        "-f qcow2 -o extended_l2=on @ 4M",
        &[Io("write -c -P 1 0 64k"), Io("write -P 2 70k 2k")],
    ),
    sample("data-file", "-f qcow2 -o data_file=@.data @ 4M", MIXED),
    sample("data-file-raw", "-f qcow2 -o data_file=@.data,data_file_raw=on @ 4M", MIXED),
    sample("data-file-extended", "-f qcow2 -o data_file=@.data,extended_l2=on @ 4M", MIXED),
    sample("over-raw", "-f qcow2 -b base.raw -F raw @", MIXED),
    sample("over-short-raw", "-f qcow2 -b short.raw -F raw @ 4M", MIXED),
    sample("over-long-raw", "-f qcow2 -b base.raw -F raw @ 1M", &[Io("write -P 4 0 4k")]),
    sample("over-qcow2", "-f qcow2 -b base.qcow2 -F qcow2 @", MIXED),
    sample("over-qcow2-small", "-f qcow2 -b base.qcow2 -F qcow2 -o cluster_size=512 @", MIXED),
    sample("over-short-qcow2", "-f qcow2 -b short.qcow2 -F qcow2 @ 4M", MIXED),
    sample("over-two", "-f qcow2 -b middle.qcow2 -F qcow2 @ 6M", &[Io("write -P 4 512k 64k")]),
    sample("over-extended", "-f qcow2 -b base.qcow2 -F qcow2 -o extended_l2=on @", MIXED),
    sample("over-in-folder", "-f qcow2 -u -b ../base.qcow2 -F qcow2 sub/@ 4M", &[]),
    sample("backing-gone", "-f qcow2 -u -b gone.raw -F raw @ 4M", &[]),
    sample(
        "snapshots",
        "-f qcow2 @ 4M",
        &[
            Io("write -P 1 0 200k"),
            Img("snapshot -c one @"),
            Io("write -P 2 0 64k"),
            Img("snapshot -c 'two words' @"),
            Io("write -P 3 1M 64k"),
        ],
    ),
    sample(
        "snapshots-v2",
        "-f qcow2 -o compat=0.10 @ 4M",
        &[Io("write -P 1 0 200k"), Img("snapshot -c one @")],
    ),
    sample(
        "bitmaps",
        "-f qcow2 @ 4M",
        &[
            Img("bitmap --add -g 512 @ first"),
            Img("bitmap --add -g 64k @ second"),
            Img("bitmap --disable @ second"),
            Io("write 0 64k"),
        ],
    ),
    sample(
        "aes",
        "-f qcow2 --object secret,id=s,data=x -o encrypt.format=aes,encrypt.key-secret=s @ 1M",
        &[],
    ),
    sample(
        "luks",
        "-f qcow2 --object secret,id=s,data=x -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 @ 1M",
        &[],
    ),
    sample(
        "luks-essiv",
        "-f qcow2 --object secret,id=s,data=x -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,\
         encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,\
         encrypt.hash-alg=sha512 @ 1M",
        &[],
    ),
    sample("raw", "-f raw @ 4M", &[Io("write -P 1 1M 100k")]),
    sample("raw-empty", "-f raw @ 0", &[]),
    sample("raw-full", "-f raw -o preallocation=full @ 1M", &[]),
];

#[test]
fn reports_match_qemu_img() {
    let root = tempfile::tempdir().unwrap();
    let ours = Path::new(env!("CARGO_BIN_EXE_qcow2-under-test"));
    let Some(both) = SideBySide::new(ours, root.path(), make) else { return };
    let lines: Vec<String> = SAMPLES.iter().flat_map(lines).collect();
    let (next, wrong) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let worker = || loop {
        let id = next.fetch_add(1, Ordering::Relaxed);
        let Some(line) = lines.get(id) else { return };
        let compared = both.run(line);
        if !compared.differences.is_empty() {
            wrong.lock().unwrap().push(format!("{line}\n{}", compared.differences));
        }
        if line.contains("--output=json") && compared.ours.code == Some(0) {
            serde_json::from_str::<Value>(&compared.ours.stdout).unwrap();
        }
    };
    thread::scope(|scope| {
        scope.spawn(worker);
        worker();
    });
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "{} of {} lines:\n\n{}", wrong.len(), lines.len(), wrong.join("\n"));
}

/// All command lines for one image.
fn lines(sample: &Sample) -> Vec<String> {
    let name =
        if sample.create.contains("sub/@") { format!("sub/{}", sample.name) } else { sample.name.into() };
    let mut lines = vec![
        format!("info --output=json {name}"),
        format!("info {name}"),
        format!("info --backing-chain --output=json {name}"),
        format!("info --backing-chain {name}"),
        format!("map --output=json {name}"),
        format!("map {name}"),
        format!("map --output=json --start-offset=100001 --max-length=300k {name}"),
    ];
    // We can check an encrypted image without its key; qemu-img does not try.
    if !sample.create.contains("encrypt.format") {
        lines.extend([
            format!("check --output=json {name}"),
            format!("check {name}"),
            format!("compare {name} plain"),
            format!("compare -s {name} {name}"),
            format!("compare -s plain {name}"),
            format!("compare {name} base.raw"),
        ]);
    }
    lines
}

fn make(qemu_img: &Tool, folder: &Path) {
    let qemu_io = Tool::find("qemu-io").expect("qemu-io beside qemu-img");
    let img = |line: &str| qemu_img.run_in(folder, &words(line)).success();
    let io = |line: &str| qemu_io.run_in(folder, &words(line)).success();
    fs::create_dir(folder.join("sub")).unwrap();
    img("create -q -f raw base.raw 4M");
    io("-f raw -c 'write -P 7 64k 700k' base.raw");
    fs::copy(folder.join("base.raw"), folder.join("short.raw")).unwrap();
    fs::File::options().write(true).open(folder.join("short.raw")).unwrap().set_len(1_000_001).unwrap();
    img("create -q -f qcow2 base.qcow2 4M");
    io("-c 'write -P 8 0 1M' -c 'write -z 256k 64k' base.qcow2");
    img("create -q -f qcow2 -o cluster_size=4k short.qcow2 300k");
    io("-c 'write -P 8 100k 150k' short.qcow2");
    img("create -q -f qcow2 -b short.qcow2 -F qcow2 middle.qcow2 2M");
    io("-c 'write -P 8 1M 70k' middle.qcow2");
    for sample in SAMPLES {
        let name =
            if sample.create.contains("sub/@") { format!("sub/{}", sample.name) } else { sample.name.into() };
        img(&format!("create -q {}", sample.create.replace('@', sample.name)));
        let format = if sample.create.starts_with("-f raw") { "raw" } else { "qcow2" };
        for step in sample.then {
            match step {
                Io(command) => drop(io(&format!("-f {format} -c '{command}' {name}"))),
                Img(line) => drop(img(&line.replace('@', &name))),
                Poke { offset, byte } => {
                    let mut bytes = fs::read(folder.join(&name)).unwrap();
                    bytes[*offset] = *byte;
                    fs::write(folder.join(&name), bytes).unwrap();
                }
            }
        }
    }
    assert!(SAMPLES.len() >= 40);
}
