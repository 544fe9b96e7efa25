//! Where a new image goes: a file, made anew, or something that is there already and is written over.

use super::format::bytes_driver;
use super::options::NewOptions;
use crate::driver::{Driver, is_device};
use crate::failure::FailureKind;
use crate::keys::Secrets;
use crate::name::{ImageName, protocol_of};
use crate::open::check_device;
use crate::tree::{Node, Options, Scalar, from_options, protocol_below};
use qcow2_core::ImageFormat;
use std::sync::Arc;

/// Where a new image goes.
#[derive(Debug)]
pub enum NewTarget {
    /// A file, made anew, or a block device.
    File(String),
    /// Something that is there already and cannot be made: a server's disk.
    Existing(Node),
    /// The same, with a name that leads nowhere.
    OutOfReach {
        /// What the name begins with.
        driver: Driver,
        /// Why it leads nowhere.
        reason: Arc<FailureKind>,
    },
}

impl NewTarget {
    /// The target that `name` means: a path that may start with `file:`, a device, or a server's disk. Disk:
    /// looks whether a device is there; opens nothing.
    pub fn parse(name: &str) -> Result<Self, FailureKind> {
        if name.is_empty() {
            return Err(FailureKind::NoFileName(Driver::File));
        }
        let driver = protocol_of_new(name)?;
        if name == "file:" {
            return Ok(Self::File(String::new()));
        }
        let node = match (protocol_below(name), driver) {
            (Ok(node), _) => node,
            (Err(reason), Driver::Nbd | Driver::HostDevice | Driver::HostCdrom) => {
                return Ok(Self::OutOfReach { driver, reason: Arc::new(reason) });
            }
            (Err(_), Driver::Blkdebug) => return Err(FailureKind::CreatesNothing(driver)),
            (Err(reason), _) => return Err(reason),
        };
        match (driver, node.path()) {
            (Driver::File, Some(path)) => Ok(Self::File(path.to_owned())),
            (Driver::HostDevice | Driver::HostCdrom, Some(path)) => {
                Ok(match check_device(driver, path, true) {
                    Err(reason) => Self::OutOfReach { driver, reason: Arc::new(reason) },
                    Ok(()) => Self::File(path.to_owned()),
                })
            }
            (Driver::Nbd, _) => Ok(Self::Existing(node)),
            _ => Err(FailureKind::CreatesNothing(driver)),
        }
    }

    /// The target that `name` means for an image of `format`: for one that is the bytes of a file or a
    /// device, a path, whatever it begins with; for one that is a server's disk, the name of one. Disk and
    /// errors: as [`parse`](Self::parse).
    pub fn of_format(name: &str, format: &ImageFormat) -> Result<Self, FailureKind> {
        let Some(driver) = bytes_driver(format) else { return Self::parse(name) };
        if driver == Driver::Nbd {
            protocol_of_new(name)?;
            let mut options = Options::default();
            options.set("driver", Scalar::text(driver.name()));
            return Ok(match from_options(options, Some(name), true, 0) {
                Ok(node) => Self::Existing(node),
                Err(reason) => Self::OutOfReach { driver, reason: Arc::new(reason) },
            });
        }
        let path = name.strip_prefix(driver.name()).and_then(|rest| rest.strip_prefix(':')).unwrap_or(name);
        if path.is_empty() {
            return Err(FailureKind::NoFileName(driver));
        }
        Ok(match driver {
            Driver::File => Self::File(path.to_owned()),
            _ => match check_device(driver, path, true) {
                Err(reason) => Self::OutOfReach { driver, reason: Arc::new(reason) },
                Ok(()) => Self::File(path.to_owned()),
            },
        })
    }

    /// The name of what was made there as `options` say, typed so; its secret is among `secrets`.
    pub fn into_name(self, typed: &str, options: &NewOptions, secrets: &Secrets) -> ImageName {
        let below = match self {
            Self::File(path) => Node::of_path(&path),
            Self::Existing(node) => node,
            Self::OutOfReach { .. } => Node::file(typed),
        };
        if bytes_driver(options.format()).is_some() {
            return ImageName::of_node(typed, below, secrets);
        }
        let mut node = Node::on(Driver::parse(options.format().name()), below);
        for key in ["key-secret", "encrypt.key-secret"] {
            if let Some(id) = options.text(key) {
                node.options.set(key, Scalar::text(id));
            }
        }
        ImageName::of_node(typed, node, secrets)
    }

    /// Whether it is a device, which has a size of its own and a content from before.
    pub fn is_device(&self) -> bool {
        matches!(self, Self::File(path) if is_device(path))
    }
}

/// The protocol of the name of a new image: options in JSON name no file to be made.
pub(super) fn protocol_of_new(name: &str) -> Result<Driver, FailureKind> {
    match name.starts_with("json:") {
        true => Err(FailureKind::UnknownProtocol("json".to_owned())),
        false => protocol_of(name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_new_images_can_go() {
        assert!(matches!(NewTarget::parse("file:a"), Ok(NewTarget::File(path)) if path == "a"));
        assert!(matches!(
            NewTarget::parse("blkdebug::a"),
            Err(FailureKind::CreatesNothing(Driver::Blkdebug))
        ));
        assert!(matches!(NewTarget::parse("nbd:unix:/s"), Ok(NewTarget::Existing(_))));
        let file = |name| NewTarget::of_format(name, &ImageFormat::Other("file".to_owned()));
        for (name, path) in [("a", "a"), ("file:a", "a"), ("nbd:a", "nbd:a")] {
            assert!(matches!(file(name), Ok(NewTarget::File(found)) if found == path), "{name}");
        }
        assert!(matches!(file(""), Err(FailureKind::NoFileName(Driver::File))));
        let server = |name| NewTarget::of_format(name, &ImageFormat::Other("nbd".to_owned()));
        assert!(
            matches!(server("nbd:unix:/s"), Ok(NewTarget::Existing(node)) if node.driver() == Driver::Nbd)
        );
        let nbd = Driver::Nbd;
        assert!(matches!(server("a"), Ok(NewTarget::OutOfReach { driver, .. }) if driver == nbd));
        assert!(matches!(server("foo:a"), Err(FailureKind::UnknownProtocol(_))));
        assert!(matches!(server("json:{}"), Err(FailureKind::UnknownProtocol(_))));
        let out = NewTarget::parse("host_device:/no/such");
        let Ok(NewTarget::OutOfReach { reason, .. }) = out else { panic!("{out:?}") };
        assert!(matches!(*reason, FailureKind::NoDevice { .. }));
        assert!(matches!(NewTarget::parse("json:{}"), Err(FailureKind::UnknownProtocol(_))));
    }
}
