//! Disks that are not opened, and what is worth a word though they are.

use super::engine::{engine_reason, snapshot_l1, snapshots_cut, source_reason, unopened};
use super::name;
use super::text::{BACKING, capitalized, chain, storage};
use crate::failure::Failure;
use qcow2_blockdev::{FailureKind, OpenFailure, Warning};
use qcow2_ops::ChainError;

/// Said of requests that the system is to queue where its page cache stands between.
pub(crate) const NATIVE_NEEDS_DIRECT: &str =
    "aio=native was specified, but it requires cache.direct=on, which was not specified.";

/// Said of a disk that is to be written to and whose locks are to be ignored.
pub(crate) const SHARED_AND_WRITABLE: &str = "force-share=on can only be used with read-only images";

/// Why a disk is not opened, and what follows on lines of their own.
pub(crate) fn reason(kind: &FailureKind) -> (String, Vec<String>) {
    if let Some(reason) = name::name(kind) {
        return (reason, Vec::new());
    }
    let reason = match kind {
        FailureKind::Option(error) => return name::option(error),
        FailureKind::Window(error) => return name::window(error),
        FailureKind::Rules(error) => return name::rules(error),
        FailureKind::Tuning(error) => return name::tuning(error),
        FailureKind::File { path, error } => return with_hint(source_reason(error, path)),
        FailureKind::Engine(error) => return engine_reason(error),
        FailureKind::Connect(error) => {
            let hint = error.needs_tls().then(|| "Did you forget a valid tls-creds?".to_owned());
            let server = error.server_message().map(|text| format!("server reported: {text}"));
            return (error.to_string(), hint.into_iter().chain(server).collect());
        }
        FailureKind::UnnamedDataFile => "'data-file' is required for this image".to_owned(),
        FailureKind::RawWithoutDataFile => "data-file-raw requires a data file".to_owned(),
        FailureKind::ReadOnlyNode => "Block node is read-only".to_owned(),
        FailureKind::SharedAndWritable => SHARED_AND_WRITABLE.to_owned(),
        FailureKind::QueuedThroughCache => NATIVE_NEEDS_DIRECT.to_owned(),
        FailureKind::NotADevice { driver, path } => {
            let name = driver.name();
            format!("'{name}' driver requires '{path}' to be either a character or block device")
        }
        FailureKind::NoDevice { path, error } => format!("Could not open '{path}': {error}"),
        FailureKind::Probe(error) => {
            format!("Could not read image for determining its format: {}", storage(error))
        }
        FailureKind::Storage(error) => storage(error),
        FailureKind::NotQcow => "Image not in qcow format".to_owned(),
        FailureKind::QcowVersion(version) => {
            let hint = "Try the 'qcow2' driver instead.".to_owned();
            return (format!("qcow (v1) does not support qcow version {version}"), vec![hint]);
        }
        FailureKind::Container(_) => "Volume is not in LUKS format".to_owned(),
        FailureKind::UnsupportedFormat(name) => format!("Unknown driver '{name}'"),
        FailureKind::UnalignedPreallocation => kind.to_string(),
        FailureKind::Loop(name) => endless(name),
        FailureKind::NoSnapshots => format!(
            "{NOT_LOADED}Block format 'raw' used by device '' does not support temporarily loading internal \
             snapshots"
        ),
        FailureKind::NoSuchSnapshot => format!("{NOT_LOADED}{NO_SNAPSHOT}"),
        other => capitalized(&other.to_string()),
    };
    (reason, Vec::new())
}

const NOT_LOADED: &str = "Failed to load snapshot: ";
const NO_SNAPSHOT: &str = "Can't find snapshot";

pub(super) fn with_hint((reason, hint): (String, Option<String>)) -> (String, Vec<String>) {
    (reason, hint.into_iter().collect())
}

/// The same in one text.
pub(crate) fn in_one_line(kind: &FailureKind) -> String {
    reason(kind).0
}

fn endless(name: &str) -> String {
    format!("Backing file '{name}' creates an infinite loop")
}

/// What is wrong with the backing chain of `name`.
pub(crate) fn chain_failure(name: &str, error: &ChainError) -> Failure {
    let (reason, depth) = match error {
        ChainError::NoBase(Some(base)) => {
            return Failure::new(format!("Did not find '{base}' in the backing chain of '{name}'"));
        }
        ChainError::NoBase(None) => return Failure::new("Image does not have a backing file"),
        ChainError::Loop { name, depth } => (endless(name), *depth),
        ChainError::TooLong(most) => (capitalized(&error.to_string()), *most),
        other => (capitalized(&other.to_string()), 0),
    };
    Failure::could_not_open(name, &format!("{}{reason}", BACKING.repeat(depth)))
}

