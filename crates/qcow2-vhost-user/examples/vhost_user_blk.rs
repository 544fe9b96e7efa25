//! Gives a machine a qcow2 image as its disk, until interrupted: `vhost_user_blk SOCKET IMAGE [QUEUES]`.
#![allow(clippy::print_stdout, reason = "a program")]

#[cfg(target_os = "linux")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    use qcow2_vhost_user::{Device, Settings, serve};
    use std::os::unix::net::UnixListener;
    use std::sync::Arc;

    let mut arguments = std::env::args_os().skip(1);
    let (Some(socket), Some(image)) = (arguments.next(), arguments.next()) else {
        println!("vhost_user_blk SOCKET IMAGE [QUEUES]");
        return Ok(());
    };
    let queues = arguments.next().and_then(|count| count.to_str()?.parse().ok()).unwrap_or(1);
    let disk = qcow2_image::Disk::options().writable().open(image)?;
    let settings = Settings { queues, serial: "qcow2".to_owned(), ..Settings::default() };
    let device = Arc::new(Device::new(Arc::clone(disk.as_guest_disk()), settings)?);
    serve(&device, UnixListener::bind(socket)?, &|| false)?;
    Ok(disk.close()?)
}

#[cfg(not(target_os = "linux"))]
fn main() {}
