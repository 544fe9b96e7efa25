//! Storage adapters for qcow2 images: the only crate that touches files.
//!
//! ```
//! use qcow2_core::{CreateOptions, Image, ImageFormat, OpenOptions};
//! use qcow2_io::{Create, OpenFile, SourceOptions, open_source};
//!
//! let path = std::env::temp_dir().join(format!("qcow2-io-{}.qcow2", std::process::id()));
//! let file = OpenFile::writable().with_create(Create::Truncate).open(&path)?;
//! qcow2_core::create(&file, None, &CreateOptions::new(1 << 20))?;
//! drop(file);
//! let source = open_source(&path, &SourceOptions::new(OpenFile::read_only()))?;
//! assert_eq!(source.format, ImageFormat::Qcow2);
//! assert_eq!(Image::open(source, &OpenOptions::default())?.size(), 1 << 20);
//! # std::fs::remove_file(&path)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! | need | adapter |
//! |---|---|
//! | an image in a file or on a block device | [`OpenFile`], which makes a [`FileStorage`] |
//! | a file that a user named, with its format and a resolver for the files it names | [`open_source`] |
//! | the backing and data files an image names, as far as a policy allows | [`FileResolver`] |
//! | to refuse writing to a file that the same program has open already | [`OpenFiles`] |
//! | an image in memory, for tests and tools | [`MemoryStorage`] |
//! | fewer or more flushes than the caller asks for | [`CacheMode`], [`NoFlush`], [`FlushEachWrite`] |
//! | to count or log the calls that reach a storage | [`TraceStorage`] |
//! | a storage with a size limit, to test a full disk | [`LimitStorage`] |
//! | calls that fail at chosen steps of the engine | [`BlkdebugStorage`] |
//! | requests that are widened and cut to limits | [`BlkdebugStorage`] with [`DebugLimits`] |
//! | the steps of a raw format above a debugger | [`RawEvents`] |
//! | an image that compresses what is written to it | [`CompressWrites`] |
//! | a disk of which only content and layers are seen | [`FilteredDisk`] |
//! | a disk above an image that shows the image's layers | [`ShownDisk`] |
//! | a disk that copies what it reads from its backing files into the top layer | [`CopyOnRead`] |
//! | a disk probed as raw that nobody turns into another format | [`GuardedRaw`] |
//! | a byte range of a storage | [`WindowStorage`] |
//! | a storage with a rate limit | [`ThrottleStorage`] |
//! | limits for several storages and disks | [`ThrottleGroup`], [`ThrottledStorage`], [`ThrottledDisk`] |
//! | a storage that is compared with a copy | [`VerifyStorage`] |
//! | a disk whose old content goes elsewhere before it changes | [`CopyBeforeWrite`] |
//! | the guest disk of one image as the storage of another | [`DiskStorage`] |
//! | to write such a wrapper | [`forward_storage`], [`forward_guest_disk`] |
//! | the export of an NBD server | [`NbdStorage`] |
//! | reads and writes of files that finish later, on io_uring | `FileRing` (feature `uring`, Linux) |
//! | a null device | [`NullStorage`] |
//! | random bytes and time for encryption keys | [`random_bytes`], [`ThreadClock`] |
//! | a test suite for adapters of your own | `conformance` (a feature) |
//!
//! # Which crate do I want?
//!
//! | you want to | take |
//! |---|---|
//! | use images in files | `qcow2-image` |
//! | open disks by QEMU's names: `json:`, `nbd:`, option lists | `qcow2-blockdev` |
//! | read and write images in your own storage; `std` for locks only | `qcow2-core` |
//! | run the procedures (convert, check, commit, ...) on your own disks and threads | `qcow2-ops` |
//! | use files, block devices, memory or NBD as storage, with locks | `qcow2-io` |
//! | compress and expand clusters | `qcow2-codec` |
//! | use LUKS headers, key slots and sector encryption | `qcow2-crypt` |
//! | parse or write the on-disk structures, `no_std` | `qcow2-format` |
#![deny(unsafe_code)]

mod buffer;
#[cfg(feature = "conformance")]
pub mod conformance;
mod direct;
mod dirty;
mod error;
mod file;
mod layer;
mod lock;
mod memory;
mod name;
mod nbd;
mod null;
mod open;
mod open_files;
mod probe;
mod reach;
mod resolve;
mod space;
mod sys;
mod system;

pub use buffer::IoBuffer;
pub use error::{OsError, os_error_text};
pub use file::FileStorage;
#[cfg(all(target_os = "linux", feature = "uring"))]
pub use file::ring::{FilePart, FileRing, RingWaker, Transfer};
pub use layer::{
    BeforeWrite, BlkdebugStorage, CacheMode, CompressWrites, CopyBeforeWrite, CopyOnRead, DebugAction,
    DebugCall, DebugLimits, DebugRule, Debugger, DiskStorage, FilteredDisk, FlushEachWrite, GuardedRaw,
    Injection, LimitError, LimitStorage, Mismatch, MismatchKind, MismatchObserver, NoFlush, Pace, Rate,
    Rates, RawEvents, RequestKind, ShownDisk, StopNews, StorageCall, StorageCounts, StorageEvent, SystemPace,
    ThrottleGroup, ThrottleLimits, ThrottleStorage, ThrottledDisk, ThrottledStorage, TraceStorage,
    VerifyStorage, WindowStorage,
};
pub use lock::{LockConflict, Locking, Permission};
pub use memory::MemoryStorage;
pub use name::{path_of, text_of_name};
pub use nbd::{
    NbdAddress, NbdError, NbdOptions, NbdStorage, NbdTls, TlsCredentials, TlsCredentialsError, TlsIdentity,
};
pub use null::NullStorage;
pub use open::{Create, OpenError, OpenErrorKind, OpenFile};
pub use open_files::{HeldFile, OpenFiles, SameFile};
pub use probe::probe_format;
/// Writes the rest of a wrapper: the calls that it hands on.
pub use qcow2_core::{forward_guest_disk, forward_storage};
pub use resolve::{FileResolver, Policy, SourceError, SourceOptions, open_source};
#[cfg(unix)]
pub use system::inherited_descriptor;
pub use system::{ThreadClock, random_bytes};
