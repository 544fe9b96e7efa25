//! A minimal lexer for the checks: Rust text to tokens and comments.
//!
//! It accepts any text. A literal becomes one token without its content, so that words in strings and
//! comments never count as code.

/// Kind of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A name or keyword (without `r#`).
    Word,
    /// One punctuation character.
    Mark,
    /// A string, character or number; its text is empty.
    Literal,
    /// A lifetime or label, with its quote.
    Lifetime,
}

/// A token and its line, counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Token<'a> {
    pub(crate) kind: Kind,
    pub(crate) text: &'a str,
    pub(crate) line: usize,
}

impl Token<'_> {
    /// True for the word or mark `text`.
    pub(crate) fn is(&self, text: &str) -> bool {
        matches!(self.kind, Kind::Word | Kind::Mark) && self.text == text
    }
}

/// A comment including its markers, and its first line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Comment<'a> {
    pub(crate) text: &'a str,
    pub(crate) line: usize,
}

impl Comment<'_> {
    /// True for a doc comment, false for a plain one.
    pub(crate) fn is_doc(&self) -> bool {
        let outer = |mark: &str, more: &str| self.text.starts_with(mark) && !self.text.starts_with(more);
        outer("///", "////")
            || outer("/**", "/***")
            || ["//!", "/*!"].iter().any(|m| self.text.starts_with(m))
    }
}

/// Splits `text` into tokens.
pub(crate) fn lex(text: &str) -> Vec<Token<'_>> {
    lex_with_comments(text).0
}

/// Splits `text` into tokens and comments.
pub(crate) fn lex_with_comments(text: &str) -> (Vec<Token<'_>>, Vec<Comment<'_>>) {
    let mut lexer = Lexer { text, at: 0, line: 1, comments: Vec::new() };
    let mut tokens = Vec::new();
    while let Some(token) = lexer.next_token() {
        tokens.push(token);
    }
    (tokens, lexer.comments)
}

struct Lexer<'a> {
    text: &'a str,
    at: usize,
    line: usize,
    comments: Vec<Comment<'a>>,
}

impl<'a> Lexer<'a> {
    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn advance(&mut self, len: usize) -> &'a str {
        let taken = &self.text[self.at..self.at + len];
        self.line += taken.matches('\n').count();
        self.at += len;
        taken
    }

    fn comment(&mut self, len: usize) {
        let line = self.line;
        let text = self.advance(len);
        self.comments.push(Comment { text, line });
    }

    fn next_token(&mut self) -> Option<Token<'a>> {
        loop {
            let rest = self.rest();
            let first = rest.chars().next()?;
            if first.is_whitespace() {
                self.advance(first.len_utf8());
            } else if rest.starts_with("//") {
                self.comment(rest.find('\n').unwrap_or(rest.len()));
            } else if rest.starts_with("/*") {
                self.comment(block_comment_len(rest));
            } else {
                break;
            }
        }
        let line = self.line;
        let (kind, len, skip) = classify(self.rest());
        let taken = self.advance(len);
        let text = if kind == Kind::Literal { "" } else { &taken[skip..] };
        Some(Token { kind, text, line })
    }
}

/// The kind of the token at the start of `rest`, its length in bytes, and the length of a prefix to drop.
fn classify(rest: &str) -> (Kind, usize, usize) {
    let first = rest.chars().next().unwrap_or(' ');
    if let Some(len) = string_len(rest) {
        return (Kind::Literal, len, 0);
    }
    if let Some(word) = rest.strip_prefix("r#") {
        let len = word_len(word);
        if len > 0 {
            return (Kind::Word, len + 2, 2);
        }
    }
    if first.is_ascii_digit() {
        return (Kind::Literal, number_len(rest), 0);
    }
    let len = word_len(rest);
    if len > 0 {
        return (Kind::Word, len, 0);
    }
    if first == '\'' {
        return quote(rest);
    }
    (Kind::Mark, first.len_utf8(), 0)
}

fn word_len(text: &str) -> usize {
    text.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(text.len())
}

/// A number includes its suffix, and one dot only if a digit follows (`0..9` is three tokens, `1.max(2)`
/// too).
fn number_len(text: &str) -> usize {
    let whole = word_len(text);
    match text[whole..].strip_prefix('.') {
        Some(tail) if tail.starts_with(|c: char| c.is_ascii_digit()) => whole + 1 + word_len(tail),
        _ => whole,
    }
}

