//! Import cycles: files of one crate that import each other, directly or through other files.
//!
//! An import is a path that starts with `crate`, `super`, `self` or a submodule, in a `use` or anywhere in
//! shipped code. A path through a re-export counts as an import of the file that defines the item, so a
//! `lib.rs` that only re-exports is in no cycle. Methods are not followed: a type whose methods are in many
//! files counts as one import.

use crate::lex::{Kind, Token};
use crate::source::{Source, matching};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// How many re-exports a path may pass through. Only a cycle of re-exports is longer.
const MAX_HOPS: usize = 16;

type Path = Vec<String>;

/// Files that import each other, relative to the crate's `src/`, each with the files of the cycle it imports.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Circle<'a> {
    pub(super) files: Vec<(&'a str, Vec<&'a str>)>,
}

/// The cycles of a crate, largest first.
pub(super) fn circles<'a>(files: &[Source<'a>]) -> Vec<Circle<'a>> {
    let mut graph = Graph::default();
    for (file, source) in files.iter().enumerate() {
        if let Some(module) = module_of(source.path) {
            Reader { source, graph: &mut graph, file }.module(0..source.tokens.len(), &module);
        }
    }
    let imports = graph.imports();
    let name = |file: usize| below_src(files[file].path);
    let imported = |file: usize, group: &[usize]| {
        let within = group.iter().filter(|&&to| imports.contains(&(file, to)));
        (name(file), within.map(|&to| name(to)).collect())
    };
    let mut circles: Vec<Circle<'_>> = connected(&imports, files.len())
        .into_iter()
        .filter(|group| group.len() > 1)
        .map(|group| Circle { files: group.iter().map(|&file| imported(file, &group)).collect() })
        .collect();
    circles.sort_by_key(|circle| std::cmp::Reverse(circle.files.len()));
    circles
}

fn below_src(path: &str) -> &str {
    path.split_once("/src/").map_or(path, |(_, below)| below)
}

/// The module of a library file. Binaries beside the library are crates of their own.
fn module_of(path: &str) -> Option<Path> {
    let below = below_src(path).strip_suffix(".rs")?;
    if below == "main" || below.starts_with("bin/") {
        return None;
    }
    let mut parts: Path = below.split('/').map(str::to_owned).collect();
    if parts.last().is_some_and(|last| last == "mod") || below == "lib" {
        parts.pop();
    }
    Some(parts)
}

#[derive(Default)]
struct Graph {
    modules: BTreeMap<Path, Module>,
}

#[derive(Default)]
struct Module {
    file: usize,
    items: BTreeSet<String>,
    uses: Vec<Use>,
    /// Paths in code outside of `use`.
    paths: Vec<Path>,
    /// Words of shipped code outside of `use`.
    words: BTreeSet<String>,
}

/// One name that a `use` imports; `*` for a glob.
struct Use {
    name: String,
    path: Path,
    public: bool,
}

impl Graph {
    /// Pairs of importing and imported file.
    fn imports(&self) -> BTreeSet<(usize, usize)> {
        let mut found = BTreeSet::new();
        for (at, module) in &self.modules {
            let mut import = |path: &Path| {
                if let Some(file) = self.resolve(at, path, MAX_HOPS).filter(|&file| file != module.file) {
                    found.insert((module.file, file));
                }
            };
            for used in &module.uses {
                // A re-export that the file does not use itself is no import.
                if !used.public || module.words.contains(&used.name) {
                    import(&used.path);
                }
            }
            module.paths.iter().for_each(&mut import);
        }
        found
    }

    /// The file that defines `path` as seen from module `at`. `None` if it belongs to another crate.
    fn resolve(&self, at: &Path, path: &[String], hops: usize) -> Option<usize> {
        let (module, rest) = self.locate(at, path)?;
        // A name that is not found comes from a macro or another crate; count it as an import of the module's
        // file.
        self.find(&module, rest, hops).or_else(|| self.modules.get(&module).map(|module| module.file))
    }

    /// The last module on `path`, and the rest of the path in it.
    fn locate<'p>(&self, at: &Path, path: &'p [String]) -> Option<(Path, &'p [String])> {
        let (first, mut rest) = path.split_first()?;
        let mut module = at.clone();
        match first.as_str() {
            "crate" => module.clear(),
            "self" => {}
            "super" => {
                module.pop()?;
                while rest.first().is_some_and(|next| next == "super") {
                    module.pop()?;
                    rest = &rest[1..];
                }
            }
            _ => {
                module.push(first.clone());
                self.modules.get(&module)?;
            }
        }
        while let Some((next, more)) = rest.split_first() {
            module.push(next.clone());
            if !self.modules.contains_key(&module) {
                module.pop();
                break;
            }
            rest = more;
        }
        Some((module, rest))
    }

    /// The file that defines `rest`, seen from `module`.
    fn find(&self, module: &Path, rest: &[String], hops: usize) -> Option<usize> {
        let here = self.modules.get(module)?;
        let Some((name, more)) = rest.split_first() else { return Some(here.file) };
        if here.items.contains(name) {
            return Some(here.file);
        }
        let hops = hops.checked_sub(1)?;
        let named = |used: &Use| self.resolve(module, &[&used.path, more].concat(), hops);
        let glob = |used: &Use| {
            let path = [&used.path, rest].concat();
            let (module, rest) = self.locate(module, &path)?;
            self.find(&module, rest, hops)
        };
        let found = here.uses.iter().filter(|used| used.name == *name).find_map(named);
        found.or_else(|| here.uses.iter().filter(|used| used.name == "*").find_map(glob))
    }
}

