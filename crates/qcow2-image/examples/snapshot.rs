//! Writes to an overlay, takes a snapshot, writes again, and reads both states: `cargo run -p qcow2-image
//! --example snapshot`
#![allow(clippy::print_stdout)]
use qcow2_image::{Disk, ImageFormat, NewDisk};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    Disk::create(folder.path().join("base.qcow2"), 1 << 30)?.close()?;
    let overlay = NewDisk::qcow2().backing_file("base.qcow2", ImageFormat::Qcow2);
    let disk = overlay.create(folder.path().join("overlay.qcow2"))?;
    disk.write_at(0, b"before the upgrade")?;
    disk.create_snapshot("upgrade")?;
    disk.write_at(0, b"after the upgrade!")?;
    let (mut then, mut now) = ([0; 18], [0; 18]);
    disk.open_snapshot("upgrade")?.read_at(0, &mut then)?;
    disk.read_at(0, &mut now)?;
    println!("then: {:?}, now: {:?}", str::from_utf8(&then)?, str::from_utf8(&now)?);
    Ok(disk.close()?)
}
