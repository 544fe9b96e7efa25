//! Names that say where bytes are: paths, `nbd://host/export`, `blkdebug:rules:path`, `null-co://`.

use crate::driver::{Driver, nbd};
use crate::failure::FailureKind;
use crate::tree::{Options, Scalar};

/// The driver that the beginning of `name` asks for; a plain path is a file's.
pub(crate) fn protocol_of(name: &str) -> Result<Driver, FailureKind> {
    match prefix(name) {
        Some("nbd+tcp" | "nbd+unix") => Ok(Driver::Nbd),
        Some(prefix) => Driver::parse(prefix)
            .filter(|driver| driver.is_protocol())
            .ok_or_else(|| FailureKind::UnknownProtocol(prefix.to_owned())),
        None => Ok(Driver::File),
    }
}

/// What `name` says as that of protocol `driver`: the options of its node, and the name of what is below.
pub(crate) fn in_name(driver: Driver, name: &str) -> Result<(Options, Option<String>), FailureKind> {
    let mut options = Options::default();
    let own = name.strip_prefix(driver.name()).and_then(|rest| rest.strip_prefix(':'));
    match driver {
        Driver::File | Driver::HostDevice | Driver::HostCdrom => {
            let path = own.unwrap_or(name);
            if path.is_empty() {
                return Err(FailureKind::NoFileName(Driver::File));
            }
            // What follows the name of the protocol does not begin with another one.
            let hides = own.is_some() && prefix(path).is_some();
            options.set("filename", Scalar::Text(if hides { format!("./{path}") } else { path.to_owned() }));
        }
        Driver::NullCo | Driver::NullAio if own == Some("//") => {}
        Driver::NullCo | Driver::NullAio => {
            return Err(FailureKind::NameOfNull(driver));
        }
        Driver::Blkdebug => {
            let image = match own.map(|rest| rest.split_once(':')) {
                None => name,
                Some(None) => return Err(FailureKind::NameOfBlkdebug),
                Some(Some((config, image))) => {
                    if !config.is_empty() {
                        options.set("config", Scalar::text(config));
                    }
                    image
                }
            };
            return Ok((options, Some(image.to_owned())));
        }
        Driver::Blkverify => {
            let image = match own.map(|rest| rest.split_once(':')) {
                None => name,
                Some(None) => return Err(FailureKind::NameOfBlkverify),
                Some(Some((copy, image))) => {
                    options.set("x-raw", Scalar::text(copy));
                    image
                }
            };
            options.set("x-image", Scalar::text(image));
        }
        Driver::Nbd => options = nbd::from_name(name)?,
        _ => {
            return Err(FailureKind::UnknownProtocol(driver.name().to_owned()));
        }
    }
    Ok((options, None))
}

/// The name of a protocol at the beginning of `name`, known or not.
fn prefix(name: &str) -> Option<&str> {
    name.split_once(':').map(|(prefix, _)| prefix).filter(|prefix| !prefix.contains('/'))
}

/// One node more. Errors: a name has too many, each below the one before.
pub(crate) fn deeper(depth: usize) -> Result<usize, FailureKind> {
    if depth >= MAX_NODES {
        return Err(FailureKind::TooManyNodes(MAX_NODES));
    }
    Ok(depth + 1)
}

/// The driver called `name`.
pub(crate) fn driver_called(name: &str) -> Result<Driver, FailureKind> {
    Driver::parse(name).ok_or_else(|| FailureKind::UnknownDriver(name.to_owned()))
}

/// Nodes of a name one below the other, at most. Origin: ours; QEMU has no limit.
const MAX_NODES: usize = 256;
