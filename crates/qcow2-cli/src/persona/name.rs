//! Names that are not understood, and options that a node does not take.

use super::text::{BACKING, capitalized, storage};
use qcow2_blockdev::{
    AddressError, AddressPart, Driver, FailureKind, JsonError, KeyValueError, LineError, OptionError,
    OptionErrorKind, RuleError, TuningError, WindowError,
};

/// Why a name is not understood; `None`: that is not the reason.
pub(super) fn name(kind: &FailureKind) -> Option<String> {
    Some(match kind {
        FailureKind::UnknownDriver(name) => format!("Unknown driver '{name}'"),
        FailureKind::UnknownProtocol(name) => format!("Unknown protocol '{name}'"),
        FailureKind::NoDriver => "Must specify either driver or file".to_owned(),
        FailureKind::NoFileName(driver) => {
            format!("The '{}' block driver requires a file name", driver.name())
        }
        FailureKind::UnknownNode(name) => no_such_node(name),
        FailureKind::UnknownBackingNode(name) => {
            format!("{BACKING}{}", no_such_node(name))
        }
        FailureKind::NodeAndName => {
            "Cannot reference an existing block device with additional options or a new filename".to_owned()
        }
        FailureKind::TwoNames => "Can't specify 'file' and 'filename' options at the same time".to_owned(),
        FailureKind::NothingBelow(role) => format!("A block device must be specified for \"{role}\""),
        FailureKind::NameOfNull(driver) => {
            format!("The only allowed filename for this driver is '{}://'", driver.name())
        }
        FailureKind::NameOfBlkdebug => "blkdebug requires both config file and image path".to_owned(),
        FailureKind::NameOfBlkverify => "blkverify requires raw copy and original image path".to_owned(),
        FailureKind::UnknownOption { driver: Driver::CopyBeforeWrite, option } => unexpected(option),
        FailureKind::Json(error) => json(error),
        FailureKind::KeyValues(error) => key_values(error),
        FailureKind::Server(error) => server(error),
        FailureKind::CreatesNothing(driver) => {
            format!("Protocol driver '{}' does not support image creation", driver.name())
        }
        FailureKind::UnknownOption { driver, option } if driver.is_protocol() => {
            format!("Block protocol '{}' doesn't support the option '{option}'", driver.name())
        }
        FailureKind::UnknownOption { driver, option } => {
            format!("Block format '{}' does not support the option '{option}'", driver.name())
        }
        FailureKind::NoBackingFiles => "Driver doesn't support backing files".to_owned(),
        FailureKind::NoDataFile => {
            "'data-file' can only be set for images with an external data file".to_owned()
        }
        _ => return None,
    })
}

/// The words of a parameter that somebody does not have.
pub(super) fn unexpected(option: &str) -> String {
    format!("Parameter '{option}' is unexpected")
}

/// Those of a value of another type.
pub(super) fn expects(option: &str, what: &str) -> String {
    format!("Parameter '{option}' expects {what}")
}

/// Those of a value that is no choice.
fn not_accepted(option: &str, value: &str) -> String {
    format!("Parameter '{option}' does not accept value '{value}'")
}

fn no_such_node(name: &str) -> String {
    format!("Cannot find device='{name}' nor node-name='{name}'")
}

fn json(error: &JsonError) -> String {
    let text = json_text(error);
    if matches!(error, JsonError::NotAnObject) {
        text
    } else {
        format!("Could not parse the JSON options: {text}")
    }
}

/// What is wrong with JSON.
pub(super) fn json_text(error: &JsonError) -> String {
    match error {
        JsonError::NotAnObject => "Invalid JSON object given".to_owned(),
        JsonError::Nothing => "Expecting a JSON value".to_owned(),
        JsonError::SeveralValues => "Expecting at most one JSON value".to_owned(),
        JsonError::TooDeep => "JSON nesting depth limit exceeded".to_owned(),
        other => format!("JSON parse error, {}", parse_error(other)),
    }
}

fn parse_error(error: &JsonError) -> String {
    match error {
        JsonError::Unfinished => "premature EOI",
        JsonError::NoValue => "expecting value",
        JsonError::KeyNotText => "key is not a string in object",
        JsonError::NoColon => "missing : in object pair",
        JsonError::DuplicateKey => "duplicate key",
        JsonError::NoCommaInObject => "expected separator in dict",
        JsonError::NoCommaInList => "expected separator in list",
        JsonError::NotUtf8 => "invalid UTF-8 sequence in string",
        JsonError::UnknownEscape => "invalid escape sequence in string",
        JsonError::Stray(text) => return format!("stray '{text}'"),
        JsonError::UnknownWord(word) => return format!("invalid keyword '{word}'"),
        JsonError::NotACharacter(text) => return format!("\\u{text} is not a valid Unicode character"),
        other => return other.to_string(),
    }
    .to_owned()
}

/// Why a list of `key=value` is none.
pub(super) fn key_values(error: &KeyValueError) -> String {
    match error {
        KeyValueError::NoKey => "Invalid parameter ''".to_owned(),
        KeyValueError::NoValue(item) => format!("Expected '=' after parameter '{item}'"),
        KeyValueError::EmptyEnd(list) => format!("Invalid option list: {list}"),
        other => capitalized(&other.to_string()),
    }
}

