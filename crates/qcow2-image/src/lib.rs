//! qcow2 disk images for people in a hurry: files, codecs, ciphers, threads and locks are set up for you,
//! with safe defaults.
//!
//! ```text
//!  your program     Disk::open, read_at, write_at, create_snapshot, convert, check, close
//!       |
//!       v
//!  qcow2-image ---------+------------------+------------------+       this crate: sets them up
//!       |               |                  |                  |
//!       v               v                  v                  v
//!  qcow2-ops       qcow2-io           qcow2-codec        qcow2-crypt
//!  procedures      files, locks,      deflate, zstd      LUKS, the old
//!       |          names                   |             AES method
//!       v               |                  |                  |
//!  qcow2-core <---------+------------------+------------------+       the engine
//!       |
//!       v
//!  qcow2-format    bytes <-> values
//! ```
//!
//! Open a disk, look at it:
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
//! Make one, change it:
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
//! # Where to find what
//!
//! | you want to | take |
//! |---|---|
//! | open an image | [`Disk::open`], [`Disk::options`] |
//! | make one: of another kind, encrypted, on a backing file, raw | [`Disk::create`], [`NewDisk`] |
//! | read, write, zero, discard, resize, flush | the methods of [`Disk`], from any number of threads |
//! | use it as `Read`, `Write` and `Seek` | [`Disk::cursor`] |
//! | take, read, apply and delete internal snapshots | [`Disk::create_snapshot`], [`Disk::open_snapshot`] |
//! | back up what was written since last time | [`Disk::add_bitmap`], [`Bitmap`] |
//! | another format, other options, compression | [`Disk::convert`] |
//! | know whether two disks hold the same | [`Disk::compare`], [`Disk::checksum`] |
//! | know what an image says of itself, without trusting it | [`info`] |
//! | find and repair damage | [`check`], [`repair`] |
//! | serve a virtual machine with your own I/O | [a block device for a VMM](vmm) |
//! | anything else | [`ops`], with [`Disk::as_guest_disk`] and [`Threads`]; [`core`], with [`Disk::as_image`] |
//!
//! # Defaults
//!
//! - **Format**: qcow2. A raw disk or a LUKS container is opened when [`DiskOptions::format`] says so.
//!   Formats are [probed](DiskOptions::probe_format) on request only: the guest of a raw disk can write a
//!   qcow2 header into it.
//! - **Names**: an image can name any file that this program may read as its backing file or data file, and
//!   its guest would see it. An image that names one is not opened ([`ErrorKind::NameDenied`]) unless
//!   [`DiskOptions::follow_backing_files`] or another [`Policy`] allows it. `json:` descriptions and servers
//!   are never followed.
//! - **Locks**: QEMU's, so its programs and this crate keep each other out, and so do two disks of one
//!   program: an image has one writer or any number of readers, anybody else gets [`ErrorKind::InUse`]. Linux
//!   only.
//! - **Writing** is asked for in one place, [`DiskOptions::writable`]. A disk that is opened for reading
//!   never writes, not even to put right what an unclean end left.
//! - **Durability**: what was written is durable after [`Disk::flush`] or [`Disk::close`]. A crash in between
//!   leaves a whole image, with some, all or none of the writes since.
//! - **Compression**: both methods are at hand for reading; new images compress with deflate, which everybody
//!   reads, or with [zstd](NewDisk::zstd).
//! - **Encryption**: a [password](DiskOptions::password), or [somebody to ask](DiskOptions::password_from).
//!   New images are encrypted as QEMU does it by default: LUKS, AES-256 in XTS mode, two seconds to try a
//!   password.
//! - **Threads**: [`convert`](Disk::convert), [`check`], [`compare`](Disk::compare) run one per processor.
//!
//! # Which crate do I want?
//!
//! | you want to | take |
//! |---|---|
//! | use images in files, now | this one |
//! | read and write images on your own storage, `no_std` | [`qcow2-core`](core) |
//! | run its procedures on disks and threads of your own | [`qcow2-ops`](ops) |
//! | files, block devices, memory, NBD as storages; locks | [`qcow2-io`](io) |
//! | compress and expand clusters | [`qcow2-codec`](codec) |
//! | LUKS headers, key slots, sectors under a key | [`qcow2-crypt`](crypt) |
//! | parse or write the on-disk structures, `no_std` | [`qcow2-format`](mod@format) |
//!
//! All of them are re-exported here, so one dependency is enough to go down a level: [`Disk::as_image`] is
//! the engine's image, [`Disk::as_guest_disk`] what the procedures take.
//!
//! # Errors
//!
//! Every call returns an [`Error`] with a [kind](ErrorKind) to match on, the [path](Error::path) of the
//! image, and its causes as [`source`](std::error::Error::source). `{error:#}` prints them all on one line.
//! No content of an image makes this crate panic. In debug builds, dropping a disk panics if closing it fails
//! and no earlier call has reported an error: see [`Disk`].
#![forbid(unsafe_code)]

mod bitmap;
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
mod snapshot;
mod system;
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
pub use system::{SystemRandom, ThreadTime};
pub use threads::Threads;

pub use qcow2_core::format::snapshot::Snapshot;
pub use qcow2_core::{ImageFormat, Preallocation};
pub use qcow2_io::{CacheMode, Locking, Policy};
pub use qcow2_ops::CopyReport;
pub use qcow2_ops::bitmap::BitmapAction;
pub use qcow2_ops::check::CheckReport;
pub use qcow2_ops::compare::Comparison;
pub use qcow2_ops::create::Qcow2Request;
pub use qcow2_ops::info::InfoReport;
pub use qcow2_ops::repair::Repaired;
pub use {
    qcow2_codec as codec, qcow2_core as core, qcow2_crypt as crypt, qcow2_format as format, qcow2_io as io,
    qcow2_ops as ops,
};

/// The examples in the README compile.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
pub struct Readme;
