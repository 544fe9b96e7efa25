//! Keeps the inner crates pure: no operating system in format, core and ops; no `unsafe` outside qcow2-io's
//! sys modules; no byte encoding in core.

pub(crate) mod bytes;

use crate::finding::Finding;
use crate::lex::Kind;
use crate::source::{Source, matching};

/// Crates that must build without the standard library.
const NO_STD: &[&str] = &["crates/qcow2-format/src/", "crates/qcow2-core/src/"];
/// The one file in them that may use it.
const STD_DOOR: &str = "crates/qcow2-core/src/sync.rs";
/// The crate that may use `std`, except its modules for I/O, time and threads.
const OPS: &str = "crates/qcow2-ops/src/";
/// Those modules.
const WORLD: &[&str] = &["fs", "net", "thread", "time", "env", "process", "os"];
/// Where `unsafe` is allowed: a folder or a file.
const UNSAFE_ROOMS: &[&str] =
    &["crates/qcow2-io/src/sys/", "crates/qcow2-io/src/sys.rs", "crates/qcow2-io/src/uring.rs"];

/// Checks one file.
pub(crate) fn check(source: &Source<'_>, findings: &mut Vec<Finding>) {
    check_no_std(source, findings);
    check_world(source, findings);
    check_unsafe(source, findings);
    check_roots(source, findings);
    bytes::check(source, findings);
}

fn check_no_std(source: &Source<'_>, findings: &mut Vec<Finding>) {
    if !NO_STD.iter().any(|root| source.path.starts_with(root)) || source.path == STD_DOOR {
        return;
    }
    for (at, token) in source.shipped() {
        if token.is("std") && !is_field(source, at) {
            findings.push(Finding::new("no-std", source.path, token.line, "std is named", "core and alloc"));
        }
    }
}

/// `x.std` is a field access.
fn is_field(source: &Source<'_>, at: usize) -> bool {
    at > 0 && source.tokens[at - 1].is(".")
}

fn check_world(source: &Source<'_>, findings: &mut Vec<Finding>) {
    if !source.path.starts_with(OPS) {
        return;
    }
    for (at, token) in source.shipped() {
        if !token.is("std") || !source.matches(at + 1, &[":", ":"]) {
            if token.is("std") && !is_field(source, at) {
                let seen = "std is renamed or imported as a whole";
                findings.push(Finding::new("world", source.path, token.line, seen, "std::<module>"));
            }
            continue;
        }
        for module in modules(source, at + 3) {
            if WORLD.contains(&module) || module == "*" || module == "self" {
                let seen = format!("std::{module} is used");
                let allowed = "ports and values; I/O, time and threads are for adapters";
                findings.push(Finding::new("world", source.path, token.line, seen, allowed));
            }
        }
    }
}

/// The modules named directly after `std::`, one or a group.
fn modules<'a>(source: &Source<'a>, at: usize) -> Vec<&'a str> {
    let Some(first) = source.tokens.get(at) else { return Vec::new() };
    if !first.is("{") {
        return vec![first.text];
    }
    let close = matching(&source.tokens, at);
    let mut names = Vec::new();
    let mut inner = at + 1;
    let mut fresh = true;
    while inner < close {
        let token = &source.tokens[inner];
        if token.is("{") {
            inner = matching(&source.tokens, inner);
        } else if token.is(",") {
            fresh = true;
        } else if fresh {
            names.push(token.text);
            fresh = false;
        }
        inner += 1;
    }
    names
}

fn check_unsafe(source: &Source<'_>, findings: &mut Vec<Finding>) {
    if UNSAFE_ROOMS.iter().any(|room| source.path.starts_with(room)) {
        return;
    }
    for token in &source.tokens {
        if token.kind == Kind::Word && token.text == "unsafe" {
            let allowed = "unsafe in qcow2-io's sys modules and uring.rs only";
            findings.push(Finding::new("unsafe", source.path, token.line, "unsafe code", allowed));
        }
    }
}

