//! From what people type to opened disks, and to new ones.
//!
//! ```text
//!  "disk.qcow2"   "json:{...}"   "driver=qcow2,file.filename=x"
//!          \           |            /
//!           ImageName::parse            a tree of nodes:   qcow2
//!                  |                                         |
//!          open(&name, &how)                              blkdebug
//!                  |                                         |
//!             OpenedDisk                                   file
//! ```
//!
//! Names become a tree of drivers with their options, the tree becomes storages from `qcow2-io` stacked on
//! one another, and the engine opens the image in them, its data file and its backing chain. Names inside
//! images lead nowhere unless the [`Policy`] says so, which also limits what opening may cost. Whatever
//! goes wrong is one [`OpenFailure`], or, where an image is made, one [`CreateFailure`], to be matched by
//! its kind; what is only worth a word is a [`Warning`].
//!
//! | need | here |
//! |---|---|
//! | a disk | [`ImageName::parse`], then [`open`] |
//! | its bytes and format alone | [`open_bytes`]; the rest of the way is [`open_layers`] |
//! | the same as it was at a snapshot | [`open_snapshot`] |
//! | to hear before what opening for changes puts right | [`open_telling`] |
//! | a disk whose changes go away with the program | [`open_scratch`] |
//! | a chain to write into below its top, for `qcow2_ops::commit` | [`ChainFiles`] |
//! | a new image | [`NewTarget`], [`NewOptions`], then [`create`] |
//! | a change of one that is there, for `qcow2_ops::amend` | [`ImageChanges`], [`SlotChange`] |
//! | a new backing file for one, for `qcow2_ops::rebase` | [`BackingFile`] |
//! | the options of both as tables | [`create_options`], [`options_at`], [`amend_options`] |
//! | that no half of one stays | [`Unfinished`] |
//! | levels of compression, which images do not record | [`Compression`] |
//! | passwords, and others for an image that is there | [`Secrets`], [`AskPassword`], [`Keys`], [`SlotChange`] |
//! | a number of bytes as people type it: `10G`, `0x200`, `1.5k` | [`parse_size`] |
//! | `key=value,key=value` | [`KeyValues`] |
//!
//! ```
//! use qcow2_blockdev::{ImageName, Naming, OpenOptions, open};
//! use qcow2_core::{CreateOptions, GuestOffset};
//!
//! # let folder = std::env::temp_dir().join(format!("qcow2-blockdev-{}", std::process::id()));
//! # std::fs::create_dir_all(&folder)?;
//! let path = folder.join("disk.qcow2");
//! # let file = qcow2_io::OpenFile::writable().with_create(qcow2_io::Create::Truncate).open(&path)?;
//! # qcow2_core::create(&file, None, &CreateOptions::new(1 << 20))?;
//! # drop(file);
//! let options = format!("driver=qcow2,file.filename={}", path.display());
//! let name = ImageName::parse(&options, &Naming::default().as_list(true))?;
//! let opened = open(&name, &OpenOptions::new())?;
//! let mut sector = [1; 512];
//! opened.disk.read_at(GuestOffset::new(0), &mut sector)?;
//! assert_eq!(sector, [0; 512]);
//! # drop(opened);
//! # std::fs::remove_dir_all(&folder)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
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
#![forbid(unsafe_code)]

mod arguments;
mod compression;
mod driver;
mod failure;
mod keys;
mod keyvalue;
mod name;
mod new;
mod open;
mod scalar;
mod size;
mod text;
mod tree;
mod warning;

pub use arguments::{count_argument, size_argument};
pub use compression::{Compression, CompressionError};
pub use driver::{
    AddressError, AddressPart, Driver, LineError, RuleError, ThrottleError, TuningError, WindowError,
    is_device, is_fifo, is_known_driver,
};
pub use failure::{FailureKind, MissingBacking, OpenFailure};
pub use keys::{
    AskPassword, Authorization, AuthorizationError, KeyError, Keys, LayerKey, NoSecret, SecretError, Secrets,
    SlotChange, SlotError, SlotOptions, TlsEndpoint, TlsObject, TlsObjectError,
};
pub use keyvalue::{KeyValueError, KeyValues, Pair, ShortForm, escape_commas};
pub use name::{ImageName, Naming, filename};
pub use new::{
    CreateFailure, CreateFailureKind, CreateHow, ImageChanges, NewFile, NewImageFile, NewOptions, NewTarget,
    OptionSpec, OptionType, TemporaryFolder, Unfinished, amend_options, amended_format, create,
    create_options, format_of_ending, measured_format, new_image_format, options_at,
};
pub use open::{
    BackingFile, ChainFiles, Feature, Follow, KeptBacking, LayerFiles, NodeFacts, OpenOptions, OpenedBytes,
    OpenedDisk, Policy, PolicyError, Refusal, Sharing, Tell, bitmaps_to_lose, locate_backing, open,
    open_backing, open_below, open_bytes, open_existing, open_layers, open_on, open_scratch, open_snapshot,
    open_telling, permit_backing, warnings_of_change,
};
pub use scalar::{
    OptionError, OptionErrorKind, OptionValue, parse_switch, read_number, read_size, read_switch,
};
pub use size::{SizeError, parse_size};
pub use text::escaped;
pub use tree::{Backing, JsonError, Node, Options, Scalar, json_text};
pub use warning::Warning;
