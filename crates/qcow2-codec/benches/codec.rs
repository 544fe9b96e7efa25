//! Throughput of compressing and expanding one cluster: 64 KiB of text-like data.
#![allow(missing_docs, reason = "the macros make public functions")]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use qcow2_codec::{Deflate, DeflateOptions, Zstd};
use qcow2_core::ClusterCodec;
use std::hint::black_box;

const CLUSTER: usize = 65536;

/// Words of a small vocabulary in a fixed pseudo-random order. Compresses to about a third, like many files.
fn text() -> Vec<u8> {
    let words =
        b"cluster refcount table offset guest host entry image backing snapshot write read zero data ";
    let words: Vec<&[u8]> = words.split_inclusive(|&b| b == b' ').collect();
    let mut out = Vec::with_capacity(CLUSTER + 16);
    let mut x = 0x9e37_79b9_7f4a_7c15_u64;
    while out.len() < CLUSTER {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        out.extend_from_slice(words[(x >> 32) as usize % words.len()]);
        out.extend_from_slice(&x.to_le_bytes()[..(x & 3) as usize]);
    }
    out.truncate(CLUSTER);
    out
}

fn bench(c: &mut Criterion, name: &str, codec: &dyn ClusterCodec) {
    let plain = text();
    let mut stream = vec![0; CLUSTER - 1];
    let len = codec.compress(&plain, &mut stream).expect("compresses").expect("fits");
    let mut group = c.benchmark_group(name);
    group.throughput(Throughput::Bytes(CLUSTER as u64));
    group.bench_function("compress", |b| {
        let mut out = vec![0; CLUSTER - 1];
        b.iter(|| codec.compress(black_box(&plain), &mut out));
    });
    group.bench_function("expand", |b| {
        let mut back = vec![0; CLUSTER];
        b.iter(|| codec.expand(black_box(&stream[..len]), &mut back));
    });
    group.finish();
}

fn codecs(c: &mut Criterion) {
    for level in [1, 6, 9] {
        if let Ok(codec) = Deflate::new(DeflateOptions::default().level(level)) {
            bench(c, &format!("deflate-{level}"), &codec);
        }
    }
    bench(c, "zstd-3", &Zstd::default());
}

criterion_group!(benches, codecs);
criterion_main!(benches);
