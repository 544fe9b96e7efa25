//! The files of one run.

use crate::persona::{DamageWords, MismatchStops};
use crate::policy::policy;
use qcow2_blockdev::OpenOptions;
use qcow2_io::OpenFiles;
use std::sync::Arc;
use std::sync::OnceLock;

/// The files that this process has open, with that of its output: whatever a verb writes to is opened among
/// them, so that it is none that the same verb reads.
pub(crate) fn open_files() -> &'static OpenFiles {
    static FILES: OnceLock<OpenFiles> = OnceLock::new();
    FILES.get_or_init(OpenFiles::with_output)
}

/// How images are opened for reading: by the policy and among the files of this run.
pub(crate) fn open_options() -> OpenOptions {
    let options = OpenOptions::new().with_policy(policy()).among(open_files());
    options.with_damage_observer(Arc::new(DamageWords)).with_mismatch_observer(Arc::new(MismatchStops))
}
