//! Number of fields of each struct, and of parameters of each function.

use crate::lex::{Kind, Token};
use crate::source::{Source, matching};
use std::ops::Range;

/// A struct or a function in shipped code.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Shape {
    /// `Name`, or `Type::name` for a method.
    pub(super) name: String,
    pub(super) line: usize,
    /// Number of fields, or of parameters without `self`.
    pub(super) count: usize,
}

/// Every struct, in line order.
pub(super) fn structs(source: &Source<'_>) -> Vec<Shape> {
    let tokens = &source.tokens;
    let mut found = Vec::new();
    for (at, token) in source.shipped() {
        if !token.is("struct") || !is_name(tokens, at + 1) {
            continue;
        }
        let Some(body) = struct_body(tokens, at + 2) else { continue };
        let count = comma_parts(tokens, body).len();
        found.push(Shape { name: tokens[at + 1].text.to_owned(), line: token.line, count });
    }
    found
}

/// Every function, including methods without a body.
pub(super) fn functions(source: &Source<'_>) -> Vec<Shape> {
    let tokens = &source.tokens;
    let owners = owners(tokens);
    let mut found = Vec::new();
    for (at, token) in source.shipped() {
        if !token.is("fn") || !is_name(tokens, at + 1) {
            continue;
        }
        let open = after_generics(tokens, at + 2);
        if !tokens.get(open).is_some_and(|t| t.is("(")) {
            continue;
        }
        let close = matching(tokens, open);
        let parts = comma_parts(tokens, open + 1..close);
        let count = parts.iter().filter(|part| !is_self(&tokens[(*part).clone()])).count();
        // The innermost owner is the last one that starts before the function and is still open there.
        let owner = owners.iter().rfind(|(body, _)| body.contains(&at));
        let name = match owner {
            Some((_, owner)) => format!("{owner}::{}", tokens[at + 1].text),
            None => tokens[at + 1].text.to_owned(),
        };
        found.push(Shape { name, line: token.line, count });
    }
    found
}

fn is_name(tokens: &[Token<'_>], at: usize) -> bool {
    tokens.get(at).is_some_and(|t| t.kind == Kind::Word)
}

/// The content of the braces or parentheses of a struct whose name ends before `from`.
fn struct_body(tokens: &[Token<'_>], from: usize) -> Option<Range<usize>> {
    let mut at = after_generics(tokens, from);
    let mut bounds = false;
    while let Some(token) = tokens.get(at) {
        if token.is(";") {
            return None;
        }
        // `where F: Fn(u8)` has parentheses that are no fields.
        if token.is("{") || (token.is("(") && !bounds) {
            return Some(at + 1..matching(tokens, at));
        }
        bounds |= token.is("where");
        at = if token.is("(") || token.is("[") { matching(tokens, at) + 1 } else { at + 1 };
    }
    None
}

/// The bodies of `impl` and `trait` blocks, with the name of the type or trait.
fn owners<'a>(tokens: &[Token<'a>]) -> Vec<(Range<usize>, &'a str)> {
    let mut found = Vec::new();
    for (at, token) in tokens.iter().enumerate() {
        let named = if token.is("impl") && begins_item(tokens, at) {
            impl_name(tokens, at + 1)
        } else if token.is("trait") && is_name(tokens, at + 1) {
            tokens[at + 1].text
        } else {
            continue;
        };
        let mut open = at + 1;
        while open < tokens.len() && !tokens[open].is("{") && !tokens[open].is(";") {
            let group = tokens[open].is("(") || tokens[open].is("[");
            open = if group { matching(tokens, open) + 1 } else { open + 1 };
        }
        if tokens.get(open).is_some_and(|t| t.is("{")) {
            found.push((open..matching(tokens, open), named));
        }
    }
    found
}

/// True if an item can start at `at`: `impl` in a type (`-> impl Read`) is no block.
fn begins_item(tokens: &[Token<'_>], at: usize) -> bool {
    let Some(before) = at.checked_sub(1).map(|before| &tokens[before]) else { return true };
    ["{", "}", ";", "]", "unsafe"].iter().any(|text| before.is(text))
}

/// The type of an `impl`: its last name outside angle brackets.
fn impl_name<'a>(tokens: &[Token<'a>], from: usize) -> &'a str {
    let mut name = "";
    let mut at = after_generics(tokens, from);
    while let Some(token) = tokens.get(at).filter(|t| !t.is("{") && !t.is("where")) {
        if token.kind == Kind::Word && !["for", "dyn", "mut"].contains(&token.text) {
            name = token.text;
        }
        at = after_generics(tokens, at + 1);
    }
    name
}

