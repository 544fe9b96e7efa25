//! A guest disk as a vhost-user-blk device: a virtual machine monitor connects to a unix socket, shares the
//! guest's memory, and the guest's block requests are answered here.
//!
//! [`Device`] is the disk with what the guest is told of it; [`serve`] answers the monitors that connect to a
//! listener, one at a time, until it is stopped. Any [`GuestDisk`](qcow2_core::GuestDisk) will do.
//!
//! ```no_run
//! # use qcow2_vhost_user::{Device, Settings, serve};
//! # use std::sync::{Arc, atomic::{AtomicBool, Ordering}};
//! # fn example(disk: Arc<dyn qcow2_core::GuestDisk>) -> Result<(), Box<dyn std::error::Error>> {
//! let device = Arc::new(Device::new(disk, Settings { queues: 2, ..Settings::default() })?);
//! let listener = std::os::unix::net::UnixListener::bind("disk.sock")?;
//! static STOP: AtomicBool = AtomicBool::new(false);
//! serve(&device, listener, &|| STOP.load(Ordering::Relaxed))?;
//! # Ok(())
//! # }
//! ```
//!
//! # What the guest sees
//!
//! A virtio block device of 512-byte sectors, with flush, discard, write zeroes, several queues, and a write
//! cache that the driver may switch off. A driver that does not know flushes gets every write flushed.
//!
//! # Order, and monitors that reconnect
//!
//! Each queue has a thread of its own and answers its requests in their order. So when this side ends at any
//! moment, what the guest got no answer for is exactly what stands behind the last answer in the ring, and a
//! monitor that reconnects (`reconnect-ms` of QEMU's character devices) sends it again: nothing is lost and
//! nothing needs to be remembered between the two runs.
//!
//! # Bytes on their way
//!
//! Bytes that lie in a file as the guest sees them go straight between the file and the guest's memory: plain
//! clusters, writes to clusters of an unencrypted image, raw disks. Compressed and encrypted clusters, what
//! comes from a backing file, and files with direct I/O go through a buffer.
//!
//! # Hostile guests
//!
//! Every number in a ring is checked. A request costs at most [`PIECE`] bytes of memory, however long it is.
#![forbid(unsafe_code)]
#![cfg(target_os = "linux")]

mod backend;
mod config;
mod device;
mod direct;
mod guest;
mod observe;
mod request;
mod serve;

pub use self::device::{Device, Settings, SettingsError};
pub use self::observe::{Ended, Kind};
pub use self::request::PIECE;
pub use self::serve::{ServeError, serve};
