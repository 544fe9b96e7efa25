//! New images as the verbs that make them have them: names as they were typed, tables and announcements as
//! qemu-img prints them, files that a signal takes away.

use crate::args::{ImageArgs, Objects};
use crate::failure::Failure;
use crate::files::open_files;
use crate::persona;
use crate::session::Session;
use qcow2_blockdev::{
    CreateFailure, CreateHow, KeyValues, NewOptions, NewTarget, OptionValue, amend_options, create,
    escape_commas, format_of_ending, new_image_format, open, options_at,
};
use qcow2_core::{GuestDisk, ImageFormat};
use qcow2_terminal::Interrupts;
use std::fmt::Write;
use std::sync::Arc;

/// The name of the format of a new image, which may be `given`. If not it is raw, as qemu-img has it; under
/// our own name what the ending of its name says. Errors: an ending of a format that is not made here.
pub(crate) fn format_of(session: &Session, given: Option<String>, file: &str) -> Result<String, Failure> {
    let format = match given {
        Some(given) => return Ok(given),
        None if session.is_drop_in() => Ok(ImageFormat::Raw),
        None => format_of_ending(file),
    };
    format.map(|format| format.name().to_owned()).map_err(|failure| {
        let ending = failure.format().name();
        let text = format!("no {ending} images can be made; for another format name it (raw, qcow2, luks)");
        Failure::new(text).about(file)
    })
}

/// Where the new image called `name`, of `format`, goes. An empty name is a file that cannot be made.
pub(crate) fn target_of(name: &str, format: &ImageFormat) -> Result<NewTarget, Failure> {
    match NewTarget::of_format(name, format) {
        Err(_) if name.is_empty() => Ok(NewTarget::File(String::new())),
        target => target.map_err(|reason| Failure::new(persona::in_one_line(&reason))),
    }
}

/// Has the new image stand on the backing file that options of the verb name.
pub(crate) fn set_backing(
    options: &mut NewOptions,
    file: &Option<String>,
    format: &Option<String>,
) -> Result<(), Failure> {
    for (option, what, value) in [("backing_file", "file", file), ("backing_fmt", "file format", format)] {
        let Some(value) = value else { continue };
        if *options.format() != ImageFormat::Qcow2 {
            let name = options.format().name();
            return Err(Failure::new(format!("Backing {what} not supported for file format '{name}'")));
        }
        options.set_text(option, value);
    }
    Ok(())
}

/// Makes the image that `options` describe at `target`. Its files are unfinished until the verb says that
/// they are whole.
pub(crate) fn make(
    session: &Session,
    target: &NewTarget,
    options: &NewOptions,
    objects: &Objects,
    interrupts: &Interrupts,
) -> Result<(), CreateFailure> {
    make_if(session, (target, options), objects, interrupts, &|| true)
}

/// The same if `agree` is true, which is asked last.
pub(crate) fn make_if(
    session: &Session,
    (target, options): (&NewTarget, &NewOptions),
    objects: &Objects,
    interrupts: &Interrupts,
    agree: &dyn Fn() -> bool,
) -> Result<(), CreateFailure> {
    let warn = |warning: &_| session.warn_lines(&persona::warning(warning));
    let how = CreateHow::new().with_secrets(objects.secrets()).among(open_files()).telling(&warn);
    let how = how.if_agreed(agree);
    create(target, options, &how.with_unfinished(interrupts.unfinished()))
}

/// Makes an image of `size` bytes as the copy of another disk, and opens it for writing.
pub(crate) fn make_disk(
    session: &Session,
    file: &str,
    format: &str,
    size: u64,
    interrupts: &Interrupts,
) -> Result<Arc<dyn GuestDisk>, Failure> {
    let format = new_image_format(format).map_err(|_| Failure::new("Unknown file format"))?;
    let mut options = NewOptions::parse(&format, &KeyValues::default())?;
    options.set_number("size", size);
    let about = |failure: Failure| failure.about("error while creating output image").about(file);
    let (made, args) = (target_of(file, &format)?, ImageArgs::default());
    make(session, &made, &options, &args.objects, interrupts).map_err(|failure| about(failure.into()))?;
    let target = made.into_name(file, &options, args.objects.secrets());
    Ok(open(&target, &args.options().writable())?.disk)
}

