//! The name that an image is shown by: the shortest one that means the same.

use crate::driver::{Driver, nbd};
use crate::tree::{Node, json_text, object};

/// The name of `node`. `probed`: the name of the format, where it was to be probed.
pub fn filename(node: &Node, probed: &str) -> String {
    short(node).unwrap_or_else(|| format!("json:{}", described(node, probed)))
}

/// The name without a JSON object, where there is one.
fn short(node: &Node) -> Option<String> {
    match node.driver() {
        Driver::File | Driver::HostDevice | Driver::HostCdrom => node.path().map(str::to_owned),
        driver @ (Driver::NullCo | Driver::NullAio) => {
            node.strong().next().is_none().then(|| format!("{}://", driver.name()))
        }
        Driver::Nbd => nbd::name(&node.options),
        Driver::Blkdebug => {
            let only_config = node.strong().all(|(key, _)| key == "config");
            let config = node.options.text("config").unwrap_or_default();
            let image = node.child().and_then(short).filter(|_| only_config)?;
            Some(format!("blkdebug:{config}:{image}"))
        }
        Driver::Blkverify => {
            let (copy, image) = (node.child().and_then(short)?, node.second().and_then(short)?);
            Some(format!("blkverify:{copy}:{image}"))
        }
        Driver::Raw | Driver::Qcow2 | Driver::Luks => {
            let child = node.child().filter(|child| child.driver().is_protocol())?;
            short(child).filter(|_| node.strong().next().is_none())
        }
        _ => None,
    }
}

fn described(node: &Node, probed: &str) -> String {
    let driver = if node.is_probed() { probed } else { node.driver().name() };
    let mut fields: Vec<(String, String)> =
        node.strong().map(|(key, value)| (key.to_owned(), value.to_json())).collect();
    if let (Some(role), Some(child)) = (node.driver().child(), node.child()) {
        fields.push((role.to_owned(), described(child, probed)));
    }
    if let (Some(role), Some(second)) = (node.driver().second_child(), node.second()) {
        fields.push((role.to_owned(), described(second, probed)));
    }
    fields.push(("driver".to_owned(), json_text(driver)));
    object(fields)
}
