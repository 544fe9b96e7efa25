//! House rules that a program can check: lengths, banned calls, stray text.

mod calls;
mod exempt;
mod lengths;
mod text;

use crate::finding::Finding;
use crate::source::Source;
use crate::tree::File;

use exempt::apply as exempt;

/// Checks every file. Findings that the exemption list covers are dropped; stale exemptions are findings.
pub(crate) fn check(files: &[File]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for file in files {
        if file.path.ends_with(".rs") {
            let source = Source::new(&file.path, &file.text);
            lengths::check(&source, &mut findings);
            calls::check(&source, &mut findings);
        }
        text::check(file, &mut findings);
    }
    exempt(findings, exempt::EXEMPT, exempt::LIST)
}