/// The line that announces a new image, without its end.
pub(crate) fn announcement(options: &NewOptions, file: &str) -> String {
    let mut line = format!("Formatting '{file}', fmt={}", options.format().name());
    for (name, value) in options.values() {
        let _ = match value {
            OptionValue::Text(text) | OptionValue::Switch(_, text) => {
                write!(line, " {name}={}", escape_commas(text))
            }
            // Numbers are shown as signed ones.
            OptionValue::Number(number) => write!(line, " {name}={}", number.cast_signed()),
        };
    }
    line
}

/// Prints what `-o` takes for an image called `name`; what files and servers take is not known without one.
pub(crate) fn print_options(
    session: &Session,
    format: &ImageFormat,
    name: Option<&str>,
) -> Result<(), Failure> {
    let mut text = match name {
        Some(_) => "Supported options:\n".to_owned(),
        None => format!("Supported {} options:\n", format.name()),
    };
    let shown = options_at(format, name).map_err(|reason| Failure::new(persona::in_one_line(&reason)))?;
    shown.iter().for_each(|option| text += &option.line());
    if name.is_none() {
        text.push_str(
            "\nThe protocol level may support further options.\n\
             Specify the target filename to include those options.\n",
        );
    }
    session.print(&text)
}

/// Prints what `amend -o` takes.
pub(crate) fn print_amend_options(session: &Session, format: &ImageFormat) -> Result<(), Failure> {
    let mut text = format!("Amend options for '{}':\n", format.name());
    amend_options(format).iter().for_each(|option| text += &option.line());
    session.print(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(format: &ImageFormat, text: &str) -> Result<NewOptions, Failure> {
        let texts = if text.is_empty() { Vec::new() } else { vec![text.to_owned()] };
        Ok(NewOptions::parse(format, &KeyValues::parse_image_options(&texts))?)
    }

    #[track_caller]
    fn check(format: &ImageFormat, text: &str, expected: &str) {
        assert_eq!(announcement(&parse(format, text).unwrap(), "x"), expected);
    }

    #[track_caller]
    fn check_error(text: &str, lines: &[&str]) {
        assert_eq!(parse(&ImageFormat::Qcow2, text).unwrap_err().lines("p", "p"), lines);
    }

    #[test]
    fn announcements() {
        check(
            &ImageFormat::Qcow2,
            "size=1M",
            "Formatting 'x', fmt=qcow2 cluster_size=65536 extended_l2=off compression_type=zlib size=1048576 \
             lazy_refcounts=off refcount_bits=16",
        );
        check(
            &ImageFormat::Qcow2,
            "nocow=on,backing_file=a,,b,lazy_refcounts=yes,refcount_bits=-1,size=1.5k,compat=v3,id=q",
            "Formatting 'x', fmt=qcow2 cluster_size=65536 extended_l2=off compression_type=zlib size=1536 compat=v3 \
             backing_file=a,,b lazy_refcounts=yes refcount_bits=-1 nocow=on",
        );
        check(
            &ImageFormat::Raw,
            "extent_size_hint=1M,preallocation=off,nocow=on,size=1M",
            "Formatting 'x', fmt=raw size=1048576 nocow=on preallocation=off extent_size_hint=1048576",
        );
    }

    #[test]
    fn errors() {
        check_error("nope=1,size=q", &["p: Invalid parameter 'nope'"]);
        check_error("lazy_refcounts=ON", &["p: Parameter 'lazy_refcounts' expects 'on' or 'off'"]);
        check_error("refcount_bits=16k", &["p: Parameter 'refcount_bits' expects a number"]);
        check_error("refcount_bits=on", &["p: Parameter 'refcount_bits' expects a number"]);
        check_error(
            "refcount_bits=99999999999999999999",
            &["p: Value '99999999999999999999' is too large for parameter 'refcount_bits'"],
        );
        check_error("size=-1", &["p: Value '-1' is out of range for parameter 'size'"]);
        check_error(
            "size=1X",
            &[
                "p: Parameter 'size' expects a non-negative number below 2^64",
                "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-",
                "and exabytes, respectively.",
            ],
        );
    }
}
