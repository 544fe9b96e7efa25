//! Numbers and names for people.

pub use qcow2_blockdev::escaped;
use serde_json::Value;
use std::fmt::Write;

/// `bytes` with three significant digits and a unit: `1.43 MiB`. A unit starts at 1000 of the smaller one.
pub fn size(bytes: u64) -> String {
    let mut unit = 0;
    while unit + 1 < UNITS.len() && bytes as f64 >= 1000.0 * scale(unit) {
        unit += 1;
    }
    format!("{} {}", three_digits(bytes as f64 / scale(unit)), UNITS[unit])
}

/// A tree as indented lines: `key: value`, `key:` above what is inside, `[0]:` for items; dashes of keys as
/// spaces.
pub fn tree(value: &Value, depth: usize) -> String {
    let mut out = String::new();
    push_tree(&mut out, value, depth);
    out
}

fn push_tree(out: &mut String, value: &Value, depth: usize) {
    match value {
        Value::Object(fields) => {
            for (key, item) in fields {
                push_item(out, &key.replace('-', " "), item, depth);
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                push_item(out, &format!("[{index}]"), item, depth);
            }
        }
        _ => {}
    }
}

fn push_item(out: &mut String, name: &str, item: &Value, depth: usize) {
    let indent = "    ".repeat(depth);
    match item {
        Value::Object(_) | Value::Array(_) => {
            let _ = writeln!(out, "{indent}{name}:");
            push_tree(out, item, depth + 1);
        }
        Value::String(text) => {
            let _ = writeln!(out, "{indent}{name}: {}", escaped(text));
        }
        scalar => {
            let _ = writeln!(out, "{indent}{name}: {scalar}");
        }
    }
}

/// `value` (not negative, below 1024) as C's `%0.3g` prints it.
fn three_digits(value: f64) -> String {
    let text = format!("{value:.2e}");
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    match exponent.parse::<i32>() {
        Ok(exponent @ -4..=2) => {
            let places = usize::try_from(2 - exponent).unwrap_or(0);
            without_zeroes(&format!("{value:.places$}")).to_owned()
        }
        Ok(exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{}e{sign}{:02}", without_zeroes(mantissa), exponent.abs())
        }
        Err(_) => text,
    }
}

fn without_zeroes(number: &str) -> &str {
    match number.contains('.') {
        true => number.trim_end_matches('0').trim_end_matches('.'),
        false => number,
    }
}

fn scale(unit: usize) -> f64 {
    1024f64.powi(i32::try_from(unit).unwrap_or(0))
}

const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Sizes as qemu-img 10.0.2 shows them.
    #[test]
    fn sizes() {
        for (bytes, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (10752, "10.5 KiB"),
            (100_352, "98 KiB"),
            (1_022_976, "999 KiB"),
            (1_023_488, "1e+03 KiB"),
            (1_024_000, "0.977 MiB"),
            (1_047_552, "0.999 MiB"),
            (1_048_576, "1 MiB"),
            (1_049_088, "1 MiB"),
            (1_500_160, "1.43 MiB"),
            (15_000_064, "14.3 MiB"),
            (150_000_128, "143 MiB"),
            (1_023_410_176, "976 MiB"),
            (1_048_575_488, "1e+03 MiB"),
            (1 << 30, "1 GiB"),
            (999_653_638_144, "931 GiB"),
            (1_024_000_000_000, "954 GiB"),
            (1 << 60, "1 EiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(size(bytes), text, "{bytes}");
        }
    }

    #[test]
    fn trees() {
        let bitmaps = json!([{"flags": ["auto"], "name": "b"}, {"flags": []}]);
        let value = json!({"refcount-bits": 16, "bitmaps": bitmaps, "x": "y\n"});
        let lines = [
            "    refcount bits: 16",
            "    bitmaps:",
            "        [0]:",
            "            flags:",
            "                [0]: auto",
            "            name: b",
            "        [1]:",
            "            flags:",
            "    x: y\\n",
            "",
        ];
        assert_eq!(tree(&value, 1), lines.join("\n"));
    }
}
