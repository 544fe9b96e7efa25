//! qcow2-rs, on its blocking I/O. Its device is for one thread.

use kit::{Result, Task};
use qcow2_rs::dev::{Qcow2Dev, Qcow2DevParams};
use qcow2_rs::helpers::Qcow2IoBuf;
use qcow2_rs::sync_io::Qcow2IoSync;
use qcow2_rs::utils::qcow2_setup_dev_sync;
use std::time::Instant;

type Device = Qcow2Dev<Qcow2IoSync>;

fn told<T>(result: qcow2_rs::error::Qcow2Result<T>) -> Result<T> {
    result.map_err(|error| format!("{error:?}").into())
}

async fn all(task: &Task, device: &Device, size: u64) -> Result<()> {
    let mut buffer = Qcow2IoBuf::<u8>::new(kit::BLOCK);
    for offset in task.offsets(0, size) {
        match task.write {
            true => told(device.write_at(&buffer, offset).await)?,
            false => drop(told(device.read_at(&mut buffer, offset).await)?),
        }
    }
    Ok(())
}

fn main() -> Result<()> {
    let task = Task::from_args()?;
    if task.threads != 1 {
        return Err("one thread only".into());
    }
    let params = Qcow2DevParams::new(9, None, None, !task.write, false);
    let device: Device = told(qcow2_setup_dev_sync(&task.image, &params))?;
    let size = device.info.virtual_size();
    tokio::runtime::Builder::new_current_thread().build()?.block_on(async {
        told(device.qcow2_prep_io().await)?;
        if !task.write {
            all(&task, &device, size).await?;
        }
        let start = Instant::now();
        all(&task, &device, size).await?;
        if task.write {
            told(device.flush_meta().await)?;
        }
        task.tell(start);
        Ok(())
    })
}
