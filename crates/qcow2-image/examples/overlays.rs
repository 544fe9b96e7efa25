//! How long a new overlay on an open chain takes: `cargo run --release --example overlays -- [FOLDER]
//! [COUNT]`. In memory, and in files with their locks in FOLDER (a temporary one by default; in `/dev/shm` no
//! disk is waited for). Prints the median of COUNT overlays that stay open side by side, in microseconds.
#![allow(clippy::print_stdout, reason = "the example prints what it measures")]

use qcow2_image::core::{CreateOptions, Image, OpenOptions, ResolvedSource};
use qcow2_image::io::MemoryStorage;
use qcow2_image::{Disk, ImageFormat, NewDisk};
use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

const SIZE: u64 = 10 << 30;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let parent = args.next().map_or_else(std::env::temp_dir, PathBuf::from);
    let count = args.next().map_or(Ok(1000), |count| count.parse())?;
    let dir = tempfile::Builder::new().prefix("overlays").tempdir_in(parent)?;
    Disk::create(dir.path().join("base.qcow2"), SIZE)?.close()?;
    let base = Disk::open(dir.path().join("base.qcow2"))?;
    let below = base.as_guest_disk();
    let new = CreateOptions::new(SIZE).with_backing("base.qcow2", "qcow2");
    median("in memory, Image::create_on", count, |_| {
        let source = ResolvedSource::new(Arc::new(MemoryStorage::new()), ImageFormat::Qcow2, "memory");
        Image::create_on(&source, &new, &OpenOptions::default(), Arc::clone(below)).map_err(Into::into)
    })?;
    let new = NewDisk::qcow2().backing_file("base.qcow2", ImageFormat::Qcow2);
    let path = |name: &str, id: usize| dir.path().join(format!("{name}{id}.qcow2"));
    median("in files, NewDisk::create_on", count, |id| {
        new.create_on(path("on", id), &base).map_err(Into::into)
    })?;
    median("in files, NewDisk::create, which opens the base", count, |id| {
        new.create(path("alone", id)).map_err(Into::into)
    })
}

fn median<T>(
    name: &str,
    count: usize,
    mut make: impl FnMut(usize) -> Result<T, Box<dyn Error>>,
) -> Result<(), Box<dyn Error>> {
    let mut made = Vec::with_capacity(count);
    let mut times: Vec<Duration> = Vec::with_capacity(count);
    for id in 0..count {
        let start = Instant::now();
        made.push(make(id)?);
        times.push(start.elapsed());
    }
    times.sort_unstable();
    let at = |part: usize| times.get(count * part / 100).map_or(0.0, |time| time.as_secs_f64() * 1e6);
    println!("{name}: median {:.1} us, 99 of 100 within {:.1} us", at(50), at(99));
    Ok(())
}
