//! New images: from a name, a format and options to a file that is whole, or not there.
//!
//! [`NewTarget`] says where the image goes, [`NewOptions`] what it is to be, [`create()`] makes it. Nothing
//! that was there before is touched until the options are known to be possible, and what was made for an
//! image that fails is taken away.

mod amend;
mod create;
mod encryption;
mod failure;
mod file;
mod format;
mod measure;
mod options;
mod qcow2;
mod table;
mod target;
mod temporary;
mod unfinished;

pub use amend::ImageChanges;
pub use create::{CreateHow, NewImageFile, create};
pub use failure::{CreateFailure, CreateFailureKind};
pub use file::NewFile;
pub use format::{amended_format, format_of_ending, measured_format, new_image_format};
pub use options::NewOptions;
pub use table::{OptionSpec, OptionType, amend_options, create_options, options_at};
pub use target::NewTarget;
pub use temporary::TemporaryFolder;
pub use unfinished::Unfinished;
