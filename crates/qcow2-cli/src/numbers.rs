//! Numbers that arguments of options give, each within its range.

use crate::failure::Failure;
use qcow2_blockdev::{count_argument, size_argument};
use std::ops::RangeInclusive;

/// Reads the argument of an option as a number within `range`; `what` names it in the error ("image size").
pub(crate) fn parse_argument(what: &str, text: &str, range: RangeInclusive<u64>) -> Result<u64, Failure> {
    size_argument(what, text, range).map_err(Failure::new)
}

/// Reads the argument of an option as a number within `range` that counts something, and so has no suffix.
pub(crate) fn parse_count(what: &str, text: &str, range: RangeInclusive<u64>) -> Result<u64, Failure> {
    count_argument(what, text, range).map_err(Failure::new)
}

/// All that a signed 64-bit number can say: the range of most size arguments.
pub(crate) const SIGNED: RangeInclusive<u64> = 0..=i64::MAX as u64;

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