/// The same in our own words, which name each file once, and shorter for whoever has named the disk already.
/// `None`: the words are QEMU's.
fn one_sentence(failure: &OpenFailure, reason: &str) -> Option<(String, Option<String>)> {
    let name = failure.name();
    let sentence = match (unopened(failure.kind()), failure.layer()) {
        (None, 0) => return None,
        (None, 1) => format!("Could not open the backing file of '{name}': {reason}"),
        (None, n) => format!("Could not open the backing file {n} layers below '{name}': {reason}"),
        (Some((file, text)), 0) if file == name => {
            return Some((format!("Could not open '{name}': {text}"), Some(text)));
        }
        (Some((file, text)), 0) => format!("Could not open '{file}' of '{name}': {text}"),
        (Some((file, text)), _) => {
            format!("Could not open '{file}' in the backing chain of '{name}': {text}")
        }
    };
    Some((sentence, None))
}

impl From<OpenFailure> for Failure {
    fn from(failure: OpenFailure) -> Self {
        let (reason, hints) = reason(failure.kind());
        let told = match failure.kind() {
            // What was asked for is not there; the image opens.
            FailureKind::NoSnapshots | FailureKind::NoSuchSnapshot => Self::new(reason),
            FailureKind::Engine(error) if snapshots_cut(error) => {
                Self::new(format!("{NOT_LOADED}{NO_SNAPSHOT}"))
            }
            FailureKind::Engine(error) if snapshot_l1(error).is_some() => {
                Self::new(format!("{NOT_LOADED}{reason}"))
            }
            _ => {
                let hintless = reason;
                let reason = format!("{}{hintless}", BACKING.repeat(failure.layer()));
                let told = Self::could_not_open(failure.name(), &reason);
                match one_sentence(&failure, &hintless) {
                    Some((sentence, short)) => told.in_own_words(sentence, short),
                    None => told,
                }
            }
        };
        let told = hints.into_iter().fold(told, Self::hint);
        let told = failure.warnings().iter().fold(told, |told, warned| told.after(warning_lines(warned)));
        match failure.missing_backing() {
            Some(missing) => told.advise(format!(
                "backing file '{}' not found; it was recorded relative to '{}'",
                missing.recorded, missing.above
            )),
            None => told,
        }
    }
}

/// The lines of a warning, with the word before the first.
pub(crate) fn warning_lines(told: &Warning) -> Vec<String> {
    let mut lines = warning(told);
    lines.first_mut().into_iter().for_each(|line| line.insert_str(0, "warning: "));
    lines
}

