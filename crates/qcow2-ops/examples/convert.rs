//! Converts a disk with all processors; this program opens the files and starts the threads.
//!
//! ```text
//! cargo run -p qcow2-ops --example convert                          # converts a generated sample disk
//! # or your own; the format follows from the target's extension
//! cargo run -p qcow2-ops --example convert -- disk.raw disk.qcow2
//! cargo run -p qcow2-ops --example convert -- -c disk.raw disk.qcow2
//! ```
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    clippy::print_stdout,
    reason = "a program opens files, starts threads and reads the clock"
)]

use qcow2_codec::{Deflate, Zstd};
use qcow2_core::format::header::CompressionType;
use qcow2_core::{
    Codecs, CreateOptions, GuestDisk, Image, ImageFormat, OpenOptions, RawDisk, create, open_disk,
};
use qcow2_io::{CacheMode, Create, OpenFile, Policy, SourceOptions, open_source};
use qcow2_ops::{ConvertOptions, Executor, Silent, convert, converted_size};
use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

struct Threads(usize);

impl Executor for Threads {
    fn workers(&self) -> usize {
        self.0
    }

    fn run(&self, job: &(dyn Fn(usize) + Sync)) {
        std::thread::scope(|scope| {
            for worker in 0..self.0 {
                scope.spawn(move || job(worker));
            }
        });
    }
}

#[derive(Default)]
struct Request {
    compress: bool,
    zstd: bool,
    threads: Option<usize>,
    files: Vec<PathBuf>,
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut request = Request::default();
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "-c" => request.compress = true,
            "-z" => (request.compress, request.zstd) = (true, true),
            "-t" => request.threads = args.next().and_then(|n| n.parse().ok()),
            _ => request.files.push(arg.into()),
        }
    }
    match &request.files[..] {
        [] => sample(&request),
        [from, to] => convert_file(&request, from, to),
        _ => Err("give a source and a target".into()),
    }
}

fn sample(request: &Request) -> Result<(), Box<dyn Error>> {
    let folder = tempfile::tempdir()?;
    let (raw, image, back) =
        (folder.path().join("disk.raw"), folder.path().join("disk.qcow2"), folder.path().join("back.raw"));
    let mut bytes = vec![0; 64 << 20];
    bytes[5 << 20..6 << 20].fill(b'x');
    std::fs::write(&raw, &bytes)?;
    convert_file(request, &raw, &image)?;
    convert_file(request, &image, &back)?;
    assert!(std::fs::read(&back)? == bytes, "the round trip changed the disk");
    Ok(())
}

fn codecs() -> Codecs {
    Codecs::new(Arc::new(Deflate::default()), Arc::new(Zstd::default()))
}

fn convert_file(request: &Request, from: &Path, to: &Path) -> Result<(), Box<dyn Error>> {
    let began = Instant::now();
    let mut open = OpenOptions::default();
    open.codecs = codecs();
    let options = SourceOptions::new(OpenFile::read_only()).with_policy(Policy::Allow);
    let source = open_disk(open_source(from, &options)?, &open)?;
    let size = converted_size(std::slice::from_ref(&source))?;
    let target = create_target(request, to, size)?;
    let mut options = ConvertOptions::default();
    options.target_is_zero = true;
    options.compress = request.compress && target.as_image().is_some();
    let threads = request.threads.unwrap_or(std::thread::available_parallelism()?.get());
    let report = convert(&[source], &*target, &options, &Threads(threads), &Silent)?;
    match target.as_image() {
        Some(image) => image.close()?,
        None => target.flush()?,
    }
    println!(
        "{} -> {}: {} MiB, of which {} MiB of data and {} compressed clusters were written, {:.2} s",
        from.display(),
        to.display(),
        size >> 20,
        report.data_bytes >> 20,
        report.compressed_clusters,
        began.elapsed().as_secs_f64()
    );
    Ok(())
}

fn create_target(request: &Request, to: &Path, size: u64) -> Result<Arc<dyn GuestDisk>, Box<dyn Error>> {
    let file = OpenFile::writable().with_create(Create::Truncate).with_cache(CacheMode::Unsafe);
    let storage = file.open(to)?;
    if to.extension().is_none_or(|extension| extension != "qcow2") {
        storage.set_len(size)?;
        return Ok(Arc::new(RawDisk::new(storage, true)?));
    }
    let mut options = CreateOptions::new(size);
    if request.zstd {
        options.compression_type = CompressionType::Zstd;
    }
    create(&storage, None, &options)?;
    drop(storage);
    let options = SourceOptions::new(OpenFile::writable().with_cache(CacheMode::Unsafe));
    let source = open_source(to, &options.with_format(ImageFormat::Qcow2))?;
    let mut open = OpenOptions::default();
    open.writable = true;
    open.codecs = codecs();
    Ok(Image::open(source, &open)?)
}
