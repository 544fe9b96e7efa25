//! Runs the block device of the example `vmm` with four queues, and compares it with four byte arrays.
#![cfg(unix)]
#![allow(missing_docs, clippy::unwrap_used)]

mod common;
#[allow(dead_code, reason = "`main` is not used here")]
#[path = "../examples/vmm.rs"]
mod vmm;

use common::{Folder, assert_clean, content, pattern};
use qcow2_image::{Disk, ImageFormat, NewDisk};
use qcow2_testkit::rng::Rng;
use std::sync::mpsc::channel;
use vmm::{Device, Request, ask};

const MIB: u64 = 1 << 20;
/// Guest bytes that one queue works on.
const PART: u64 = 4 * MIB;

#[test]
fn four_queues_match_their_models_while_the_disk_grows() {
    let folder = Folder::new();
    let path = folder.path("disk.qcow2");
    Disk::create(&path, 4 * PART).unwrap().close().unwrap();
    let models = run(&path, [(); 4].map(|()| vec![0; PART as usize]));
    check(&folder, &models);
}

#[test]
fn image_with_an_external_data_file_is_refused() {
    let folder = Folder::new();
    let path = folder.path("disk.qcow2");
    NewDisk::qcow2().size(MIB).data_file("data.raw").create(&path).unwrap().close().unwrap();
    assert!(Device::open(&path).is_err());
}

#[test]
fn four_queues_on_a_compressed_image() {
    let folder = Folder::new();
    let raw = pattern(4 * PART as usize, 5);
    std::fs::write(folder.path("base.raw"), &raw).unwrap();
    let base = Disk::options().format(ImageFormat::Raw).open(folder.path("base.raw")).unwrap();
    let path = folder.path("disk.qcow2");
    base.convert().compress().to(&path, &NewDisk::qcow2()).unwrap();
    let models = run(&path, [0, 1, 2, 3].map(|i| raw[i * PART as usize..(i + 1) * PART as usize].to_vec()));
    check(&folder, &models);
}

/// Serves four queues for four guests, each on its own part of the disk. Returns the models of the parts.
fn run(path: &std::path::Path, models: [Vec<u8>; 4]) -> [Vec<u8>; 4] {
    let device = Device::open(path).unwrap();
    let models = std::thread::scope(|scope| {
        let guests = std::array::from_fn(|index| {
            let (sender, queue) = channel();
            scope.spawn(|| device.serve(queue).unwrap());
            let (mut model, mut rng) = (models[index].clone(), Rng::new(index as u64 + 1));
            scope.spawn(move || {
                for step in 0..150 {
                    one_request(&sender, (index as u64 * PART, &mut model), &mut rng, step);
                }
                model
            })
        });
        for step in 1..=20 {
            device.0.resize(4 * PART + step * MIB).unwrap();
        }
        guests.map(|guest: std::thread::ScopedJoinHandle<'_, Vec<u8>>| guest.join().unwrap())
    });
    device.0.close().unwrap();
    models
}

type Queue = std::sync::mpsc::Sender<(Request, std::sync::mpsc::Sender<Vec<u8>>)>;

fn one_request(queue: &Queue, (start, model): (u64, &mut [u8]), rng: &mut Rng, step: u8) {
    let len = 1 + rng.below(200_000);
    let at = rng.below(PART - len);
    let part = at as usize..(at + len) as usize;
    match rng.below(8) {
        0..=3 => {
            let bytes = pattern(len as usize, step);
            model[part].copy_from_slice(&bytes);
            ask(queue, Request::Write(start + at, bytes)).unwrap();
        }
        4 => {
            // Whole clusters only: the content of partly discarded clusters is unspecified.
            let range = at.next_multiple_of(65_536)..(at + len) / 65_536 * 65_536;
            if range.start < range.end {
                ask(queue, Request::Discard(start + range.start..start + range.end)).unwrap();
                model[range.start as usize..range.end as usize].fill(0);
            }
        }
        5 => drop(ask(queue, Request::Flush).unwrap()),
        _ => {
            let read = ask(queue, Request::Read(start + at, len as usize)).unwrap();
            assert!(read == model[part], "{len} bytes at {at} of the part at {start}");
        }
    }
}

fn check(folder: &Folder, models: &[Vec<u8>; 4]) {
    let path = folder.path("disk.qcow2");
    assert_clean(&path);
    let mut expected = models.concat();
    expected.resize((4 * PART + 20 * MIB) as usize, 0);
    assert!(content(&Disk::open(&path).unwrap()) == expected);
    folder.ask_qemu("driver=qcow2,file.filename=disk.qcow2", None, &expected);
}
