//! The files of one run.

use qcow2_io::OpenFiles;
use std::sync::OnceLock;

/// The files that this process has open, with that of its output: whatever a verb writes to is opened among
/// them, so that it is none that the same verb reads.
pub(crate) fn open_files() -> &'static OpenFiles {
    static FILES: OnceLock<OpenFiles> = OnceLock::new();
    FILES.get_or_init(OpenFiles::with_output)
}
