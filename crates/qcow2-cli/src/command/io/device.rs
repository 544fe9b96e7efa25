//! The disks of the exerciser, and what is said of those that are not opened.

use crate::args::Objects;
use crate::failure::Failure;
use crate::files::open_options;
use crate::findings::tell_of_change;
use crate::persona;
use crate::session::Session;
use qcow2_blockdev::Warning;
use qcow2_core::ResolvedSource;
use qcow2_exerciser::{FilesError, OpenRequest, OpenedDisk, OpenedFiles, Opener, Refusal};
use std::fs::File;
use std::io::{self, Read};

/// Opens files.
pub(super) struct Files<'a> {
    /// Where it is told what is put right.
    pub(super) session: &'a Session,
    /// What names may speak of.
    pub(super) objects: Objects,
}

impl Opener for Files<'_> {
    fn open(&self, request: &OpenRequest) -> Result<OpenedDisk, Refusal> {
        let tell = |warning: &Warning, source: &ResolvedSource| tell_of_change(self.session, warning, source);
        let opened = qcow2_exerciser::open_files(request, self.objects.secrets(), open_options(), &tell);
        let OpenedFiles { mut opened, warnings, .. } = opened.map_err(|error| {
            let failure = failure(error).without_name();
            let failure = if self.session.is_own() { failure.own_reason() } else { failure };
            let mut lines = failure.lines("", "").into_iter();
            let reason = lines.next().unwrap_or_default();
            Refusal { reason: reason.trim_start_matches(": ").to_owned(), hints: lines.collect() }
        })?;
        opened.warnings = warnings.iter().flat_map(lines).collect();
        Ok(opened)
    }

    fn read_file(&self, name: &str, limit: u64) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        File::open(qcow2_io::path_of(name))?.take(limit).read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

/// Why files were not opened, for the user.
pub(crate) fn failure(error: FilesError) -> Failure {
    match error {
        FilesError::List(error) => error.into(),
        FilesError::Option(error) => error.into(),
        FilesError::Open(failure) => failure.into(),
        other => Failure::new(other.to_string()),
    }
}

/// A warning of opening, as lines.
pub(crate) fn lines(warning: &Warning) -> Vec<String> {
    match warning {
        Warning::GuessedRaw(_) => persona::warning(warning),
        _ => persona::warning_lines(warning),
    }
}