/// The index after an optional `<...>` at `at`.
fn after_generics(tokens: &[Token<'_>], at: usize) -> usize {
    let mut depth = 0usize;
    let mut inner = at;
    while let Some(token) = tokens.get(inner) {
        if token.is("<") {
            depth += 1;
        } else if token.is(">") && !is_arrow(tokens, inner) {
            depth = depth.saturating_sub(1);
        }
        inner += 1;
        if depth == 0 {
            return if inner == at + 1 { at } else { inner };
        }
    }
    tokens.len()
}

/// True if the `>` at `at` ends a `->`.
fn is_arrow(tokens: &[Token<'_>], at: usize) -> bool {
    at > 0 && tokens[at - 1].is("-")
}

/// Splits a list at its commas; commas inside brackets of any kind do not count.
fn comma_parts(tokens: &[Token<'_>], list: Range<usize>) -> Vec<Range<usize>> {
    let end = list.end.min(tokens.len());
    let mut parts = Vec::new();
    let mut start = list.start;
    let mut angles = 0usize;
    let mut at = list.start;
    while at < end {
        let token = &tokens[at];
        if token.is("(") || token.is("[") || token.is("{") {
            at = matching(tokens, at);
        } else if token.is("<") {
            angles += 1;
        } else if token.is(">") && !is_arrow(tokens, at) {
            angles = angles.saturating_sub(1);
        } else if token.is(",") && angles == 0 {
            parts.push(start..at);
            start = at + 1;
        }
        at += 1;
    }
    parts.push(start..end);
    parts.retain(|part| !part.is_empty());
    parts
}

/// `self`, `&self`, `&'a mut self`, `self: Arc<Self>`.
fn is_self(parameter: &[Token<'_>]) -> bool {
    let first = parameter.iter().find(|t| !t.is("&") && !t.is("mut") && t.kind != Kind::Lifetime);
    first.is_some_and(|t| t.is("self"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(shapes: Vec<Shape>, expected: &[(&str, usize)]) {
        let seen: Vec<_> = shapes.iter().map(|s| (s.name.as_str(), s.count)).collect();
        assert_eq!(seen, expected);
    }

    fn check_structs(text: &str, expected: &[(&str, usize)]) {
        check(structs(&Source::new("crates/a/src/x.rs", text)), expected);
    }

    fn check_functions(text: &str, expected: &[(&str, usize)]) {
        check(functions(&Source::new("crates/a/src/x.rs", text)), expected);
    }

    #[test]
    fn fields_are_counted() {
        check_structs("struct A { a: u8, pub b: u8 }", &[("A", 2)]);
        check_structs("struct A { #[b(c, d)] a: HashMap<u8, (u8, u8)>, b: [u8; 2], }", &[("A", 2)]);
        check_structs(
            "struct A<T: Into<u8>, const N: usize> where T: Fn(u8, u8) -> u8 { a: T }",
            &[("A", 1)],
        );
        check_structs("struct A(u8, Box<dyn Fn(u8, u8) -> u8>, u8);\nstruct B;", &[("A", 3)]);
        check_structs("struct A<F>(F) where F: Fn(u8, u8);\nstruct B {}", &[("A", 1), ("B", 0)]);
        check_structs("#[cfg(test)]\nstruct A { a: u8 }", &[]);
        check_structs("macro_rules! m { () => { struct $name { a: u8 } } }", &[]);
    }

    #[test]
    fn parameters_are_counted_without_self() {
        check_functions("fn a() {}\nfn b(a: u8, b: u8,) {}", &[("a", 0), ("b", 2)]);
        check_functions("fn a<T: Fn(u8, u8) -> u8, U>(a: T, b: HashMap<u8, U>) {}", &[("a", 2)]);
        check_functions("fn a(b: impl Fn(u8, u8) -> Result<u8, u8>, (c, d): (u8, u8)) {}", &[("a", 2)]);
        check_functions("type F = fn(u8, u8);\n#[test]\nfn a(b: u8) {}", &[]);
    }

    #[test]
    fn methods_are_named_with_their_type() {
        check_functions("impl A { fn a(&self, b: u8) {} fn c(mut self) {} }", &[("A::a", 1), ("A::c", 0)]);
        check_functions(
            "impl<'a, T> b::B<T> for c::A<'a, T> where T: D { fn a(&'a mut self) {} }",
            &[("A::a", 0)],
        );
        check_functions(
            "trait A: B<C> { fn a(self: Arc<Self>, b: u8); }\nfn e() {}",
            &[("A::a", 1), ("e", 0)],
        );
        check_functions(
            "fn a() -> impl B { c() }\nimpl<T> B for &mut T { fn b() {} }",
            &[("a", 0), ("T::b", 0)],
        );
        check_functions("impl A { fn a() { impl B for C { fn b(d: u8) {} } } }", &[("A::a", 0), ("C::b", 1)]);
    }

    #[test]
    fn any_text_terminates() {
        for text in [
            "struct A",
            "struct A<",
            "struct A {",
            "fn a",
            "fn a<(",
            "impl A { fn a(",
            "impl",
            "trait A where",
        ] {
            check_structs(text, if text == "struct A {" { &[("A", 0)] } else { &[] });
            let _ = functions(&Source::new("a.rs", text));
        }
    }
}
