//! What `help` says.

use super::table::{COMMANDS, Spec};
use std::fmt::Write;

/// All commands, a line each.
pub(crate) fn all() -> String {
    let mut text: String = COMMANDS.iter().map(|spec| spec.usage(spec.name)).collect();
    text.push_str("\nUse 'help commandname' for more about one of them.\n");
    text
}

/// One command with its options.
pub(crate) fn one(spec: &Spec, typed: &str) -> String {
    let mut text = spec.usage(typed);
    let letters = spec.letters.unwrap_or_default();
    if letters.is_empty() {
        return text;
    }
    text.push('\n');
    for (place, letter) in letters.char_indices().filter(|(_, letter)| *letter != ':') {
        let value = if letters[place + letter.len_utf8()..].starts_with(':') { " ..." } else { "" };
        let _ = writeln!(text, " -{letter}{value:<4}  {}", meaning(spec.name, letter));
    }
    text.push_str("\nSizes and offsets are bytes, or take one of the suffixes k M G T P E.\n");
    text
}

/// What a letter means to a command.
fn meaning(command: &str, letter: char) -> &'static str {
    match (command, letter) {
        ("open", 'r') | ("reopen", 'r') => "for reading only",
        ("reopen", 'w') => "for reading and writing",
        ("open", 's') => "changes go to a scratch overlay",
        ("open", 'C') => "copy to the top layer what is read from below",
        ("open", 'n') => "around the page cache, as -t none",
        ("open", 'k') => "the kernel's asynchronous I/O, as -i native",
        ("open", 'i') => "asynchronous I/O: threads, native or io_uring",
        ("open", 'U') => "even if another program writes to it",
        ("open", 't') | ("reopen", 'c') => "cache mode: none, writeback, writethrough, directsync or unsafe",
        ("open", 'd') => "discards: ignore or unmap",
        ("open", 'o') | ("reopen", 'o') => "further options, key=value,...",
        ("truncate", 'm') => "what to do with new space: off, metadata, falloc or full",
        ("write", 's') => "write the content of this file, again and again",
        ("read", 's') => "with -P: skip so many bytes",
        ("read", 'l') => "with -P: check so many bytes",
        ("read" | "readv" | "aio_read", 'P') => "all bytes must be this one",
        (_, 'P') => "the byte to write (0xcd)",
        (_, 'b') => "the machine's state instead of the disk",
        (_, 'C') => "report in one line for programs",
        (_, 'c') => "compressed",
        (_, 'f') => "durable when reported",
        (_, 'i') => "only count a request that is not possible",
        (_, 'n') => "with -z: fail rather than write zeroes as data",
        (_, 'p') => "nothing; accepted for old scripts",
        (_, 'q') => "no report",
        (_, 'r') => "nothing here: registers the buffer",
        (_, 'u') => "with -z: the space may be given back",
        (_, 'v') => "show the bytes",
        (_, 'z') => "zeroes, without data where that is possible",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grammar::table::find;

    #[test]
    fn every_option_of_every_command_is_described() {
        for spec in COMMANDS {
            for letter in spec.letters.unwrap_or_default().chars().filter(|letter| *letter != ':') {
                assert_ne!(meaning(spec.name, letter), "", "{} -{letter}", spec.name);
            }
        }
    }

    #[test]
    fn commands_are_sorted_and_found_by_both_names() {
        assert!(COMMANDS.is_sorted_by_key(|spec| spec.name));
        assert_eq!(find("r").map(|spec| spec.name), Some("read"));
        assert_eq!(find("?").map(|spec| spec.name), Some("help"));
        assert!(find("R").is_none());
    }

    #[test]
    fn usage_lines() {
        let usage = |name| find(name).unwrap().usage(name);
        assert!(usage("map").starts_with("map  -- "));
        assert!(usage("f").starts_with("f -- "));
        assert!(usage("alloc").starts_with("alloc offset [count] -- "));
        assert!(all().lines().count() > 30);
        assert!(one(find("read").unwrap(), "r").contains(" -P ...  all bytes must be this one"));
    }
}
