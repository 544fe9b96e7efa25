//! `compare`.

use crate::args::Arguments;
use crate::failure::Failure;
use crate::session::Session;

/// Runs the verb.
pub(crate) fn run(_session: &Session, _args: Arguments) -> Result<u8, Failure> {
    Err(Failure::new("not supported yet"))
}
