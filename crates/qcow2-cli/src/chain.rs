//! A chain whose layers are opened one by one, so that one below the top can be changed.

use crate::args::ImageArgs;
use crate::failure::Failure;
use crate::findings::tell_of_recovery;
use crate::imagename::ImageName;
use crate::open::{BACKING, OpenAs, Sharing, complain_of_guess, open_file, open_layers};
use crate::render::qemu_text;
use crate::session::Session;
use crate::throttle::Throttle;
use qcow2_core::chain::MAX_CHAIN_LEN;
use qcow2_core::{GuestDisk, ImageFormat, Layers, Reference, ResolvedSource, SourceId};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The layers of a chain down to one that takes changes.
pub(crate) struct OpenedChain {
    /// The layers over the base, top first, each without what is below it.
    pub(crate) above: Vec<Arc<dyn GuestDisk>>,
    /// The base with its own chain, writable.
    pub(crate) base: Arc<dyn GuestDisk>,
}

/// Opens the image that `name` leads to for changes, and below it every layer down to `base`, that one for
/// changes too. `base`: as the user names it; `None` is the backing file of the top. Errors: what cannot be
/// opened, in QEMU's words; no such base.
pub(crate) fn open_down_to(
    session: &Session,
    name: &ImageName,
    args: &ImageArgs,
    how: OpenAs,
    base: Option<&str>,
) -> Result<OpenedChain, Failure> {
    let writable = OpenAs { writable: true, bytes_per_second: None, ..how };
    let mut source = open_file(name, args, writable)?;
    complain_of_guess(session, name, &source.format);
    let (mut above, mut context) = (Vec::new(), String::new());
    let mut seen: BTreeSet<SourceId> = source.id.into_iter().collect();
    // Each layer has its own password.
    let mut layer_name = name.clone();
    loop {
        let mut below = backing_of(name, &source, &context)?;
        // The user may have named another one for the top.
        let other = if above.is_empty() { name.node.other_backing() } else { None };
        if let Some(node) = &other {
            below = node.as_ref().map(|node| Backing {
                name: String::new(),
                format: None,
                path: PathBuf::from(node.path().unwrap_or_default()),
            });
        }
        let layer = OpenAs { layers: Layers::NoBacking, writable: above.is_empty(), ..writable };
        let Some(below) = below else {
            if layer.writable {
                tell_of_recovery(session, &source);
            }
            // What does not open is told first.
            open_layers(&layer_name, source, layer, &context)?;
            return Err(no_base(&name.typed, base));
        };
        let is_base = base.is_none_or(|base| is_same(&source.name, base, &below.path));
        let reference = Reference::Backing { name: &below.name, format: below.format.as_deref() };
        let next = match other.flatten() {
            Some(node) => {
                let sharing = if is_base { Sharing::TopAlone } else { writable.sharing };
                let writable = OpenAs { writable: is_base, sharing, ..writable };
                let failed = |failure: Failure| {
                    failure.without_name().after_words(&format!("{context}{BACKING}")).on_opening(&name.typed)
                };
                open_file(&ImageName { node, ..name.clone() }, args, writable).map_err(failed)?
            }
            None => source.resolver.resolve(reference, is_base).map_err(|error| {
                qemu_text::open_failure(&name.typed, &format!("{context}{BACKING}"), &error.into())
            })?,
        };
        check_chain(&next, &mut seen, above.len())
            .map_err(|reason| Failure::could_not_open(&name.typed, &format!("{context}{BACKING}{reason}")))?;
        if layer.writable {
            tell_of_recovery(session, &source);
        }
        above.push(open_layers(&layer_name, source, layer, &context)?.disk);
        layer_name.keys = layer_name.keys.below();
        context.push_str(BACKING);
        source = next;
        if is_base {
            break;
        }
    }
    if let Some(rate) = how.bytes_per_second {
        source.storage = Arc::new(Throttle::new(source.storage, rate));
    }
    let base = open_layers(&layer_name, source, writable, &context)?.disk;
    Ok(OpenedChain { above, base })
}

/// Refuses a layer that is one of those above it, and a chain that is too long, as the engine does where it
/// opens one.
fn check_chain(next: &ResolvedSource, seen: &mut BTreeSet<SourceId>, above: usize) -> Result<(), String> {
    if above + 2 > MAX_CHAIN_LEN {
        return Err(format!("Backing chain has more than {MAX_CHAIN_LEN} layers"));
    }
    match next.id {
        Some(id) if !seen.insert(id) => Err(format!("Backing file '{}' creates an infinite loop", next.name)),
        _ => Ok(()),
    }
}

/// What an image says of its backing file.
struct Backing {
    name: String,
    format: Option<String>,
    /// Where the name leads.
    path: PathBuf,
}

fn backing_of(name: &ImageName, source: &ResolvedSource, context: &str) -> Result<Option<Backing>, Failure> {
    if source.format != ImageFormat::Qcow2 {
        return Ok(None);
    }
    let header = qcow2_core::walk::read_header(&*source.storage)
        .map_err(|error| qemu_text::open_failure(&name.typed, context, &error))?;
    let format = header.extensions.backing_format_name();
    Ok(header.backing_file_name().filter(|name| !name.is_empty()).map(|backing| {
        let path = beside(&source.name, &backing);
        Backing { name: backing, format, path }
    }))
}

/// `name` as an image at `image` means it.
fn beside(image: &str, name: &str) -> PathBuf {
    Path::new(image).parent().unwrap_or(Path::new("")).join(name.strip_prefix("file:").unwrap_or(name))
}

/// Whether `base`, taken from where the image at `image` is, leads to the file at `path`.
fn is_same(image: &str, base: &str, path: &Path) -> bool {
    let named = Path::new(image).parent().unwrap_or(Path::new("")).join(base);
    match (named.canonicalize(), path.canonicalize()) {
        (Ok(named), Ok(path)) => !base.is_empty() && named == path,
        _ => false,
    }
}

fn no_base(name: &str, base: Option<&str>) -> Failure {
    Failure::new(match base {
        Some(base) => format!("Did not find '{base}' in the backing chain of '{name}'"),
        None => "Image does not have a backing file".to_owned(),
    })
}
