//! The target of `convert`: made anew, or there already.

use super::request::Request;
use crate::args::ImageArgs;
use crate::failure::Failure;
use crate::files::open_files;
use crate::imageopts::{ImageOptions, TargetFormat};
use crate::interrupt::Interrupts;
use crate::newimage;
use crate::open::{open_target, read_name};
use crate::persona;
use crate::session::Session;
use qcow2_blockdev::{Driver, KeptBacking, NewTarget, OpenedDisk, open_backing};
use qcow2_core::GuestDisk;
use qcow2_core::format::Version;
use std::sync::Arc;

/// Makes the target of `size` bytes, unless it is to exist, and opens it for writing.
pub(super) fn open(
    session: &Session,
    request: &Request,
    sources: &[OpenedDisk],
    size: u64,
    interrupts: &Interrupts,
) -> Result<Arc<dyn GuestDisk>, Failure> {
    let objects = request.source.args.objects.clone();
    let mut args = ImageArgs { format: request.target.format.clone(), objects, ..ImageArgs::default() };
    let name = if request.target.create {
        TargetFormat::parse(request.target.format())?;
        let made = match NewTarget::parse(&request.target.name) {
            Err(reason) if !request.target.name.is_empty() => {
                return Err(Failure::new(persona::in_one_line(&reason)));
            }
            target => target.unwrap_or(NewTarget::File(String::new())),
        };
        let options = settle(request, sources, size)?;
        request.target.cache()?;
        // What it is to stand on is not emptied for it.
        let _kept = options.text("backing_file").map(|backing| {
            let (new, format) = (&request.target.name, options.text("backing_fmt"));
            let kept = KeptBacking::unopened(open_files(), new, backing);
            // What cannot be opened is complained of when the new image is.
            let (format, objects) = (format.map(str::to_owned), options.objects().clone());
            let args = ImageArgs { format, objects, ..ImageArgs::default() };
            match open_backing(new, backing, &args.naming(), &args.options()) {
                Ok(chain) => kept.with(chain),
                Err(_) => kept,
            }
        });
        let format = options.format().name();
        newimage::make(session, &made, &options, interrupts).map_err(|not_made| {
            Failure::from(not_made)
                .about(&format!("error while converting {format}"))
                .about(&request.target.name)
        })?;
        let driver = options.format().driver();
        let key = if driver == Driver::Luks { "key-secret" } else { "encrypt.key-secret" };
        let secret = options.text(key).map(|id| (key, id));
        made.into_name(&request.target.name, driver, secret, args.objects.secrets())
    } else {
        args.image_opts = request.target.image_opts;
        args.check()?;
        if !args.image_opts && args.format.is_none() {
            args.format = Some("raw".to_owned());
        }
        check_bitmaps(request, sources)?;
        request.target.cache()?;
        read_name(session, &request.target.name, &args)?
    };
    let mut how = args.options().with_cache(request.target.cache()?);
    how.bytes_per_second = request.target.bytes_per_second;
    how.codecs = Some(request.copy.compression.codecs()?);
    let target = open_target(session, &name, &how)?.disk;
    if request.copy.compress && target.as_image().is_none() {
        return Err(Failure::new(NO_COMPRESSION));
    }
    Ok(target)
}

/// The options of the new image, checked against each other and against the sources.
fn settle(request: &Request, sources: &[OpenedDisk], size: u64) -> Result<ImageOptions, Failure> {
    let format = TargetFormat::parse(request.target.format())?;
    let mut options = ImageOptions::parse(format, &request.target.list)?;
    options.set_objects(&request.source.args.objects);
    if (request.target.backing.is_some() || request.target.backing_format.is_some()) && !format.is_layered() {
        let what = if request.target.backing.is_some() { "file" } else { "file format" };
        return Err(Failure::new(format!(
            "Backing {what} not supported for file format '{}'",
            format.name()
        )));
    }
    if let Some(backing) = &request.target.backing {
        options.set_text("backing_file", backing);
    }
    if let Some(backing_format) = &request.target.backing_format {
        options.set_text("backing_fmt", backing_format);
    }
    options.set_number("size", size);
    let has_backing = options.text("backing_file").is_some();
    if has_backing && sources.len() > 1 {
        return Err(Failure::new(
            "Having a backing file for the target makes no sense when concatenating multiple input images",
        ));
    }
    if options.text("backing_file") == Some("") {
        return Err(Failure::new("Expected backing file name, got empty string"));
    }
    if has_backing && options.text("backing_fmt").is_none() {
        return Err(Failure::new("Use of backing file requires explicit backing format"));
    }
    if request.copy.compress {
        check_compression(&options)?;
    }
    check_bitmaps(request, sources)?;
    Ok(options)
}

fn check_compression(options: &ImageOptions) -> Result<(), Failure> {
    let encrypted = options.switch("encryption") || options.text("encrypt.format").is_some();
    let preallocated = options.text("preallocation").is_some_and(|mode| mode != "off");
    let text = match options.format() {
        TargetFormat::Raw | TargetFormat::Luks => NO_COMPRESSION,
        TargetFormat::Qcow2 if encrypted => "Compression and encryption not supported at the same time",
        TargetFormat::Qcow2 if preallocated => "Compression and preallocation not supported at the same time",
        TargetFormat::Qcow2 => return Ok(()),
    };
    Err(Failure::new(text))
}

const NO_COMPRESSION: &str = "Compression not supported for this file format";

fn check_bitmaps(request: &Request, sources: &[OpenedDisk]) -> Result<(), Failure> {
    let Some(source) = sources.first().filter(|_| request.copy.bitmaps) else {
        return Ok(());
    };
    if sources.len() > 1 {
        return Err(Failure::new("Copying bitmaps only possible with single source"));
    }
    let with_bitmaps = source.disk.as_image().filter(|image| image.header().version >= Version::V3);
    let image = with_bitmaps.ok_or_else(|| Failure::new("Source lacks bitmap support"))?;
    let bitmaps = image.bitmaps().map_err(|error| Failure::new(persona::chain(&error)))?;
    let broken = bitmaps.iter().find(|bitmap| bitmap.in_use && !request.copy.skip_broken_bitmaps);
    if let Some(bitmap) = broken {
        let name = bitmap.name_text();
        return Err(Failure::new(format!("Cannot copy inconsistent bitmap '{name}'"))
            .hint("Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it"));
    }
    if request.target.format() == "raw" && !request.target.image_opts {
        return Err(Failure::new("Format driver 'raw' does not support bitmaps"));
    }
    Ok(())
}
