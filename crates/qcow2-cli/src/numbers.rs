//! Numbers that arguments of options give, each within its range.

use crate::failure::Failure;
use qcow2_blockdev::{SizeError, parse_size};
use std::ops::RangeInclusive;

/// Reads the argument of an option as a number within `range`; `what` names it in the error ("image size").
pub(crate) fn parse_argument(what: &str, text: &str, range: RangeInclusive<u64>) -> Result<u64, Failure> {
    match parse_size(text) {
        Ok(value) if range.contains(&value) => Ok(value),
        Err(SizeError::Syntax) => Err(Failure::new(format!("Invalid {what} specified: '{text}'."))),
        _ => Err(Failure::new(format!(
            "Invalid {what} specified. Must be between {} and {}.",
            range.start(),
            range.end()
        ))),
    }
}

/// Reads the argument of an option as a number within `range` that counts something, and so has no suffix.
pub(crate) fn parse_count(what: &str, text: &str, range: RangeInclusive<u64>) -> Result<u64, Failure> {
    let syntax = || Failure::new(format!("Invalid {what} specified: '{text}'."));
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
        Failure::new(format!("Invalid {what} specified. Must be between {start} and {end}."))
    })
}

/// All that a signed 64-bit number can say: the range of most size arguments.
pub(crate) const SIGNED: RangeInclusive<u64> = 0..=i64::MAX as u64;

const BLANKS: [char; 6] = [' ', '\t', '\n', '\r', '\u{b}', '\u{c}'];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn argument_errors_name_the_argument() {
        let text = |result: Result<u64, Failure>| result.unwrap_err().to_string();
        assert_eq!(text(parse_argument("image size", "1X", SIGNED)), "Invalid image size specified: '1X'.");
        assert_eq!(
            text(parse_argument("number of coroutines", "17", 1..=16)),
            "Invalid number of coroutines specified. Must be between 1 and 16."
        );
        assert_eq!(parse_argument("rate limit", "8191P", SIGNED).unwrap(), 8191 << 50);
        assert!(parse_argument("rate limit", "8192P", SIGNED).is_err());
    }
}
