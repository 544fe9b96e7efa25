//! Text of `help`.

use super::table::{COMMANDS, Spec};
use std::fmt::Write;

/// All commands, one per line.
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

/// Description of one option letter of a command.
fn meaning(command: &str, letter: char) -> &'static str {
    match (command, letter) {
        ("open", 'r') | ("reopen", 'r') => "read-only",
        ("reopen", 'w') => "read-write",
        ("open", 's') => "changes go to a scratch overlay",
        ("open", 'C') => "copy data read from the backing chain to the top layer",
        ("open", 'n') => "bypass the page cache, same as -t none",
        ("open", 'k') => "the kernel's asynchronous I/O, same as -i native",
        ("open", 'i') => "asynchronous I/O: threads, native or io_uring",
        ("open", 'U') => "open even if another program writes to it",
        ("open", 't') | ("reopen", 'c') => "cache mode: none, writeback, writethrough, directsync or unsafe",
        ("open", 'd') => "discards: ignore or unmap",
        ("open", 'o') | ("reopen", 'o') => "further options, key=value,...",
        ("truncate", 'm') => "preallocation of new space: off, metadata, falloc or full",
        ("write", 's') => "write the content of this file, repeated",
        ("read", 's') => "with -P: number of bytes to skip",
        ("read", 'l') => "with -P: number of bytes to check",
        ("read" | "readv" | "aio_read", 'P') => "all bytes must be this one",
        (_, 'P') => "the byte to write (0xcd)",
        (_, 'b') => "the VM state instead of the disk",
        (_, 'C') => "report in one line of comma-separated values",
        (_, 'c') => "compressed",
        (_, 'f') => "flush before reporting",
        (_, 'i') => "inject an invalid request",
        (_, 'n') => "with -z: fail rather than write zeroes as data",
        (_, 'p') => "no effect; accepted for old scripts",
        (_, 'q') => "no report",
        (_, 'r') => "no effect; qemu-io registers the buffer",
        (_, 'u') => "with -z: clusters may be deallocated",
        (_, 'v') => "show the bytes",
        (_, 'z') => "write zeroes, by metadata where possible",
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
