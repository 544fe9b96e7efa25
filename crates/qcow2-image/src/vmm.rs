//! A block device for a virtual machine monitor: four queues, each served by its own thread, and data that
//! the monitor transfers with its own file descriptor. This page is documentation only.
//!
//! A VMM has its own path from guest memory to the file: mapped pages, perhaps an io_uring, and its own
//! threads. The engine stays out of that path: it only returns where data is, or where to write it.
//!
//! # Reading
//!
//! Take a [`pin`](crate::core::Image::pin), then look up [the extent](crate::core::Pin::extent_at) of a
//! range: data at a host offset, zeroes, compressed, or unallocated in this layer. While the pin lives, the
//! clusters are not reused. Drop it as soon as the data has been read, because freed clusters wait for it.
//! Let the engine read everything that is not plain data, with [`Disk::read_at`](crate::Disk::read_at), which
//! must not be called while the pin is held.
//!
//! Host offsets, here and in the pieces of a write, are offsets in the [data
//! storage](crate::core::Image::data_storage): the image file, or the external data file of an image that has
//! one. The device below opens the image file only, so it refuses images with an external data file.
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
//! A ticket or a pin holds a read lock on the image, and stays on the thread that took it (neither is
//! `Send`). Resize, snapshots, changes of bitmaps and close take the write lock, and a waiting writer goes
//! before new readers. Four rules prevent deadlocks:
//!
//! - A thread that holds a pin does not call the image, except to look up extents through the pin.
//! - A thread that holds a ticket does not take the write lock itself. And if any other thread may take it,
//!   the ticket's thread commits or drops the ticket before it calls the image again, even for
//!   `prepare_write`, `read_at` or `flush`: that call would wait behind the writer, the writer waits for the
//!   ticket, and neither would ever continue. So with live resizes or snapshots a thread holds one ticket at
//!   a time, as the device below does.
//! - Otherwise a thread may hold several tickets. It must not write, zero or discard a cluster that it holds
//!   a ticket for.
//! - It takes them in ascending order of guest offsets.
//!
//! # The rest
//!
//! [`flush`](crate::Disk::flush) makes committed writes durable. It flushes the data first, so all pieces
//! must have been written to the file, but need not be on disk. [`discard`](crate::Disk::discard) and
//! [`resize`](crate::Disk::resize) can be called from any thread at any time; a resize waits for open tickets
//! and pins, and holds new ones back. Encrypted images must be read and written through the engine, because
//! the bytes in the file are not the guest's.
//!
//! # The whole device
//!
//! The device takes about 90 lines and ends with `range`; the rest is a guest. `cargo run -p qcow2-image
//! --example vmm` runs it. A test runs four guests on it while the disk grows.
#![doc = concat!("```no_run\n", include_str!("../examples/vmm.rs"), "```")]
