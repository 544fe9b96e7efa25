//! Who is running: the program's name and the way to its output.

use crate::exit;
use crate::failure::Failure;
use qcow2_core::format::text::bytes_of;
use qcow2_report::human::escaped;
use qcow2_terminal::Audience;
use std::io::{self, IsTerminal, Write};

/// One run of the program.
#[derive(Debug)]
pub(crate) struct Session {
    program: &'static str,
    called: String,
    drop_in: bool,
}

impl Session {
    /// `argv0`: how the program was called. Under the name `qemu-img` it behaves as that tool in every word.
    pub(crate) fn new(argv0: &str) -> Self {
        let name = argv0.rsplit(['/', '\\']).next().unwrap_or_default();
        let name = name.strip_suffix(".exe").unwrap_or(name);
        let drop_in = name == QEMU_IMG;
        let program = match name {
            QEMU_IMG => QEMU_IMG,
            QEMU_IO => QEMU_IO,
            QEMU_NBD => QEMU_NBD,
            _ => OWN_NAME,
        };
        let called = if argv0.is_empty() { program } else { argv0 }.to_owned();
        Self { program, called, drop_in }
    }

    /// The name that stands before messages.
    pub(crate) fn program(&self) -> &str {
        self.program
    }

    /// How the program was called, with the path.
    pub(crate) fn called(&self) -> &str {
        &self.called
    }

    /// Whether the program stands in for qemu-img.
    pub(crate) fn is_drop_in(&self) -> bool {
        self.drop_in
    }

    /// Whether the program is called by its own name, and speaks its own words.
    pub(crate) fn is_own(&self) -> bool {
        self.program == OWN_NAME
    }

    /// Whether the program stands in for qemu-io.
    pub(crate) fn is_qemu_io(&self) -> bool {
        self.program == QEMU_IO
    }

    /// Whether the program stands in for qemu-nbd.
    pub(crate) fn is_qemu_nbd(&self) -> bool {
        self.program == QEMU_NBD
    }

    /// Writes `text` to standard output at once. Errors: as [`printed`].
    pub(crate) fn print(&self, text: &str) -> Result<(), Failure> {
        let mut out = io::stdout().lock();
        printed(out.write_all(&bytes_of(text)).and_then(|()| out.flush()))
    }

    /// Writes a line to standard error. Control characters in it are escaped, a line feed too: names, and all
    /// else that images, servers and files say, are quoted in errors, and must neither drive a terminal nor
    /// look like a line of ours.
    pub(crate) fn complain(&self, line: &str) {
        // Nobody is left to hear that complaining failed.
        let _ = io::stderr().lock().write_all(&bytes_of(&(escaped(line) + "\n")));
    }

    /// Writes why a command, or a part of one, was not done to standard error.
    pub(crate) fn report(&self, failure: &Failure) {
        let words = if self.is_own() { failure.clone().own_words() } else { failure.clone() };
        words.lines(self.program(), self.called()).iter().for_each(|line| self.complain(line));
        failure.advice().filter(|_| !self.drop_in).for_each(|line| self.complain(line));
    }

    /// Writes a warning to standard error.
    pub(crate) fn warn(&self, text: &str) {
        self.complain(&format!("{}: warning: {text}", self.program));
    }

    /// Writes a warning of several lines to standard error.
    pub(crate) fn warn_lines(&self, lines: &[String]) {
        if let Some((first, rest)) = lines.split_first() {
            self.warn(first);
            rest.iter().for_each(|line| self.complain(line));
        }
    }
}

impl Audience for Session {
    fn draws(&self) -> bool {
        !self.drop_in && io::stderr().is_terminal()
    }

    fn is_drop_in(&self) -> bool {
        self.drop_in
    }
}

/// Judges how writing a text to standard output went. A reader that has gone away has read enough: the text
/// is dropped, the command goes on, and its exit code is that of its work. Errors: everything else, a full
/// disk above all, since somebody wants a text that is lost.
pub(crate) fn printed(written: io::Result<()>) -> Result<(), Failure> {
    match written {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written.map_err(|error| lost_output(&error)),
    }
}

/// The failure of a command whose data, not a text about its work, standard output did not take to the end. A
/// reader that has gone away knows that something is missing; whoever looks at the exit code does not.
pub(crate) fn unfinished_stream(error: &io::Error) -> Failure {
    match error.kind() {
        io::ErrorKind::BrokenPipe => Failure::silent(exit::FAILURE),
        _ => lost_output(error),
    }
}

fn lost_output(error: &io::Error) -> Failure {
    Failure::new(format!("cannot write to standard output: {error}"))
}

const OWN_NAME: &str = "qcow2";
const QEMU_IMG: &str = "qemu-img";
const QEMU_IO: &str = "qemu-io";
const QEMU_NBD: &str = "qemu-nbd";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_that_leaves_decides_nothing_but_an_unfinished_stream_is_a_failure() {
        let (gone, full) = (io::ErrorKind::BrokenPipe, io::ErrorKind::StorageFull);
        assert!(printed(Ok(())).is_ok() && printed(Err(gone.into())).is_ok());
        assert_eq!(printed(Err(full.into())).unwrap_err().code(), exit::FAILURE);
        for (kind, lines) in [(gone, 0), (full, 1)] {
            let failure = unfinished_stream(&kind.into());
            assert_eq!((failure.code(), failure.lines("", "").len()), (exit::FAILURE, lines), "{kind}");
        }
    }

    #[test]
    fn the_name_it_is_called_by_decides() {
        for (argv0, program, drop_in) in [
            ("qcow2", "qcow2", false),
            ("/usr/bin/qemu-img", "qemu-img", true),
            ("./qemu-img", "qemu-img", true),
            ("/usr/bin/qemu-io", "qemu-io", false),
            ("/usr/bin/qemu-nbd", "qemu-nbd", false),
            ("C:\\bin\\qemu-img.exe", "qemu-img", true),
            ("/tmp/other", "qcow2", false),
            ("", "qcow2", false),
        ] {
            let session = Session::new(argv0);
            assert_eq!((session.program(), session.is_drop_in()), (program, drop_in), "{argv0}");
        }
    }
}
