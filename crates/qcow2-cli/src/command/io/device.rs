//! Opens what the exerciser asks for: files with their chains, scratch overlays, copies to the top layer.

use crate::args::{ImageArgs, Objects};
use crate::failure::Failure;
use crate::persona::{self, NATIVE_NEEDS_DIRECT, SHARED_AND_WRITABLE};
use qcow2_blockdev::{
    ImageName, KeyValues, Warning, bitmaps_to_lose, escape_commas, open_bytes, open_scratch,
};
use qcow2_core::ImageFormat;
use qcow2_exerciser::{OpenRequest, OpenedDisk, Opener, Refusal};
use qcow2_io::{CacheMode, CopyOnRead, GuardedRaw};
use std::fs::File;
use std::io::{self, Read};
use std::sync::Arc;

/// Opens files.
pub(super) struct Files {
    /// What names may speak of.
    pub(super) objects: Objects,
    /// Whether reasons are in our own words.
    pub(super) own: bool,
}

impl Opener for Files {
    fn open(&self, request: &OpenRequest) -> Result<OpenedDisk, Refusal> {
        let request = understood(request).map_err(Refusal::new)?;
        open(&request, &self.objects).map_err(|failure| {
            let failure = failure.without_name();
            let failure = if self.own { failure.own_reason() } else { failure };
            let mut lines = failure.lines("", "").into_iter();
            let reason = lines.next().unwrap_or_default();
            Refusal { reason: reason.trim_start_matches(": ").to_owned(), hints: lines.collect() }
        })
    }

    fn read_file(&self, name: &str, limit: u64) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        File::open(name)?.take(limit).read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

/// The request with the options that are about opening taken out of its option strings. Errors: the reason.
fn understood(request: &OpenRequest) -> Result<OpenRequest, String> {
    let mut request = request.clone();
    let list = match request.options.is_empty() {
        true => KeyValues::default(),
        false => KeyValues::parse_pairs(&request.options.join(","), None)
            .map_err(|error| Failure::from(error).to_string())?,
    };
    let mut rest = Vec::new();
    let (mut direct, mut no_flush) = (None, None);
    for pair in list.pairs() {
        let on = || match &*pair.value {
            "on" => Ok(true),
            "off" => Ok(false),
            _ => Err(format!("Parameter '{}' expects 'on' or 'off'", pair.key)),
        };
        match &*pair.key {
            "read-only" => request.read_only = on()?,
            "force-share" => request.force_share = on()?,
            "cache.direct" => direct = Some(on()?),
            "cache.no-flush" => no_flush = Some(on()?),
            "discard" => request.set_discard(Some(&pair.value))?,
            _ => rest.push(format!("{}={}", pair.key, escape_commas(&pair.value))),
        }
    }
    request.options = rest;
    request.cache = request.cache.with_flags(direct, no_flush);
    if request.force_share && !request.read_only {
        return Err(SHARED_AND_WRITABLE.to_owned());
    }
    if request.native_aio && !request.cache.is_direct() {
        return Err(NATIVE_NEEDS_DIRECT.to_owned());
    }
    Ok(request)
}

fn open(request: &OpenRequest, objects: &Objects) -> Result<OpenedDisk, Failure> {
    let (typed, args) = name_and_args(request, objects);
    let name = ImageName::parse(&typed, &args.naming())?;
    // Durable writes are made by flushing after each, above the image; its own tables need no flush each.
    let cache = match request.cache {
        CacheMode::None | CacheMode::Directsync => CacheMode::None,
        CacheMode::Unsafe => CacheMode::Unsafe,
        _ => CacheMode::Writeback,
    };
    let guessed = name.node.is_probed();
    let scratch = request.snapshot && !request.read_only;
    let writable = !request.read_only;
    let mut how = args.options().with_cache(cache);
    how.writable = writable && !scratch;
    let opened = qcow2_blockdev::open(&name, &how)?;
    let debugger = opened.debugger.clone();
    let (mut disk, format) = match scratch {
        true => {
            let size = opened.disk.size();
            drop(opened);
            let base = open_bytes(&name, &how)?.source;
            let disk = open_scratch(base, size, name.keys.above());
            (disk.map_err(|error| persona::engine_failure("", &error))?, ImageFormat::Qcow2)
        }
        false => (opened.disk, opened.format),
    };
    let mut warnings = Vec::new();
    if guessed && writable && format == ImageFormat::Raw {
        disk = Arc::new(GuardedRaw::new(disk));
        warnings = persona::warning(&Warning::GuessedRaw(name.typed.clone()));
    }
    if let Some(image) = disk.as_image().filter(|_| how.writable) {
        let lost = bitmaps_to_lose(&**image.storage(), &image.header());
        warnings.extend(lost.iter().flat_map(persona::warning_lines));
    }
    if request.copy_on_read && writable {
        disk = Arc::new(CopyOnRead::new(disk));
    }
    let mut opened = OpenedDisk::new(disk, writable);
    opened.durable_writes = request.cache.is_writethrough() && writable;
    opened.discards = match name.node.options.text("discard").as_deref() {
        Some(mode) => matches!(mode, "unmap" | "on"),
        None => request.discards,
    };
    opened.warnings = warnings;
    opened.debugger = debugger;
    Ok(opened)
}

/// What the request's name is, and how it is meant: options turn it into an option string.
fn name_and_args(request: &OpenRequest, objects: &Objects) -> (String, ImageArgs) {
    let mut args = ImageArgs {
        format: request.format.clone(),
        image_opts: request.image_opts,
        force_share: request.force_share,
        objects: objects.clone(),
    };
    let path = request.path.clone().unwrap_or_default();
    if request.options.is_empty() {
        return (path, args);
    }
    let mut parts = Vec::new();
    match &request.path {
        Some(path) if request.image_opts => parts.push(path.clone()),
        Some(path) => parts.push(format!("file.filename={}", escape_commas(path))),
        None => {}
    }
    parts.extend(args.format.take().map(|format| format!("driver={format}")));
    parts.extend(request.options.iter().cloned());
    args.image_opts = true;
    (parts.join(","), args)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_options(options: &str) -> Result<OpenRequest, String> {
        let mut request = OpenRequest::default();
        request.path = Some("disk".to_owned());
        request.options = vec![options.to_owned()];
        understood(&request)
    }

    #[test]
    fn options_about_opening_are_taken_out() {
        let request =
            with_options("read-only=on,cache.direct=on,driver=qcow2,discard=ignore,a=b,,c").unwrap();
        assert!(request.read_only && !request.discards);
        assert_eq!(request.cache, CacheMode::Directsync);
        assert_eq!(request.options, ["driver=qcow2", "a=b,,c"]);
        let (typed, args) = name_and_args(&request, &Objects::default());
        assert_eq!((&*typed, args.image_opts), ("file.filename=disk,driver=qcow2,a=b,,c", true));
        let request = with_options("cache.no-flush=on").unwrap();
        assert_eq!(request.cache, CacheMode::Unsafe);
        let refused = |options| with_options(options).map(|_| ()).unwrap_err();
        assert_eq!(refused("force-share=on"), "force-share=on can only be used with read-only images");
        assert_eq!(refused("read-only=maybe"), "Parameter 'read-only' expects 'on' or 'off'");
    }
}
