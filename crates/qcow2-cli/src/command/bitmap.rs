//! `bitmap`: the persistent bitmaps of an image.

use crate::args::{Arguments, ImageArgs, Opt};
use crate::exit;
use crate::failure::Failure;
use crate::numbers::{SIGNED, parse_argument};
use crate::open::{open_to_change, read_name};
use crate::persona;
use crate::session::Session;
use qcow2_blockdev::{ImageName, OpenOptions, OpenedDisk, open};
use qcow2_core::bitmap::OtherSize;
use qcow2_core::format::Version;
use qcow2_core::format::text::bytes_of;
use qcow2_core::{ErrorKind, Image, Layers, find_cause};
use qcow2_ops::bitmap::{BitmapAction, change_bitmap};
use qcow2_terminal::Interrupts;

/// Runs the verb.
pub(crate) fn run(session: &Session, args: Arguments) -> Result<u8, Failure> {
    let request = Request::parse(session, args)?;
    let name = read_name(session, &request.filename, &request.image)?;
    let opened = open_to_change(session, &name, &alone(&request.image))?;
    let source = request.open_source()?;
    // Bitmaps change in memory, however long that takes: a signal may end the program until they are stored.
    let interrupts = Interrupts::install();
    let done = request.actions.iter().try_for_each(|action| request.change(&opened, source.as_ref(), action));
    interrupts.hold();
    // What was done before a failure stays done.
    let closed = opened.disk.as_image().map_or(Ok(()), Image::close);
    interrupts.die_if_asked();
    done?;
    closed.map_err(|error| {
        Failure::new(format!("Error while closing the image: {}", persona::cause(&error)))
    })?;
    Ok(exit::SUCCESS)
}

#[derive(Debug, Default)]
struct Request {
    image: ImageArgs,
    actions: Vec<BitmapAction>,
    granularity: Option<u64>,
    source: Option<String>,
    source_format: Option<String>,
    filename: String,
    bitmap: String,
}

impl Request {
    fn parse(session: &Session, mut args: Arguments) -> Result<Self, Failure> {
        let mut request = Self::default();
        while let Some(given) = args.next(session)? {
            match given.opt {
                Opt::AddBitmap => request.actions.push(BitmapAction::Add { granularity: None }),
                Opt::RemoveBitmap => request.actions.push(BitmapAction::Remove),
                Opt::ClearBitmap => request.actions.push(BitmapAction::Clear),
                Opt::EnableBitmap => request.actions.push(BitmapAction::Enable),
                Opt::DisableBitmap => request.actions.push(BitmapAction::Disable),
                Opt::MergeBitmap => request.actions.push(BitmapAction::Merge { source: given.value }),
                Opt::Granularity => {
                    let granularity = parse_argument("granularity", &given.value, SIGNED)?;
                    request.granularity = Some(granularity).filter(|&granularity| granularity > 0);
                }
                Opt::Backing => request.source = Some(given.value),
                Opt::BackingFormat => request.source_format = Some(given.value),
                opt => request.image.take(opt, given.value)?,
            }
        }
        let operands = args.into_operands();
        if request.actions.is_empty() {
            let text = "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge";
            return Err(Failure::new(text));
        }
        request.check_together()?;
        let Ok([filename, bitmap]) = <[String; 2]>::try_from(operands) else {
            return Err(Failure::new("Expecting filename and bitmap name"));
        };
        (request.filename, request.bitmap) = (filename, bitmap);
        request.image.check()?;
        Ok(request)
    }

    /// What needs what.
    fn check_together(&mut self) -> Result<(), Failure> {
        let has = |wanted: fn(&BitmapAction) -> bool| self.actions.iter().any(wanted);
        let (adds, merges) = (
            has(|action| matches!(action, BitmapAction::Add { .. })),
            has(|action| matches!(action, BitmapAction::Merge { .. })),
        );
        let rules = [
            (self.granularity.is_some() && !adds, "granularity only supported with --add"),
            (self.source_format.is_some() && self.source.is_none(), "-F only supported with -b"),
            (self.source.is_some() && !merges, "Merge bitmap source file only supported with --merge"),
        ];
        if let Some((_, text)) = rules.iter().find(|(broken, _)| *broken) {
            return Err(Failure::new(*text));
        }
        for action in &mut self.actions {
            if let BitmapAction::Add { granularity } = action {
                *granularity = self.granularity;
            }
        }
        Ok(())
    }

