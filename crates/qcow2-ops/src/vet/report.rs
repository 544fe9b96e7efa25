//! What was found in an image.

use super::finding::{Finding, Verdict};
use qcow2_core::format::signature::Container;
use std::fmt;

/// What was found in an image.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct VetReport {
    /// The format that it would be opened in; `None`: raw.
    pub format: Option<Container>,
    /// Length of the file in bytes.
    pub file_len: u64,
    /// The virtual size that its header states, in bytes; of a raw disk the length of the file. `None` if it
    /// cannot be read.
    pub virtual_size: Option<u64>,
    /// The reasons not to accept it, at most [`MAX_FINDINGS`].
    pub findings: Vec<Finding>,
}

impl VetReport {
    /// The worst of the findings.
    pub fn verdict(&self) -> Verdict {
        self.findings.iter().map(Finding::verdict).max().unwrap_or(Verdict::Safe)
    }

    /// Name of the format.
    pub fn format_name(&self) -> &'static str {
        self.format.map_or("raw", Container::name)
    }

    pub(super) fn new(format: Option<Container>, file_len: u64) -> Self {
        Self { format, file_len, virtual_size: None, findings: Vec::new() }
    }

    pub(super) fn found(&mut self, finding: Finding) {
        if self.findings.len() < MAX_FINDINGS && !self.findings.contains(&finding) {
            self.findings.push(finding);
        }
    }
}

/// The most findings that a report has; a file of one line each could name thousands of files.
pub const MAX_FINDINGS: usize = 64;

/// One line: the verdict, the format and the reasons.
impl fmt::Display for VetReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.verdict().name(), self.format_name())?;
        let mut between = ": ";
        for finding in &self.findings {
            write!(f, "{between}{finding}")?;
            between = "; ";
        }
        Ok(())
    }
}
