//! The value of one option.

use super::dictionary::json_text;
use std::fmt;

/// A value that has no parts. Lists of `key=value` give texts only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scalar {
    /// `null`.
    Null,
    /// `true` or `false`.
    Switch(bool),
    /// A number, as JSON has it.
    Number(String),
    /// A text.
    Text(String),
}

impl Scalar {
    /// A text.
    pub fn text(text: &str) -> Self {
        Self::Text(text.to_owned())
    }

    /// As JSON.
    pub(crate) fn to_json(&self) -> String {
        match self {
            Self::Null => "null".to_owned(),
            Self::Switch(on) => on.to_string(),
            Self::Number(number) => number.clone(),
            Self::Text(text) => json_text(text),
        }
    }
}

/// As it would stand in a list of `key=value`.
impl fmt::Display for Scalar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Null => "null",
            Self::Switch(true) => "on",
            Self::Switch(false) => "off",
            Self::Number(text) | Self::Text(text) => text,
        })
    }
}