/// Library roots must have the attributes that make the compiler enforce these rules.
fn check_roots(source: &Source<'_>, findings: &mut Vec<Finding>) {
    let Some(krate) = source.path.strip_prefix("crates/").and_then(|p| p.strip_suffix("/src/lib.rs")) else {
        return;
    };
    let mut require = |marker: &str, words: &[&str]| {
        if !(0..source.tokens.len()).any(|at| source.matches(at, words)) {
            let seen = format!("the crate root lacks {marker}");
            findings.push(Finding::new("marker", source.path, 1, seen, format!("{marker} at the top")));
        }
    };
    if krate != "qcow2-io" {
        require("#![forbid(unsafe_code)]", &["#", "!", "[", "forbid", "(", "unsafe_code", ")", "]"]);
    }
    if NO_STD.iter().any(|root| source.path.starts_with(root)) {
        let words = ["#", "!", "[", "cfg_attr", "(", "not", "(", "test", ")", ",", "no_std", ")", "]"];
        require("#![cfg_attr(not(test), no_std)]", &words);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_text(path: &str, text: &str, rules: &[&str]) {
        let mut findings = Vec::new();
        check(&Source::new(path, text), &mut findings);
        let seen: Vec<_> = findings.iter().map(|f| f.rule).collect();
        assert_eq!(seen, rules, "{path}: {text:?}: {findings:?}");
    }

    #[test]
    fn inner_crates_use_std_in_one_file_only() {
        check_text("crates/qcow2-format/src/a.rs", "use std::fs;", &["no-std"]);
        check_text("crates/qcow2-core/src/a.rs", "extern crate std;", &["no-std"]);
        check_text("crates/qcow2-core/src/sync.rs", "extern crate std; use std::sync::Mutex;", &[]);
        check_text(
            "crates/qcow2-core/src/a.rs",
            "// std::fs\nuse core::fmt; const A: &str = \"std::fs\";",
            &[],
        );
        check_text("crates/qcow2-core/src/a.rs", "#[cfg(test)]\nmod tests { use std::fs; }", &[]);
    }

    #[test]
    fn ops_uses_no_io_time_or_threads() {
        check_text("crates/qcow2-ops/src/a.rs", "fn f() { std::thread::spawn(g); }", &["world"]);
        check_text("crates/qcow2-ops/src/a.rs", "use std::{fmt, time::Instant};", &["world"]);
        check_text("crates/qcow2-ops/src/a.rs", "use std::{sync::{Arc, fs}, collections};", &[]);
        check_text("crates/qcow2-ops/src/a.rs", "use std::{self};", &["world"]);
        check_text("crates/qcow2-ops/src/a.rs", "use std as s;", &["world"]);
        check_text("crates/qcow2-ops/src/a.rs", "use std::sync::Arc;", &[]);
        check_text("crates/qcow2-io/src/a.rs", "use std::fs::File;", &[]);
    }

    #[test]
    fn unsafe_is_allowed_in_sys_modules_only() {
        check_text("crates/qcow2-io/src/sys/linux.rs", "unsafe { f() }", &[]);
        check_text("crates/qcow2-io/src/file.rs", "unsafe { f() }", &["unsafe"]);
        check_text("crates/qcow2-core/src/a.rs", "#[cfg(test)]\nmod tests { unsafe fn f() {} }", &["unsafe"]);
        check_text("crates/qcow2-core/src/a.rs", "/// unsafe\nfn f() { g(\"unsafe\") }", &[]);
    }

    #[test]
    fn crate_roots_need_their_attributes() {
        check_text("crates/qcow2-ops/src/lib.rs", "//! x", &["marker"]);
        check_text("crates/qcow2-core/src/lib.rs", "#![forbid(unsafe_code)]", &["marker"]);
        check_text(
            "crates/qcow2-core/src/lib.rs",
            "#![cfg_attr(not(test), no_std)]\n#![forbid(unsafe_code)]",
            &[],
        );
        check_text("crates/qcow2-io/src/lib.rs", "", &[]);
    }
}
