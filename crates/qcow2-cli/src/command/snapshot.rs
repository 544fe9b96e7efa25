//! `snapshot`: the snapshots inside an image.

use crate::args::{Arguments, ImageArgs, Opt};
use crate::exit;
use crate::failure::Failure;
use crate::files::open_files;
use crate::open::{complain_of_guess, open_to_change, read_name};
use crate::persona;
use crate::session::Session;
use qcow2_blockdev::{CreateHow, ImageName, NewImageFile, NewTarget, Sharing, open};
use qcow2_core::format::text::bytes_of;
use qcow2_core::snapshot::read_snapshots_padded;
use qcow2_core::{BackingName, ErrorKind, Image, ImageFormat, NewSnapshot};
use qcow2_io::{FileResolver, Policy, path_of};
use qcow2_ops::snapshot::{self, SnapshotName};
use qcow2_report::info::snapshot_table;
use qcow2_terminal::Interrupts;
use std::time::{SystemTime, UNIX_EPOCH};

/// Runs the verb.
pub(crate) fn run(session: &Session, args: Arguments) -> Result<u8, Failure> {
    let request = Request::parse(session, args)?;
    let name = read_name(session, &request.filename, &request.image)?;
    if let Action::External(new) = &request.action {
        return external(&name, &request.image, new).map(|()| exit::SUCCESS);
    }
    let writable = !matches!(request.action, Action::List);
    if writable && request.image.force_share {
        let reason = "force-share=on can only be used with read-only images";
        return Err(Failure::could_not_open(&name.typed, reason));
    }
    let opened = match writable {
        true => open_to_change(session, &name, &request.image.options())?,
        false => open(&name, &request.image.options())?,
    };
    let Some(image) = opened.disk.as_image() else {
        if matches!(request.action, Action::Apply(_)) {
            // The disk is opened anew.
            complain_of_guess(session, &name, &opened.format);
        }
        return request.action.without_snapshots().map(|()| exit::SUCCESS);
    };
    match &request.action {
        Action::List => list(session, image)?,
        action => {
            let interrupts = Interrupts::install();
            interrupts.hold();
            let changed = change(image, action);
            interrupts.die_if_asked();
            changed?;
        }
    }
    Ok(exit::SUCCESS)
}

/// What is to be done.
#[derive(Debug)]
enum Action {
    List,
    Create(String),
    Apply(String),
    Delete(String),
    External(String),
}

#[derive(Debug)]
struct Request {
    image: ImageArgs,
    action: Action,
    filename: String,
}

impl Request {
    fn parse(session: &Session, mut args: Arguments) -> Result<Self, Failure> {
        let (mut image, mut action) = (ImageArgs::default(), None);
        let verb = args.verb();
        while let Some(given) = args.next(session)? {
            let wanted = match given.opt {
                Opt::ListSnapshots => Action::List,
                Opt::CreateSnapshot => Action::Create(given.value),
                Opt::ApplySnapshot => Action::Apply(given.value),
                Opt::DeleteSnapshot => Action::Delete(given.value),
                Opt::ExternalSnapshot => Action::External(given.value),
                opt => {
                    image.take(opt, given.value)?;
                    continue;
                }
            };
            if action.replace(wanted).is_some() {
                return Err(Failure::usage(verb.name, "Cannot mix '-l', '-a', '-c', '-d'"));
            }
        }
        let filename = args.into_one_operand("Expecting one image file name")?;
        image.check()?;
        Ok(Self { image, action: action.unwrap_or(Action::List), filename })
    }
}

impl Action {
    /// What is said of a disk that cannot have snapshots.
    fn without_snapshots(&self) -> Result<(), Failure> {
        match self {
            Self::List | Self::External(_) => Ok(()),
            Self::Create(_) => Err(self.failure(NOT_SUPPORTED)),
            Self::Apply(_) => Err(self.failure("Block driver does not support snapshots")),
            Self::Delete(_) => Err(self.failure("snapshot not found")),
        }
    }

    fn failure(&self, reason: &str) -> Failure {
        let (verb, name) = match self {
            Self::List | Self::External(_) => return Failure::new(reason),
            Self::Create(name) => ("create", name),
            Self::Apply(name) => ("apply", name),
            Self::Delete(name) => ("delete", name),
        };
        Failure::new(format!("Could not {verb} snapshot '{name}': {reason}"))
    }

