//! Encryption at the command line: secrets, what the operating system gives, passwords for layers, options of
//! new volumes.

mod options;
mod prompt;
mod slots;

pub(crate) use options::{LUKS_NAMES, NewCrypt, QCOW2_NAMES, read_options};
pub(crate) use prompt::Terminal;
pub(crate) use qcow2_image::{SystemRandom, ThreadTime};
pub(crate) use slots::{SlotOptions, SlotRequest};
