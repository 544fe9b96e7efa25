//! What `vet` found, as JSON.

use qcow2_ops::vet::{Finding, VetReport};
use serde_json::{Value, json};

/// The report on the file called `filename`: verdict, format and lengths, and each finding with its kind, its
/// place, what was seen, what is allowed, and the name it is about.
pub fn to_json(filename: &str, report: &VetReport) -> Value {
    let finding = |finding: &Finding| {
        json!({
            "kind": finding.kind(),
            "verdict": finding.verdict().name(),
            "offset": finding.offset(),
            "seen": finding.numbers().map(|(seen, _)| seen),
            "allowed": finding.numbers().map(|(_, allowed)| allowed),
            "name": finding.named().map(|(name, _)| name),
            "name-kind": finding.named().map(|(_, kind)| kind.name()),
            "message": finding.to_string(),
        })
    };
    json!({
        "filename": filename,
        "verdict": report.verdict().name(),
        "format": report.format_name(),
        "file-length": report.file_len,
        "virtual-size": report.virtual_size,
        "findings": report.findings.iter().map(finding).collect::<Value>(),
    })
}
