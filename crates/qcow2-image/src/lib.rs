//! A high-level interface to qcow2 disk images. It sets up files, codecs, ciphers, threads and locks, with
//! safe defaults.
//!
//! ```text
//!  your program     Disk::open, read_at, write_at, create_snapshot, convert, check, close
//!       |
//!       v
//!  qcow2-image ---------+------------------+------------------+       this crate: sets the others up
//!       |               |                  |                  |
//!       v               v                  v                  v
//!  qcow2-ops       qcow2-io           qcow2-codec        qcow2-crypt
//!  procedures      files, locks,      deflate, zstd      LUKS, legacy
//!       |          names                   |             AES method
//!       v               |                  |                  |
//!  qcow2-core <---------+------------------+------------------+       the engine
//!       |
//!       v
//!  qcow2-format    bytes <-> values
//! ```
//!
//! Open a disk and read from it:
//!
//! ```no_run
//! use qcow2_image::Disk;
//!
//! let disk = Disk::open("disk.qcow2")?;
//! let mut sector = [0; 512];
//! disk.read_at(0, &mut sector)?;
//! println!("{} bytes, beginning with {:02x?}", disk.size(), &sector[..16]);
//! # Ok::<(), qcow2_image::Error>(())
//! ```
//!
//! Create a disk and change it:
//!
//! ```
//! use qcow2_image::{Disk, NewDisk};
//!
//! # let folder = tempfile::tempdir()?;
//! # let path = folder.path().join("disk.qcow2");
//! let disk = Disk::create(&path, 64 << 20)?;
//! disk.write_at(1 << 20, b"hello")?;
//! disk.create_snapshot("first")?;
//! disk.discard(1 << 20..2 << 20)?;
//! disk.resize(128 << 20)?;
//! disk.convert().compress().to(path.with_extension("small.qcow2"), &NewDisk::qcow2().zstd())?;
//! disk.close()?;
//! assert_eq!(qcow2_image::check(&path)?.corruptions, 0);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Where to find things
//!
//! | you want to | take |
//! |---|---|
//! | open an image | [`Disk::open`], [`Disk::options`] |
//! | create one: with other options, encrypted, with a backing file, raw | [`Disk::create`], [`NewDisk`] |
//! | create many overlays on one base, each in less than 0.1 ms | [`NewDisk::create_on`] |
//! | read, write, zero, discard, resize, flush | the methods of [`Disk`], from any number of threads; blocking |
//! | use it as `Read`, `Write` and `Seek` | [`Disk::cursor`] |
//! | take, read, apply and delete internal snapshots | [`Disk::create_snapshot`], [`Disk::open_snapshot`] |
//! | put an overlay on it, commit the overlay, rebase it | [methods of `DiskOptions`](DiskOptions::commit) |
//! | make incremental backups | [`Disk::add_bitmap`], [`Bitmap`] |
//! | convert to another format, with other options, compressed | [`Disk::convert`] |
//! | compare the content of two disks | [`Disk::compare`], [`Disk::checksum`] |
//! | describe an untrusted image | [`info`] |
//! | find and repair damage | [`check`], [`repair`] |
//! | read what is left of an image that nothing opens | [`Disk::rescue`] |
//! | serve a virtual machine with your own I/O | [a block device for a VMM](vmm) |
//! | anything else | [`ops`], with [`Disk::as_guest_disk`] and [`Threads`]; [`core`], with [`Disk::as_image`] |
//!
//! # Defaults
//!
//! - **Format**: qcow2. Raw disks and LUKS containers need [`DiskOptions::format`]. Formats are
//!   [probed](DiskOptions::probe_format) on request only: the guest of a raw disk can write a qcow2 header
//!   into it.
//! - **Named files**: an image can name any file that this program may read as its backing file or data file,
//!   and its guest would see the content. So an image that names a file is not opened
//!   ([`ErrorKind::NameDenied`]) unless [`DiskOptions::follow_backing_files`] or another [`Policy`] allows
//!   it. `json:` names and servers are never followed.
//! - **Locks**: QEMU's byte locks, so that its programs, this crate, and several disks in one program keep
//!   each other out. A qcow2 image has one writer or any number of readers; everyone else gets
//!   [`ErrorKind::InUse`]. Raw disks and LUKS containers are not protected against other writers, unless
//!   [`DiskOptions::locking`] demands it. Linux only, and only where the file system supports locks:
//!   elsewhere nothing is locked.
//! - **Writing** needs [`DiskOptions::writable`]. A disk opened for reading never writes, not even to recover
//!   from an unclean close.
//! - **Durability**: writes are durable after [`Disk::flush`] or [`Disk::close`]. A crash before that leaves
//!   a consistent image with some, all or none of the writes since then. A write may survive in part, but
//!   never with a part of a 512-byte sector: the medium must write such sectors whole.
//! - **Compression**: both algorithms can be read. New images use deflate, which every reader supports, or
//!   [zstd](NewDisk::zstd).
//! - **Encryption**: with a [password](DiskOptions::password) or a [callback](DiskOptions::password_from).
//!   New images use QEMU's defaults: LUKS, AES-256 in XTS mode, two seconds per password attempt.
//! - **Threads**: [`convert`](Disk::convert), [`check`] and [`compare`](Disk::compare) use one thread per
//!   processor.
//!
//! # Which crate do I want?
//!
//! | you want to | take |
//! |---|---|
//! | use images in files | this one |
//! | read and write images in your own storage; `std` for locks only | [`qcow2-core`](core) |
//! | run the procedures on your own disks and threads | [`qcow2-ops`](ops) |
//! | use files, block devices, memory or NBD as storage, with locks | [`qcow2-io`](io) |
//! | compress and expand clusters | [`qcow2-codec`](codec) |
//! | use LUKS headers, key slots and sector encryption | [`qcow2-crypt`](crypt) |
//! | parse or write the on-disk structures, `no_std` | [`qcow2-format`](mod@format) |
//!
//! All of them are re-exported here, so one dependency is enough to use a lower level: [`Disk::as_image`] is
//! the engine's image, [`Disk::as_guest_disk`] is what the procedures take.
//!
//! # Errors
//!
//! Every call returns an [`Error`] with a [kind](ErrorKind) to match on, the [path](Error::path) of the
//! image, and its causes as [`source`](std::error::Error::source). `{error:#}` prints them all on one line.
//! No content of an image makes this crate panic; the fuzz targets in `fuzz/` run the parsers, the codecs,
//! the engine and the check on damaged images. In debug builds, dropping a disk panics if closing it fails
//! and no earlier call has reported an error: see [`Disk`].
#![forbid(unsafe_code)]

