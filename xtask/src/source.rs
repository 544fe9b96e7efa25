//! A Rust file as the checks see it: text, tokens, comments, and which lines are test code.

use crate::lex::{Comment, Token, lex_with_comments};

/// A Rust file of the workspace.
pub(crate) struct Source<'a> {
    /// Relative to the workspace root, with forward slashes.
    pub(crate) path: &'a str,
    pub(crate) text: &'a str,
    pub(crate) tokens: Vec<Token<'a>>,
    pub(crate) comments: Vec<Comment<'a>>,
    test_lines: Vec<(usize, usize)>,
}

impl<'a> Source<'a> {
    pub(crate) fn new(path: &'a str, text: &'a str) -> Self {
        let (tokens, comments) = lex_with_comments(text);
        let test_lines = if is_test_path(path) { vec![(1, usize::MAX)] } else { test_lines(&tokens) };
        Self { path, text, tokens, comments, test_lines }
    }

    /// True if `line` is test code: in a test file, or in an item marked `#[cfg(test)]` or `#[test]`.
    pub(crate) fn is_test_line(&self, line: usize) -> bool {
        self.test_lines.iter().any(|&(first, last)| (first..=last).contains(&line))
    }

    /// The tokens outside of test code, with their index in `tokens`.
    pub(crate) fn shipped(&self) -> impl Iterator<Item = (usize, &Token<'a>)> {
        self.tokens.iter().enumerate().filter(|(_, t)| !self.is_test_line(t.line))
    }

    /// True if the tokens from `at` on are `words`.
    pub(crate) fn matches(&self, at: usize, words: &[&str]) -> bool {
        self.tokens.len() >= at + words.len()
            && words.iter().zip(&self.tokens[at..]).all(|(word, token)| token.is(word))
    }
}

/// True for files that contain only tests, by their path.
fn is_test_path(path: &str) -> bool {
    let file = path.rsplit('/').next().unwrap_or(path);
    path.split('/').any(|part| part == "tests" || part == "benches")
        || file == "tests.rs"
        || file.ends_with("_tests.rs")
}

fn test_lines(tokens: &[Token<'_>]) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        if !tokens[at].is("#") {
            at += 1;
            continue;
        }
        let inner = tokens.get(at + 1).is_some_and(|t| t.is("!"));
        let open = at + 1 + usize::from(inner);
        if !tokens.get(open).is_some_and(|t| t.is("[")) {
            at += 1;
            continue;
        }
        let close = matching(tokens, open);
        if names_test(&tokens[open + 1..close.min(tokens.len())]) {
            if inner {
                return vec![(1, usize::MAX)];
            }
            let last = item_end(tokens, close + 1);
            found.push((tokens[at].line, tokens.get(last).map_or(usize::MAX, |t| t.line)));
            at = last + 1;
        } else {
            at = close + 1;
        }
    }
    found
}

/// True if an attribute's content is `test`, or a `cfg` that holds only in tests.
fn names_test(attribute: &[Token<'_>]) -> bool {
    match attribute {
        [only] => only.is("test"),
        [cfg, ..] if cfg.is("cfg") => attribute
            .iter()
            .enumerate()
            .any(|(at, t)| t.is("test") && !attribute[..at].iter().any(|b| b.is("not") || b.is("any"))),
        _ => false,
    }
}

/// The index of the bracket that closes the one at `open`, or the number of tokens.
pub(crate) fn matching(tokens: &[Token<'_>], open: usize) -> usize {
    let mut depth = 0usize;
    for (at, token) in tokens.iter().enumerate().skip(open) {
        if ["(", "[", "{"].iter().any(|m| token.is(m)) {
            depth += 1;
        } else if [")", "]", "}"].iter().any(|m| token.is(m)) {
            depth = depth.saturating_sub(1);
            if depth == 0 {
                return at;
            }
        }
    }
    tokens.len()
}

/// The index of the last token of the item that starts at `from`: its closing brace or its semicolon.
fn item_end(tokens: &[Token<'_>], from: usize) -> usize {
    let mut at = from;
    while at < tokens.len() {
        if tokens[at].is(";") {
            return at;
        }
        if tokens[at].is("{") {
            return matching(tokens, at);
        }
        at = if tokens[at].is("(") || tokens[at].is("[") { matching(tokens, at) + 1 } else { at + 1 };
    }
    tokens.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(path: &str, text: &str, test_lines: &[usize]) {
        let source = Source::new(path, text);
        let seen: Vec<_> = (1..=text.lines().count()).filter(|&l| source.is_test_line(l)).collect();
        assert_eq!(seen, test_lines, "test lines of {text:?}");
    }

    #[test]
    fn a_test_module_is_test_code() {
        check(
            "crates/a/src/x.rs",
            "fn a() {}\n#[cfg(test)]\nmod tests {\n    fn b() {}\n}\nfn c() {}\n",
            &[2, 3, 4, 5],
        );
        check("crates/a/src/x.rs", "#[cfg(all(test, feature = \"x\"))]\nuse b;\nfn c() {}\n", &[1, 2]);
        check("crates/a/src/x.rs", "#[cfg(test)]\nconst A: [u8; 2] = [1, 2];\nfn c() {}\n", &[1, 2]);
    }

    #[test]
    fn code_with_other_cfgs_is_shipped() {
        check("crates/a/src/x.rs", "#[cfg(not(test))]\nfn a() {}\n", &[]);
        check("crates/a/src/x.rs", "#[cfg(any(test, feature = \"x\"))]\nfn a() {}\n", &[]);
        check("crates/a/src/x.rs", "#![cfg_attr(not(test), no_std)]\nfn a() {}\n", &[]);
    }

    #[test]
    fn whole_files_are_tests_by_path_or_attribute() {
        check("tests/tests/a.rs", "fn a() {}\n", &[1]);
        check("crates/a/src/write/tests.rs", "fn a() {}\n", &[1]);
        check("crates/a/src/x.rs", "#![cfg(test)]\nfn a() {}\n", &[1, 2]);
    }
}
