//! imago, its synchronous form.

use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate};
use kit::{Result, Task};

fn main() -> Result<()> {
    let task = Task::from_args()?;
    let builder = Qcow2::<File>::builder_path(&task.image).write(task.write);
    let disk = FormatAccess::new(builder.open(PermissiveImplicitOpenGate::default())?);
    let request = |offset, buffer: &mut [u8]| match task.write {
        true => Ok(disk.write(&*buffer, offset)?),
        false => Ok(disk.read(buffer, offset)?),
    };
    task.run(disk.size(), request, || {
        disk.flush()?;
        Ok(disk.sync()?)
    })
}
