//! Where the text goes: results to standard output, complaints to standard error, each at once and in order.

use crate::failure::Failure;
use crate::session::printed;
use std::io::{self, Write};

/// Both outputs of the program.
pub(super) struct Console<'a> {
    program: &'a str,
    out: Box<dyn Write + 'a>,
    err: Box<dyn Write + 'a>,
    /// Why text for standard output was lost, the first time.
    lost: Option<Failure>,
}

impl<'a> Console<'a> {
    /// `program` stands before complaints about more than the command line.
    pub(super) fn new(program: &'a str, out: Box<dyn Write + 'a>, err: Box<dyn Write + 'a>) -> Self {
        Self { program, out, err, lost: None }
    }

    /// The program's own outputs.
    pub(super) fn standard(program: &'a str) -> Self {
        Self::new(program, Box::new(io::stdout()), Box::new(io::stderr()))
    }

    /// Text for standard output.
    pub(super) fn out(&mut self, text: &str) {
        // Commands go on where text is lost: a script that stopped halfway would leave half of its changes.
        if let Err(failure) = printed(self.out.write_all(text.as_bytes()).and_then(|()| self.out.flush())) {
            self.lost.get_or_insert(failure);
        }
    }

    /// A line for standard error.
    pub(super) fn err(&mut self, line: &str) {
        // Nobody is left to hear that complaining failed.
        let _ = writeln!(self.err, "{line}").and_then(|()| self.err.flush());
    }

    /// A line for standard error, after the program's name.
    pub(super) fn named(&mut self, text: &str) {
        self.err(&format!("{}: {text}", self.program));
    }

    /// Why text for standard output was lost that somebody still wanted, if it was.
    pub(super) fn take_lost(&mut self) -> Option<Failure> {
        self.lost.take()
    }
}
