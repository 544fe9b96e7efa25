//! Encryption at the command line: secrets, what the operating system gives, passwords for layers, options of
//! new volumes.

mod options;
mod prompt;
mod slots;
mod system;

pub(crate) use options::{LUKS_NAMES, NewCrypt, QCOW2_NAMES, read_options};
pub(crate) use prompt::Terminal;
pub(crate) use slots::{SlotOptions, SlotRequest};
pub(crate) use system::{SystemRandom, ThreadTime};
