//! Names of disks: plain paths, protocol names, `json:` descriptions, lists of options.
//!
//! `protocol` understands names that say where bytes are, `crate::tree` makes a tree of options, `shown` puts
//! a tree together again.

mod protocol;
mod shown;

pub(crate) use protocol::{deeper, driver_called, in_name, protocol_of};
pub use shown::filename;

use crate::failure::{FailureKind, OpenFailure};
use crate::keys::{Keys, Secrets};
use crate::tree::{Node, Options, Scalar, from_options};
use crate::warning::Warning;
use qcow2_core::ImageFormat;

/// How names are meant.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Naming {
    /// The driver on top, where it is given; otherwise the format is probed.
    pub format: Option<String>,
    /// Whether names are lists of options (`driver=qcow2,file.filename=disk`).
    pub is_list: bool,
    /// Options that go with a plain name and are stronger than it (`driver=qcow2,file.locking=off`).
    pub options: Option<String>,
    /// The secrets that options may name.
    pub secrets: Secrets,
}

impl Naming {
    /// Plain names of disks whose format is probed and whose secrets are among `secrets`.
    pub fn new(secrets: &Secrets) -> Self {
        Self { secrets: secrets.clone(), ..Self::default() }
    }

    /// The same with a format.
    #[must_use]
    pub fn with_format(mut self, format: Option<String>) -> Self {
        self.format = format;
        self
    }

    /// The same with options that go with the name.
    #[must_use]
    pub fn with_options(self, list: &str) -> Self {
        Self { options: Some(list.to_owned()), ..self }
    }

    /// Lists of options instead of names, where `is_list` is set.
    #[must_use]
    pub fn as_list(mut self, is_list: bool) -> Self {
        self.is_list = is_list;
        self
    }
}

/// A disk as somebody named it, understood. Nothing of it is opened yet.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ImageName {
    /// As it was typed, for messages.
    pub typed: String,
    /// What it is made of.
    pub node: Node,
    /// The secrets of its layers.
    pub keys: Keys,
    /// What is deprecated in it.
    pub warnings: Vec<Warning>,
}

impl ImageName {
    /// Understands `typed` as `naming` says. Disk: looks whether names lead to devices; opens nothing.
    ///
    /// ```
    /// use qcow2_blockdev::{FailureKind, ImageName, Naming};
    ///
    /// let text = r#"json:{"driver": "qcow2", "file": {"filename": "a"}}"#;
    /// let name = ImageName::parse(text, &Naming::default())?;
    /// assert_eq!(name.path(), Some("a"));
    /// let failure = ImageName::parse("floppy:a", &Naming::default()).unwrap_err();
    /// assert!(matches!(failure.kind(), FailureKind::UnknownProtocol(name) if name == "floppy"));
    /// # Ok::<(), qcow2_blockdev::OpenFailure>(())
    /// ```
    pub fn parse(typed: &str, naming: &Naming) -> Result<Self, OpenFailure> {
        let mut warnings = Vec::new();
        let understood = match naming.is_list {
            true => from_list(typed, &mut warnings),
            false => from_name(typed, naming, &mut warnings),
        };
        let node = match understood {
            Ok(node) => node,
            Err(kind) => return Err(OpenFailure::new(typed, kind).with_warnings(warnings)),
        };
        if node.names_empty_backing() {
            warnings.push(Warning::EmptyBacking);
        }
        let keys = Keys::of(&node, &naming.secrets);
        Ok(Self { typed: typed.to_owned(), node, keys, warnings })
    }

    /// The disk that `node` describes, called `typed` in messages.
    pub fn of_node(typed: &str, node: Node, secrets: &Secrets) -> Self {
        let keys = Keys::of(&node, secrets);
        Self { typed: typed.to_owned(), node, keys, warnings: Vec::new() }
    }

    /// The same without keys: encrypted layers open, and their content stays unreadable.
    #[must_use]
    pub fn sealed(self) -> Self {
        Self { keys: Keys::sealed(), ..self }
    }

    /// The file that is at the bottom of it, if one is.
    pub fn path(&self) -> Option<&str> {
        self.node.path()
    }

    /// The warning for a disk that is to be written to and was taken for raw by its looks; `format`: what it
    /// was taken for.
    pub fn guess_warning(&self, format: &ImageFormat) -> Option<Warning> {
        let guessed = self.node.is_probed() && *format == ImageFormat::Raw;
        guessed.then(|| Warning::GuessedRaw(filename(&self.node, "raw")))
    }
}

/// Understands a plain name; adds to `warnings`.
fn from_name(name: &str, naming: &Naming, warnings: &mut Vec<Warning>) -> Result<Node, FailureKind> {
    let mut options = Options::default();
    if let Some(list) = &naming.options {
        let (listed, short) = Options::from_list(list)?;
        warnings.extend(short.into_iter().map(Warning::ShortSwitch));
        options = listed;
    }
    if let Some(format) = &naming.format {
        options.set("driver", Scalar::text(driver_called(format)?.name()));
    }
    from_options(options, Some(name), false, 0)
}

