//! Line metrics: how many, how long, and how many comments state a reason.

use crate::source::Source;
use crate::tree::File;

/// The longest allowed line, in columns.
pub(super) const MAX_COLUMNS: usize = 110;
/// Macros that assert what the code relies on.
const ASSERTIONS: &[&str] = &[
    "assert",
    "assert_eq",
    "assert_ne",
    "debug_assert",
    "debug_assert_eq",
    "debug_assert_ne",
    "unreachable",
];

/// Line counts of shipped code, summed over files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Lines {
    /// All lines, blank ones included, without tests.
    pub(super) all: usize,
    /// Lines with a plain comment (`//`): those state reasons, where documentation states behaviour.
    pub(super) why: usize,
    pub(super) assertions: usize,
}

impl Lines {
    pub(super) fn of(source: &Source<'_>) -> Self {
        let shipped = |line: usize| !source.is_test_line(line);
        let plain = source.comments.iter().filter(|c| shipped(c.line) && !c.is_doc());
        let is_assertion = |at: usize| {
            let named = ASSERTIONS.contains(&source.tokens[at].text) && source.matches(at + 1, &["!"]);
            named || source.matches(at, &["invariant", ":", ":"]) && source.matches(at + 4, &["("])
        };
        Self {
            all: (1..=source.text.lines().count()).filter(|&line| shipped(line)).count(),
            why: plain.map(|c| c.text.lines().count()).sum(),
            assertions: source.shipped().filter(|&(at, _)| is_assertion(at)).count(),
        }
    }

    pub(super) fn add(&mut self, other: Self) {
        self.all += other.all;
        self.why += other.why;
        self.assertions += other.assertions;
    }
}

/// The longest line of a kind: file, line and columns.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Longest {
    pub(super) place: String,
    pub(super) columns: usize,
}

/// Line lengths of a group of files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Lengths {
    /// Lines over the bound.
    pub(super) over: usize,
    pub(super) code: Longest,
    pub(super) comment: Longest,
}

impl Lengths {
    /// Adds the lines of a page or a source file, tests included. Table rows are not counted, since they
    /// cannot be wrapped, nor long lines that are one string: people search for messages and command lines,
    /// and a break would hide them.
    pub(super) fn add(&mut self, file: &File) {
        let page = file.path.ends_with(".md");
        for (at, line) in file.text.lines().enumerate() {
            let text = line.trim_start();
            let prose = page || text.starts_with("//");
            if prose && text.trim_start_matches(['/', '!', ' ']).starts_with('|') {
                continue;
            }
            let columns = line.chars().count();
            if columns > MAX_COLUMNS && !prose && is_mostly_a_string(text) {
                continue;
            }
            self.over += usize::from(columns > MAX_COLUMNS);
            let longest = if prose { &mut self.comment } else { &mut self.code };
            if columns > longest.columns {
                *longest = Longest { place: format!("{}:{}", file.path, at + 1), columns };
            }
        }
    }
}

/// True if a line of code is a string, is inside one that continues, or has one that fills half of it.
fn is_mostly_a_string(text: &str) -> bool {
    let quoted = text.split('"').skip(1).step_by(2).map(|part| part.chars().count()).max();
    text.starts_with(['"'])
        || text.starts_with("r#\"")
        || text.ends_with('\\')
        || quoted.is_some_and(|len| len > MAX_COLUMNS / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, all: usize, why: usize, assertions: usize) {
        let seen = Lines::of(&Source::new("crates/a/src/x.rs", text));
        assert_eq!(seen, Lines { all, why, assertions }, "{text:?}");
    }

    fn check_lengths(path: &str, text: &str, over: usize, code: usize, comment: usize) {
        let mut lengths = Lengths::default();
        lengths.add(&File { path: path.to_owned(), text: text.to_owned() });
        let seen = (lengths.over, lengths.code.columns, lengths.comment.columns);
        assert_eq!(seen, (over, code, comment), "{path}: {text:?}");
    }

    #[test]
    fn lines_are_counted_without_tests() {
        check(
            "fn f() {}\n\nfn g() {}\n#[cfg(test)]\nmod tests {\n    // why\n    fn t() { assert!(a) }\n}\n",
            3,
            0,
            0,
        );
    }

    #[test]
    fn plain_comments_are_counted_apart_from_documentation() {
        check("//! What\n/// What\n// Why\n// and more\nfn f() {} // why\n", 5, 3, 0);
        check("fn f() { g(\"// no\") }\n/* why\n too */\n", 3, 2, 0);
    }

    #[test]
    fn assertion_macros_are_counted() {
        check("fn f() { assert!(a); debug_assert_eq!(a, b); unreachable!() }", 1, 0, 3);
        check("fn f() { assert(a); prop_assert!(b) } // assert!(c)", 1, 1, 0);
        check("use crate::invariant;\nfn f() { invariant::may_write(a); }", 2, 0, 1);
    }

    #[test]
    fn line_length_is_counted_in_characters() {
        check_lengths("a.rs", &format!("{}\n{}\n", "é".repeat(110), "é".repeat(111)), 1, 111, 0);
        check_lengths("a.rs", &format!("    // {}\n", "x".repeat(111)), 1, 0, 118);
        check_lengths("a.md", &format!("{}\n", "x".repeat(120)), 1, 0, 120);
    }

    #[test]
    fn long_strings_are_not_counted() {
        check_lengths("a.rs", &format!("    f(\"{}\");\n", "x".repeat(120)), 0, 0, 0);
        check_lengths("a.rs", &format!("    {} \\\n", "x".repeat(120)), 0, 0, 0);
        check_lengths("a.rs", &format!("    // \"{}\"\n", "x".repeat(120)), 1, 0, 129);
        check_lengths("a.rs", &format!("    f(\"a\", {});\n", "x".repeat(120)), 1, 133, 0);
    }

    #[test]
    fn table_rows_are_not_counted() {
        check_lengths("a.md", &format!("| {} |\n", "x".repeat(120)), 0, 0, 0);
        check_lengths("a.rs", &format!("/// | {} |\n", "x".repeat(120)), 0, 0, 0);
        check_lengths("a.rs", &format!("| {} |\n", "x".repeat(120)), 1, 124, 0);
    }
}
