//! imago, its asynchronous form: tasks on one thread, for its futures stay where they were made.

use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate};
use kit::{BLOCK, Result, Task};
use std::rc::Rc;
use std::time::Instant;

async fn all(task: &Task, disk: &Rc<FormatAccess<File>>) -> Result<()> {
    let work = |thread| {
        let (task, disk) = (task.clone(), Rc::clone(disk));
        tokio::task::spawn_local(async move {
            let mut buffer = vec![7; BLOCK];
            for offset in task.offsets(thread, disk.size()) {
                match task.write {
                    true => disk.write(&buffer[..], offset).await?,
                    false => disk.read(&mut buffer[..], offset).await?,
                }
            }
            Ok::<(), std::io::Error>(())
        })
    };
    let tasks: Vec<_> = (0..task.threads).map(work).collect();
    for task in tasks {
        task.await??;
    }
    Ok(())
}

fn main() -> Result<()> {
    let task = Task::from_args()?;
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let builder = Qcow2::<File>::builder_path(&task.image).write(task.write);
        let disk = FormatAccess::new(builder.open(PermissiveImplicitOpenGate::default()).await?);
        let disk = Rc::new(disk);
        if !task.write {
            all(&task, &disk).await?;
        }
        let start = Instant::now();
        all(&task, &disk).await?;
        disk.flush().await?;
        disk.sync().await?;
        task.tell(start);
        Ok(())
    })
}
