//! The command language: turns a line into a [`Command`] and prints the help. Pure text.
//!
//! `line` splits words and parses numbers, `table` lists the commands, `parse` turns words into a `Command`.

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
