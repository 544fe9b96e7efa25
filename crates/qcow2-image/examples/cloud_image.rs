//! Converts a compressed cloud image to a raw disk: `cargo run -p qcow2-image --example cloud_image --
//! cloud.qcow2 disk.raw`
#![allow(clippy::print_stdout)]
use qcow2_image::{Disk, NewDisk};
use std::io::Write;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    let [from, to] = &args[..] else { return Err("usage: cloud_image CLOUD.qcow2 DISK.raw".into()) };
    let image = Disk::open(from)?;
    let bar = |work: qcow2_image::Work| {
        print!("\r{:5.1} %", work.percent());
        let _ = std::io::stdout().flush();
    };
    let report = image.convert().progress(bar).to(to, &NewDisk::raw().overwrite())?;
    println!("\r{} bytes, of which {} were stored", image.size(), report.data_bytes);
    Ok(())
}
