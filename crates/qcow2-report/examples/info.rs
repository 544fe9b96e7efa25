//! Prints what an image says of itself, as `qemu-img info --output=json` does.
//!
//! `cargo run -p qcow2-report --example info -- tests/data/images/v3-512.qcow2`
#![allow(clippy::print_stdout)]

use qcow2_blockdev::{ImageName, Naming, OpenOptions, open_bytes};
use qcow2_report::info::{NamedInfo, to_json};
use qcow2_report::json;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let name = std::env::args().nth(1).ok_or("usage: info IMAGE")?;
    let name = ImageName::parse(&name, &Naming::default())?;
    let opened = open_bytes(&name, &OpenOptions::default())?;
    let report = qcow2_ops::info(&*opened.source.storage, &opened.source.format)?;
    let info = NamedInfo {
        filename: opened.source.name,
        full_backing: None,
        format: "qcow2",
        nodes: opened.nodes,
        report,
        references: None,
    };
    print!("{}", json::pretty(&to_json(&info)));
    Ok(())
}
