//! Statistics as JSON and as text for Prometheus.

use crate::export::{Counter, Export, Statistics};
use serde_json::{Value, json};
use std::fmt::Write;

/// The shares of requests whose latency is told.
const SHARES: [(&str, f64); 3] = [("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999)];

/// A number of a counter.
type Number = fn(&Counter) -> u64;

fn kinds(statistics: &Statistics) -> [(&'static str, &Counter); 5] {
    [
        ("read", &statistics.reads),
        ("write", &statistics.writes),
        ("flush", &statistics.flushes),
        ("trim", &statistics.trims),
        ("zero", &statistics.zeroes),
    ]
}

/// Requests, bytes and latencies in nanoseconds, by kind.
pub(super) fn as_json(statistics: &Statistics) -> Value {
    let told = kinds(statistics).map(|(kind, counter)| {
        let latency = SHARES.map(|(name, share)| (name.to_owned(), json!(counter.latency(share))));
        let latency = Value::Object(latency.into_iter().collect());
        let (requests, bytes) = (counter.requests(), counter.bytes());
        (kind.to_owned(), json!({"requests": requests, "bytes": bytes, "latency-ns": latency}))
    });
    Value::Object(told.into_iter().collect())
}

/// The text format of Prometheus, version 0.0.4.
pub(super) fn as_text<'a>(exports: impl Iterator<Item = &'a Export> + Clone) -> String {
    let mut text = String::new();
    let metrics: [(&str, &str, Number); 2] = [
        ("qcow2_requests_total", "Requests that reached the disk.", Counter::requests),
        ("qcow2_bytes_total", "Bytes of their ranges.", Counter::bytes),
    ];
    for (name, help, value) in metrics {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} counter");
        for export in exports.clone() {
            let disk = escaped(export.name());
            for (kind, counter) in kinds(export.statistics()) {
                let _ = writeln!(text, "{name}{{disk=\"{disk}\",kind=\"{kind}\"}} {}", value(counter));
            }
        }
    }
    let name = "qcow2_latency_seconds";
    let _ = writeln!(text, "# HELP {name} How long requests took.\n# TYPE {name} summary");
    for export in exports {
        let disk = escaped(export.name());
        for (kind, counter) in kinds(export.statistics()) {
            for (_, share) in SHARES {
                let seconds = counter.latency(share) as f64 / 1e9;
                let labels = format!("disk=\"{disk}\",kind=\"{kind}\",quantile=\"{share}\"");
                let _ = writeln!(text, "{name}{{{labels}}} {seconds}");
            }
        }
    }
    text
}

/// A label's value: backslash, quote and line feed are escaped.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}
