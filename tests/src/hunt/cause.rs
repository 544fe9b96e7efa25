//! What two runs of a line differ in, reduced to what the same cause has in common everywhere.

use crate::side_by_side::{without_own, without_varying};
use qcow2_testkit::oracle::Outcome;

/// How two outcomes differ; `None` if they do not. `verb`: the first words of the line. `first`: no line ran
/// before it, so that both tools saw the same files.
pub(super) fn of_outcomes(verb: &str, first: bool, theirs: &Outcome, ours: &Outcome) -> Option<String> {
    if theirs.code != ours.code {
        let code = |outcome: &Outcome| outcome.code.map_or("signal".to_owned(), |code| code.to_string());
        // A guess is told of by both, before what they differ in.
        let told = |line: &&str| !line.starts_with("WARNING: ") && !line.starts_with("         ");
        let text = |outcome: &Outcome| {
            let stderr: String = outcome.stderr.split_inclusive('\n').filter(told).collect();
            plain(first_line(&stderr, &without_varying(&outcome.stdout)))
        };
        return Some(format!(
            "{verb}: exit code {} and {}: {} | {}",
            code(theirs),
            code(ours),
            text(theirs),
            text(ours)
        ));
    }
    for (what, theirs, ours) in
        [("stderr", &theirs.stderr, &ours.stderr), ("stdout", &theirs.stdout, &ours.stdout)]
    {
        let [theirs, ours] = [theirs, ours].map(|text| {
            let text = without_varying(text);
            let line = |line| if first { without_digits(line) } else { without_own(line) };
            text.split_inclusive('\n').map(line).collect::<String>()
        });
        if theirs != ours {
            let (one, other) = first_difference(&theirs, &ours);
            return Some(format!("{verb}: {what}: {} | {}", plain(one), plain(other)));
        }
    }
    None
}

/// The line without a number, and its unit, that the list of what stays different leaves out.
fn without_digits(line: &str) -> String {
    let begin = line.trim_start();
    let mut rules = super::DIFFERENT.lines().filter_map(|line| line.strip_prefix(DIGITS));
    let Some(number) = rules.find_map(|rule| begin.strip_prefix(rule)) else { return line.to_owned() };
    let rest = number.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.');
    let after = UNITS.iter().find_map(|unit| rest.strip_prefix(unit)).unwrap_or(rest);
    format!("{}_{after}", line.strip_suffix(number).unwrap_or_default())
}

const UNITS: [&str; 4] = [" B", " KiB", " MiB", " GiB"];
/// What such an entry begins with; the words before the number follow.
pub(super) const DIGITS: &str = "digits: ";

fn first_line<'a>(text: &'a str, or: &'a str) -> &'a str {
    text.lines().next().or_else(|| or.lines().next()).unwrap_or("")
}

fn first_difference<'a>(one: &'a str, other: &'a str) -> (&'a str, &'a str) {
    let (mut one, mut other) = (one.lines(), other.lines());
    loop {
        match (one.next(), other.next()) {
            (Some(a), Some(b)) if a == b => {}
            (None, None) => return ("", ""),
            (a, b) => return (a.unwrap_or("(end)"), b.unwrap_or("(end)")),
        }
    }
}

/// A text without names and numbers, which say where it happened and not why.
pub(super) fn plain(text: &str) -> String {
    let word = |word: &str| {
        let bare = word.trim_matches(|c: char| !c.is_alphanumeric());
        let names_a_file =
            bare.contains('.') || matches!(bare, "n0" | "n1" | "x8" | "zero" | "tiny" | "rnd" | "nofile");
        if names_a_file || bare.chars().any(|c| c.is_ascii_digit()) {
            word.replace(bare, "_")
        } else {
            word.to_owned()
        }
    };
    text.split_whitespace().map(word).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_are_no_cause() {
        assert_eq!(
            plain("qemu-img: Could not open 'n2.qcow2': at 512 bytes"),
            "qemu-img: Could not open '_': at _ bytes"
        );
        assert_eq!(plain("'n0' is  there"), "'_' is there");
    }

    #[test]
    fn sizes_on_the_host_are_left_out_and_nothing_else() {
        for (line, expected) in [
            ("disk size: 1.5 MiB\n", "disk size: _\n"),
            ("    disk size: 0 B", "    disk size: _"),
            ("  \"actual-size\": 4096,\n", "  \"actual-size\": _,\n"),
            ("disk size: unavailable\n", "disk size: _unavailable\n"),
            ("virtual size: 1 MiB\n", "virtual size: 1 MiB\n"),
        ] {
            assert_eq!(without_digits(line), expected);
        }
    }

    #[test]
    fn the_first_differing_lines_count() {
        assert_eq!(first_difference("a\nb\n", "a\nc\n"), ("b", "c"));
        assert_eq!(first_difference("a\n", "a\nc\n"), ("(end)", "c"));
    }
}
