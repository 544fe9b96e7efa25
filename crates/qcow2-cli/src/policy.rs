//! What images may lead to: as the environment says, then the options of the verb.

use crate::args::Opt;
use crate::failure::Failure;
use qcow2_blockdev::{Follow, Policy};
use std::sync::{Mutex, PoisonError};

/// The environment variable that sets the policy, under every name of the program.
const VARIABLE: &str = "QCOW2_POLICY";

/// One for the whole run: every verb opens all of its images alike.
static POLICY: Mutex<Option<Policy>> = Mutex::new(None);

/// The policy of this run; without a word of anybody all names are followed, as qemu-img does.
pub(crate) fn policy() -> Policy {
    let set = POLICY.lock().unwrap_or_else(PoisonError::into_inner).clone();
    set.unwrap_or_else(|| Policy::default().with_follow(Follow::All))
}

/// Takes what the environment says. Errors: it is no policy.
pub(crate) fn take_environment() -> Result<(), Failure> {
    let Some(text) = std::env::var_os(VARIABLE) else { return Ok(()) };
    set(&qcow2_io::text_of_name(&text)).map_err(|failure| failure.after_words(&format!("{VARIABLE}: ")))
}

/// Takes an option that sets the policy; gives back any other.
pub(crate) fn take(opt: Opt, value: &str) -> Result<bool, Failure> {
    match opt {
        Opt::Follow => set(&format!("follow={value}"))?,
        Opt::Untrusted => set("untrusted")?,
        Opt::Policy => set(value)?,
        _ => return Ok(false),
    }
    Ok(true)
}

fn set(text: &str) -> Result<(), Failure> {
    let set = policy().with_text(text).map_err(|error| Failure::new(error.to_string()))?;
    *POLICY.lock().unwrap_or_else(PoisonError::into_inner) = Some(set);
    Ok(())
}