/// Understands a list of options; adds to `warnings`.
fn from_list(text: &str, warnings: &mut Vec<Warning>) -> Result<Node, FailureKind> {
    if text.is_empty() || text.starts_with('=') {
        return from_options(Options::default(), None, false, 0);
    }
    if !text.contains('=') {
        return Err(FailureKind::UnknownNode(Options::lone_name(text)));
    }
    let (options, short) = Options::from_list(text)?;
    warnings.extend(short.into_iter().map(Warning::ShortSwitch));
    from_options(options, None, false, 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::Driver;
    use crate::tree::JsonError;

    fn parse(typed: &str, is_list: bool, format: Option<&str>) -> Result<ImageName, OpenFailure> {
        let naming = Naming::default().as_list(is_list).with_format(format.map(str::to_owned));
        ImageName::parse(typed, &naming)
    }

    /// The shortest name of what is understood.
    #[track_caller]
    fn check(typed: &str, is_list: bool, expected: &str) {
        let shown = parse(typed, is_list, None).map(|name| filename(&name.node, "probed"));
        assert_eq!(shown.unwrap_or_else(|failure| panic!("{failure}")), expected, "{typed}");
    }

    fn kind(typed: &str, is_list: bool) -> FailureKind {
        let failure = parse(typed, is_list, None).map(|name| filename(&name.node, "probed")).unwrap_err();
        assert_eq!((failure.name(), failure.layer()), (typed, 0));
        failure.into_kind()
    }

    #[test]
    fn names() {
        for (typed, expected) in [
            ("a.img", "a.img"),
            ("./a:b", "./a:b"),
            ("dir/a:b", "dir/a:b"),
            ("file:a.img", "a.img"),
            ("null-co://", "null-co://"),
            ("blkdebug::a.img", "blkdebug::a.img"),
            ("blkdebug:a.cfg:b", "blkdebug:a.cfg:b"),
            ("blkdebug::null-aio://", "blkdebug::null-aio://"),
            ("nbd:unix:/s:exportname=x", "nbd+unix:///x?socket=/s"),
            ("nbd://host/x", "nbd://host:10809/x"),
            ("json:{\"driver\":\"qcow2\",\"file\":{\"filename\":\"a:b\"}}", "a:b"),
            ("json:{\"driver\":\"null-co\",\"size\":1024}", "json:{\"driver\": \"null-co\", \"size\": 1024}"),
        ] {
            check(typed, false, expected);
        }
        assert!(matches!(kind("foo:x", false), FailureKind::UnknownProtocol(name) if name == "foo"));
        assert!(matches!(kind("qcow2:x", false), FailureKind::UnknownProtocol(name) if name == "qcow2"));
        assert!(matches!(kind("", false), FailureKind::NoFileName(Driver::File)));
        assert!(matches!(kind("json:{", false), FailureKind::Json(JsonError::Unfinished)));
        assert!(matches!(kind("json:[]", false), FailureKind::Json(JsonError::NotAnObject)));
        assert!(matches!(kind("null-co:x", false), FailureKind::NameOfNull(Driver::NullCo)));
        assert!(matches!(kind("blkdebug:x", false), FailureKind::NameOfBlkdebug));
        assert!(matches!(kind("nbd://", false), FailureKind::Server(_)));
        assert!(matches!(kind(&"blkdebug::".repeat(300), false), FailureKind::TooManyNodes(256)));
    }

    #[test]
    fn option_strings() {
        check("driver=qcow2,file.filename=a,,b", true, "a,b");
        check("file.filename=a,file.driver=file", true, "a");
        check(
            "driver=raw,offset=512,file.filename=a",
            true,
            concat!(
                r#"json:{"offset": "512", "driver": "raw", "#,
                r#""file": {"driver": "file", "filename": "a"}}"#
            ),
        );
        check(
            "driver=qcow2,file.driver=blkdebug,file.image.filename=a,file.inject-error.0.event=l2_load",
            true,
            concat!(
                r#"json:{"driver": "qcow2", "file": {"image": {"driver": "file", "filename": "a"}, "#,
                r#""driver": "blkdebug", "inject-error.0.event": "l2_load"}}"#
            ),
        );
        assert!(matches!(kind("a.img", true), FailureKind::UnknownNode(name) if name == "a.img"));
        assert!(matches!(kind("driver=raw,file=x", true), FailureKind::UnknownNode(name) if name == "x"));
        assert!(matches!(kind("driver=qcow2", true), FailureKind::NothingBelow("file")));
        assert!(matches!(kind("", true), FailureKind::NoDriver));
        let unknown = kind("file.driver=nope,file.filename=x", true);
        assert!(matches!(unknown, FailureKind::UnknownDriver(name) if name == "nope"));
        let backing = kind("driver=qcow2,file.filename=x,backing=y", true);
        assert!(matches!(backing, FailureKind::UnknownBackingNode(name) if name == "y"));
    }

    #[test]
    fn a_given_format_counts_for_plain_names() {
        let top = |format| parse("x", false, Some(format)).map(|name| name.node.driver());
        assert_eq!(top("raw").ok(), Some(Driver::Raw));
        assert_eq!(top("file").ok(), Some(Driver::File));
        let shown = parse("x", false, Some("blkdebug")).map(|name| filename(&name.node, "probed"));
        assert_eq!(shown.ok().as_deref(), Some("blkdebug::x"));
        assert!(top("null-co").is_err() && top("floppy").is_err());
    }

    #[test]
    fn deprecated_forms_are_warned_of_also_where_the_name_is_refused() {
        let name = parse("driver=qcow2,file.filename=x,backing=,read-only", true, None).unwrap();
        let [Warning::ShortSwitch(short), Warning::EmptyBacking] = &name.warnings[..] else {
            panic!("{:?}", name.warnings);
        };
        assert_eq!((&*short.item, &*short.long.key), ("read-only", "read-only"));
        let failure = parse("driver=nope,read-only", true, None).unwrap_err();
        assert_eq!(failure.warnings().len(), 1);
    }
}
