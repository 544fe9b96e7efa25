//! JSON as QEMU writes it in names.

use qcow2_core::format::text::bytes_of;
use std::fmt::Write;

/// Writes an object on one line. The keys come in the order in which QEMU's dictionaries have them, which is
/// that of a hash: scripts compare such names as text.
pub(crate) fn object(mut fields: Vec<(String, String)>) -> String {
    // Of two keys in one place the later one comes first.
    fields.reverse();
    fields.sort_by_key(|(key, _)| bucket(key));
    let mut out = String::from("{");
    for (index, (key, value)) in fields.iter().enumerate() {
        let comma = if index > 0 { ", " } else { "" };
        let _ = write!(out, "{comma}{}: {value}", json_text(key));
    }
    out.push('}');
    out
}

/// `text` as QEMU writes it in JSON: in quotes, ASCII only. Bytes of a name that belong to no character
/// become U+FFFD, one for each row of bytes that begins like a character.
pub fn json_text(text: &str) -> String {
    let (bytes, mut out) = (bytes_of(text), String::from('"'));
    let mut rest = &*bytes;
    while let Some((c, after)) = next_character(rest) {
        rest = after;
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            ' '..='~' => out.push(c),
            _ => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(out, "\\u{unit:04X}");
                }
            }
        }
    }
    out.push('"');
    out
}

/// The character at the beginning of `bytes`, and what follows it. QEMU's UTF-8 has rows of up to six bytes,
/// of which those with more than four are none, and two bytes for U+0000.
fn next_character(bytes: &[u8]) -> Option<(char, &[u8])> {
    let (&first, rest) = bytes.split_first()?;
    let wanted = match first.leading_ones() as usize {
        0 => return Some((char::from(first), rest)),
        ones @ 2..=6 => ones - 1,
        _ => return Some((char::REPLACEMENT_CHARACTER, rest)),
    };
    let more = rest.iter().take(wanted).take_while(|byte| **byte & 0xc0 == 0x80).count();
    let (row, after) = bytes.split_at(1 + more);
    let is_character = |c: &char| {
        let code = u32::from(*c);
        code & 0xfffe != 0xfffe && !(0xfdd0..0xfdf0).contains(&code)
    };
    let c = match row {
        [0xc0, 0x80] => Some('\0'),
        row => std::str::from_utf8(row).ok().and_then(|text| text.chars().next()).filter(is_character),
    };
    Some((c.unwrap_or(char::REPLACEMENT_CHARACTER), after))
}

/// Where QEMU's dictionary puts `key`: the hash of the database library that it comes from, modulo 512.
fn bucket(key: &str) -> u32 {
    let start = 0x238f_13af_u32.wrapping_mul(key.len() as u32);
    let sum = key
        .bytes()
        .enumerate()
        .fold(start, |sum, (index, byte)| sum.wrapping_add(u32::from(byte) << (index * 5 % 24)));
    1_103_515_243_u32.wrapping_mul(sum).wrapping_add(12345) % 512
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_are_no_characters() {
        let cases: [(&[u8], &str); 12] = [
            (b"a\xe9b", "a\\uFFFDb"),
            (b"\xe9\xe9", "\\uFFFD\\uFFFD"),
            (b"\xc3\xa9", "\\u00E9"),
            (b"\xf4\x8f\xba\x80", "\\uDBFF\\uDE80"),
            (b"\xed\xa0\x80", "\\uFFFD"),
            (b"\xc0\x80", "\\u0000"),
            (b"\xf0\x90\x80", "\\uFFFD"),
            (b"\xf8\x80", "\\uFFFD"),
            (b"\xfe\xff", "\\uFFFD\\uFFFD"),
            (b"\xe2\x82x", "\\uFFFDx"),
            (b"\xf4\x90\x80\x80", "\\uFFFD"),
            (b"\xef\xb7\x90\xe0\x80\x80z", "\\uFFFD\\uFFFDz"),
        ];
        for (bytes, text) in cases {
            assert_eq!(json_text(&qcow2_core::format::text::text_of(bytes)), format!("\"{text}\""));
        }
    }

    #[test]
    fn keys_in_the_order_of_a_dictionary() {
        let fields = |keys: &[&str]| keys.iter().map(|key| ((*key).to_owned(), "1".to_owned())).collect();
        assert_eq!(
            object(fields(&["driver", "file", "size", "offset"])),
            r#"{"offset": 1, "driver": 1, "size": 1, "file": 1}"#
        );
        assert_eq!(object(fields(&["filename", "driver"])), r#"{"driver": 1, "filename": 1}"#);
    }
}