fn server(error: &AddressError) -> String {
    match error {
        AddressError::NotAUrl => "No valid URL specified".to_owned(),
        AddressError::NotNbd => "File name string for NBD must start with 'nbd:'".to_owned(),
        AddressError::Unreadable { part, address } => {
            let what = match part {
                AddressPart::Port => "port in address",
                AddressPart::Ipv6 => "IPv6 address",
                AddressPart::Whole => "address",
            };
            format!("error parsing {what} '{address}'")
        }
        AddressError::PathAndHost => "path and host may not be used at the same time".to_owned(),
        AddressError::NoCredentials(id) => format!("No TLS credentials with id '{id}'"),
        AddressError::NotCredentials(id) => format!("Object with id '{id}' is not TLS credentials"),
        AddressError::NotForClients => "Expected TLS credentials for a client endpoint".to_owned(),
        AddressError::Missing(name) => format!("Parameter '{name}' is missing"),
        AddressError::NoServer => "NBD server address missing".to_owned(),
        AddressError::UnknownType(kind) => format!("Parameter 'type' does not accept value '{kind}'"),
        other => capitalized(&other.to_string()),
    }
}

/// A value that its option does not take, and what follows on lines of their own.
pub(super) fn option(error: &OptionError) -> (String, Vec<String>) {
    let OptionError { option, value, kind } = error;
    let reason = match kind {
        OptionErrorKind::NotASwitch => format!("Parameter '{option}' expects 'on' or 'off'"),
        OptionErrorKind::NotANumber => format!("Parameter '{option}' expects a number"),
        OptionErrorKind::NumberTooLarge => format!("Value '{value}' is too large for parameter '{option}'"),
        OptionErrorKind::SizeOutOfRange => {
            format!("Value '{value}' is out of range for parameter '{option}'")
        }
        OptionErrorKind::NotASize if option == "min-cluster-size" => expects(option, "size"),
        OptionErrorKind::NotAnInteger => expects(option, "integer"),
        OptionErrorKind::NotAU32 => expects(option, "uint32_t"),
        OptionErrorKind::NotAChoice if option == "on-cbw-error" => not_accepted(option, value),
        OptionErrorKind::NotAChoice if option == "discard" => "Invalid discard option".to_owned(),
        OptionErrorKind::NotAChoice => format!("invalid parameter value: {value}"),
        OptionErrorKind::NotASize => {
            let reason = format!("Parameter '{option}' expects a non-negative number below 2^64");
            return (reason, SUFFIXES.map(str::to_owned).to_vec());
        }
        _ => capitalized(&error.to_string()),
    };
    (reason, Vec::new())
}

/// What follows the complaint about a size.
const SUFFIXES: [&str; 2] = [
    "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-",
    "and exabytes, respectively.",
];

/// Why a part of a raw disk is not there.
pub(super) fn window(error: &WindowError) -> (String, Vec<String>) {
    let reason = match error {
        WindowError::Option(error) => return option(error),
        WindowError::Storage(error) => storage(error),
        WindowError::OffsetPastEnd { offset, len } => {
            format!("Offset ({offset}) cannot be greater than size of the containing file ({len})")
        }
        // The two blanks are QEMU's.
        WindowError::EndPastEnd { offset, size, len } => format!(
            "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the  actual size of the \
             containing file ({len})"
        ),
        WindowError::NotInSectors(_) => "Specified size is not multiple of 512".to_owned(),
        other => capitalized(&other.to_string()),
    };
    (reason, Vec::new())
}

/// Why rules for faults are none.
pub(super) fn rules(error: &RuleError) -> (String, Vec<String>) {
    let reason = match error {
        RuleError::Value(error) => return option(error),
        RuleError::Limit { option, bytes } => format!("Cannot meet constraints with {option} {bytes}"),
        RuleError::Unreadable(error) => format!("Could not read blkdebug config file: {error}"),
        RuleError::UnknownOption(key) => {
            format!("Block protocol 'blkdebug' doesn't support the option '{key}'")
        }
        RuleError::UnknownKey { group, key } => {
            format!("[{group}] section doesn't support the option '{key}'")
        }
        RuleError::NoEvent => "Missing event name for rule".to_owned(),
        RuleError::Line { file, line, error } => {
            let what = match error {
                LineError::UnknownGroup => "There is no such group",
                LineError::OutsideGroup => "no group defined",
                LineError::NotAPair => "parse error",
            };
            format!("{file}:{line}: {what}")
        }
        other => capitalized(&other.to_string()),
    };
    (reason, Vec::new())
}

/// Why options of a qcow2 image do not go together.
pub(super) fn tuning(error: &TuningError) -> (String, Vec<String>) {
    let reason = match error {
        TuningError::Option(error) => return option(error),
        TuningError::CleanInterval => "Cache clean interval too big".to_owned(),
        TuningError::NeedsVersion3("lazy-refcounts") => {
            "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level".to_owned()
        }
        TuningError::NeedsVersion3(option) => format!("{option} is only supported since qcow2 version 3"),
        TuningError::LargerThanAll(option) => format!("{option} may not exceed cache-size"),
        TuningError::ThreeSizes => {
            "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time".to_owned()
        }
        TuningError::EntrySize { cluster_size } => format!(
            "L2 cache entry size must be a power of two between 512 and the cluster size ({cluster_size})"
        ),
        TuningError::OverlapConflict { plain, template } => format!(
            "Conflicting values for qcow2 options 'overlap-check' ('{plain}') and 'overlap-check.template' \
             ('{template}')"
        ),
        TuningError::OverlapTemplate(text) => format!(
            "Unsupported value '{text}' for qcow2 option 'overlap-check'. Allowed are any of the following: none, \
             constant, cached, all"
        ),
        other => capitalized(&other.to_string()),
    };
    (reason, Vec::new())
}
