//! A block device for a virtual machine monitor: four queues, each served by its own thread, and data that
//! the monitor transfers with its own file descriptor. This page is documentation only.
//!
//! A monitor does not want the engine between its guest's memory and the file: it has the pages mapped, maybe
//! an io_uring, and its own threads. The engine only tells it where data is and where to write data; it never
//! touches the data.
//!
//! # Reading
//!
//! Take a [`pin`](crate::core::Image::pin), then look up [the extent](crate::core::Pin::extent_at) of a
//! range: data at a host offset, zeroes, compressed, or unallocated in this layer. While the pin lives, the
//! clusters are not reused. Drop it as soon as the data has been read, because freed clusters wait for it.
//! Let the engine read everything that is not plain data, with [`Disk::read_at`](crate::Disk::read_at), which
//! must not be called while the pin is held.
//!
//! # Writing: prepare, move, commit
//!
//! 1. **Prepare.** [`Image::prepare_write`](crate::core::Image::prepare_write) allocates clusters for a first
//!    part of the request, and the ticket has its [range](crate::core::WriteTicket::range). Readers do not
//!    see them yet.
//! 2. **Move.** Write the ticket's [pieces](crate::core::WriteTicket::pieces), in any order or in parallel:
//!    the guest's data, and the copy-on-write edges of new clusters.
//! 3. **Commit.** [`WriteTicket::commit`](crate::core::WriteTicket::commit), after the last piece has been
//!    written. From here on readers see the new data. Dropping a ticket without committing it undoes the
//!    allocation.
//!
//! Two rules prevent deadlocks. A thread that holds a ticket for a cluster must not write, zero or discard
//! that cluster again before it commits. A thread that holds several tickets takes them in ascending order.
//!
//! # The rest
//!
//! [`flush`](crate::Disk::flush) makes committed writes durable. It flushes the data first, so all pieces
//! must have been written to the file, but need not be on disk. [`discard`](crate::Disk::discard) and
//! [`resize`](crate::Disk::resize) can be called from any thread at any time; a resize waits for open tickets
//! and pins, and holds new ones back. Encrypted images must be read and written through the engine, because
//! the bytes in the file are not the guest's.
//!
//! # The whole
//!
//! The device takes about eighty lines and ends with `range`; the rest is a guest. `cargo run -p qcow2-image
//! --example vmm` runs it. A test runs four guests on it while the disk grows.
#![doc = concat!("```no_run\n", include_str!("../examples/vmm.rs"), "```")]
