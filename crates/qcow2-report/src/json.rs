//! JSON as qemu-img lays it out: four spaces, one item a line, empty lists and objects on two lines, ASCII
//! only.

use qcow2_blockdev::json_text;
use serde_json::Value;
use std::fmt::Write;

/// `value`, pretty, with a newline at the end.
pub fn pretty(value: &Value) -> String {
    let mut text = String::new();
    push_value(&mut text, value, 0);
    text.push('\n');
    text
}

fn push_value(out: &mut String, value: &Value, depth: usize) {
    match value {
        Value::String(text) => out.push_str(&json_text(text)),
        Value::Array(items) => {
            push_block(out, ['[', ']'], items, depth, |out, item| push_value(out, item, depth + 1));
        }
        Value::Object(fields) => {
            push_block(out, ['{', '}'], fields, depth, |out, (key, item)| {
                out.push_str(&json_text(key));
                out.push_str(": ");
                push_value(out, item, depth + 1);
            });
        }
        scalar => {
            let _ = write!(out, "{scalar}");
        }
    }
}

fn push_block<T>(
    out: &mut String,
    [open, close]: [char; 2],
    items: impl IntoIterator<Item = T>,
    depth: usize,
    mut push: impl FnMut(&mut String, T),
) {
    out.push(open);
    for (index, item) in items.into_iter().enumerate() {
        out.push_str(if index > 0 { ",\n" } else { "\n" });
        indent(out, depth + 1);
        push(out, item);
    }
    out.push('\n');
    indent(out, depth);
    out.push(close);
}

fn indent(out: &mut String, depth: usize) {
    for _ in 0..depth {
        out.push_str("    ");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn layout() {
        let value = json!({"b": [], "a": {"x": 1, "y": [true, "z"]}, "e": {}});
        let lines = [
            "{",
            "    \"b\": [",
            "    ],",
            "    \"a\": {",
            "        \"x\": 1,",
            "        \"y\": [",
            "            true,",
            "            \"z\"",
            "        ]",
            "    },",
            "    \"e\": {",
            "    }",
            "}",
            "",
        ];
        assert_eq!(pretty(&value), lines.join("\n"));
    }

    #[test]
    fn strings_are_ascii() {
        let text = pretty(&json!("s\"\n1é\u{1b}\\\u{7f}😀\t"));
        assert_eq!(text, concat!(r#""s\"\n1\u00E9\u001B\\\u007F\uD83D\uDE00\t""#, "\n"));
    }
}