/// The lines of a warning, without the word itself.
pub(crate) fn warning(warning: &Warning) -> Vec<String> {
    match warning {
        Warning::ShortSwitch(short) => vec![
            format!("short-form boolean option '{}' deprecated", short.item),
            format!("Please use {}={} instead", short.long.key, short.long.value),
        ],
        Warning::EmptyBacking => {
            vec!["Use of \"backing\": \"\" is deprecated; use \"backing\": null instead".to_owned()]
        }
        Warning::NoExtentSizeHint(error) => vec![format!("Failed to set extent size hint: {error}")],
        // The word stands in the first line already.
        Warning::GuessedRaw(name) => vec![
            format!("WARNING: Image format was not specified for '{name}' and probing guessed raw."),
            "         Automatically detecting the format is dangerous for raw images, \
             write operations on block 0 will be restricted."
                .to_owned(),
            "         Specify the 'raw' format explicitly to remove the restrictions.".to_owned(),
        ],
        Warning::BitmapsToLose(damage) => {
            vec![format!("bitmaps are damaged, and lost when the disk is changed: {}", chain(&**damage))]
        }
        Warning::NotClosedCleanly => vec!["the image was not closed cleanly".to_owned()],
        Warning::MissingEnd { file, len, end } => vec![format!(
            "'{file}' ends at byte {len}, but clusters in use reach up to {end}: \
             it may have been cut short. What is missing reads as zeroes"
        )],
        other => vec![format!("{other:?}")],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::ImageArgs;
    use qcow2_blockdev::{ImageName, open};

    fn told(typed: &str, image_opts: bool) -> Failure {
        let args = ImageArgs { image_opts, ..ImageArgs::default() };
        let opened = ImageName::parse(typed, &args.naming()).and_then(|name| open(&name, &args.options()));
        opened.map_or_else(Failure::from, |_| panic!("'{typed}' opens"))
    }

    #[track_caller]
    fn check(typed: &str, reason: &str) {
        let image_opts = typed.contains('=') && !typed.contains(':');
        assert_eq!(told(typed, image_opts).to_string(), format!("Could not open '{typed}': {reason}"));
    }

    #[test]
    fn names() {
        check("foo:x", "Unknown protocol 'foo'");
        check("", "The 'file' block driver requires a file name");
        check("null-co:x", "The only allowed filename for this driver is 'null-co://'");
        check("blkdebug:x", "blkdebug requires both config file and image path");
        check("nbd://", "No valid URL specified");
        check("nbd::", "error parsing port in address ':'");
        check("nbd:[::1", "error parsing IPv6 address '[::1'");
        check("nbd:x", "error parsing address 'x'");
        check("nbd:", "NBD server address missing");
        check("driver=nbd,server.type=inet", "Parameter 'host' is missing");
        check("driver=nbd,server.type=vsock", "Parameter 'type' does not accept value 'vsock'");
        check("driver=raw,file=x", "Cannot find device='x' nor node-name='x'");
        check("driver=qcow2", "A block device must be specified for \"file\"");
        check("driver=file", "The 'file' block driver requires a file name");
        check("file.driver=nope,file.filename=x", "Unknown driver 'nope'");
        check(
            "driver=qcow2,file.filename=x,backing=y",
            "Could not open backing file: Cannot find device='y' nor node-name='y'",
        );
        assert_eq!(told("", true).to_string(), "Could not open '': Must specify either driver or file");
    }

    #[test]
    fn json_that_is_none() {
        for (text, why) in [
            ("", "Expecting a JSON value"),
            ("{} x", "Expecting at most one JSON value"),
            ("{", "JSON parse error, premature EOI"),
            ("nope", "JSON parse error, invalid keyword 'nope'"),
            ("{\"a\":}", "JSON parse error, expecting value"),
            ("{\"a\":1,'a':2}", "JSON parse error, duplicate key"),
            ("{\"a\" 1}", "JSON parse error, missing : in object pair"),
            ("{1:2}", "JSON parse error, key is not a string in object"),
            ("{'a':1 'b':2}", "JSON parse error, expected separator in dict"),
            ("[1 2]", "JSON parse error, expected separator in list"),
            ("{a:-c}", "JSON parse error, stray '-c'"),
            (r#""\ud800""#, "JSON parse error, \\ud800 is not a valid Unicode character"),
            (r#""\x""#, "JSON parse error, invalid escape sequence in string"),
        ] {
            check(&format!("json:{text}"), &format!("Could not parse the JSON options: {why}"));
        }
        check("json:[]", "Invalid JSON object given");
        let deep = format!("json:{}", "[".repeat(2000));
        check(&deep, "Could not parse the JSON options: JSON nesting depth limit exceeded");
    }

    #[test]
    fn options_and_files() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("raw");
        std::fs::write(&file, [0; 512]).unwrap();
        let on = |options: &str, reason: &str| {
            check(&format!("{options},file.filename={}", file.display()), reason);
        };
        on("driver=raw,nope=1", "Block format 'raw' does not support the option 'nope'");
        on("driver=raw,file.nope=1", "Block protocol 'file' doesn't support the option 'nope'");
        on("driver=raw,file.locking=perhaps", "invalid parameter value: perhaps");
        on("driver=raw,file.discard=perhaps", "Invalid discard option");
        on("driver=raw,offset=1k", "Offset (1024) cannot be greater than size of the containing file (512)");
        on("driver=raw,backing.driver=raw,backing.file.filename=x", "Driver doesn't support backing files");
        on("driver=raw,file.aio=native", NATIVE_NEEDS_DIRECT);
        let missing = folder.path().join("none").display().to_string();
        check(&missing, &format!("Could not open '{missing}': No such file or directory"));
        let failure = told(&format!("driver=raw,size=1X,file.filename={}", file.display()), true);
        assert_eq!(failure.lines("p", "p").len(), 3);
    }

    #[test]
    fn deprecated_forms_come_before_the_failure() {
        let lines = told("driver=nope,read-only", true).lines("p", "p");
        let warned = [
            "p: warning: short-form boolean option 'read-only' deprecated",
            "Please use read-only=on instead",
        ];
        assert_eq!(lines[..2], warned);
    }
}
