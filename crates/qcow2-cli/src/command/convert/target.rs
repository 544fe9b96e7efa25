//! The target of `convert`: made anew, or there already.

use super::request::Request;
use crate::args::ImageArgs;
use crate::failure::Failure;
use crate::files::open_files;
use crate::newimage::{make_if, set_backing, target_of};
use crate::open::{open_target, read_name};
use crate::persona;
use crate::session::Session;
use qcow2_blockdev::{CreateFailureKind, KeptBacking, NewOptions, OpenedDisk, new_image_format};
use qcow2_core::format::Version;
use qcow2_core::{GuestDisk, ImageFormat};
use qcow2_terminal::Interrupts;
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
        let format = new_image_format(request.target.format())?;
        let made = target_of(&request.target.name, &format)?;
        let options = settle(request, &format, sources, size)?;
        // What it is to stand on is not emptied for it.
        let _kept = options.text("backing_file").map(|backing| {
            let format = options.text("backing_fmt").map(str::to_owned);
            let args = ImageArgs { format, ..args.clone() };
            // What cannot be opened is complained of when the new image is.
            let kept = KeptBacking::unopened(open_files(), &request.target.name, backing);
            kept.with_what_opens(&args.naming(), &args.options())
        });
        // What is wrong with the new image is said before an unknown cache mode.
        let agree = || request.target.cache().is_ok();
        if let Err(failure) = make_if(session, (&made, &options), &args.objects, interrupts, &agree) {
            if matches!(failure.kind(), CreateFailureKind::Disagreed) {
                request.target.cache()?;
            }
            let what = format!("error while converting {}", format.name());
            return Err(Failure::from(failure).about(&what).about(&request.target.name));
        }
        made.into_name(&request.target.name, &options, args.objects.secrets())
    } else {
        request.check_zero_target(request.target.backing.is_some())?;
        check_single(sources, request.target.backing.is_some())?;
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
    let opened = open_target(session, &name, &how)?;
    if request.copy.bitmaps && opened.format != ImageFormat::Qcow2 {
        let name = opened.format.name();
        return Err(Failure::new(format!("Format driver '{name}' does not support bitmaps")));
    }
    let target = opened.disk;
    if request.copy.compress && target.as_image().is_none() {
        return Err(Failure::new(NO_COMPRESSION));
    }
    Ok(target)
}

/// The options of the new image, checked against each other and against the sources.
fn settle(
    request: &Request,
    format: &ImageFormat,
    sources: &[OpenedDisk],
    size: u64,
) -> Result<NewOptions, Failure> {
    let mut options = NewOptions::parse(format, &request.target.list)?;
    set_backing(&mut options, &request.target.backing, &request.target.backing_format)?;
    options.set_number("size", size);
    let has_backing = options.text("backing_file").is_some();
    check_single(sources, has_backing)?;
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
    // Before it is made.
    if request.copy.bitmaps && *format == ImageFormat::Raw {
        return request.target.cache().and(Err(Failure::new("Format driver 'raw' does not support bitmaps")));
    }
    Ok(options)
}

fn check_single(sources: &[OpenedDisk], has_backing: bool) -> Result<(), Failure> {
    if has_backing && sources.len() > 1 {
        return Err(Failure::new(
            "Having a backing file for the target makes no sense when concatenating multiple input images",
        ));
    }
    Ok(())
}

fn check_compression(options: &NewOptions) -> Result<(), Failure> {
    let encrypted = options.switch("encryption") || options.text("encrypt.format").is_some();
    let preallocated = options.text("preallocation").is_some_and(|mode| mode != "off");
    let text = match options.format() {
        ImageFormat::Qcow2 if encrypted => "Compression and encryption not supported at the same time",
        ImageFormat::Qcow2 if preallocated => "Compression and preallocation not supported at the same time",
        ImageFormat::Qcow2 => return Ok(()),
        _ => NO_COMPRESSION,
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
    Ok(())
}
