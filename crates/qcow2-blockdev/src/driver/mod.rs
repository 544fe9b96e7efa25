//! The drivers: what each one has of its own.
//!
//! # Adding an image format
//!
//! A format is a disk ([`GuestDisk`](qcow2_core::GuestDisk)) over the bytes of a file
//! ([`Storage`](qcow2_core::Storage)). `ContainerDisk` in qcow2-core is the smallest example. In this order
//! (some matches have a wildcard, so the compiler does not name every place):
//!
//! 1. qcow2-format, or a crate of its own: parse the header and tables, total on any bytes.
//! 2. The disk: `read_at`, `extent_at` and `size`, and what it can of `write_at`, `write_zeroes`, `discard`,
//!    `flush` and `resize`.
//! 3. `qcow2_core::ImageFormat`: a variant with its name (`crates/qcow2-core/src/port/resolver.rs`).
//!    `crates/qcow2-core/src/chain.rs` opens it, alone and as a layer below another.
//! 4. A [`Driver`] with its options and its format (`table.rs`). The tree parser, names, `json:` and
//!    `driver=` know it from then on. What it takes beside its file goes into a file of its own here, as
//!    `raw.rs` has the window of a raw disk.
//! 5. The signature by which files of unknown format are recognised, if that is safe
//!    (`crates/qcow2-format/src/signature.rs`).
//! 6. If images can be made: `new/table.rs` (its options) and `new/create.rs`.
//!
//! Conversion, map, compare, checksum and the exerciser work on any guest disk, the command on any driver:
//! nothing in qcow2-ops or qcow2-cli names the format, except to show what only it has (`info`, `check`). A
//! parent or an extent that the format names goes through `Resolver` as a new kind of `Reference`, never to
//! the file system. The engine (`read`, `write`, `meta`, `snapshot` and `bitmap` in qcow2-core), the traits
//! of the ports and the allowed arrows stay as they are.

mod blkdebug;
mod file;
mod known;
pub(crate) mod nbd;
mod null;
mod preallocate;
mod qcow2;
mod raw;
mod table;
mod throttle;
mod values;

pub use blkdebug::{LineError, RuleError};
pub(crate) use blkdebug::{limits as debug_limits, rules as debug_rules};
pub(crate) use file::not_a_device;
pub use file::{is_device, is_fifo};
pub use known::is_known_driver;
pub(crate) use known::{makes_no_images, may_be_recorded};
pub use nbd::{AddressError, AddressPart};
pub(crate) use null::null;
pub(crate) use preallocate::preallocation;
pub use qcow2::TuningError;
pub(crate) use qcow2::tune;
pub use raw::WindowError;
pub(crate) use raw::{is_window, window};
pub use table::Driver;
pub(crate) use table::KEY_OPTIONS;
pub use throttle::ThrottleError;
pub(crate) use throttle::throttle_group;
pub(crate) use values::check as check_values;
