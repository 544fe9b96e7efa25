//! Where the text goes: results to standard output, complaints to standard error, each at once and in order.

use crate::failure::Failure;
use crate::session::Session;
use qcow2_exerciser::Console;
use std::cell::RefCell;

/// Both outputs of the program.
pub(super) struct Streams<'a> {
    session: &'a Session,
    /// Why text for standard output was lost, the first time.
    lost: RefCell<Option<Failure>>,
}

impl<'a> Streams<'a> {
    pub(super) fn new(session: &'a Session) -> Self {
        Self { session, lost: RefCell::new(None) }
    }

    /// Why text for standard output was lost that somebody still wanted, if it was.
    pub(super) fn take_lost(&self) -> Option<Failure> {
        self.lost.take()
    }
}

impl Console for Streams<'_> {
    fn out(&self, text: &str) {
        // Commands go on where text is lost: a script that stopped halfway would leave half of its changes.
        if let Err(failure) = self.session.print(text) {
            self.lost.borrow_mut().get_or_insert(failure);
        }
    }

    fn complain(&self, line: &str) {
        self.session.complain(line);
    }

    fn complain_named(&self, text: &str) {
        self.complain(&format!("{}: {text}", self.session.program()));
    }
}
