//! Opens a disk by any name that QEMU's tools take, follows the names in it within its directory, and shows
//! what it is made of.
//!
//! `cargo run -p qcow2-blockdev --example look -- tests/data/images/v3-512.qcow2`
#![allow(clippy::print_stdout)]

use qcow2_blockdev::{Follow, ImageName, Naming, OpenOptions, filename, open};
use qcow2_core::GuestOffset;
use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let typed = std::env::args().nth(1).ok_or("usage: look NAME")?;
    let name = ImageName::parse(&typed, &Naming::default())?;
    let opened = open(&name, &OpenOptions::new().with_follow(Follow::SameDirectory))?;
    println!("{}: {:?}, {} bytes", filename(&name.node, "raw"), opened.format, opened.disk.size());
    for files in &opened.files {
        println!("  {}", files.image);
    }
    let mut sector = [0; 16];
    opened.disk.read_at(GuestOffset::new(0), &mut sector)?;
    println!("it begins with {sector:02x?}");
    Ok(())
}
