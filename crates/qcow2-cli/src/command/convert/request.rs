//! What `convert` is asked to do.

use crate::args::{Arguments, ImageArgs, Opt, parse_cache};
use crate::failure::Failure;
use crate::newimage::{format_of, print_options};
use crate::numbers::{SIGNED, parse_argument, parse_count};
use crate::session::Session;
use qcow2_blockdev::{Compression, KeyValues, new_image_format};
use qcow2_core::ImageFormat;
use qcow2_io::CacheMode;
use qcow2_ops::ConvertOptions;
use qcow2_ops::convert::MAX_SPARSE_SIZE;
use qcow2_ops::snapshot::SnapshotName;

/// The command line of `convert`, understood.
#[derive(Debug, Default)]
pub(super) struct Request {
    pub(super) source: SourceArgs,
    pub(super) target: TargetArgs,
    pub(super) copy: CopyArgs,
    pub(super) shown: Shown,
}

/// What is read.
#[derive(Debug, Default)]
pub(super) struct SourceArgs {
    /// As typed.
    pub(super) names: Vec<String>,
    pub(super) args: ImageArgs,
    pub(super) snapshot: Option<SnapshotName>,
    pub(super) cache: CacheMode,
}

/// What is written.
#[derive(Debug, Default)]
pub(super) struct TargetArgs {
    /// As typed.
    pub(super) name: String,
    pub(super) format: Option<String>,
    /// Whether it is made, and not there already.
    pub(super) create: bool,
    /// What it is made with.
    pub(super) list: KeyValues,
    pub(super) backing: Option<String>,
    pub(super) backing_format: Option<String>,
    pub(super) image_opts: bool,
    cache: Option<String>,
    pub(super) bytes_per_second: Option<u64>,
}

/// How it is copied.
#[derive(Debug, Default)]
pub(super) struct CopyArgs {
    pub(super) compress: bool,
    pub(super) compression: Compression,
    pub(super) bitmaps: bool,
    pub(super) skip_broken_bitmaps: bool,
    pub(super) workers: Option<usize>,
    sparse_size: Option<u64>,
    target_is_zero: bool,
    out_of_order: bool,
    salvage: bool,
    offload: bool,
}

/// What is said meanwhile.
#[derive(Debug, Default)]
pub(super) struct Shown {
    pub(super) quiet: bool,
    pub(super) progress: bool,
    pub(super) json_progress: bool,
}

/// What is settled once all options are there.
#[derive(Debug, Default)]
struct Texts {
    options: Vec<String>,
    source_cache: Option<String>,
}

impl Request {
    /// `None`: help was asked for and given.
    pub(super) fn parse(session: &Session, mut args: Arguments) -> Result<Option<Self>, Failure> {
        let mut texts = Texts::default();
        let mut request = Self::default();
        request.target.create = true;
        while let Some(given) = args.next(session)? {
            request.take(given.opt, given.value, &mut texts)?;
        }
        request.check_together(&texts)?;
        let mut list = KeyValues::parse_image_options(&texts.options);
        if list.asks_help() {
            let format = new_image_format(request.target.format())?;
            let names = args.into_operands();
            print_options(session, &format, names.last().filter(|_| names.len() > 1).map(|name| &**name))?;
            if format == ImageFormat::Qcow2 && !session.is_drop_in() {
                session.print(COMPRESSION_HELP)?;
            }
            return Ok(None);
        }
        // Not available when invoked as qemu-img, which refuses them.
        if !session.is_drop_in() {
            request.copy.compression = Compression::take(&mut list)?;
        }
        if request.copy.compression.is_given() && !request.copy.compress {
            return Err(Failure::new("A compression level or window is for compressed clusters: use -c"));
        }
        request.target.list = list;
        request.source.names = args.into_operands();
        let target = request.source.names.pop().filter(|_| !request.source.names.is_empty());
        request.target.name = target.ok_or_else(|| Failure::new("Must specify image file name"))?;
        if request.target.format.is_none() && !request.target.image_opts {
            let format = format_of(session, None, &request.target.name)?;
            request.target.format = Some(format).filter(|format| format != "raw");
        }
        request.source.cache = parse_cache("source cache", texts.source_cache.as_deref())?;
        request.source.args.check()?;
        Ok(Some(request))
    }

    /// How to copy. `has_backing`: whether the target stands on another image.
    pub(super) fn options(&self, has_backing: bool) -> Result<ConvertOptions, Failure> {
        let Self { target, copy, .. } = self;
        self.check_zero_target(has_backing)?;
        let mut options = ConvertOptions::default();
        options.sparse_size = copy.sparse_size.unwrap_or(options.sparse_size);
        // A container's payload that nobody wrote reads as noise.
        let noise = target.format.as_deref() == Some("luks");
        options.target_is_new = target.create && !noise;
        options.target_is_zero = copy.target_is_zero;
        options.keep_backing = has_backing && (target.backing.is_some() || target.create);
        options.compress = copy.compress;
        options.out_of_order = copy.out_of_order;
        options.salvage = copy.salvage;
        options.offload = copy.offload;
        Ok(options)
    }

