//! Outcome of a request.

use crate::reason::Reason;

/// The output of a request, and if it failed. Printed in the order `complaint`, `refused`, `text`.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// Results, for standard output.
    pub(crate) text: String,
    /// Name of the request that failed (`read`, `aio_write`) and the reason; goes to standard output as `NAME
    /// failed: REASON`.
    pub(crate) refused: Option<(&'static str, Reason)>,
    /// A line for standard error.
    pub(crate) complaint: Option<String>,
    /// True if the request failed.
    pub(crate) failed: bool,
}

impl Outcome {
    pub(crate) fn success(text: String) -> Self {
        Self { text, ..Self::default() }
    }

    pub(crate) fn refused(name: &'static str, reason: Reason) -> Self {
        Self { refused: Some((name, reason)), failed: true, ..Self::default() }
    }

    pub(crate) fn complaint(line: String) -> Self {
        Self { complaint: Some(line), failed: true, ..Self::default() }
    }
}
