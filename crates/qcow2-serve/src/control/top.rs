//! Statistics as a table for people.

use serde_json::Value;
use std::fmt::Write;

/// What clients did in the `seconds` between two answers to `statistics`; without one before, since the start
/// of the server and without rates.
pub fn top(before: Option<&Value>, now: &Value, seconds: f64) -> String {
    let mut text = String::from(
        "disk             kind    requests      /s         bytes      MB/s        p50        p99      p99.9\n",
    );
    for (disk, kinds) in now.as_object().into_iter().flatten() {
        for (kind, numbers) in kinds.as_object().into_iter().flatten() {
            let earlier = before.and_then(|before| before.get(disk)?.get(kind));
            line(&mut text, (disk, kind), numbers, earlier, seconds);
        }
    }
    text
}

fn line(text: &mut String, (disk, kind): (&str, &str), now: &Value, before: Option<&Value>, seconds: f64) {
    let number = |of: &Value, name| of.get(name).and_then(Value::as_u64).unwrap_or(0);
    let (requests, bytes) = (number(now, "requests"), number(now, "bytes"));
    let rate = |name, now: u64| match before {
        Some(before) if seconds > 0.0 => now.saturating_sub(number(before, name)) as f64 / seconds,
        _ => 0.0,
    };
    let told = now.get("latency-ns").unwrap_or(&Value::Null);
    let [p50, p99, p999] = ["p50", "p99", "p99.9"].map(|share| short(number(told, share)));
    let latencies = format!("{p50:>10} {p99:>10} {p999:>10}");
    let (per_second, megabytes) = (rate("requests", requests), rate("bytes", bytes) / 1e6);
    // Writing to a string cannot fail.
    let _ = writeln!(
        text,
        "{disk:<16} {kind:<6} {requests:>9} {per_second:>7.0} {bytes:>13} {megabytes:>9.1} {latencies}"
    );
}

/// A time in three digits and its unit.
fn short(nanoseconds: u64) -> String {
    match nanoseconds {
        0..1_000 => format!("{nanoseconds} ns"),
        1_000..1_000_000 => format!("{:.3} us", nanoseconds as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.3} ms", nanoseconds as f64 / 1e6),
        _ => format!("{:.3} s", nanoseconds as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn rates_are_the_difference_of_two_answers() {
        let answer = |requests: u64| {
            let latency = json!({"p50": 1500, "p99": 2_000_000, "p99.9": 3_000_000_000_u64});
            json!({"d": {"read": {"requests": requests, "bytes": requests * 4096, "latency-ns": latency}}})
        };
        let (first, second) = (answer(100), answer(300));
        let line = |text: &str| text.lines().nth(1).unwrap().split_whitespace().map(str::to_owned).collect();
        let words: Vec<String> = line(&top(Some(&first), &second, 2.0));
        assert_eq!(
            words,
            ["d", "read", "300", "100", "1228800", "0.4", "1.500", "us", "2.000", "ms", "3.000", "s"]
        );
        let words: Vec<String> = line(&top(None, &first, 0.0));
        assert_eq!(words[2..4], ["100", "0"]);
        assert_eq!(top(None, &Value::Null, 1.0).lines().count(), 1);
    }
}
