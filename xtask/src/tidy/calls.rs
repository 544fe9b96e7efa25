//! Calls and attributes that must not ship.

use crate::finding::Finding;
use crate::source::{Source, matching};

/// Macros for unfinished work: forbidden everywhere, tests included.
const UNFINISHED: &[&str] = &["todo", "unimplemented", "dbg"];
/// Macros that print to the terminal.
const PRINTS: &[&str] = &["print", "println", "eprint", "eprintln"];
/// Where printing is allowed; tests may print too.
const PRINTERS: &[&str] = &["crates/qcow2-cli/", "xtask/", "crates/qcow2-testkit/src/oracle.rs"];
/// Examples print and stop on errors, but must not unwrap.
const EXAMPLES: &str = "/examples/";

pub(super) fn check(source: &Source<'_>, findings: &mut Vec<Finding>) {
    let may_print = PRINTERS.iter().any(|p| source.path.starts_with(p)) || source.path.contains(EXAMPLES);
    let mut found = |rule, line, seen: String, allowed: &str| {
        findings.push(Finding::new(rule, source.path, line, seen, allowed));
    };
    for (at, token) in source.tokens.iter().enumerate() {
        let shipped = !source.is_test_line(token.line);
        let is_macro = |names: &[&str]| names.contains(&token.text) && source.matches(at + 1, &["!"]);
        if is_macro(UNFINISHED) {
            found("unfinished", token.line, format!("{}!", token.text), "finished work");
        } else if shipped && !may_print && is_macro(PRINTS) {
            found(
                "print",
                token.line,
                format!("{}!", token.text),
                "printing in the CLI, xtask, tests and examples",
            );
        } else if shipped && token.is(".") && is_unwrap(source, at + 1) {
            let allowed = "an error, or expect with the reason why it cannot fail";
            found("unwrap", token.line, "unwrap outside tests".to_owned(), allowed);
        } else if token.is("#") && source.matches(at + 1, &["[", "ignore"]) {
            found("ignore", token.line, "an ignored test".to_owned(), "a test that runs, or a printed skip");
        } else if token.is("#") && !source.path.contains(EXAMPLES) && is_silent_allow(source, at + 1) {
            found("allow", token.line, "a lint is disabled without a reason".to_owned(), "reason = \"...\"");
        }
    }
}

fn is_unwrap(source: &Source<'_>, at: usize) -> bool {
    ["unwrap", "unwrap_err"].iter().any(|name| source.matches(at, &[name, "(", ")"]))
}

/// True for `allow` and `expect` attributes without a reason, outside tests.
fn is_silent_allow(source: &Source<'_>, at: usize) -> bool {
    let open = at + usize::from(source.matches(at, &["!"]));
    if !["allow", "expect"].iter().any(|word| source.matches(open, &["[", word])) {
        return false;
    }
    let close = matching(&source.tokens, open).min(source.tokens.len());
    !source.is_test_line(source.tokens[open].line)
        && !source.tokens[open..close].iter().any(|t| t.is("reason"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_text(path: &str, text: &str, rules: &[&str]) {
        let mut findings = Vec::new();
        check(&Source::new(path, text), &mut findings);
        let seen: Vec<_> = findings.iter().map(|f| f.rule).collect();
        assert_eq!(seen, rules, "{path}: {text:?}");
    }

    #[test]
    fn unfinished_work_is_found_everywhere() {
        check_text("crates/a/src/x.rs", concat!("fn f() { to", "do!() }"), &["unfinished"]);
        check_text("tests/tests/x.rs", concat!("fn f() { d", "bg!(1); }"), &["unfinished"]);
        check_text("crates/a/src/x.rs", "// todo!()\nfn todo() {}", &[]);
    }

    #[test]
    fn unwrap_is_allowed_in_tests_only() {
        check_text("crates/a/src/x.rs", "fn f() { g().unwrap(); }", &["unwrap"]);
        check_text("crates/a/src/x.rs", "fn f() { g().unwrap_or(1); }", &[]);
        check_text("crates/a/src/x.rs", "#[cfg(test)]\nmod t { fn f() { g().unwrap(); } }", &[]);
        check_text("crates/a/examples/x.rs", "fn f() { g().unwrap(); }", &["unwrap"]);
    }

    #[test]
    fn printing_is_allowed_in_programs_only() {
        check_text("crates/qcow2-core/src/x.rs", "fn f() { println!(); }", &["print"]);
        check_text("crates/qcow2-cli/src/x.rs", "fn f() { eprintln!(); }", &[]);
        check_text("crates/qcow2-core/examples/x.rs", "fn f() { println!(); }", &[]);
    }

    #[test]
    fn disabled_lints_need_a_reason() {
        check_text("crates/a/src/x.rs", "#[allow(dead_code)]\nfn f() {}", &["allow"]);
        check_text("crates/a/src/x.rs", "#![allow(dead_code)]\nfn f() {}", &["allow"]);
        check_text("crates/a/src/x.rs", "#[expect(dead_code, reason = \"x\")]\nfn f() {}", &[]);
        check_text("crates/a/src/x.rs", "#[cfg(test)]\nmod t {\n#[ignore]\nfn f() {}\n}", &["ignore"]);
    }
}
