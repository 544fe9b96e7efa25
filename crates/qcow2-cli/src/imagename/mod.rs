//! Names of images on the command line: plain paths, protocol names, `json:` names, option strings.
//!
//! `options` takes a name apart, `node` makes a tree of it, `display` puts it together again; `nbd` and
//! `blkdebug` know the words of these two.

mod blkdebug;
mod display;
mod json;
mod jsontext;
mod nbd;
mod node;
mod options;

pub(crate) use blkdebug::rules as debug_rules;
pub(crate) use display::filename;
pub(crate) use nbd::server as nbd_server;
pub(crate) use node::{Driver, Node};
pub(crate) use options::Options;

use crate::args::{ImageArgs, Objects};
use crate::crypt::Keys;
use crate::failure::Failure;
use crate::session::Session;
use serde_json::Value;

/// An image as the user named it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ImageName {
    /// As it was typed, for messages.
    pub(crate) typed: String,
    /// What it is made of.
    pub(crate) node: Node,
    /// The secrets of its layers.
    pub(crate) keys: Keys,
    /// What is deprecated in it.
    pub(crate) warnings: Vec<String>,
}

impl ImageName {
    /// Understands `typed` as `args` say. Errors: "Could not open".
    pub(crate) fn parse(typed: &str, args: &ImageArgs) -> Result<Self, Failure> {
        let mut warnings = Vec::new();
        let understood = match args.image_opts {
            true => node::from_option_string(typed, &mut warnings),
            false => node::from_name(typed, args.format.as_deref()),
        };
        let node = understood.map_err(|reason| {
            let failure = Failure::could_not_open(typed, &reason);
            warnings.iter().fold(failure, |failure, warning| failure.after(format!("warning: {warning}")))
        })?;
        if node.names_empty_backing() {
            warnings.push("Use of \"backing\": \"\" is deprecated; use \"backing\": null instead".to_owned());
        }
        let keys = Keys::new(node.layer_keys(), &args.objects);
        Ok(Self { typed: typed.to_owned(), node, keys, warnings })
    }

    /// The same, and says on standard error what is deprecated in it.
    pub(crate) fn read(session: &Session, typed: &str, args: &ImageArgs) -> Result<Self, Failure> {
        let name = Self::parse(typed, args)?;
        name.warnings.iter().for_each(|warning| session.warn(warning));
        Ok(name)
    }

    /// What was made at `target`, typed so, in a format. `secret`: the option that names its secret, and what
    /// it names.
    pub(crate) fn on(
        typed: &str,
        target: NewTarget,
        format: Driver,
        secret: Option<(&str, &str)>,
        objects: &Objects,
    ) -> Self {
        let below = match target {
            NewTarget::File(path) => Node::file(&path),
            NewTarget::Existing(node) => node,
            NewTarget::OutOfReach { .. } => Node::file(typed),
        };
        let mut node = Node::on(Some(format), below);
        if let Some((key, id)) = secret {
            node.options.set(key, Value::String(id.to_owned()));
        }
        let keys = Keys::new(node.layer_keys(), objects);
        Self { typed: typed.to_owned(), node, keys, warnings: Vec::new() }
    }

    /// The file that is at the bottom of it, if one is.
    pub(crate) fn path(&self) -> Option<&str> {
        self.node.path()
    }
}

/// Where a new image goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum NewTarget {
    /// A file, made anew.
    File(String),
    /// Something that is there already and cannot be made: a server's disk.
    Existing(Node),
    /// The same, with a name that leads nowhere.
    OutOfReach {
        /// What the name begins with.
        driver: &'static str,
        /// Why it leads nowhere.
        reason: String,
    },
}

/// The target that `name` means: a path that may start with `file:`, or a server's disk. Errors: the reason.
pub(crate) fn new_target(name: &str) -> Result<NewTarget, String> {
    if name.is_empty() {
        return Err("The 'file' block driver requires a file name".to_owned());
    }
    if name.starts_with("json:") {
        return Err("Unknown protocol 'json'".to_owned());
    }
    if name == "file:" {
        return Ok(NewTarget::File(String::new()));
    }
    let driver = node::protocol_of(name)?;
    let made_nowhere = || Err(format!("Protocol driver '{}' does not support image creation", driver.name()));
    let node = match (node::protocol_from_name(name), &driver) {
        (Ok(node), _) => node,
        (Err(reason), Driver::Nbd | Driver::HostDevice) => {
            return Ok(NewTarget::OutOfReach { driver: driver.name(), reason });
        }
        (Err(_), Driver::Blkdebug) => return made_nowhere(),
        (Err(reason), _) => return Err(reason),
    };
    match (&driver, node.path()) {
        (Driver::File, Some(path)) => Ok(NewTarget::File(path.to_owned())),
        (Driver::HostDevice, Some(path)) => Ok(match crate::open::not_a_device(path) {
            Some(reason) => NewTarget::OutOfReach { driver: driver.name(), reason },
            None => NewTarget::File(path.to_owned()),
        }),
        (Driver::Nbd, _) => Ok(NewTarget::Existing(node)),
        _ => made_nowhere(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(typed: &str, args: &ImageArgs) -> Result<String, String> {
        ImageName::parse(typed, args).map(|name| filename(&name.node, "probed")).map_err(|f| f.to_string())
    }

    #[track_caller]
    fn check(typed: &str, image_opts: bool, expected: &str) {
        let args = ImageArgs { image_opts, ..ImageArgs::default() };
        assert_eq!(parse(typed, &args).as_deref(), Ok(expected), "{typed}");
    }

    #[track_caller]
    fn check_error(typed: &str, image_opts: bool, reason: &str) {
        let args = ImageArgs { image_opts, ..ImageArgs::default() };
        assert_eq!(parse(typed, &args), Err(format!("Could not open '{typed}': {reason}")));
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
        check_error("foo:x", false, "Unknown protocol 'foo'");
        check_error("", false, "The 'file' block driver requires a file name");
        check_error("json:{", false, "Could not parse the JSON options: JSON parse error, premature EOI");
        check_error("null-co:x", false, "The only allowed filename for this driver is 'null-co://'");
        check_error("blkdebug:x", false, "blkdebug requires both config file and image path");
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
        check_error("a.img", true, "Cannot find device='a.img' nor node-name='a.img'");
        check_error("driver=raw,file=x", true, "Cannot find device='x' nor node-name='x'");
        check_error("driver=qcow2", true, "A block device must be specified for \"file\"");
        check_error("", true, "Must specify either driver or file");
        check_error("file.driver=nope,file.filename=x", true, "Unknown driver 'nope'");
    }

    #[test]
    fn a_given_format_counts_for_plain_names() {
        let args = |format: &str| ImageArgs { format: Some(format.to_owned()), ..ImageArgs::default() };
        let top = |format| ImageName::parse("x", &args(format)).map(|name| name.node.driver().clone());
        assert_eq!(top("raw").ok(), Some(Driver::Raw));
        assert_eq!(top("file").ok(), Some(Driver::File));
        assert_eq!(parse("x", &args("blkdebug")).as_deref(), Ok("blkdebug::x"));
        assert!(top("null-co").is_err());
    }

    #[test]
    fn where_new_images_can_go() {
        assert_eq!(new_target("file:a"), Ok(NewTarget::File("a".to_owned())));
        assert_eq!(
            new_target("blkdebug::a"),
            Err("Protocol driver 'blkdebug' does not support image creation".to_owned())
        );
        assert!(matches!(new_target("nbd:unix:/s"), Ok(NewTarget::Existing(_))));
    }
}
