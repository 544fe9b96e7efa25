//! Where the text goes: results to standard output, complaints to standard error, each at once and in order.

use std::io::{self, Write};

/// Both outputs of the program.
pub(super) struct Console<'a> {
    program: &'a str,
    out: Box<dyn Write + 'a>,
    err: Box<dyn Write + 'a>,
    gone: bool,
}

impl<'a> Console<'a> {
    /// `program` stands before complaints about more than the command line.
    pub(super) fn new(program: &'a str, out: Box<dyn Write + 'a>, err: Box<dyn Write + 'a>) -> Self {
        Self { program, out, err, gone: false }
    }

    /// The program's own outputs.
    pub(super) fn standard(program: &'a str) -> Self {
        Self::new(program, Box::new(io::stdout()), Box::new(io::stderr()))
    }

    /// Text for standard output.
    pub(super) fn out(&mut self, text: &str) {
        if self.out.write_all(text.as_bytes()).and_then(|()| self.out.flush()).is_err() {
            self.gone = true;
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

    /// Whether nobody reads the results any more.
    pub(super) fn is_gone(&self) -> bool {
        self.gone
    }
}
