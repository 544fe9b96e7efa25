//! qemu-img reads clusters that these codecs compressed, in a hand-made image.

use crate::mixed;
use qcow2_codec::{Deflate, DeflateOptions, Zstd};
use qcow2_core::ClusterCodec;
use qcow2_testkit::oracle::Tool;
use std::fs;

const CLUSTER_BITS: u32 = 16;
const CLUSTER: usize = 1 << CLUSTER_BITS;

/// A version 3 image whose clusters are all compressed: header, refcount table, refcount block, L1 and L2
/// table in the first five clusters, then the streams, each starting at a sector.
fn image(codec: &dyn ClusterCodec, zstd: bool, plain: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 5 * CLUSTER];
    let put32 = |file: &mut Vec<u8>, at: usize, v: u32| file[at..at + 4].copy_from_slice(&v.to_be_bytes());
    let put64 = |file: &mut Vec<u8>, at: usize, v: u64| file[at..at + 8].copy_from_slice(&v.to_be_bytes());
    file[..4].copy_from_slice(b"QFI\xfb");
    put32(&mut file, 4, 3);
    put32(&mut file, 20, CLUSTER_BITS);
    put64(&mut file, 24, plain.len() as u64);
    put32(&mut file, 36, 1); // L1 entries
    put64(&mut file, 40, 3 * CLUSTER as u64); // L1 table
    put64(&mut file, 48, CLUSTER as u64); // refcount table
    put32(&mut file, 56, 1); // its clusters
    put64(&mut file, 72, if zstd { 1 << 3 } else { 0 }); // compression type is not deflate
    put32(&mut file, 96, 4); // refcount order
    put32(&mut file, 100, 112); // header length
    file[104] = u8::from(zstd);
    put64(&mut file, CLUSTER, 2 * CLUSTER as u64);
    put64(&mut file, 3 * CLUSTER, (4 * CLUSTER as u64) | (1 << 63));
    let mut stream = vec![0; CLUSTER - 1];
    for (i, cluster) in plain.chunks_exact(CLUSTER).enumerate() {
        let len = codec.compress(cluster, &mut stream).unwrap().expect("shrinks");
        let offset = file.len() as u64;
        let more_sectors = (len as u64 - 1) / 512;
        let descriptor = (1 << 62) | (more_sectors << (62 - (CLUSTER_BITS - 8))) | offset;
        put64(&mut file, 4 * CLUSTER + 8 * i, descriptor);
        file.extend_from_slice(&stream[..len]);
        file.resize(file.len().next_multiple_of(512), 0xee); // the rest of the sector is garbage
        for host in offset as usize / CLUSTER..=(offset as usize + len - 1) / CLUSTER {
            file[2 * CLUSTER + 2 * host + 1] += 1;
        }
    }
    for host in 0..5 {
        file[2 * CLUSTER + 2 * host + 1] = 1;
    }
    file
}

fn check(name: &str, codec: &dyn ClusterCodec, zstd: bool) {
    let mut plain = mixed(15 * CLUSTER, 3);
    plain.extend([0; CLUSTER]);
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.raw"), &plain).unwrap();
    fs::write(dir.path().join("a.qcow2"), image(codec, zstd, &plain)).unwrap();
    let Some(qemu_img) = Tool::find("qemu-img") else { return };
    let checked = qemu_img.run_in(dir.path(), &["check", "-f", "qcow2", "a.qcow2"]);
    assert_eq!(checked.code, Some(0), "{name}: {checked}");
    let args = ["compare", "-f", "raw", "-F", "qcow2", "a.raw", "a.qcow2"];
    let compared = qemu_img.run_in(dir.path(), &args);
    assert_eq!(compared.code, Some(0), "{name}: {compared}");
}

#[test]
fn qemu_img_reads_deflate_of_every_level() {
    for level in 1..=9 {
        let codec = Deflate::new(DeflateOptions::default().level(level)).unwrap();
        check(&format!("deflate {level}"), &codec, false);
    }
}

#[test]
fn qemu_img_reads_zstd() {
    for level in [1, 3, 12] {
        check(&format!("zstd {level}"), &Zstd::new(level).unwrap(), true);
    }
}
