//! The engine handles values, not bytes: number encoding, and which bits of an offset select a cluster,
//! belong to the format crate.

use crate::finding::Finding;
use crate::lex::{Kind, Token};
use crate::source::Source;

/// The crate the rule applies to.
const ENGINE: &str = "crates/qcow2-core/src/";
/// Methods that convert between numbers and the format's bytes.
const CONVERSIONS: &[&str] = &["to_be_bytes", "from_be_bytes"];

/// Checks one file.
pub(super) fn check(source: &Source<'_>, findings: &mut Vec<Finding>) {
    if !source.path.starts_with(ENGINE) {
        return;
    }
    for (at, token) in source.shipped() {
        if CONVERSIONS.contains(&token.text) {
            let seen = format!("{} in the engine", token.text);
            findings.push(Finding::new("bytes", source.path, token.line, seen, "bytes in qcow2-format only"));
        } else if token.is("cluster_bits") && is_shift(&source.tokens, at) {
            let allowed = "methods of Geometry";
            let seen = "a shift by cluster bits";
            findings.push(Finding::new("cluster-shift", source.path, token.line, seen, allowed));
        }
    }
}

/// True if the expression that ends with the word at `end` is a shift amount.
fn is_shift(tokens: &[Token<'_>], end: usize) -> bool {
    let mut at = end;
    while let Some(before) = at.checked_sub(1) {
        let token = &tokens[before];
        let part = token.kind == Kind::Word || [".", ":", "(", "&", "*"].iter().any(|mark| token.is(mark));
        if token.is(")") {
            at = opening(tokens, before);
        } else if part && !["return", "in", "if", "match", "let"].contains(&token.text) {
            at = before;
        } else {
            break;
        }
    }
    let at = if at > 0 && tokens[at - 1].is("=") { at - 1 } else { at };
    at > 1 && ["<", ">"].iter().any(|mark| tokens[at - 1].is(mark) && tokens[at - 2].is(mark))
}

/// The index of the parenthesis that matches the one at `close`, or 0.
fn opening(tokens: &[Token<'_>], close: usize) -> usize {
    let mut depth = 0usize;
    for at in (0..=close).rev() {
        if tokens[at].is(")") {
            depth += 1;
        } else if tokens[at].is("(") {
            depth -= 1;
            if depth == 0 {
                return at;
            }
        }
    }
    0
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

    fn check_core(text: &str, rules: &[&str]) {
        check_text("crates/qcow2-core/src/a.rs", text, rules);
    }

    #[test]
    fn byte_conversions_are_for_the_format_crate() {
        check_core("fn f() { x.to_be_bytes() }", &["bytes"]);
        check_core("fn f() { u64::from_be_bytes(x) }", &["bytes"]);
        check_core("// to_be_bytes\n#[cfg(test)]\nmod tests { fn f() { x.to_be_bytes() } }", &[]);
        check_text("crates/qcow2-format/src/a.rs", "fn f() { x.to_be_bytes(); y >> cluster_bits }", &[]);
    }

    #[test]
    fn shifts_by_cluster_bits_are_for_geometry() {
        check_core("fn f() { x >> self.geometry.cluster_bits() }", &["cluster-shift"]);
        check_core("fn f() { 1 << cluster_bits }", &["cluster-shift"]);
        check_core("fn f() { x <<= self.cluster_bits; }", &["cluster-shift"]);
        check_core("fn f() { x << u32::from(self.geometry(a).cluster_bits() - 3) }", &["cluster-shift"]);
        check_core("fn f(cluster_bits: u32) { g(cluster_bits, x >> 3) }", &[]);
        check_core("fn f() -> u32 { let a = x >> 3; self.geometry.cluster_bits() }", &[]);
        check_core("struct A { a: Vec<Vec<u8>>, cluster_bits: u32 }", &[]);
        check_core("cluster_bits", &[]);
        check_core("fn f() { ) . cluster_bits }", &[]);
    }
}