/// Adds the modules of one file to the graph.
struct Reader<'a, 'b> {
    source: &'b Source<'a>,
    graph: &'b mut Graph,
    file: usize,
}

impl<'a> Reader<'a, '_> {
    fn tokens(&self) -> &[Token<'a>] {
        &self.source.tokens
    }

    fn module(&mut self, range: Range<usize>, path: &Path) {
        let mut module = Module { file: self.file, ..Module::default() };
        let mut at = range.start;
        while at < range.end.min(self.tokens().len()) {
            let token = self.tokens()[at];
            let next = self.tokens().get(at + 1).copied();
            if self.source.is_test_line(token.line) {
                at += 1;
            } else if token.is("use") && !next.is_some_and(|t| t.is("<")) {
                let public = at > 0 && (self.tokens()[at - 1].is("pub") || self.tokens()[at - 1].is(")"));
                at = self.use_tree(at + 1, &mut Vec::new(), public, &mut module.uses);
            } else if token.is("mod") && self.source.matches(at + 2, &["{"]) {
                let close = matching(self.tokens(), at + 2);
                let inner = [path.as_slice(), &[self.tokens()[at + 1].text.to_owned()]].concat();
                self.module(at + 3..close, &inner);
                at = close + 1;
            } else {
                if token.kind == Kind::Word {
                    module.words.insert(token.text.to_owned());
                    let defines = ITEMS.contains(&token.text);
                    if let Some(name) = next.filter(|t| defines && t.kind == Kind::Word) {
                        module.items.insert(name.text.to_owned());
                    }
                }
                let (path, end) = self.path(at);
                if path.len() > 1 {
                    module.paths.push(path);
                }
                at = end.max(at + 1);
            }
        }
        self.graph.modules.insert(path.clone(), module);
    }

    /// The path that starts at `at`, and its end. Empty if none starts there.
    fn path(&self, at: usize) -> (Path, usize) {
        let mut path = Path::new();
        let mut end = at;
        let absolute = at > 1 && self.source.matches(at - 2, &[":", ":"]);
        // `pub(in crate::a)` is no import.
        let visibility = at > 0 && self.tokens()[at - 1].is("in") && self.source.matches(at, &["crate"]);
        while !absolute && !visibility && self.tokens().get(end).is_some_and(|t| t.kind == Kind::Word) {
            path.push(self.tokens()[end].text.to_owned());
            end += 1;
            if !self.source.matches(end, &[":", ":"]) {
                break;
            }
            end += 2;
        }
        (path, end)
    }

    /// Reads one branch of a `use` tree from `at` on, below `prefix`. Returns its end.
    fn use_tree(&self, mut at: usize, prefix: &mut Path, public: bool, uses: &mut Vec<Use>) -> usize {
        let depth = prefix.len();
        let mut name = String::new();
        while let Some(token) = self.tokens().get(at).copied() {
            if token.is("{") {
                let close = matching(self.tokens(), at);
                at += 1;
                while at < close {
                    at = self.use_tree(at, prefix, public, uses) + 1;
                }
                prefix.truncate(depth);
                return close + 1;
            }
            if token.is("*") {
                name = "*".to_owned();
            } else if token.is("as") {
                at += 1;
                name = self.tokens().get(at).map_or("", |t| t.text).to_owned();
            } else if token.is("self") && !prefix.is_empty() {
                // `a::{self}` is `a`.
                name = prefix.last().cloned().unwrap_or_default();
            } else if token.kind == Kind::Word {
                prefix.push(token.text.to_owned());
                name = token.text.to_owned();
            } else if !token.is(":") {
                break;
            }
            at += 1;
        }
        if !name.is_empty() {
            uses.push(Use { name, path: prefix.clone(), public });
        }
        prefix.truncate(depth);
        at
    }
}

/// Keywords that define the item named after them.
const ITEMS: &[&str] = &["fn", "struct", "enum", "trait", "const", "static", "type", "union"];

/// The strongly connected components of `count` nodes along `edges`.
fn connected(edges: &BTreeSet<(usize, usize)>, count: usize) -> Vec<Vec<usize>> {
    let reach: Vec<BTreeSet<usize>> = (0..count).map(|from| reachable(edges, from)).collect();
    let mut seen = BTreeSet::new();
    let mut groups = Vec::new();
    for node in 0..count {
        let group: Vec<usize> = (node..count)
            .filter(|&other| other == node || reach[node].contains(&other) && reach[other].contains(&node))
            .collect();
        if seen.insert(node) {
            seen.extend(&group);
            groups.push(group);
        }
    }
    groups
}

