//! Limits on the length of files and functions.

use crate::finding::Finding;
use crate::lex::Kind;
use crate::source::{Source, matching};

/// Lines of a file, without its tests.
const FILE_LINES: usize = 600;
/// Lines of a function, from `fn` to its closing brace.
const FUNCTION_LINES: usize = 70;

pub(super) fn check(source: &Source<'_>, findings: &mut Vec<Finding>) {
    let lines = source.text.lines().count();
    let shipped = (1..=lines).filter(|&line| !source.is_test_line(line)).count();
    if shipped > FILE_LINES {
        let seen = format!("{shipped} lines without its tests");
        findings.push(Finding::new(
            "file-length",
            source.path,
            0,
            seen,
            format!("{FILE_LINES}: split the file"),
        ));
    }
    for (name, line, length) in functions(source) {
        if length > FUNCTION_LINES {
            let seen = format!("function {name} has {length} lines");
            let allowed = format!("{FUNCTION_LINES}: split it");
            findings.push(Finding::new("function-length", source.path, line, seen, allowed));
        }
    }
}

/// Name, first line and length of every function with a body.
fn functions<'a>(source: &Source<'a>) -> Vec<(&'a str, usize, usize)> {
    let tokens = &source.tokens;
    let mut found = Vec::new();
    for at in 0..tokens.len() {
        let Some(name) = tokens.get(at + 1).filter(|t| tokens[at].is("fn") && t.kind == Kind::Word) else {
            continue;
        };
        let mut open = at + 2;
        while open < tokens.len() && !tokens[open].is("{") && !tokens[open].is(";") {
            let group = tokens[open].is("(") || tokens[open].is("[");
            open = if group { matching(tokens, open) + 1 } else { open + 1 };
        }
        if !tokens.get(open).is_some_and(|t| t.is("{")) {
            continue;
        }
        if let Some(close) = tokens.get(matching(tokens, open)) {
            found.push((name.text, tokens[at].line, close.line - tokens[at].line + 1));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_text(text: &str, rules: &[&str]) {
        let mut findings = Vec::new();
        check(&Source::new("crates/a/src/x.rs", text), &mut findings);
        let seen: Vec<_> = findings.iter().map(|f| f.rule).collect();
        assert_eq!(seen, rules, "{findings:?}");
    }

    fn function(lines: usize) -> String {
        format!("fn f(a: [u8; 2]) -> u8\nwhere u8: Sized {{\n{}}}\n", "// x\n".repeat(lines - 3))
    }

    #[test]
    fn long_files_are_found_without_counting_tests() {
        check_text(&"// x\n".repeat(600), &[]);
        check_text(&"// x\n".repeat(700), &["file-length"]);
        check_text(
            &format!("{}#[cfg(test)]\nmod tests {{\n{}}}\n", "// x\n".repeat(600), "// x\n".repeat(300)),
            &[],
        );
    }

    #[test]
    fn long_functions_are_found() {
        check_text(&function(70), &[]);
        check_text(&function(71), &["function-length"]);
        check_text(&format!("#[cfg(test)]\nmod tests {{\n{}}}\n", function(80)), &["function-length"]);
    }

    #[test]
    fn declarations_without_a_body_are_no_functions() {
        check_text("trait A { fn f(&self) -> [u8; 3]; }\ntype F = fn(u8) -> u8;\n", &[]);
    }
}
