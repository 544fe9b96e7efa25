//! Text rules for every file, whatever its language.

use crate::finding::Finding;
use crate::tree::File;

/// Paths that exist on one machine only. Split into pieces, so that this file passes the check.
const MACHINE_PATHS: &[&str] =
    &[concat!("/ro", "ot/"), concat!("/ho", "me/"), concat!("/wo", "rk/"), concat!("/Use", "rs/")];

pub(super) fn check(file: &File, findings: &mut Vec<Finding>) {
    let mut found = |rule, line, seen: &str, allowed: &str| {
        findings.push(Finding::new(rule, file.path.as_str(), line, seen, allowed));
    };
    for (number, line) in file.text.split('\n').enumerate().map(|(at, line)| (at + 1, line)) {
        // Recorded output of other programs may end with white space.
        if line.ends_with([' ', '\t']) && !file.path.ends_with(".txt") {
            found("trailing-space", number, "white space at the end of the line", "none");
        }
        if line.contains('\r') {
            found("line-end", number, "a carriage return", "plain line feeds");
        }
        if file.path.ends_with(".rs") && line.contains('\t') {
            found("tab", number, "a tab", "spaces, or \\t");
        }
        for path in MACHINE_PATHS.iter().filter(|path| line.contains(**path)) {
            found("machine-path", number, &format!("the path {path}..."), "relative paths");
        }
        if ["<<<<<<< ", ">>>>>>> "].iter().any(|mark| line.starts_with(mark)) {
            found("conflict", number, "a conflict marker", "none");
        }
    }
    if !file.text.is_empty() && !file.text.ends_with('\n') {
        found("last-line", file.text.lines().count(), "no line feed at the end", "one");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_text(text: &str, rules: &[&str]) {
        let mut findings = Vec::new();
        check(&File { path: "a.rs".to_owned(), text: text.to_owned() }, &mut findings);
        let seen: Vec<_> = findings.iter().map(|f| f.rule).collect();
        assert_eq!(seen, rules, "{text:?}");
    }

    #[test]
    fn stray_white_space_and_machine_paths_are_found() {
        check_text("fine\n", &[]);
        check_text("a \n", &["trailing-space"]);
        check_text("a\tb\n", &["tab"]);
        check_text("a\r\nb\n", &["line-end"]);
        check_text("a\rb\n", &["line-end"]);
        check_text("a", &["last-line"]);
        check_text(concat!("x = /ho", "me/someone/x\n"), &["machine-path"]);
        check_text("<<<<<<< ours\n", &["conflict"]);
    }
}