/// A character literal or a lifetime.
fn quote(rest: &str) -> (Kind, usize, usize) {
    let mut chars = rest.char_indices().skip(1);
    match chars.next() {
        Some((_, '\\')) => {
            let end = closing(rest, 1, '\'');
            (Kind::Literal, end, 0)
        }
        Some((_, _)) => match chars.next() {
            Some((at, '\'')) => (Kind::Literal, at + 1, 0),
            _ => (Kind::Lifetime, 1 + word_len(&rest[1..]), 0),
        },
        None => (Kind::Mark, 1, 0),
    }
}

/// The length of the string literal at the start of `rest`, of any kind.
fn string_len(rest: &str) -> Option<usize> {
    for prefix in ["", "b", "c"] {
        if rest.strip_prefix(prefix).is_some_and(|t| t.starts_with('"')) {
            return Some(closing(rest, prefix.len() + 1, '"'));
        }
    }
    if rest.starts_with("b'") {
        return Some(closing(rest, 2, '\''));
    }
    for prefix in ["r", "br", "cr"] {
        let Some(tail) = rest.strip_prefix(prefix) else { continue };
        let hashes = tail.len() - tail.trim_start_matches('#').len();
        if tail[hashes..].starts_with('"') {
            let start = prefix.len() + hashes + 1;
            let end = format!("\"{}", "#".repeat(hashes));
            return Some(rest[start..].find(&end).map_or(rest.len(), |at| start + at + end.len()));
        }
    }
    None
}

/// The end of the literal that starts before `from`: after the first `end` that is not escaped.
fn closing(rest: &str, from: usize, end: char) -> usize {
    let mut escaped = false;
    for (at, c) in rest[from..].char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if c == end => return from + at + c.len_utf8(),
            _ => {}
        }
    }
    rest.len()
}

fn block_comment_len(rest: &str) -> usize {
    let mut depth = 0usize;
    let mut at = 0;
    while at < rest.len() {
        let tail = &rest.as_bytes()[at..];
        if tail.starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if tail.starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    rest.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: &[&str]) {
        let seen: Vec<_> = lex(text)
            .into_iter()
            .map(|t| if t.kind == Kind::Literal { "<lit>".to_owned() } else { t.text.to_owned() })
            .collect();
        assert_eq!(seen, expected, "tokens of {text:?}");
    }

    #[test]
    fn words_in_comments_and_strings_are_no_tokens() {
        check("a /* x /* y */ z */ b // c\nd", &["a", "b", "d"]);
        check(
            r##"f("un\"wrap()", r#"std "fs""#, b"x", b'\'')"##,
            &["f", "(", "<lit>", ",", "<lit>", ",", "<lit>", ",", "<lit>", ")"],
        );
    }

    #[test]
    fn character_literals_and_lifetimes_are_distinguished() {
        check("&'a str", &["&", "'a", "str"]);
        check(r"['x', '\n', '\'', '{']", &["[", "<lit>", ",", "<lit>", ",", "<lit>", ",", "<lit>", "]"]);
        check("'outer: loop", &["'outer", ":", "loop"]);
    }

    #[test]
    fn numbers_and_raw_identifiers_are_single_tokens() {
        check(
            "0..0x1f 1.5 1.max(2) r#fn",
            &["<lit>", ".", ".", "<lit>", "<lit>", "<lit>", ".", "max", "(", "<lit>", ")", "fn"],
        );
    }

    #[test]
    fn line_numbers_count_lines_in_literals() {
        let tokens = lex("a\n\"x\ny\"\n/* \n */ b");
        let lines: Vec<_> = tokens.iter().map(|t| t.line).collect();
        assert_eq!(lines, [1, 2, 5]);
    }

    #[test]
    fn comments_have_their_line_and_kind() {
        let text = "//! a\n/// b\nc(\"// d\"); // e\n/* f\n */ //// g\n/** h */";
        let (_, comments) = lex_with_comments(text);
        let seen: Vec<_> = comments.iter().map(|c| (c.line, c.is_doc())).collect();
        assert_eq!(seen, [(1, true), (2, true), (3, false), (4, false), (5, false), (6, true)]);
        assert_eq!(comments[2].text, "// e");
    }

    #[test]
    fn any_text_terminates() {
        for text in ["\"", "'", "'\\", "/*", "r#\"", "b'", "é'é", "/* é"] {
            let _ = lex(text);
        }
    }
}
