//! Switches, numbers and sizes as values of options.

use crate::size::{SizeError, parse_size};
use std::fmt;

/// The value of an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OptionValue {
    /// A text.
    Text(String),
    /// What it means, and how it was written.
    Switch(bool, String),
    /// A number, or a number of bytes.
    Number(u64),
}

/// A value that an option does not take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OptionError {
    /// The option.
    pub option: String,
    /// Its value, as it was given.
    pub value: String,
    /// What is wrong with it.
    pub kind: OptionErrorKind,
}

/// What is wrong with the value of an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OptionErrorKind {
    /// Neither on nor off.
    NotASwitch,
    /// Not a number.
    NotANumber,
    /// A number of 2^64 or more.
    NumberTooLarge,
    /// Not a number of bytes, with a suffix or without.
    NotASize,
    /// A number of bytes that is negative, or 2^64 or more.
    SizeOutOfRange,
    /// None of the choices.
    NotAChoice,
    /// Not an integer.
    NotAnInteger,
    /// Not an integer from 0 to 2^32 - 1.
    NotAU32,
}

impl OptionError {
    /// `value` of `option` is wrong as `kind` says.
    pub(crate) fn new(option: &str, value: &str, kind: OptionErrorKind) -> Self {
        Self { option: option.to_owned(), value: value.to_owned(), kind }
    }
}

impl fmt::Display for OptionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let wanted = match self.kind {
            OptionErrorKind::NotASwitch => "on or off",
            OptionErrorKind::NotANumber => "a number",
            OptionErrorKind::NumberTooLarge => "a number below 2^64",
            OptionErrorKind::NotASize => "a number of bytes, perhaps with one of the suffixes k M G T P E",
            OptionErrorKind::SizeOutOfRange => "a number of bytes from 0 to 2^64 - 1",
            OptionErrorKind::NotAChoice => "one of its choices",
            OptionErrorKind::NotAnInteger => "an integer",
            OptionErrorKind::NotAU32 => "a number from 0 to 2^32 - 1",
        };
        write!(f, "option '{}' takes {wanted}, not '{}'", self.option, self.value)
    }
}

impl std::error::Error for OptionError {}

/// The value of the switch `option`. Errors: it is neither on nor off.
pub fn read_switch(option: &str, text: &str) -> Result<bool, OptionError> {
    parse_switch(text).ok_or_else(|| OptionError::new(option, text, OptionErrorKind::NotASwitch))
}

/// The value of `option`, a number of bytes ([`parse_size`]). Errors: it is none, or out of range.
pub fn read_size(option: &str, text: &str) -> Result<u64, OptionError> {
    parse_size(text).map_err(|error| {
        let kind = match error {
            SizeError::Range => OptionErrorKind::SizeOutOfRange,
            SizeError::Syntax => OptionErrorKind::NotASize,
        };
        OptionError::new(option, text, kind)
    })
}

/// The value of `option`, a number as C reads it: blanks, a sign, then decimal, `0` octal or `0x` hexadecimal
/// digits; negative ones wrap. Errors: it is none, or too large.
pub fn read_number(option: &str, text: &str) -> Result<u64, OptionError> {
    parse_number(text).map_err(|error| {
        let kind = match error {
            SizeError::Range => OptionErrorKind::NumberTooLarge,
            SizeError::Syntax => OptionErrorKind::NotANumber,
        };
        OptionError::new(option, text, kind)
    })
}

/// The value of an on/off switch; `None` for another word.
pub fn parse_switch(text: &str) -> Option<bool> {
    match text {
        "on" | "yes" | "true" | "y" => Some(true),
        "off" | "no" | "false" | "n" => Some(false),
        _ => None,
    }
}

fn parse_number(text: &str) -> Result<u64, SizeError> {
    let body = text.trim_start();
    let (negative, body) = match body.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, body.strip_prefix('+').unwrap_or(body)),
    };
    let (digits, radix) = match body.strip_prefix("0x").or_else(|| body.strip_prefix("0X")) {
        Some(rest) => (rest, 16),
        None if body.len() > 1 && body.starts_with('0') => (&body[1..], 8),
        None => (body, 10),
    };
    if digits.is_empty() || !digits.chars().all(|c| c.is_digit(radix)) {
        return Err(SizeError::Syntax);
    }
    let value = u64::from_str_radix(digits, radix).map_err(|_| SizeError::Range)?;
    Ok(if negative { value.wrapping_neg() } else { value })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_as_in_c() {
        for (text, number) in
            [("16", 16), ("0x10", 16), ("010", 8), (" 16", 16), ("+16", 16), ("0", 0), ("-1", u64::MAX)]
        {
            assert_eq!(parse_number(text), Ok(number), "{text}");
        }
        for text in ["", "16 ", "0x", "09", "16.0", "--1", "x"] {
            assert_eq!(parse_number(text), Err(SizeError::Syntax), "{text}");
        }
    }

    #[test]
    fn errors_say_which_option() {
        let error = read_size("offset", "1X").unwrap_err();
        assert_eq!((error.option.as_str(), error.kind), ("offset", OptionErrorKind::NotASize));
        assert_eq!(read_size("offset", "-1").unwrap_err().kind, OptionErrorKind::SizeOutOfRange);
        assert_eq!(
            read_number("n", "99999999999999999999").unwrap_err().kind,
            OptionErrorKind::NumberTooLarge
        );
        assert_eq!(
            read_switch("lazy", "ON").unwrap_err().to_string(),
            "option 'lazy' takes on or off, not 'ON'"
        );
    }
}