mod bitmap;
mod chain;
mod convert;
mod cursor;
mod disk;
mod error;
mod look;
mod names;
mod new;
mod newfile;
mod options;
mod password;
mod rescue;
mod snapshot;
mod threads;
#[cfg(any(doc, doctest))]
pub mod vmm;

pub use bitmap::Bitmap;
pub use convert::{Convert, Work};
pub use cursor::Cursor;
pub use disk::Disk;
pub use error::{Error, ErrorKind, Result};
pub use look::{check, info, repair};
pub use new::NewDisk;
pub use options::DiskOptions;
pub use rescue::{Rescue, Rescued};
pub use threads::Threads;

pub use qcow2_core::format::snapshot::Snapshot;
pub use qcow2_core::{CreateOptions, ImageFormat, Place, Preallocation};
pub use qcow2_io::{CacheMode, Locking, Policy};
pub use qcow2_ops::CopyReport;
pub use qcow2_ops::bitmap::BitmapAction;
pub use qcow2_ops::check::CheckReport;
pub use qcow2_ops::compare::Comparison;
pub use qcow2_ops::info::InfoReport;
pub use qcow2_ops::rebase::RebaseReport;
pub use qcow2_ops::repair::Repaired;
pub use qcow2_ops::rescue::RescueReport;
pub use {
    qcow2_codec as codec, qcow2_core as core, qcow2_crypt as crypt, qcow2_format as format, qcow2_io as io,
    qcow2_ops as ops,
};

/// Compiles the examples in the README.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
pub struct Readme;
