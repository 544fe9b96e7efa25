//! Numbers that arguments of options give, each within its range.

use crate::{SizeError, parse_size};
use std::ops::RangeInclusive;

/// Reads the argument of an option as a number within `range`; `what` names it in the error ("image size").
/// Errors: the text for the user.
pub fn size_argument(what: &str, text: &str, range: RangeInclusive<u64>) -> Result<u64, String> {
    match parse_size(text) {
        Ok(value) if range.contains(&value) => Ok(value),
        Err(SizeError::Syntax) => Err(format!("Invalid {what} specified: '{text}'.")),
        _ => Err(format!("Invalid {what} specified. Must be between {} and {}.", range.start(), range.end())),
    }
}

/// Reads the argument of an option as a number within `range` that counts something, and so has no
/// suffix. Errors: as [`size_argument`].
pub fn count_argument(what: &str, text: &str, range: RangeInclusive<u64>) -> Result<u64, String> {
    let syntax = || format!("Invalid {what} specified: '{text}'.");
    let body = text.trim_start_matches(BLANKS);
    let digits = body.strip_prefix(['-', '+']).unwrap_or(body);
    let (digits, radix) = match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(digits) => (digits, 16),
        None if digits.len() > 1 && digits.starts_with('0') => (digits, 8),
        None => (digits, 10),
    };
    if digits.is_empty() || !digits.chars().all(|digit| digit.is_digit(radix)) {
        return Err(syntax());
    }
    let value = u64::from_str_radix(digits, radix).ok();
    let value = value.filter(|&value| range.contains(&value) && (value == 0 || !body.starts_with('-')));
    value.ok_or_else(|| {
        let (start, end) = (range.start(), range.end());
        format!("Invalid {what} specified. Must be between {start} and {end}.")
    })
}

const BLANKS: [char; 6] = [' ', '\t', '\n', '\r', '\u{b}', '\u{c}'];