fn reachable(edges: &BTreeSet<(usize, usize)>, from: usize) -> BTreeSet<usize> {
    let mut found = BTreeSet::new();
    let mut open = vec![from];
    while let Some(node) = open.pop() {
        for &(_, to) in edges.range((node, 0)..=(node, usize::MAX)) {
            if found.insert(to) {
                open.push(to);
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(files: &[(&str, &str)], expected: &[&[&str]]) {
        let paths: Vec<String> = files.iter().map(|(name, _)| format!("crates/a/src/{name}")).collect();
        let sources: Vec<_> =
            paths.iter().zip(files).map(|(path, (_, text))| Source::new(path, text)).collect();
        let circles = circles(&sources);
        let seen: Vec<Vec<&str>> =
            circles.iter().map(|circle| circle.files.iter().map(|(name, _)| *name).collect()).collect();
        assert_eq!(seen, expected, "{files:?}");
    }

    #[test]
    fn a_cycle_lists_who_imports_whom() {
        let paths = ["crates/a/src/a.rs", "crates/a/src/b.rs", "crates/a/src/c.rs"];
        let texts = ["use crate::b::B;", "use crate::{a::A, c::C};", "use crate::b::B; use crate::d::D;"];
        let sources: Vec<_> = paths.iter().zip(texts).map(|(path, text)| Source::new(path, text)).collect();
        let files = vec![("a.rs", vec!["b.rs"]), ("b.rs", vec!["a.rs", "c.rs"]), ("c.rs", vec!["b.rs"])];
        assert_eq!(circles(&sources), [Circle { files }]);
    }

    #[test]
    fn two_files_that_import_each_other_are_a_cycle() {
        check(&[("a.rs", "use crate::b::B;"), ("b.rs", "use crate::a::A;")], &[&["a.rs", "b.rs"]]);
        check(&[("a.rs", "use crate::b::B;"), ("b.rs", "struct B;")], &[]);
        check(
            &[("a.rs", "use crate::{b::{self, B}};"), ("b.rs", "fn f() { crate::a::g() }")],
            &[&["a.rs", "b.rs"]],
        );
    }

    #[test]
    fn a_cycle_may_lead_through_other_files() {
        let third = "use super::a;";
        check(
            &[
                ("a.rs", "use crate::b::B;"),
                ("b.rs", "use crate::c::C as D;"),
                ("c.rs", third),
                ("d.rs", third),
            ],
            &[&["a.rs", "b.rs", "c.rs"]],
        );
    }

    #[test]
    fn tests_comments_and_strings_are_no_imports() {
        let back =
            "// use crate::a::A;\nconst C: &str = \"crate::a\";\n#[cfg(test)]\nmod tests { use crate::a; }";
        check(&[("a.rs", "use crate::b::B;"), ("b.rs", back)], &[]);
        check(&[("a.rs", "use crate::b::B;"), ("b.rs", "pub(in crate::a) fn f() {}")], &[]);
        check(&[("a.rs", "use crate::b::B;"), ("b.rs", "use other::crate_::a; use std::a;")], &[]);
    }

    #[test]
    fn a_reexport_counts_as_the_defining_file() {
        let root = "mod a; mod b; pub use a::A; pub use crate::b::*;";
        check(&[("lib.rs", root), ("a.rs", "use crate::B;"), ("b.rs", "pub struct B;")], &[]);
        check(
            &[("lib.rs", root), ("a.rs", "use crate::B;"), ("b.rs", "use crate::A; pub struct B;")],
            &[&["a.rs", "b.rs"]],
        );
    }

    #[test]
    fn a_parent_module_that_uses_its_child_imports_it() {
        let parent = "mod c; pub use c::C; struct P { c: C }";
        check(&[("p/mod.rs", parent), ("p/c.rs", "use super::P; struct C;")], &[&["p/mod.rs", "p/c.rs"]]);
        check(&[("p.rs", "mod c; fn f() { c::g() }"), ("p/c.rs", "use super::*;")], &[&["p.rs", "p/c.rs"]]);
        check(&[("p.rs", "mod c; fn f() {}"), ("p/c.rs", "use super::f;")], &[]);
    }

    #[test]
    fn inline_modules_belong_to_their_file() {
        let a = "mod inner { use super::super::b::B; pub struct A; }";
        check(&[("a.rs", a), ("b.rs", "use crate::a::inner::A; struct B;")], &[&["a.rs", "b.rs"]]);
    }

    #[test]
    fn cyclic_reexports_terminate() {
        check(
            &[("a.rs", "pub use crate::b::X; type Y = X;"), ("b.rs", "pub use crate::a::X; type Z = X;")],
            &[&["a.rs", "b.rs"]],
        );
    }

    #[test]
    fn any_text_terminates() {
        for text in ["use", "use a::", "use a::{", "use {{", "mod a {", "crate::", "use a as"] {
            check(&[("a.rs", text)], &[]);
        }
    }
}