    /// The failure that an error of the procedure is.
    fn refused(&self, error: &qcow2_ops::Error) -> Failure {
        if let Some((what, system)) = error.core_error().and_then(persona::snapshot_l1) {
            return match self {
                Self::Apply(_) => {
                    self.failure(&format!("Failed to load snapshot: {system}")).after(vec![what])
                }
                _ => self.failure(&what),
            };
        }
        let found = error.kind() != qcow2_ops::ErrorKind::NotFound
            && !error.core_error().is_some_and(persona::snapshots_cut);
        let reason = match (self, found, error.core_error()) {
            (Self::Apply(_), false, _) => "Failed to load snapshot: No such file or directory".to_owned(),
            (Self::Delete(_), false, _) => "snapshot not found".to_owned(),
            (_, _, Some(engine)) if engine.storage_error().is_none() => match engine.kind() {
                ErrorKind::Unsupported => NOT_SUPPORTED.to_owned(),
                // A refcount or a table at its limit, not a full disk.
                ErrorKind::NoSpace => "Invalid argument".to_owned(),
                _ => persona::cause(engine),
            },
            (_, _, Some(engine)) => persona::cause(engine),
            _ => persona::chain(error),
        };
        match self {
            Self::Apply(_) if reason == NOT_SUPPORTED => {
                self.failure(&format!("Failed to load snapshot: {reason}"))
            }
            _ => self.failure(&reason),
        }
    }
}

fn list(session: &Session, image: &Image) -> Result<(), Failure> {
    let snapshots = match image.snapshots() {
        Err(error) if session.is_drop_in() && persona::snapshots_cut(&error) => {
            read_snapshots_padded(&**image.storage(), &image.header())
        }
        snapshots => snapshots,
    };
    let snapshots = snapshots.map_err(|error| Failure::new(persona::chain(&error)))?;
    if snapshots.is_empty() {
        return Ok(());
    }
    session.print(&format!("Snapshot list:\n{}", snapshot_table(&snapshots)))
}

fn change(image: &Image, action: &Action) -> Result<(), Failure> {
    let done = match action {
        Action::List | Action::External(_) => Ok(()),
        Action::Create(name) => snapshot::create(image, &new_snapshot(name)).map(drop),
        Action::Apply(_) if image.header().has_data_file() => {
            return Err(action.failure(&format!("Failed to load snapshot: {NOT_SUPPORTED}")));
        }
        Action::Apply(_) if image.header().trusted_bitmaps().is_some() => {
            return Err(action.failure("Device has active dirty bitmaps"));
        }
        Action::Apply(name) => snapshot::apply(image, &SnapshotName::Any(name.clone())),
        Action::Delete(name) => {
            // As qemu-img: by name only.
            snapshot::delete(image, &SnapshotName::Exact { id: None, name: Some(name.clone()) })
        }
    };
    done.map_err(|error| action.refused(&error))?;
    image.close().map_err(|error| action.failure(&persona::cause(&error)))
}

/// A new image on top of the one that `name` leads to, which nobody may be changing and which stays as it is.
fn external(name: &ImageName, args: &ImageArgs, new: &str) -> Result<(), Failure> {
    let about = |failure: Failure| failure.about(new);
    let opened = open(name, &args.options().with_sharing(Sharing::Alone))?;
    if opened.format == ImageFormat::Raw && args.format.is_none() && !args.image_opts {
        let failure = Failure::new("The format of the image must be given (-f), for it was guessed");
        return Err(about(failure.hint("Detected format of raw.")));
    }
    let target = NewTarget::parse(new).map_err(|kind| Failure::new(persona::in_one_line(&kind)))?;
    let (Some(old), NewTarget::File(path)) = (name.path(), &target) else {
        return Err(about(Failure::new("both images must be files")));
    };
    if path_of(path).exists() {
        return Err(about(Failure::new("the file exists already")));
    }
    let backing = FileResolver::new(path_of(path), Policy::Deny).name_for(&path_of(old));
    let backing =
        backing.map_err(|error| about(Failure::new(format!("cannot say where '{old}' is: {error}"))))?;
    let interrupts = Interrupts::install();
    let how = CreateHow::new().among(open_files()).with_unfinished(interrupts.unfinished());
    let file = NewImageFile::new(path, &how);
    let made = snapshot::external(&*opened.disk, &opened.format, &backing, &file);
    interrupts.end_files(made.is_ok());
    made.map_err(|error| {
        let format = Some(opened.format.name().to_owned());
        let failure = file.failure(error, BackingName { name: backing, format });
        about(failure.map_or_else(|error| persona::procedure(&error), Failure::from))
    })
}

/// Now, with the name as far as it goes: 255 bytes.
fn new_snapshot(name: &str) -> NewSnapshot {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut new = NewSnapshot::default();
    new.name = bytes_of(name).iter().take(MAX_NAME).copied().collect();
    new.date_seconds = now.as_secs() as u32;
    new.date_nanoseconds = now.subsec_micros() * 1000;
    new.icount = Some(0);
    new
}

const NOT_SUPPORTED: &str = "Operation not supported";
/// Bytes of a name that qemu-img takes.
const MAX_NAME: usize = 255;
