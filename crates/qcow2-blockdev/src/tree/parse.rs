//! From the options of an image, flat, to a tree of nodes.

use super::node::{Backing, Node};
use super::options::Options;
use super::scalar::Scalar;
use crate::driver::{Driver, is_block_device};
use crate::failure::FailureKind;
use crate::name::{deeper, driver_called, protocol_below};

/// Makes the tree of an image's options, below `depth` other nodes. `inner`: it is what another node stands
/// on.
pub(crate) fn from_options(mut options: Options, inner: bool, depth: usize) -> Result<Node, FailureKind> {
    let depth = deeper(depth)?;
    let driver = match options.take_text("driver") {
        Some(name) => Some(driver_called(&name)?),
        None if inner => match options.text("filename") {
            Some(path) if is_block_device(&path) => Some(Driver::HostDevice),
            Some(_) => Some(Driver::File),
            None => return Err(FailureKind::NoDriver),
        },
        None if options.iter().any(|(key, _)| key == "file" || key.starts_with("file.")) => None,
        None => return Err(FailureKind::NoDriver),
    };
    let mut node = Node::new(driver);
    if let Some(role) = node.driver().child() {
        node.below = Some(Box::new(child(&mut options, role, depth)?));
    }
    if node.driver() == Driver::Qcow2 || node.is_probed() {
        node.backing = backing(&mut options, depth)?;
        if let Some(name) = options.take_text("data-file") {
            return Err(FailureKind::UnknownNode(name));
        }
        let data_file = options.take_group("data-file");
        if !data_file.is_empty() {
            node.data_file = Some(Box::new(from_options(data_file, true, depth)?));
        }
    }
    let needs_name = matches!(node.driver(), Driver::File | Driver::HostDevice);
    if needs_name && options.text("filename").is_none_or(|path| path.is_empty()) {
        return Err(FailureKind::NoFileName(node.driver()));
    }
    node.options = options;
    Ok(node)
}

/// The node that `role` names: `role` alone is the name of a node, of which there are none.
fn child(options: &mut Options, role: &'static str, depth: usize) -> Result<Node, FailureKind> {
    if let Some(name) = options.take_text(role) {
        return Err(FailureKind::UnknownNode(name));
    }
    if role == "image"
        && let Some(name) = options.take_text("x-image")
    {
        return protocol_below(&name, depth);
    }
    let inner = options.take_group(role);
    match inner.is_empty() {
        true => Err(FailureKind::NothingBelow(role)),
        false => from_options(inner, true, depth),
    }
}

/// What `options` say of the backing file of a node that is the `depth`-th from the top.
fn backing(options: &mut Options, depth: usize) -> Result<Backing, FailureKind> {
    match options.take("backing") {
        Some(Scalar::Null) => return Ok(Backing::Nothing),
        Some(Scalar::Text(name)) if name.is_empty() => return Ok(Backing::Empty),
        Some(Scalar::Text(name)) => {
            return Err(FailureKind::UnknownBackingNode(name));
        }
        _ => {}
    }
    let mut inner = options.take_group("backing");
    let names = |key: &str| key == "file" || key.starts_with("file.");
    // Without a name it is that of the file which the image names.
    if let Some(name) = inner.text("driver").filter(|_| !inner.iter().any(|(key, _)| names(key))) {
        let driver = driver_called(&name)?;
        if driver.is_protocol() {
            return Ok(Backing::Node(Box::new(from_options(inner, false, depth)?)));
        }
        inner.take("driver");
        if inner.is_empty() {
            return Ok(Backing::AsNamed);
        }
    }
    match inner.is_empty() {
        true => Ok(Backing::AsNamed),
        false if !inner.iter().any(|(key, _)| names(key)) => {
            let mut node = Node::new(None);
            node.backing = backing(&mut inner, deeper(depth)?)?;
            node.options = inner;
            Ok(Backing::Keys(Box::new(node)))
        }
        false => Ok(Backing::Node(Box::new(from_options(inner, false, depth)?))),
    }
}
