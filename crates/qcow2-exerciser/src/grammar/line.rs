//! Splits a command line into words and parses options, numbers and patterns. Pure text.

use qcow2_blockdev::{SizeError, parse_size};

/// Longest request: one sector less than 2 GiB, the limit of QEMU's block layer.
pub(crate) const MAX_REQUEST: u64 = 2_147_483_136;

/// Splits a line into words at spaces; there is no quoting.
pub(crate) fn split(line: &str) -> Vec<&str> {
    line.split(' ').filter(|word| !word.is_empty()).collect()
}

/// Options and operands of one command, as `getopt` parses them: letters may be joined, a value may follow
/// its letter directly or as the next word, options may come after operands, `--` ends them.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Arguments<'a> {
    /// Each letter with its value, in order; an empty value for letters that take none.
    pub(crate) options: Vec<(char, &'a str)>,
    /// The other words, in order.
    pub(crate) operands: Vec<&'a str>,
}

impl<'a> Arguments<'a> {
    /// Parses the words after the command's name. `letters`: as for `getopt`, a colon after each letter that
    /// takes a value. Returns everything before the first error, and the text that `getopt` would print for
    /// it.
    pub(crate) fn parse(letters: &str, words: &[&'a str]) -> (Self, Option<String>) {
        let mut arguments = Self::default();
        let error = arguments.fill(letters, words).err();
        (arguments, error)
    }

    fn fill(&mut self, letters: &str, words: &[&'a str]) -> Result<(), String> {
        let mut words = words.iter().copied();
        while let Some(word) = words.next() {
            if word == "--" {
                self.operands.extend(words.by_ref());
            } else if word.len() > 1 && word.starts_with('-') {
                self.cluster(letters, &word[1..], &mut words)?;
            } else {
                self.operands.push(word);
            }
        }
        Ok(())
    }

    fn cluster(
        &mut self,
        letters: &str,
        cluster: &'a str,
        words: &mut impl Iterator<Item = &'a str>,
    ) -> Result<(), String> {
        for (at, letter) in cluster.char_indices() {
            let known = letters.find(letter).filter(|_| letter != ':');
            let place = known.ok_or_else(|| format!("invalid option -- '{letter}'"))?;
            if !letters[place + letter.len_utf8()..].starts_with(':') {
                self.options.push((letter, ""));
                continue;
            }
            let value = match &cluster[at + letter.len_utf8()..] {
                "" => words.next().ok_or_else(|| format!("option requires an argument -- '{letter}'"))?,
                rest => rest,
            };
            self.options.push((letter, value));
            break;
        }
        Ok(())
    }

    /// True if the letter was given.
    pub(crate) fn has(&self, letter: char) -> bool {
        self.options.iter().any(|(given, _)| *given == letter)
    }

    /// How many times the letter was given.
    pub(crate) fn count(&self, letter: char) -> usize {
        self.options.iter().filter(|(given, _)| *given == letter).count()
    }

    /// The value of the letter's last occurrence, which is the one that counts.
    pub(crate) fn last(&self, letter: char) -> Option<&'a str> {
        self.options.iter().rev().find(|(given, _)| *given == letter).map(|(_, value)| *value)
    }
}

/// Parses a size that fits a signed 64-bit number. Errors: the line for standard output.
pub(crate) fn number(text: &str) -> Result<u64, String> {
    match parse_size(text) {
        Ok(value) if value <= i64::MAX as u64 => Ok(value),
        Err(SizeError::Syntax) => {
            Err(format!("Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {text}"))
        }
        _ => Err(format!("Parsing error: argument too large -- {text}")),
    }
}

/// Parses the length of a request. Errors: the line for standard output.
pub(crate) fn request_len(text: &str) -> Result<u64, String> {
    match number(text)? {
        len if len <= MAX_REQUEST => Ok(len),
        _ => Err(format!("length cannot exceed {MAX_REQUEST}, given {text}")),
    }
}

/// Parses the lengths of a request with several buffers. Errors: the line for standard output.
pub(crate) fn request_lens(texts: &[&str]) -> Result<Vec<u64>, String> {
    let mut lens = Vec::new();
    let mut total = 0;
    for text in texts {
        let len = number(text)?;
        if len > MAX_REQUEST {
            return Err(format!("Argument '{text}' exceeds maximum size {MAX_REQUEST}"));
        }
        if len > MAX_REQUEST - total {
            return Err(format!("The total number of bytes exceed the maximum size {MAX_REQUEST}"));
        }
        total += len;
        lens.push(len);
    }
    Ok(lens)
}

/// Parses a pattern byte: decimal, `0x` hexadecimal or `0` octal. Errors: the line for standard output.
pub(crate) fn pattern(text: &str) -> Result<u8, String> {
    c_integer(text)
        .and_then(|value| u8::try_from(value).ok())
        .ok_or_else(|| format!("{text} is not a valid pattern byte"))
}

/// Parses all of `text` as a whole number, like C's `strtol` with base 0.
pub(crate) fn c_integer(text: &str) -> Option<i64> {
    let text = text.trim_start_matches([' ', '\t', '\n', '\r', '\u{b}', '\u{c}']);
    let (negative, digits) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    let (radix, digits) = match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(hex) => (16, hex),
        None if digits.len() > 1 && digits.starts_with('0') => (8, &digits[1..]),
        None => (10, digits),
    };
    if !digits.chars().all(|c| c.is_digit(radix)) {
        return None;
    }
    let value = i64::from_str_radix(digits, radix).ok()?;
    Some(if negative { -value } else { value })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(letters: &str, line: &str, options: &[(char, &str)], operands: &[&str]) {
        let words = split(line);
        let (arguments, error) = Arguments::parse(letters, &words);
        assert_eq!(error, None);
        assert_eq!((&arguments.options[..], &arguments.operands[..]), (options, operands), "{line}");
    }

