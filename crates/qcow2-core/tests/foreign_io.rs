//! Prepared writes whose bytes the caller writes through its own file descriptor, bypassing the storage.
#![cfg(unix)]
#![allow(missing_docs, clippy::unwrap_used)]

use qcow2_core::{
    CreateOptions, GuestOffset, GuestRange, Image, ImageFormat, OpenOptions, Piece, ResolvedSource,
};
use qcow2_io::OpenFile;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

const CLUSTER: u64 = 64 << 10;

fn source(path: &Path) -> ResolvedSource {
    ResolvedSource::new(OpenFile::writable().open(path).unwrap(), ImageFormat::Qcow2, "image")
}

fn new_image(path: &Path) -> Arc<Image> {
    Image::create(source(path), &CreateOptions::new(64 << 20), &OpenOptions::writable()).unwrap()
}

/// Prepare, move, commit, until all of `bytes` is written.
fn write(image: &Image, file: &File, mut at: u64, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        let range = GuestRange::new(GuestOffset::new(at), bytes.len() as u64).unwrap();
        let ticket = image.prepare_write(range).unwrap();
        let (now, later) = bytes.split_at(ticket.range().len() as usize);
        for piece in ticket.pieces() {
            match piece {
                Piece::Guest { host } => file.write_all_at(now, host.value()).unwrap(),
                Piece::Bytes { host, bytes } => file.write_all_at(bytes, host.value()).unwrap(),
                Piece::Zeroes { host, len } => {
                    file.write_all_at(&vec![0; len as usize], host.value()).unwrap()
                }
                other => panic!("{other:?}"),
            }
        }
        ticket.commit().unwrap();
        (at, bytes) = (at + now.len() as u64, later);
    }
}

fn read(image: &Image, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![1; len];
    image.read_at(GuestOffset::new(at), &mut bytes).unwrap();
    bytes
}

/// `FileStorage` caches its length. If the caller's writes grow the file unnoticed, the next `set_len`
/// truncates them.
#[test]
fn close_does_not_truncate_moved_data() {
    let path = tempfile::NamedTempFile::new().unwrap();
    let image = new_image(path.path());
    // Leaves the cached length inside a cluster, so that close pads it.
    image.write_at(GuestOffset::new(32 << 20), b"short").unwrap();
    let bytes: Vec<u8> = (0..9_000_000u32).map(|i| (i / 251) as u8).collect();
    write(&image, &path.reopen().unwrap(), 1000, &bytes);
    image.close().unwrap();
    drop(image);
    let image = Image::open(source(path.path()), &OpenOptions::read_only()).unwrap();
    assert!(read(&image, 1000, bytes.len()) == bytes);
}

/// A cluster past the cached end of the file counts as a hole: its edges would not be zeroed, and old data
/// would show through.
#[test]
fn reused_cluster_does_not_expose_old_data() {
    let path = tempfile::NamedTempFile::new().unwrap();
    let image = new_image(path.path());
    let file = path.reopen().unwrap();
    write(&image, &file, 0, &[0xaa; 8 * CLUSTER as usize]);
    image.flush().unwrap();
    image.discard(GuestRange::new(GuestOffset::new(0), 8 * CLUSTER).unwrap()).unwrap();
    for _ in 0..3 {
        image.flush().unwrap();
    }
    for cluster in 0..8 {
        image.write_at(GuestOffset::new((100 + cluster) * CLUSTER), b"short").unwrap();
        write(&image, &file, (200 + cluster) * CLUSTER + 700, b"short");
    }
    for cluster in 0..8 {
        let bytes = read(&image, (100 + cluster) * CLUSTER, CLUSTER as usize);
        assert!(bytes[..5] == *b"short" && bytes[5..].iter().all(|&b| b == 0), "cluster {cluster}");
        let bytes = read(&image, (200 + cluster) * CLUSTER, CLUSTER as usize);
        assert!(bytes.iter().filter(|&&b| b != 0).count() == 5, "cluster {cluster}");
    }
    image.close().unwrap();
}

/// Dropping a ticket frees its clusters again; the file stays grown.
#[test]
fn dropped_ticket_frees_its_clusters() {
    let path = tempfile::NamedTempFile::new().unwrap();
    let image = new_image(path.path());
    let range = GuestRange::new(GuestOffset::new(0), CLUSTER).unwrap();
    let place = |ticket: &qcow2_core::WriteTicket<'_>| match ticket.pieces().next() {
        Some(Piece::Guest { host }) => host,
        other => panic!("{other:?}"),
    };
    let first = place(&image.prepare_write(range).unwrap());
    assert_eq!(place(&image.prepare_write(range).unwrap()), first);
    let end = first.value() + CLUSTER;
    assert!(path.as_file().metadata().unwrap().len() >= end, "the file covers the pieces");
}
