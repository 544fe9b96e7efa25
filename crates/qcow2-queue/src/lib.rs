//! Many requests to a guest disk from one thread: submitted with buffers of the caller's own, finished later.
//!
//! A [`Queue`] takes requests and gives back completions. Where the bytes lie in a file as the guest sees
//! them, and the tables that say so are in memory, a request is read or written by io_uring, without a thread
//! and without a copy. Everything else (a table to be read, new clusters, compression, encryption, a flush, a
//! system without io_uring) is done by the threads that the queue was given, through the same engine. So a
//! request whose metadata is cold does not hold up those behind it.
//!
//! ```
//! use qcow2_queue::{IoBuffer, Queue, QueueOptions, Request};
//! # use qcow2_queue::GuestOffset;
//! # let folder = tempfile::tempdir()?;
//! # let disk = qcow2_image::Disk::create(folder.path().join("disk.qcow2"), 1 << 20)?;
//! let disk = disk.as_guest_disk();
//! let mut queue = Queue::new(disk, &QueueOptions::default());
//! for (token, at) in (0..8_u64).map(|n| (n, n * 4096)) {
//!     let buffer = IoBuffer::from(vec![token as u8; 4096]);
//!     queue.submit(token, Request::Write { offset: GuestOffset::new(at), buffer });
//! }
//! while queue.in_flight() > 0 {
//!     queue.wait(|completion| assert!(completion.result.is_ok()))?;
//! }
//! queue.submit(8, Request::Flush);
//! queue.wait(|completion| assert_eq!(completion.token, 8))?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Order
//!
//! Requests in flight have no order among each other, as those of a machine's disk have none: whoever needs
//! one before the other submits that one when the first has finished. A flush makes durable what had finished
//! when it was submitted.
//!
//! # Dropping, cancelling
//!
//! A dropped queue waits for what has begun; what has not is never done. [`Queue::cancel`] gives such a
//! request back. No buffer is in use when its completion is there, or when the queue is gone.
#![forbid(unsafe_code)]

mod direct;
mod queue;
mod request;
mod threads;

pub use qcow2_core::{GuestOffset, GuestRange, ZeroMode};
pub use qcow2_io::IoBuffer;
pub use queue::{Queue, QueueOptions};
pub use request::{Completion, Request};
