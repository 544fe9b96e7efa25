//! JSON as QEMU writes it in names.

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

/// `text` as QEMU writes it in JSON: in quotes, ASCII only.
pub fn json_text(text: &str) -> String {
    let mut out = String::from('"');
    for c in text.chars() {
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
    fn keys_in_the_order_of_a_dictionary() {
        let fields = |keys: &[&str]| keys.iter().map(|key| ((*key).to_owned(), "1".to_owned())).collect();
        assert_eq!(
            object(fields(&["driver", "file", "size", "offset"])),
            r#"{"offset": 1, "driver": 1, "size": 1, "file": 1}"#
        );
        assert_eq!(object(fields(&["filename", "driver"])), r#"{"driver": 1, "filename": 1}"#);
    }
}
