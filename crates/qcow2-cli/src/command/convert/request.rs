//! What `convert` is asked to do.

use crate::args::{Arguments, ImageArgs, Opt, parse_cache};
use crate::compression::{self, Compression};
use crate::failure::Failure;
use crate::imageopts::{TargetFormat, print_options};
use crate::numbers::{SIGNED, parse_argument, parse_count};
use crate::open::is_block_device;
use crate::optlist::OptList;
use crate::session::Session;
use qcow2_io::CacheMode;
use qcow2_ops::ConvertOptions;
use qcow2_ops::convert::MAX_SPARSE_SIZE;
use qcow2_ops::snapshot::SnapshotName;

/// The command line of `convert`, understood.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) source: ImageArgs,
    pub(super) source_cache: CacheMode,
    pub(super) snapshot: Option<SnapshotName>,
    pub(super) sources: Vec<String>,
    pub(super) target: String,
    pub(super) target_format: Option<String>,
    pub(super) target_image_opts: bool,
    target_cache: Option<String>,
    pub(super) list: OptList,
    pub(super) compression: Compression,
    pub(super) backing: Option<String>,
    pub(super) backing_format: Option<String>,
    pub(super) create: bool,
    pub(super) compress: bool,
    pub(super) bitmaps: bool,
    pub(super) skip_broken_bitmaps: bool,
    pub(super) quiet: bool,
    pub(super) progress: bool,
    pub(super) json_progress: bool,
    pub(super) workers: Option<usize>,
    pub(super) bytes_per_second: Option<u64>,
    sparse_size: Option<u64>,
    target_is_zero: bool,
    out_of_order: bool,
    salvage: bool,
    offload: bool,
}

impl Request {
    /// `None`: help was asked for and given.
    pub(super) fn parse(session: &Session, mut args: Arguments) -> Result<Option<Self>, Failure> {
        let mut raw = Raw::default();
        while let Some(given) = args.next(session)? {
            raw.take(given.opt, given.value)?;
        }
        raw.check_together()?;
        let mut list = OptList::parse_image_options(&raw.option_texts);
        if list.asks_help() {
            let format = TargetFormat::parse(raw.target_format.as_deref().unwrap_or("raw"))?;
            print_options(session, format, !args.into_operands().is_empty())?;
            if format.is_layered() && !session.is_drop_in() {
                session.print(compression::HELP)?;
            }
            return Ok(None);
        }
        // In place of qemu-img they are unknown, as there.
        let compression =
            if session.is_drop_in() { Compression::DEFAULT } else { Compression::take(&mut list)? };
        if compression.is_given() && !raw.compress {
            return Err(Failure::new("A compression level or window is for compressed clusters: use -c"));
        }
        let mut sources = args.into_operands();
        let target = sources.pop().filter(|_| !sources.is_empty());
        let target = target.ok_or_else(|| Failure::new("Must specify image file name"))?;
        let cache =
            |what, text: &Option<String>| text.as_ref().map(|text| parse_cache(what, text)).transpose();
        let source_cache = cache("source cache", &raw.source_cache)?.unwrap_or_default();
        raw.source.check()?;
        Ok(Some(Self {
            source: raw.source,
            source_cache,
            snapshot: raw.snapshot,
            sources,
            target,
            target_format: raw.target_format,
            target_image_opts: raw.target_image_opts,
            target_cache: raw.target_cache,
            list,
            compression,
            backing: raw.backing,
            backing_format: raw.backing_format,
            create: !raw.no_create,
            compress: raw.compress,
            bitmaps: raw.bitmaps,
            skip_broken_bitmaps: raw.skip_broken_bitmaps,
            quiet: raw.quiet,
            progress: raw.progress,
            json_progress: raw.json_progress,
            workers: raw.workers,
            bytes_per_second: raw.bytes_per_second,
            sparse_size: raw.sparse_size,
            target_is_zero: raw.target_is_zero,
            out_of_order: raw.out_of_order,
            salvage: raw.salvage,
            offload: raw.copy_range,
        }))
    }

    /// How the target is written. Errors: no such mode.
    pub(super) fn target_cache(&self) -> Result<CacheMode, Failure> {
        self.target_cache.as_ref().map_or(Ok(CacheMode::Unsafe), |text| parse_cache("cache", text))
    }

    /// How to copy. `has_backing`: whether the target stands on another image.
    pub(super) fn options(&self, has_backing: bool) -> Result<ConvertOptions, Failure> {
        let raw = self.target_format.as_deref().is_none_or(|format| format == "raw");
        let used_before = raw && is_block_device(&self.target);
        if self.target_is_zero && has_backing {
            let text = "Cannot use --target-is-zero when the destination image has a backing file";
            return Err(Failure::new(text));
        }
        let mut options = ConvertOptions::default();
        options.sparse_size = self.sparse_size.unwrap_or(options.sparse_size);
        // What nobody wrote to a container reads as noise.
        let noise = self.target_format.as_deref() == Some("luks");
        options.target_is_zero = (self.create && !used_before && !noise) || self.target_is_zero;
        options.keep_backing = has_backing && (self.backing.is_some() || self.create);
        options.compress = self.compress;
        options.out_of_order = self.out_of_order;
        options.salvage = self.salvage;
        options.offload = self.offload;
        Ok(options)
    }
}

