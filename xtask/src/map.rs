//! Checks that the root pages are true: paths, links and names in ARCHITECTURE.md and its neighbours exist.

use crate::finding::Finding;
use crate::lex::{Kind, lex};
use std::fs;
use std::path::Path;

/// The pages whose paths and links are checked.
const PAGES: &[&str] = &["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"];
/// The pages that must mention every crate.
const CRATE_PAGES: &[&str] = &["README.md", "ARCHITECTURE.md"];
/// Keywords that define the name after them.
const DEFINERS: &[&str] = &["fn", "struct", "enum", "trait", "mod", "const", "static", "type", "union"];

/// Checks the pages under `root`.
pub(crate) fn check(root: &Path) -> Result<Vec<Finding>, String> {
    let crates = crate_names(root)?;
    let mut findings = Vec::new();
    for page in PAGES {
        let Ok(text) = fs::read_to_string(root.join(page)) else {
            findings.push(Finding::new("page", *page, 0, "no such page", "the page exists"));
            continue;
        };
        check_page(root, page, &text, &mut findings);
        if CRATE_PAGES.contains(page) {
            for name in crates.iter().filter(|name| !text.contains(name.as_str())) {
                let seen = format!("the crate {name} is not mentioned");
                findings.push(Finding::new("page", *page, 0, seen, "every crate is mentioned"));
            }
        }
    }
    Ok(findings)
}

fn crate_names(root: &Path) -> Result<Vec<String>, String> {
    let folder = root.join("crates");
    let entries = fs::read_dir(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let mut names: Vec<_> = entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    Ok(names)
}

fn check_page(root: &Path, page: &str, text: &str, findings: &mut Vec<Finding>) {
    let mut fenced = false;
    for (number, line) in text.lines().enumerate().map(|(at, line)| (at + 1, line)) {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        } else if !fenced {
            let mut found = |seen: String, allowed: &str| {
                findings.push(Finding::new("page", page, number, seen, allowed));
            };
            for link in links(line).filter(|link| !root.join(link).exists()) {
                found(format!("a link to {link}, which does not exist"), "links to files of this repository");
            }
            check_places(root, line, &mut found);
        }
    }
}

/// A code span that looks like a path must name a file; the code spans after it in the same cell must be
/// defined in that file.
fn check_places(root: &Path, line: &str, found: &mut impl FnMut(String, &str)) {
    for cell in line.split('|') {
        let mut file: Option<(&str, String)> = None;
        for span in cell.split('`').skip(1).step_by(2) {
            if is_path(span) {
                let path = root.join(span);
                if !path.exists() {
                    found(format!("`{span}` does not exist"), "paths of files in this repository");
                }
                file = fs::read_to_string(path).ok().map(|text| (span, text));
            } else if let Some((path, text)) =
                file.as_ref().filter(|_| is_symbol(span) && line.starts_with('|'))
            {
                let name = span.rsplit("::").next().unwrap_or(span);
                if path.ends_with(".rs") && !defines(text, name) {
                    found(format!("`{span}` is not defined in `{path}`"), "what the file defines");
                }
            }
        }
    }
}

fn is_path(span: &str) -> bool {
    span.contains('/')
        && span.chars().all(|c| c.is_ascii_alphanumeric() || "/._-".contains(c))
        && !span.starts_with('/')
}

fn is_symbol(span: &str) -> bool {
    !span.is_empty() && span.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == ':')
}

fn defines(text: &str, name: &str) -> bool {
    let tokens = lex(text);
    tokens.windows(2).any(|pair| {
        DEFINERS.iter().any(|word| pair[0].is(word)) && pair[1].kind == Kind::Word && pair[1].text == name
    })
}

/// The targets of file links, without fragments.
fn links(line: &str) -> impl Iterator<Item = &str> {
    let targets = line.split("](").skip(1).filter_map(|tail| tail.split(')').next());
    targets.filter(|t| !t.contains("://")).map(|t| t.split('#').next().unwrap_or(t)).filter(|t| !t.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_text(text: &str, count: usize) {
        let mut findings = Vec::new();
        check_page(&crate::tree::root(), "ARCHITECTURE.md", text, &mut findings);
        assert_eq!(findings.len(), count, "{text:?}: {findings:?}");
    }

    #[test]
    fn missing_paths_are_found() {
        check_text("see `xtask/src/map.rs`", 0);
        check_text("see `xtask/src/gone.rs`", 1);
        check_text("```\n`xtask/src/gone.rs`\n```", 0);
        check_text("run `a/b --c` for 4/5 of `/dev/null`", 0);
    }

    #[test]
    fn names_missing_from_their_file_are_found() {
        check_text("| pages | `xtask/src/map.rs` `check_page` |", 0);
        check_text("| pages | `xtask/src/map.rs` `check_pages` |", 1);
        check_text("| pages | `xtask/src/finding.rs` `Finding::new` | `xtask/src/map.rs` `PAGES` |", 0);
    }

    #[test]
    fn broken_links_are_found() {
        check_text("[a](xtask/src/map.rs) [b](https://example.org/x) [c](#here)", 0);
        check_text("[a](gone.md#part)", 1);
    }
}
