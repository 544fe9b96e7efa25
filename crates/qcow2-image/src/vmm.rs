//! A block device for a virtual machine monitor: four queues, each on a thread of its own, and bytes that the
//! monitor moves with its own file descriptor. This page is documentation only.
//!
//! A monitor does not want the engine between its guest's memory and the file: it has the pages at hand,
//! perhaps an io_uring, and its own idea of threads. The engine says where bytes are and where they go, and
//! never sees them.
//!
//! # Reading
//!
//! [`Image::pin`](crate::core::Image::pin), then ask [where a range is](crate::core::Pin::extent_at): data at
//! a place in the file, zeroes, compressed, or nothing in this layer. As long as the pin lives, nothing else
//! comes to that place; drop it as soon as the bytes are there, because freed clusters wait for it. What is
//! not plain data the engine reads, by [`Disk::read_at`](crate::Disk::read_at), which must not be called
//! under the pin.
//!
//! # Writing: prepare, move, commit
//!
//! 1. **Prepare.** [`Image::prepare_write`](crate::core::Image::prepare_write) finds a place for a first part
//!    of the request and says [how long](crate::core::WriteTicket::range) that is. Nobody sees the place yet.
//! 2. **Move.** Write its [pieces](crate::core::WriteTicket::pieces), in any order and at the same time: the
//!    guest's bytes, and what has to stand beside them in new clusters.
//! 3. **Commit.** [`WriteTicket::commit`](crate::core::WriteTicket::commit), after the last piece has been
//!    written: from here on readers see the new bytes. A ticket that is dropped instead has never been.
//!
//! Two rules keep threads from waiting for each other in a circle: a thread that holds a ticket for a cluster
//! does not write, zero or discard that cluster again before it commits, and a thread that holds several
//! takes them in ascending order.
//!
//! # The rest
//!
//! [`flush`](crate::Disk::flush) makes durable what was committed: it flushes the data first, so all pieces
//! must have reached the file, not the disk. [`discard`](crate::Disk::discard) and
//! [`resize`](crate::Disk::resize) may come from any thread at any time; a resize waits for tickets and pins
//! that are out, and holds new ones back. Encrypted images are read and written through the engine only, as
//! their bytes are not the guest's.
//!
//! # The whole
//!
//! The device has some eighty lines and ends with `range`; what follows is a guest. `cargo run -p qcow2-image
//! --example vmm` runs it, and a test has four guests at it while the disk grows.
#![doc = concat!("```no_run\n", include_str!("../examples/vmm.rs"), "```")]
