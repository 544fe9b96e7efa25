//! Names as text without loss.
//!
//! A name, in an image or of a file, is a row of bytes that mostly, but not always, is UTF-8. As a `String`
//! it is the same text, where each byte that belongs to no character stands as one of the characters U+10FE80
//! to U+10FEFF, which are for private use. Where one of these occurs in a name itself, its four bytes stand
//! so.

use alloc::borrow::{Cow, ToOwned};
use alloc::string::String;
use alloc::vec::Vec;

/// The text of a name. Never fails, and [`bytes_of`] gives the same bytes back.
///
/// ```
/// use qcow2_format::text::{bytes_of, text_of};
///
/// assert_eq!(text_of("café".as_bytes()), "café");
/// assert_eq!(text_of(b"caf\xe9"), "caf\u{10fee9}");
/// assert_eq!(*bytes_of("caf\u{10fee9}"), *b"caf\xe9");
/// ```
pub fn text_of(bytes: &[u8]) -> String {
    if let Ok(text) = core::str::from_utf8(bytes)
        && !text.chars().any(|c| lone_byte(c).is_some())
    {
        return text.to_owned();
    }
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match lone_byte(c) {
                None => text.push(c),
                Some(_) => text.extend(c.encode_utf8(&mut [0; 4]).bytes().map(mark)),
            }
        }
        text.extend(chunk.invalid().iter().copied().map(mark));
    }
    text
}

/// The bytes of the name that is `text`.
pub fn bytes_of(text: &str) -> Cow<'_, [u8]> {
    if !text.chars().any(|c| lone_byte(c).is_some()) {
        return Cow::Borrowed(text.as_bytes());
    }
    let mut bytes = Vec::with_capacity(text.len());
    for c in text.chars() {
        match lone_byte(c) {
            None => bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
            Some(byte) => bytes.push(byte),
        }
    }
    Cow::Owned(bytes)
}

/// The byte that `c` stands for, if it stands for one that belongs to no character.
pub fn lone_byte(c: char) -> Option<u8> {
    let byte = u32::from(c).checked_sub(MARKS)?;
    u8::try_from(byte).ok().filter(|byte| *byte >= 0x80)
}

/// The character that stands for `byte`, from 0x80 on.
fn mark(byte: u8) -> char {
    char::from_u32(MARKS + u32::from(byte)).unwrap_or(char::REPLACEMENT_CHARACTER)
}

const MARKS: u32 = 0x10_fe00;

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(bytes: &[u8], text: &str) {
        assert_eq!(text_of(bytes), text);
        assert_eq!(*bytes_of(text), *bytes);
    }

    #[test]
    fn every_name_comes_back() {
        check(b"", "");
        check("a\u{e9}\u{1f600}\0".as_bytes(), "a\u{e9}\u{1f600}\0");
        check(b"caf\xe9", "caf\u{10fee9}");
        check(b"\xe9\xff\x80", "\u{10fee9}\u{10feff}\u{10fe80}");
        // Cut off, too long, half of a pair.
        check(b"\xe2\x82x\xc0\x80", "\u{10fee2}\u{10fe82}x\u{10fec0}\u{10fe80}");
        check(b"\xed\xa0\x80", "\u{10feed}\u{10fea0}\u{10fe80}");
        // A mark in the name is not taken for what it would stand for; its neighbours are plain.
        check("\u{10fee9}".as_bytes(), "\u{10fef4}\u{10fe8f}\u{10febb}\u{10fea9}");
        check("\u{10fe7f}\u{10ff00}".as_bytes(), "\u{10fe7f}\u{10ff00}");
    }

    #[test]
    fn any_two_bytes_come_back() {
        for first in 0..=255 {
            for second in 0..=255 {
                let bytes = [first, second];
                assert_eq!(*bytes_of(&text_of(&bytes)), bytes);
            }
        }
    }
}
