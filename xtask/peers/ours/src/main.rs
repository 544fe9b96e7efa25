//! Ours.

use kit::{Result, Task};
use qcow2_image::Disk;

fn main() -> Result<()> {
    let task = Task::from_args()?;
    let options = Disk::options().follow_backing_files();
    let options = if task.write { options.writable() } else { options };
    let disk = options.open(&task.image)?;
    let request = |offset, buffer: &mut [u8]| match task.write {
        true => Ok(disk.write_at(offset, buffer)?),
        false => Ok(disk.read_at(offset, buffer)?),
    };
    task.run(disk.size(), request, || Ok(disk.flush()?))?;
    Ok(disk.close()?)
}
