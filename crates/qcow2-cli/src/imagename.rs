//! Names of images on the command line: plain paths, `file:` and `json:` names, option strings.

use crate::args::ImageArgs;
use crate::failure::Failure;
use crate::optlist::OptList;
use serde_json::Value;
use std::collections::BTreeMap;

/// An image as the user named it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ImageName {
    /// As it was typed, for messages.
    pub(crate) typed: String,
    /// The file.
    pub(crate) path: String,
    /// The format, where one is given; otherwise it is probed.
    pub(crate) format: Option<String>,
}

impl ImageName {
    /// Understands `typed` as `args` say. Errors: "Could not open".
    pub(crate) fn parse(typed: &str, args: &ImageArgs) -> Result<Self, Failure> {
        let understood = match args.image_opts {
            true => from_option_string(typed),
            false => from_name(typed).map(|(path, format)| (path, format.or_else(|| args.format.clone()))),
        };
        let (path, format) = understood.map_err(|reason| Failure::could_not_open(typed, &reason))?;
        Ok(Self { typed: typed.to_owned(), path, format })
    }
}

/// The path of a plain file name that may start with `file:`, for targets. Errors: the reason.
pub(crate) fn file_path(name: &str) -> Result<String, String> {
    if name.is_empty() {
        return Err("The 'file' block driver requires a file name".to_owned());
    }
    match name.split_once(':') {
        Some(("file", path)) => Ok(path.to_owned()),
        Some((protocol, _)) if !protocol.contains('/') => Err(format!("Unknown protocol '{protocol}'")),
        _ => Ok(name.to_owned()),
    }
}

type Understood = Result<(String, Option<String>), String>;

fn from_name(name: &str) -> Understood {
    match name.strip_prefix("json:") {
        Some(json) => from_json(json),
        None => Ok((file_path(name)?, None)),
    }
}

fn from_json(json: &str) -> Understood {
    let value: Value = serde_json::from_str(json).map_err(|error| {
        let what = if error.is_eof() { "premature EOI".to_owned() } else { error.to_string() };
        format!("Could not parse the JSON options: JSON parse error, {what}")
    })?;
    let mut options = BTreeMap::new();
    flatten(&mut options, "", &value);
    from_options(&options)
}

fn from_option_string(text: &str) -> Understood {
    if text.is_empty() {
        return from_options(&BTreeMap::new());
    }
    if !text.contains('=') {
        return Err(format!("Cannot find device='{text}' nor node-name='{text}'"));
    }
    let list = OptList::parse_pairs(text, None)?;
    let pairs = list.pairs().iter().map(|pair| (pair.key.clone(), pair.value.clone()));
    from_options(&pairs.collect())
}

/// `{"a": {"b": 1}}` becomes `a.b=1`, as option strings have it.
fn flatten(options: &mut BTreeMap<String, String>, prefix: &str, value: &Value) {
    match value {
        Value::Object(fields) => {
            for (key, item) in fields {
                let name = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                flatten(options, &name, item);
            }
        }
        Value::String(text) => {
            options.insert(prefix.to_owned(), text.clone());
        }
        other => {
            options.insert(prefix.to_owned(), other.to_string());
        }
    }
}

fn from_options(options: &BTreeMap<String, String>) -> Understood {
    let get = |key: &str| options.get(key).map(String::as_str);
    if let Some(node) = get("file") {
        return Err(format!("Cannot find device='{node}' nor node-name='{node}'"));
    }
    let (driver, file_driver) = (get("driver"), get("file.driver"));
    if driver.is_none() && !options.keys().any(|key| key.starts_with("file.")) {
        return Err("Must specify either driver or file".to_owned());
    }
    if let Some(other) = file_driver.filter(|driver| !FILE_DRIVERS.contains(driver)) {
        return Err(format!("Unknown driver '{other}'"));
    }
    for key in options.keys() {
        if let Some(option) = key.strip_prefix("file.") {
            if !FILE_OPTIONS.contains(&option) {
                return Err(format!("Block protocol 'file' doesn't support the option '{option}'"));
            }
        } else if !FORMAT_OPTIONS.contains(&&**key) {
            let driver = driver.unwrap_or("qcow2");
            return Err(format!("Block format '{driver}' does not support the option '{key}'"));
        }
    }
    match get("file.filename") {
        Some(path) => Ok((path.to_owned(), driver.map(str::to_owned))),
        None => Err("A block device must be specified for \"file\"".to_owned()),
    }
}

const FILE_DRIVERS: [&str; 2] = ["file", "host_device"];
/// What a file takes beside its name; none of it changes what is read.
const FILE_OPTIONS: [&str; 7] =
    ["driver", "filename", "locking", "aio", "cache.direct", "cache.no-flush", "node-name"];
/// What a format takes; none of it changes what is read.
const FORMAT_OPTIONS: [&str; 10] = [
    "driver",
    "node-name",
    "read-only",
    "auto-read-only",
    "discard",
    "lazy-refcounts",
    "l2-cache-size",
    "refcount-cache-size",
    "cache-size",
    "overlap-check",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(typed: &str, image_opts: bool) -> Result<(String, Option<String>), String> {
        let args = ImageArgs { image_opts, ..ImageArgs::default() };
        ImageName::parse(typed, &args).map(|name| (name.path, name.format)).map_err(|f| f.to_string())
    }

    #[track_caller]
    fn check(typed: &str, image_opts: bool, path: &str, format: Option<&str>) {
        assert_eq!(parse(typed, image_opts), Ok((path.to_owned(), format.map(str::to_owned))));
    }

    #[track_caller]
    fn check_error(typed: &str, image_opts: bool, reason: &str) {
        assert_eq!(parse(typed, image_opts), Err(format!("Could not open '{typed}': {reason}")));
    }

    #[test]
    fn names() {
        check("a.img", false, "a.img", None);
        check("./a:b", false, "./a:b", None);
        check("dir/a:b", false, "dir/a:b", None);
        check("file:a.img", false, "a.img", None);
        check("json:{\"driver\":\"qcow2\",\"file\":{\"filename\":\"a:b\"}}", false, "a:b", Some("qcow2"));
        check_error("foo:x", false, "Unknown protocol 'foo'");
        check_error("", false, "The 'file' block driver requires a file name");
        check_error("json:{", false, "Could not parse the JSON options: JSON parse error, premature EOI");
    }

    #[test]
    fn option_strings() {
        check("driver=qcow2,file.filename=a,,b", true, "a,b", Some("qcow2"));
        check("file.filename=a,file.driver=file", true, "a", None);
        check_error("a.img", true, "Cannot find device='a.img' nor node-name='a.img'");
        check_error("driver=raw,file=x", true, "Cannot find device='x' nor node-name='x'");
        check_error("driver=qcow2", true, "A block device must be specified for \"file\"");
        check_error("", true, "Must specify either driver or file");
        check_error(
            "driver=qcow2,foo=1,file.filename=x",
            true,
            "Block format 'qcow2' does not support the option 'foo'",
        );
        check_error(
            "driver=qcow2,file.foo=3,file.filename=x",
            true,
            "Block protocol 'file' doesn't support the option 'foo'",
        );
        check_error("file.driver=nope,file.filename=x", true, "Unknown driver 'nope'");
    }

    #[test]
    fn a_given_format_counts_for_plain_names() {
        let args = ImageArgs { format: Some("raw".to_owned()), ..ImageArgs::default() };
        assert_eq!(ImageName::parse("x", &args).unwrap().format.as_deref(), Some("raw"));
    }
}
