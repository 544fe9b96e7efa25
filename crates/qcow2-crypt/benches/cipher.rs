//! Throughput of the ciphers on one core, 64 KiB at a time.
#![allow(missing_docs, reason = "criterion's macro generates undocumented functions")]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use qcow2_core::SectorNumbering;
use qcow2_crypt::{CipherAlg, CipherMode, CipherSpec, IvGen, Secret, SectorCipher};
use std::hint::black_box;

fn ciphers(c: &mut Criterion) {
    let mut group = c.benchmark_group("cipher");
    let mut data = vec![0x5a; 64 << 10];
    group.throughput(Throughput::Bytes(data.len() as u64));
    for (name, mode) in [
        ("aes-256", CipherMode::Xts),
        ("aes-128", CipherMode::Xts),
        ("aes-256", CipherMode::Cbc),
        ("aes-128", CipherMode::Cbc),
    ] {
        let Some(alg) = CipherAlg::from_name(name) else { continue };
        let spec = CipherSpec { alg, mode, ivgen: IvGen::Plain64, ivgen_hash: None };
        let key = Secret::new((0..spec.key_len()).map(|i| i as u8).collect());
        let Ok(cipher) = SectorCipher::new(&spec, &key, SectorNumbering::Host) else { continue };
        group.bench_function(format!("{name}-{}/encrypt", mode.name()), |b| {
            b.iter(|| cipher.encrypt_sectors(7, black_box(&mut data)));
        });
        group.bench_function(format!("{name}-{}/decrypt", mode.name()), |b| {
            b.iter(|| cipher.decrypt_sectors(7, black_box(&mut data)));
        });
    }
    group.finish();
}

criterion_group!(benches, ciphers);
criterion_main!(benches);
