//! Makes a history that shows a difference as small as it will go.

use super::pair::Pair;

/// Runs that one shrinking may take.
const MAX_RUNS: usize = 150;

/// A smaller history with a difference of the same `cause`: without lines, then without words.
pub(super) fn shrink(pair: &Pair, history: Vec<String>, cause: &str) -> Vec<String> {
    let mut runs = 0;
    let mut still = |history: &[String]| {
        runs += 1;
        runs <= MAX_RUNS && pair.run(history).1.is_some_and(|difference| difference.cause == cause)
    };
    let mut best = history;
    let mut at = 0;
    while best.len() > 1 && at < best.len() {
        let mut shorter = best.clone();
        shorter.remove(at);
        if still(&shorter) { best = shorter } else { at += 1 }
    }
    for line in 0..best.len() {
        // An option with its value first, then single words. The program and the verb stay.
        for count in [2, 1] {
            let mut at = 1;
            while let Some(shorter) = without_words(&best[line], at, count) {
                let mut candidate = best.clone();
                candidate[line] = shorter;
                if still(&candidate) { best = candidate } else { at += 1 }
            }
        }
    }
    best
}

/// `line` without `count` words from word `at`; `None` if it has no such words. Quoted words count as one.
fn without_words(line: &str, at: usize, count: usize) -> Option<String> {
    let words = pieces(line);
    let first = if words.first().is_some_and(|word| *word == "qemu-img") { 2 } else { 1 };
    let at = at + first - 1;
    if at + count > words.len() {
        return None;
    }
    Some([&words[..at], &words[at + count..]].concat().join(" "))
}

/// The words of a line with their quotes.
fn pieces(line: &str) -> Vec<&str> {
    let mut quoted = false;
    line.split(|c| {
        quoted ^= c == '\'';
        c == ' ' && !quoted
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_go_and_the_verb_stays() {
        let line = "qemu-img info --output json 'a b'";
        assert_eq!(without_words(line, 1, 2).as_deref(), Some("qemu-img info 'a b'"));
        assert_eq!(without_words(line, 3, 1).as_deref(), Some("qemu-img info --output json"));
        assert_eq!(without_words(line, 4, 1), None);
        assert_eq!(without_words("qemu-io -c 'write 0 1' x", 1, 2).as_deref(), Some("qemu-io x"));
    }
}
