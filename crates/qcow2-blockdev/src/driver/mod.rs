//! The drivers: what each one has of its own.

mod blkdebug;
mod file;
mod known;
pub(crate) mod nbd;
mod null;
mod qcow2;
mod raw;
mod table;
mod values;

pub(crate) use blkdebug::rules as debug_rules;
pub use blkdebug::{LineError, RuleError};
pub use file::is_block_device;
pub(crate) use file::not_a_device;
pub use known::is_known_driver;
pub(crate) use known::{makes_no_images, may_be_recorded};
pub use nbd::{AddressError, AddressPart};
pub(crate) use null::null;
pub use qcow2::TuningError;
pub(crate) use qcow2::tune;
pub use raw::WindowError;
pub(crate) use raw::{is_window, window};
pub use table::Driver;
pub(crate) use table::KEY_OPTIONS;
pub(crate) use values::check as check_values;