    #[test]
    fn options_may_precede_and_follow_operands() {
        check("P:qv", "0 512", &[], &["0", "512"]);
        check("P:qv", "-q  -v 0 -P 7 512", &[('q', ""), ('v', ""), ('P', "7")], &["0", "512"]);
        check("P:qv", "-qvP7 0", &[('q', ""), ('v', ""), ('P', "7")], &["0"]);
        check("P:qv", "-Pq - -- -v --", &[('P', "q")], &["-", "-v", "--"]);
    }

    #[test]
    fn option_errors_are_those_of_getopt() {
        let error = |line| Arguments::parse("P:q", &split(line)).1.unwrap();
        assert_eq!(error("-qx 1"), "invalid option -- 'x'");
        assert_eq!(error("-1 5"), "invalid option -- '1'");
        assert_eq!(error("-q:"), "invalid option -- ':'");
        assert_eq!(error("0 -P"), "option requires an argument -- 'P'");
    }

    #[test]
    fn numbers() {
        assert_eq!(number("0x10"), Ok(16));
        assert_eq!(number("1.5k"), Ok(1536));
        assert!(number("8E").unwrap_err().starts_with("Parsing error: argument too large -- 8E"));
        assert!(number("-1").unwrap_err().starts_with("Parsing error: argument too large -- -1"));
        assert!(number("1x").unwrap_err().ends_with("unrecognized suffix -- 1x"));
        assert_eq!(request_len("2147483136"), Ok(MAX_REQUEST));
        assert_eq!(request_len("2G").unwrap_err(), "length cannot exceed 2147483136, given 2G");
        assert_eq!(request_lens(&["1k", "2k"]), Ok(vec![1024, 2048]));
        assert!(request_lens(&["1G", "2G"]).unwrap_err().starts_with("Argument '2G' exceeds"));
        assert!(request_lens(&["1G", "1G"]).unwrap_err().starts_with("The total number"));
    }

    #[test]
    fn patterns() {
        for (text, value) in [("0", 0), ("17", 17), ("0x11", 17), ("010", 8), ("255", 255), ("+1", 1)] {
            assert_eq!(pattern(text), Ok(value), "{text}");
        }
        for text in ["256", "-1", "abc", "0x", "1k", "", "09", "--1", "0x100", "+"] {
            assert_eq!(pattern(text).unwrap_err(), format!("{text} is not a valid pattern byte"));
        }
    }
}
