//! Encryption at the command line: secrets, what the operating system gives, passwords for layers, options of
//! new volumes.

mod prompt;
mod slots;

pub(crate) use prompt::Terminal;
pub(crate) use slots::{SlotOptions, SlotRequest};
