//! The fault lists. A fault is a few lines; blank lines separate faults:
//!
//! ```text
//! # Why it would hurt.
//! name: a-name-of-its-own
//! file: crates/qcow2-core/src/meta/flush.rs
//! - the line as it is
//! + the line as it would be wrong
//! test: -p qcow2-core --test flush
//! ```
//!
//! Several `-` lines are consecutive lines, and `+` lines are optional. Indentation is ignored; the `-` lines
//! must occur in the file exactly once. `test:` gives arguments of `cargo test`; it may be repeated.

use std::fs;
use std::path::Path;

/// A fault, and the tests that must detect it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) name: String,
    pub(super) file: String,
    old: Vec<String>,
    new: Vec<String>,
    pub(super) tests: Vec<String>,
}

impl Fault {
    /// The file's text with the fault applied. Errors: its lines do not occur, or occur more than once.
    pub(super) fn apply(&self, text: &str) -> Result<String, String> {
        let lines: Vec<&str> = text.lines().collect();
        let is_place = |window: &&[&str]| window.iter().zip(&self.old).all(|(line, old)| line.trim() == old);
        let places: Vec<usize> = (0..lines.len().saturating_sub(self.old.len() - 1))
            .filter(|&at| is_place(&&lines[at..at + self.old.len()]))
            .collect();
        let [place] = places[..] else {
            return Err(format!("its line is in {} {} times, not once", self.file, places.len()));
        };
        let (before, after) = (&lines[..place], &lines[place + self.old.len()..]);
        let new = self.new.iter().map(String::as_str);
        let all: Vec<&str> = before.iter().copied().chain(new).chain(after.iter().copied()).collect();
        Ok(all.join("\n") + "\n")
    }

    fn check(self) -> Result<Self, String> {
        let missing = [
            ("name", self.name.is_empty()),
            ("file", self.file.is_empty()),
            ("-", self.old.is_empty()),
            ("test", self.tests.is_empty()),
        ];
        match missing.iter().find(|(_, missing)| *missing) {
            Some((what, _)) => Err(format!("fault '{}' has no '{what}'", self.name)),
            None => Ok(self),
        }
    }
}

/// Every fault of every list in `folder`.
pub(super) fn load(folder: &Path) -> Result<Vec<Fault>, String> {
    let failed = |e: std::io::Error| format!("{}: {e}", folder.display());
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        paths.push(entry.map_err(failed)?.path());
    }
    paths.retain(|path| path.extension().is_some_and(|ext| ext == "txt"));
    paths.sort();
    let mut faults = Vec::new();
    for path in paths {
        let text = fs::read_to_string(&path).map_err(failed)?;
        faults.extend(parse(&text).map_err(|error| format!("{}: {error}", path.display()))?);
    }
    let mut names: Vec<&str> = faults.iter().map(|fault| &*fault.name).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(format!("two faults are called '{}'", pair[0])),
        None => Ok(faults),
    }
}

fn parse(text: &str) -> Result<Vec<Fault>, String> {
    let paragraphs =
        text.split("\n\n").map(|paragraph| paragraph.lines().filter(|line| !line.starts_with('#')));
    paragraphs
        .map(Vec::from_iter)
        .filter(|lines| lines.iter().any(|line| !line.is_empty()))
        .map(parse_one)
        .collect()
}

fn parse_one(lines: Vec<&str>) -> Result<Fault, String> {
    let mut fault = Fault::default();
    for line in lines.into_iter().filter(|line| !line.is_empty()) {
        let value = |prefix: &str| line.strip_prefix(prefix).map(|rest| rest.trim().to_owned());
        if let Some(name) = value("name:") {
            fault.name = name;
        } else if let Some(file) = value("file:") {
            fault.file = file;
        } else if let Some(test) = value("test:") {
            fault.tests.push(test);
        } else if let Some(old) = value("-") {
            fault.old.push(old);
        } else if let Some(new) = value("+") {
            fault.new.push(new);
        } else {
            return Err(format!("'{line}' is not a valid line of a fault"));
        }
    }
    fault.check()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "# A list.\n\n# Why.\nname: one\nfile: a.rs\n- b\n- c\n+ d\ntest: -p x y\n\nname: two\nfile: a.rs\n- e\ntest: z\n";

    #[test]
    fn a_list_is_parsed() {
        let faults = parse(LIST).unwrap();
        assert_eq!(faults.len(), 2);
        assert_eq!((&*faults[0].name, &*faults[0].file, &*faults[0].tests[0]), ("one", "a.rs", "-p x y"));
        assert!(parse("name: one\nfile: a\ntest: b\n").unwrap_err().contains("no '-'"));
        assert!(parse("name: one\nwhat\n").unwrap_err().contains("what"));
    }

    #[test]
    fn the_lines_of_a_fault_must_occur_exactly_once() {
        let faults = parse(LIST).unwrap();
        assert_eq!(faults[0].apply("a\n    b\n    c\ne\n").unwrap(), "a\nd\ne\n");
        assert_eq!(faults[1].apply("a\n  e\nb\n").unwrap(), "a\nb\n");
        assert!(faults[0].apply("b\na\nc\n").unwrap_err().contains("0 times"));
        assert!(faults[1].apply("e\ne\n").unwrap_err().contains("2 times"));
        assert!(faults[0].apply("").is_err());
    }

    #[test]
    fn every_fault_in_the_lists_applies_to_the_tree() {
        let root = crate::tree::root();
        for fault in load(&root.join("xtask/src/mutants")).unwrap() {
            let text = fs::read_to_string(root.join(&fault.file)).unwrap();
            assert!(fault.apply(&text).is_ok(), "{}: its lines are not in {}", fault.name, fault.file);
        }
    }

    /// A renamed feature or test would otherwise be noticed only by the long run.
    #[test]
    fn every_test_in_the_lists_is_in_the_tree() {
        let root = crate::tree::root();
        for test in load(&root.join("xtask/src/mutants")).unwrap().iter().flat_map(|fault| &fault.tests) {
            let words: Vec<&str> = test.split_whitespace().collect();
            let value = |option| words.iter().position(|&word| word == option).map(|at| words[at + 1]);
            let folder = match value("-p").unwrap() {
                "qcow2-tests" => root.join("tests"),
                package => root.join("crates").join(package),
            };
            let manifest = fs::read_to_string(folder.join("Cargo.toml")).unwrap();
            if let Some(feature) = value("--features") {
                let declared = manifest.lines().any(|line| line.starts_with(&format!("{feature} = [")));
                assert!(declared, "{test}: no feature {feature}");
            }
            if let Some(name) = value("--test") {
                let files = [format!("tests/{name}.rs"), format!("tests/{name}/main.rs")];
                let found = files.iter().any(|file| folder.join(file).is_file());
                assert!(found, "{test}: no test {name}");
            }
        }
    }
}
