//! From the options of an image, flat, to a tree of nodes.

use super::node::{Backing, Node};
use super::options::Options;
use super::scalar::Scalar;
use crate::driver::{Driver, is_device};
use crate::failure::FailureKind;
use crate::name::{deeper, driver_called, in_name, protocol_of};

/// The tree of bytes that are called `name`, whatever they mean.
pub(crate) fn protocol_below(name: &str) -> Result<Node, FailureKind> {
    from_options(Options::default(), Some(name), true, 0)
}

/// Makes the tree of an image's options, below `depth` other nodes. `name`: what somebody called it besides;
/// options are stronger than it. `inner`: it is what another node stands on.
pub(crate) fn from_options(
    mut options: Options,
    name: Option<&str>,
    inner: bool,
    depth: usize,
) -> Result<Node, FailureKind> {
    let depth = deeper(depth)?;
    let name = match name.map(|name| name.strip_prefix("json:").ok_or(name)) {
        Some(Ok(text)) => {
            options.add_missing(Options::from_json(text)?);
            None
        }
        other => other.and_then(Result::err),
    };
    let driver = driver_of(&mut options, name, inner)?;
    let mut node = Node::new(driver);
    let below = match (name, driver.filter(|driver| driver.is_protocol())) {
        (Some(_), Some(_)) if options.has("filename") => return Err(FailureKind::TwoNames),
        (Some(name), Some(driver)) => {
            let (own, below) = in_name(driver, name)?;
            own.iter().for_each(|(key, value)| options.set(key, value.clone()));
            below
        }
        (name, _) => name.map(str::to_owned),
    };
    if let Some(role) = node.driver().child() {
        node.below = Some(Box::new(match child(&mut options, role, below, depth) {
            Err(FailureKind::NothingBelow(role)) if node.driver() == Driver::CopyBeforeWrite => {
                return Err(FailureKind::Missing(role.to_owned()));
            }
            child => child?,
        }));
    }
    if let Some(role) = node.driver().second_child() {
        node.second = second_child(&mut options, node.driver(), role, depth)?.map(Box::new);
    }
    if node.driver() == Driver::Qcow2 || node.is_probed() {
        node.backing = backing(&mut options)?;
        if let Some(name) = options.take_text("data-file") {
            return Err(FailureKind::UnknownNode(name));
        }
        let data_file = options.take_group("data-file");
        if !data_file.is_empty() {
            node.data_file = Some(Box::new(from_options(data_file, None, true, depth)?));
        }
    }
    if node.driver().is_file() && options.text("filename").is_none_or(|path| path.is_empty()) {
        return Err(FailureKind::NoFileName(node.driver()));
    }
    node.options = options;
    Ok(node)
}

/// The driver that the options or the name ask for; `None`: a format that is to be probed.
fn driver_of(options: &mut Options, name: Option<&str>, inner: bool) -> Result<Option<Driver>, FailureKind> {
    if let Some(driver) = options.take_text("driver") {
        return driver_called(&driver).map(Some);
    }
    match name {
        Some("") => Err(FailureKind::NoFileName(Driver::File)),
        Some(name) if inner => Ok(Some(match protocol_of(name)? {
            Driver::File if !name.starts_with("file:") && is_device(name) => Driver::HostDevice,
            driver => driver,
        })),
        Some(_) => Ok(None),
        None if inner => match options.text("filename") {
            Some(path) if is_device(&path) => Ok(Some(Driver::HostDevice)),
            Some(_) => Ok(Some(Driver::File)),
            None => Err(FailureKind::NoDriver),
        },
        None if options.iter().any(|(key, _)| is_of(key, "file")) => Ok(None),
        None => Err(FailureKind::NoDriver),
    }
}

/// Whether `key` is `role`, or belongs to the node that it names.
fn is_of(key: &str, role: &str) -> bool {
    key.strip_prefix(role).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// The node that `role` names: `role` alone is the name of a node, of which there are none. `name`: what was
/// given besides.
fn child(
    options: &mut Options,
    role: &'static str,
    mut name: Option<String>,
    depth: usize,
) -> Result<Node, FailureKind> {
    if let Some(node) = options.take_text(role) {
        return Err(match name {
            Some(_) => FailureKind::NodeAndName,
            None => FailureKind::UnknownNode(node),
        });
    }
    let short = match role {
        "image" => options.take_text("x-image"),
        "raw" => options.take_text("x-raw"),
        _ => None,
    };
    if let Some(given) = short {
        name.get_or_insert(given);
    }
    let inner = options.take_group(role);
    match inner.is_empty() && name.is_none() {
        true => Err(FailureKind::NothingBelow(role)),
        false => from_options(inner, name.as_deref(), true, depth),
    }
}

/// The node that `role` names beside the child of `driver`; `None`: it may be missing, and is.
fn second_child(
    options: &mut Options,
    driver: Driver,
    role: &'static str,
    depth: usize,
) -> Result<Option<Node>, FailureKind> {
    if let Some(node) = options.take_text(role) {
        return Err(FailureKind::UnknownNode(node));
    }
    let name = if role == "test" { options.take_text("x-image") } else { None };
    let inner = options.take_group(role);
    if driver == Driver::CopyBeforeWrite {
        if inner.is_empty() {
            return Ok(None);
        }
        check_drivers(&inner, role)?;
        return from_options(inner, None, true, depth).map(Some);
    }
    if inner.is_empty() && name.is_none() {
        return Err(FailureKind::NothingBelow(role));
    }
    from_options(inner, name.as_deref(), false, depth).map(Some)
}

/// Refuses `options` of the node at `path` where it, or a node below it, does not name its driver.
fn check_drivers(options: &Options, path: &str) -> Result<(), FailureKind> {
    if !options.has("driver") {
        return Err(FailureKind::Missing(format!("{path}.driver")));
    }
    for role in ["file", "image", "backing", "data-file"] {
        let inner = options.clone().take_group(role);
        if !inner.is_empty() {
            check_drivers(&inner, &format!("{path}.{role}"))?;
        }
    }
    Ok(())
}

/// What `options` say of the backing file.
fn backing(options: &mut Options) -> Result<Backing, FailureKind> {
    let backing = match options.take("backing") {
        Some(Scalar::Null) => Backing::Nothing,
        Some(Scalar::Text(name)) if name.is_empty() => Backing::Empty,
        Some(Scalar::Text(name)) => {
            return Err(FailureKind::UnknownBackingNode(name));
        }
        _ => {
            let inner = options.take_group("backing");
            let deepest =
                inner.iter().map(|(key, _)| key.split('.').take_while(|part| *part == "backing").count());
            deeper(deepest.max().unwrap_or(0))?;
            return Ok(if inner.is_empty() { Backing::AsNamed } else { Backing::Given(inner) });
        }
    };
    Ok(backing)
}
