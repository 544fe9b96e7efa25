//! Incremental backup: copies what was written since the last backup, while nobody writes. `cargo run -p
//! qcow2-image --example incremental`
#![allow(clippy::print_stdout)]
use qcow2_image::Disk;
use std::io::{Read, Seek, SeekFrom, copy};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    let disk = Disk::create(folder.path().join("disk.qcow2"), 1 << 30)?;
    disk.add_bitmap("backup")?; // When the full backup is made.
    disk.write_at(300 << 20, b"written since then")?;
    let (mut dump, mut cursor) = (std::fs::File::create(folder.path().join("dump"))?, disk.cursor());
    for range in disk.bitmap("backup")?.marked_ranges() {
        dump.seek(SeekFrom::Start(range.start))?;
        cursor.seek(SeekFrom::Start(range.start))?;
        let bytes = copy(&mut (&mut cursor).take(range.end - range.start), &mut dump)?;
        println!("{bytes} bytes at {}", range.start);
    }
    disk.clear_bitmap("backup")?; // The next dump starts from here.
    Ok(disk.close()?)
}