    /// The image that holds the source of a merge, where it is another.
    fn open_source(&self) -> Result<Option<OpenedDisk>, Failure> {
        let Some(source) = &self.source else { return Ok(None) };
        let (format, objects) = (self.source_format.clone(), self.image.objects.clone());
        let args = ImageArgs { format, objects, ..ImageArgs::default() };
        Ok(Some(open(&ImageName::parse(source, &args.naming())?, &alone(&args))?))
    }

    fn change(
        &self,
        opened: &OpenedDisk,
        source: Option<&OpenedDisk>,
        action: &BitmapAction,
    ) -> Result<(), Failure> {
        self.check_possible(opened, action)?;
        let merged = match action {
            BitmapAction::Merge { source } => source,
            _ => &self.bitmap,
        };
        let missing = |name: &str| self.failure(action, &format!("Dirty bitmap '{name}' not found"));
        let image = opened.disk.as_image().ok_or_else(|| missing(&self.bitmap))?;
        if let BitmapAction::Merge { .. } = action {
            // The target is looked for first.
            let bitmaps = image.bitmaps().map_err(|error| self.refused(action, &error))?;
            if !bitmaps.iter().any(|bitmap| bitmap.name_text() == self.bitmap) {
                return Err(missing(&self.bitmap));
            }
        }
        let other = match source {
            Some(source) => Some(source.disk.as_image().ok_or_else(|| missing(merged))?),
            None => None,
        };
        change_bitmap(image, &self.bitmap, action, other).map_err(|error| match error.core_error() {
            Some(engine) => self.refused(action, engine),
            None => self.failure(action, &persona::chain(&error)),
        })
    }

    /// What is said before anything is tried.
    fn check_possible(&self, opened: &OpenedDisk, action: &BitmapAction) -> Result<(), Failure> {
        let BitmapAction::Add { granularity } = action else { return Ok(()) };
        let name = &self.bitmap;
        let reason = match opened.disk.as_image() {
            _ if granularity
                .is_some_and(|g| !g.is_power_of_two() || !(512..=MAX_GRANULARITY).contains(&g)) =>
            {
                "Granularity must be power of 2 and at least 512".to_owned()
            }
            _ if name.is_empty() => "Bitmap name cannot be empty".to_owned(),
            None => format!("Can't store persistent bitmaps to {NODE}: Operation not supported"),
            Some(image) if image.header().version < Version::V3 => {
                format!(
                    "Can't make bitmap '{name}' persistent in '{NODE}': Cannot store dirty bitmaps in qcow2 v2 files"
                )
            }
            Some(_) if bytes_of(name).len() > MAX_NAME => {
                format!(
                    "Can't make bitmap '{name}' persistent in '{NODE}': Name length exceeds maximum (1023 characters)"
                )
            }
            Some(_) => return Ok(()),
        };
        Err(self.failure(action, &reason))
    }

    fn refused(&self, action: &BitmapAction, error: &qcow2_core::Error) -> Failure {
        if let Some(OtherSize { source, own, .. }) = find_cause::<OtherSize>(error) {
            let sizes = format!("destination size is {own}, source size is {source}");
            return self
                .failure(action, &format!("Bitmaps are of different sizes ({sizes}) and can't be merged"));
        }
        let failure = self.failure(action, &persona::capitalized(&persona::cause(error)));
        match error.kind() {
            ErrorKind::Inconsistent => failure.hint(persona::INCONSISTENT_HINT),
            _ => failure,
        }
    }

    fn failure(&self, action: &BitmapAction, reason: &str) -> Failure {
        let operation = match action {
            BitmapAction::Add { .. } => "add",
            BitmapAction::Remove => "remove",
            BitmapAction::Clear => "clear",
            BitmapAction::Enable => "enable",
            BitmapAction::Disable => "disable",
            BitmapAction::Merge { .. } => "merge",
        };
        Failure::new(format!("Operation {operation} on bitmap {} failed: {reason}", self.bitmap))
    }
}

/// Bitmaps are the image's own: its backing file need not be there.
fn alone(args: &ImageArgs) -> OpenOptions {
    args.options().with_layers(Layers::NoBacking)
}
/// What stands for the name of a node, which QEMU makes up anew each time.
const NODE: &str = "#block100";
const MAX_GRANULARITY: u64 = 1 << 31;
/// Bytes of a name.
const MAX_NAME: usize = 1023;
