//! Text from images, files and servers, for people.

use qcow2_core::format::text::lone_byte;
use std::fmt::Write;

/// `text` from an image, fit for a terminal: control characters and marks of direction as `\n` or `\x1b`.
/// Other bytes that belong to no character stay.
pub fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c.is_ascii_control() => {
                let _ = write!(out, "\\x{:02x}", u32::from(c));
            }
            // What a terminal that is not set to UTF-8 takes for a control character.
            c if lone_byte(c).is_some_and(|byte| byte < 0xa0) => {
                let _ = write!(out, "\\x{:02x}", u32::from(c) & 0xff);
            }
            c if c.is_control() || is_direction_mark(c) => {
                let _ = write!(out, "\\u{{{:x}}}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out
}

/// Marks that make a terminal show text in another order than it stands.
fn is_direction_mark(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_names() {
        assert_eq!(escaped("\u{10fe9b}0m\u{10fee9}"), "\\x9b0m\u{10fee9}");
        assert_eq!(escaped("a\x1b[31m\n\u{202e}é\u{9b}"), "a\\x1b[31m\\n\\u{202e}é\\u{9b}");
    }
}
