//! The language of the commands: from a line to a value, and what the help says of it. Pure text.
//!
//! `line` splits words and reads numbers, `table` knows the commands, `parse` turns words into a `Command`.

mod command;
mod help;
mod line;
mod parse;
mod table;
#[cfg(test)]
mod tests;

pub(crate) use command::{
    Break, Check, Command, Content, Manner, Open, Place, Range, Read, Reopen, Style, Write,
};
pub(crate) use help::{all as help_for_all, one as help_for_one};
pub(crate) use line::split;
pub(crate) use parse::{Complaint, parse};
pub(crate) use table::{Spec, find};
