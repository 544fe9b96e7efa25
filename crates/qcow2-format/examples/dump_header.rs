//! Prints the parsed header of an image: `cargo run -p qcow2-format --example dump_header -- disk.qcow2`.
#![allow(clippy::print_stdout, reason = "the example prints the header")]

use qcow2_format::Header;
use std::fs::File;
use std::io::Read;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args_os().nth(1).ok_or("usage: dump_header IMAGE")?;
    let mut start = Vec::new();
    File::open(&path)?.take(Header::PROBE_LEN as u64).read_to_end(&mut start)?;
    let wanted = Header::probe_len(&start)?;
    let mut cluster = Vec::new();
    File::open(&path)?.take(wanted as u64).read_to_end(&mut cluster)?;

    let header = Header::parse(&cluster)?;
    println!("{header:#?}");
    println!("{:#?}", header.geometry()?);
    let encoded = header.encode()?;
    let same = cluster.get(..encoded.len()) == Some(&encoded);
    println!("encoded again: {} bytes, {}", encoded.len(), if same { "the same" } else { "not the same" });
    Ok(())
}