/// Options as they come.
#[derive(Debug, Default)]
struct Raw {
    source: ImageArgs,
    source_cache: Option<String>,
    snapshot: Option<SnapshotName>,
    target_format: Option<String>,
    target_image_opts: bool,
    target_cache: Option<String>,
    option_texts: Vec<String>,
    backing: Option<String>,
    backing_format: Option<String>,
    no_create: bool,
    target_is_zero: bool,
    compress: bool,
    sparse_size: Option<u64>,
    bitmaps: bool,
    skip_broken_bitmaps: bool,
    workers: Option<usize>,
    bytes_per_second: Option<u64>,
    copy_range: bool,
    salvage: bool,
    out_of_order: bool,
    quiet: bool,
    progress: bool,
    json_progress: bool,
}

impl Raw {
    fn take(&mut self, opt: Opt, value: String) -> Result<(), Failure> {
        match opt {
            Opt::Quiet => self.quiet = true,
            Opt::Progress => self.progress = true,
            Opt::JsonProgress => self.json_progress = true,
            Opt::Object => self.source.objects.add(&value)?,
            Opt::ImageOpts => self.source.image_opts = true,
            Opt::Format => self.source.format = Some(value),
            Opt::ForceShare => self.source.force_share = true,
            Opt::Cache => self.source_cache = Some(value),
            Opt::Snapshot => self.snapshot = Some(parse_snapshot(&value)?),
            Opt::SparseSize => self.sparse_size = Some(parse_sparse_size(&value)?),
            Opt::TargetFormat => self.target_format = Some(value),
            Opt::TargetImageOpts => self.target_image_opts = true,
            Opt::TargetCache => self.target_cache = Some(value),
            Opt::Options => self.option_texts.push(OptList::checked(value)?),
            Opt::Backing => self.backing = Some(value),
            Opt::BackingFormat => self.backing_format = Some(value),
            Opt::Salvage => self.salvage = true,
            Opt::TargetIsZero => self.target_is_zero = true,
            Opt::Bitmaps => self.bitmaps = true,
            Opt::SkipBrokenBitmaps => self.skip_broken_bitmaps = true,
            Opt::Rate => {
                let rate = parse_argument("rate limit", &value, SIGNED)?;
                self.bytes_per_second = Some(rate).filter(|&rate| rate > 0);
            }
            Opt::Parallel => {
                let workers = parse_count("number of coroutines", &value, 1..=16)?;
                self.workers = usize::try_from(workers).ok();
            }
            Opt::OutOfOrder => self.out_of_order = true,
            Opt::CopyRange => self.copy_range = true,
            Opt::Compress => self.compress = true,
            Opt::NoCreate => self.no_create = true,
            _ => {}
        }
        Ok(())
    }

    /// What excludes or needs what, in the order in which qemu-img says so.
    fn check_together(&self) -> Result<(), Failure> {
        let rules = [
            (self.skip_broken_bitmaps && !self.bitmaps, "Use of --skip-broken-bitmaps requires --bitmaps"),
            (self.copy_range && self.compress, "Cannot enable copy offloading when -c is used"),
            (self.copy_range && self.sparse_size.is_some(), "Cannot enable copy offloading when -S is used"),
            (self.copy_range && self.salvage, "Cannot use copy offloading in salvaging mode"),
            (
                self.no_create && !self.option_texts.is_empty(),
                "-o has no effect when skipping image creation",
            ),
            (self.target_image_opts && !self.no_create, "--target-image-opts requires use of -n flag"),
            (self.target_is_zero && !self.no_create, "--target-is-zero requires use of -n flag"),
        ];
        rules.iter().find(|(broken, _)| *broken).map_or(Ok(()), |(_, text)| Err(Failure::new(*text)))
    }
}

fn parse_sparse_size(text: &str) -> Result<u64, Failure> {
    let size = parse_argument("buffer size for sparse output", text, SIGNED)?;
    match size.is_multiple_of(512) && size <= MAX_SPARSE_SIZE {
        true => Ok(size),
        false => Err(Failure::new(format!(
            "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to \
             {MAX_SPARSE_SIZE}. Select 0 to disable sparse detection (fully allocates output)."
        ))),
    }
}

/// `snapshot.id=ID,snapshot.name=NAME`, or an id or a name alone.
pub(crate) fn parse_snapshot(text: &str) -> Result<SnapshotName, Failure> {
    if !text.starts_with("snapshot.") {
        return Ok(SnapshotName::Any(text.to_owned()));
    }
    let failed = |message: String| {
        // Two messages, each with the program's name.
        Failure::new(format!("Failed in parsing snapshot param '{text}'")).after(message)
    };
    let list = OptList::parse_pairs(text, None).map_err(failed)?;
    if let Some(pair) = list.pairs().iter().find(|p| p.key != "snapshot.id" && p.key != "snapshot.name") {
        return Err(failed(format!("Invalid parameter '{}'", pair.key)));
    }
    let get = |key: &str| list.last(key).map(str::to_owned);
    Ok(SnapshotName::Exact { id: get("snapshot.id"), name: get("snapshot.name") })
}
