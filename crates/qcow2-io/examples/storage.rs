//! Creates a sparse file, lists its data and holes, and prints how many calls the trace wrapper counted.
//!
//! `cargo run -p qcow2-io --example storage`
#![allow(clippy::print_stdout)]

use qcow2_core::{HostOffset, Storage, ZeroMode};
use qcow2_io::{Create, OpenFile, TraceStorage};
use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::temp_dir().join(format!("qcow2-io-example-{}", std::process::id()));
    let file = OpenFile::writable().with_create(Create::New).open(&path)?;
    let storage = TraceStorage::new(file);

    storage.write_at(HostOffset::new(0), b"the first bytes")?;
    storage.write_at(HostOffset::new(64 << 20), b"and some far away")?;
    storage.write_zeroes(HostOffset::new(1 << 20), 1 << 20, ZeroMode::KeepAllocated)?;
    storage.flush()?;

    let len = storage.len()?;
    println!("{len} bytes long, {} bytes used", storage.used_bytes()?.unwrap_or(len));
    let mut offset = 0;
    while offset < len {
        let extent = storage.extent_at(HostOffset::new(offset), len - offset)?;
        println!("  {offset:>10} + {:<10} {}", extent.len, if extent.data { "data" } else { "hole" });
        offset += extent.len;
    }
    let counts = storage.counts();
    println!("{} writes, {} barriers", counts.writes, counts.flushes);
    std::fs::remove_file(&path)?;
    Ok(())
}