    /// `has_backing`: whether the target stands on another image, or is said to.
    pub(super) fn check_zero_target(&self, has_backing: bool) -> Result<(), Failure> {
        match self.copy.target_is_zero && has_backing {
            true => {
                Err(Failure::new("Cannot use --target-is-zero when the destination image has a backing file"))
            }
            false => Ok(()),
        }
    }

    fn take(&mut self, opt: Opt, value: String, texts: &mut Texts) -> Result<(), Failure> {
        let Self { source, target, copy, shown } = self;
        match opt {
            Opt::Quiet => shown.quiet = true,
            Opt::Progress => shown.progress = true,
            Opt::JsonProgress => shown.json_progress = true,
            Opt::Object => source.args.objects.add(&value)?,
            Opt::ImageOpts => source.args.image_opts = true,
            Opt::Format => source.args.format = Some(value),
            Opt::ForceShare => source.args.force_share = true,
            Opt::Cache => texts.source_cache = Some(value),
            Opt::Snapshot => source.snapshot = Some(parse_snapshot(&value)?),
            Opt::SparseSize => copy.sparse_size = Some(parse_sparse_size(&value)?),
            Opt::TargetFormat => target.format = Some(value),
            Opt::TargetImageOpts => target.image_opts = true,
            Opt::TargetCache => target.cache = Some(value),
            Opt::Options => texts.options.push(KeyValues::checked(value)?),
            Opt::Backing => target.backing = Some(value),
            Opt::BackingFormat => target.backing_format = Some(value),
            Opt::Salvage => copy.salvage = true,
            Opt::TargetIsZero => copy.target_is_zero = true,
            Opt::Bitmaps => copy.bitmaps = true,
            Opt::SkipBrokenBitmaps => copy.skip_broken_bitmaps = true,
            Opt::Rate => {
                let rate = parse_argument("rate limit", &value, SIGNED)?;
                target.bytes_per_second = Some(rate).filter(|&rate| rate > 0);
            }
            Opt::Parallel => {
                let workers = parse_count("number of coroutines", &value, 1..=16)?;
                copy.workers = usize::try_from(workers).ok();
            }
            Opt::OutOfOrder => copy.out_of_order = true,
            Opt::CopyRange => copy.offload = true,
            Opt::Compress => copy.compress = true,
            Opt::NoCreate => target.create = false,
            // The verb's table has no others.
            other => debug_assert!(false, "convert has no option {other:?}"),
        }
        Ok(())
    }

    /// What excludes or needs what, in the order in which qemu-img says so.
    fn check_together(&self, texts: &Texts) -> Result<(), Failure> {
        let Self { target, copy, .. } = self;
        let rules = [
            (copy.skip_broken_bitmaps && !copy.bitmaps, "Use of --skip-broken-bitmaps requires --bitmaps"),
            (copy.offload && copy.compress, "Cannot enable copy offloading when -c is used"),
            (copy.offload && copy.sparse_size.is_some(), "Cannot enable copy offloading when -S is used"),
            (copy.offload && copy.salvage, "Cannot use copy offloading in salvaging mode"),
            (!target.create && !texts.options.is_empty(), "-o has no effect when skipping image creation"),
            (target.image_opts && target.create, "--target-image-opts requires use of -n flag"),
            (copy.target_is_zero && target.create, "--target-is-zero requires use of -n flag"),
        ];
        rules.iter().find(|(broken, _)| *broken).map_or(Ok(()), |(_, text)| Err(Failure::new(*text)))
    }
}

impl TargetArgs {
    /// How it is written. Errors: no such mode.
    pub(super) fn cache(&self) -> Result<CacheMode, Failure> {
        match self.cache.as_deref() {
            None => Ok(CacheMode::Unsafe),
            given => parse_cache("cache", given),
        }
    }

    /// Its format's name; raw where none was given.
    pub(super) fn format(&self) -> &str {
        self.format.as_deref().unwrap_or("raw")
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
        Failure::new(format!("Failed in parsing snapshot param '{text}'")).after(vec![message])
    };
    let list =
        KeyValues::parse_pairs(text, None).map_err(|error| failed(Failure::from(error).to_string()))?;
    if let Some(pair) = list.pairs().iter().find(|p| p.key != "snapshot.id" && p.key != "snapshot.name") {
        return Err(failed(format!("Invalid parameter '{}'", pair.key)));
    }
    let get = |key: &str| list.last(key).map(str::to_owned);
    Ok(SnapshotName::Exact { id: get("snapshot.id"), name: get("snapshot.name") })
}

/// What help says of the options that an image does not record and qemu-img does not have.
const COMPRESSION_HELP: &str = "\nWith -c also, not recorded in the image:\n\
    \x20 compression_level=<num> - zlib: 1 (quick) to 9 (small), 6 by default; zstd: up to 22, 3 by default\n\
    \x20 compression_window_bits=<num> - zlib: 12 by default, up to 15 for smaller clusters that not every \
    reader takes\n";
