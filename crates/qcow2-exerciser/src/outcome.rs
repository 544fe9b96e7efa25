//! What came of a request.

use crate::reason::Reason;

/// How a request went: what there is to tell, and whether it failed.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// For the output.
    pub(crate) text: String,
    /// What was refused, `read` or `aio_write`, and why; told on the output, before `text`.
    pub(crate) refused: Option<(&'static str, Reason)>,
    /// A complaint, told first.
    pub(crate) complaint: Option<String>,
    /// Whether it failed.
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
