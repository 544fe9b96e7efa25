//! A finding of a check: place, what was seen, what is allowed.

use std::fmt;

/// One violation of one rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Finding {
    /// Name of the rule, as in the exemption list.
    pub(crate) rule: &'static str,
    /// The file, relative to the workspace root, or a crate's name.
    pub(crate) place: String,
    /// The line, counted from 1; 0 for the whole place.
    pub(crate) line: usize,
    /// What was seen there.
    pub(crate) seen: String,
    /// What is allowed instead.
    pub(crate) allowed: String,
}

impl Finding {
    pub(crate) fn new(
        rule: &'static str,
        place: impl Into<String>,
        line: usize,
        seen: impl Into<String>,
        allowed: impl Into<String>,
    ) -> Self {
        Self { rule, place: place.into(), line, seen: seen.into(), allowed: allowed.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.place)?;
        if self.line > 0 {
            write!(f, ":{}", self.line)?;
        }
        write!(f, ": [{}] {}; allowed: {}", self.rule, self.seen, self.allowed)
    }
}
