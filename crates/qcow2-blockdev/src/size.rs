//! Sizes as people type them on the command line.
//!
//! Grammar: leading blanks, an optional `+`, then either `0x` and hexadecimal digits, or decimal digits with
//! an optional fraction, followed by at most one of `b k m g t p e` (either case; powers of 1024). A fraction
//! other than zero needs a suffix that scales, and is rounded to the nearest byte.

/// Why a text is not a size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SizeError {
    /// Not of the grammar.
    Syntax,
    /// Of the grammar, but negative or not below 2^64.
    Range,
}

/// Reads `text` as a number of bytes.
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    let body = text.trim_start_matches(BLANKS);
    if let Some(rest) = body.strip_prefix('-') {
        let whole_number = !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_digit());
        return Err(if whole_number { SizeError::Range } else { SizeError::Syntax });
    }
    let body = body.strip_prefix('+').unwrap_or(body);
    match body.strip_prefix("0x").or_else(|| body.strip_prefix("0X")) {
        Some(digits) => parse_hex(digits),
        None => parse_decimal(body),
    }
}

fn parse_hex(digits: &str) -> Result<u64, SizeError> {
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(SizeError::Syntax);
    }
    u64::from_str_radix(digits, 16).map_err(|_| SizeError::Range)
}

fn parse_decimal(body: &str) -> Result<u64, SizeError> {
    let number_len = body.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(body.len());
    let (number, suffix) = body.split_at(number_len);
    let shift = suffix_shift(suffix).ok_or(SizeError::Syntax)?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if fraction.contains('.') || (whole.is_empty() && fraction.is_empty()) {
        return Err(SizeError::Syntax);
    }
    let has_fraction = fraction.bytes().any(|b| b != b'0');
    if has_fraction && shift == 0 {
        return Err(SizeError::Syntax);
    }
    let scale = 1u64 << shift;
    let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| SizeError::Range)? };
    let bytes = whole.checked_mul(scale).ok_or(SizeError::Range)?;
    bytes.checked_add(if has_fraction { fraction_bytes(fraction, scale) } else { 0 }).ok_or(SizeError::Range)
}

/// `0.fraction` times `scale`, to the nearest byte. `fraction` is digits only, so it parses; at most 2^60
/// results.
fn fraction_bytes(fraction: &str, scale: u64) -> u64 {
    let value: f64 = format!("0.{fraction}").parse().unwrap_or(0.0);
    (value * scale as f64 + 0.5) as u64
}

fn suffix_shift(suffix: &str) -> Option<u32> {
    match suffix.to_ascii_lowercase().as_str() {
        "" | "b" => Some(0),
        "k" => Some(10),
        "m" => Some(20),
        "g" => Some(30),
        "t" => Some(40),
        "p" => Some(50),
        "e" => Some(60),
        _ => None,
    }
}

const BLANKS: [char; 6] = [' ', '\t', '\n', '\r', '\u{b}', '\u{c}'];

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expected: Result<u64, SizeError>) {
        assert_eq!(parse_size(text), expected, "{text:?}");
    }

    #[test]
    fn accepted_forms() {
        for (text, bytes) in [
            ("0", 0),
            ("1k", 1024),
            ("1K", 1024),
            ("1.5k", 1536),
            (".5M", 524_288),
            ("1.", 1),
            ("1.0", 1),
            ("1.0b", 1),
            ("1B", 1),
            ("+1M", 1 << 20),
            ("0x100000", 1 << 20),
            ("0X10", 16),
            ("0x1b", 27),
            (" 10", 10),
            ("\t10", 10),
            (" +1k", 1024),
            ("010", 10),
            ("0.k", 0),
            (".0", 0),
            ("1e", 1 << 60),
            ("1.e", 1 << 60),
            ("0.1k", 102),
            ("0.7k", 717),
            ("0.0000001k", 0),
            ("0.99999999999999999999k", 1024),
            ("9007199254740993.0", 9_007_199_254_740_993),
            ("8388607.99999999999T", 9_223_372_036_854_775_797),
            ("18446744073709551615", u64::MAX),
        ] {
            check(text, Ok(bytes));
        }
    }

    #[test]
    fn refused_forms() {
        for text in [
            "", "1.5", "1.5b", "0.5", "10X", "10kb", "1KiB", "1TT", "1e3", "1,000", "10 ", "1k ", "0x",
            "0xk", "0x1.8", "0x10k", "-1k", "-0.5", "+-1", "-+1", "++1", "- 1", ".", ".k", "1.5.5k", "inf",
            "nan", "0b1", "1_0", "-",
        ] {
            check(text, Err(SizeError::Syntax));
        }
        for text in [
            "-1",
            "-0",
            "18446744073709551616",
            "16e",
            "17e",
            "15.999999999999999999e",
            "99999999999999999999k",
        ] {
            check(text, Err(SizeError::Range));
        }
    }
}
