//! Names that say where bytes are: paths, `nbd://host/export`, `blkdebug:rules:path`, `null-co://`.

use crate::driver::{Driver, nbd};
use crate::failure::FailureKind;
use crate::tree::{Node, Scalar};

/// Understands the name of bytes, whatever they mean, below `depth` other nodes.
pub(crate) fn protocol_below(name: &str, depth: usize) -> Result<Node, FailureKind> {
    if name.is_empty() {
        return Err(FailureKind::NoFileName(Driver::File));
    }
    protocol(protocol_of(name)?, name, depth)
}

/// The driver that the beginning of `name` asks for; a plain path is a file's.
pub(crate) fn protocol_of(name: &str) -> Result<Driver, FailureKind> {
    match name.split_once(':') {
        Some((prefix, _)) if !prefix.contains('/') => match prefix {
            "nbd+tcp" | "nbd+unix" => Ok(Driver::Nbd),
            _ => Driver::parse(prefix)
                .filter(|driver| driver.is_protocol())
                .ok_or_else(|| FailureKind::UnknownProtocol(prefix.to_owned())),
        },
        _ => Ok(Driver::File),
    }
}

/// The node of protocol `driver` that `name` means, below `depth` others.
pub(super) fn protocol(driver: Driver, name: &str, depth: usize) -> Result<Node, FailureKind> {
    let depth = deeper(depth)?;
    let mut node = Node::new(Some(driver));
    let own = name.strip_prefix(driver.name()).and_then(|rest| rest.strip_prefix(':'));
    match driver {
        Driver::File | Driver::HostDevice => {
            let path = own.unwrap_or(name);
            if path.is_empty() {
                return Err(FailureKind::NoFileName(Driver::File));
            }
            node.options.set("filename", Scalar::text(path));
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
                        node.options.set("config", Scalar::text(config));
                    }
                    image
                }
            };
            node.below = Some(Box::new(protocol_below(image, depth)?));
        }
        Driver::Nbd => node.options = nbd::from_name(name)?,
        _ => {
            return Err(FailureKind::UnknownProtocol(driver.name().to_owned()));
        }
    }
    Ok(node)
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
