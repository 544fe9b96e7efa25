//! Runs a history of command lines with both tools, each in a folder of its own.

use super::cause;
use crate::copies::{Copies, FolderCopy};
use crate::side_by_side::words;
use qcow2_testkit::oracle::{Outcome, Qemu, Tool};
use std::collections::BTreeSet;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

/// Both tools under their names, and the folder in which each history begins.
pub(super) struct Pair {
    reference: Qemu,
    ours: Qemu,
    copies: Copies,
}

/// The first thing in which the two runs of a history differ.
#[derive(Clone, Debug)]
pub(super) struct Difference {
    /// What has the same cause has the same text here.
    pub(super) cause: String,
    /// Both outcomes, or what is wrong with a file, for a person.
    pub(super) shown: String,
}

impl Pair {
    /// `ours`: our program. `root`: an empty folder for the links and copies; `start`: what each history
    /// begins with. `None`, with a printed skip, if the reference is missing.
    pub(super) fn new(ours: &Path, root: &Path, start: PathBuf) -> Option<Self> {
        let reference = Qemu::find()?;
        let bin = root.join("bin");
        fs::create_dir(&bin).expect("a new folder for the program");
        let link = |name: &str| {
            let link = bin.join(name);
            #[cfg(unix)]
            std::os::unix::fs::symlink(ours, &link).expect("a link to the program");
            Tool::at(link)
        };
        let ours = Qemu { img: link("qemu-img"), io: link("qemu-io") };
        Some(Self { reference, ours, copies: Copies::new(start, root.to_owned()) })
    }

    /// Runs `history` up to the first difference. Returns the number of lines that were run.
    pub(super) fn run(&self, history: &[String]) -> (usize, Option<Difference>) {
        let copies = [self.copies.take(), self.copies.take()];
        let mut seen = (0, None);
        for (at, line) in history.iter().enumerate() {
            seen.0 += 1;
            let (failed, said) = self.run_line(line, at == 0, &copies);
            let files = |found: FileDifference| self.judge(&history[..at], line, failed, found, &copies[1]);
            seen.1 = said.or_else(|| self.compare_files(&copies).map(files));
            if seen.1.is_some() {
                break;
            }
        }
        copies.into_iter().for_each(|copy| self.copies.give_back(copy));
        seen
    }

    /// Whether the line failed with both, and how what they said differs. `first`: of its history.
    fn run_line(
        &self,
        line: &str,
        first: bool,
        [reference, ours]: &[FolderCopy; 2],
    ) -> (bool, Option<Difference>) {
        let words = words(line);
        let Some((name, args)) = words.split_first() else { return (false, None) };
        let run = |tools: &Qemu, folder: &Path| {
            let tool = if name == "qemu-io" { &tools.io } else { &tools.img };
            catch_unwind(AssertUnwindSafe(|| tool.run_in(folder, args)))
                .map(|outcome| named(outcome, tool, name))
        };
        let (theirs, own) = match (run(&self.reference, reference.path()), run(&self.ours, ours.path())) {
            (Ok(theirs), Ok(own)) => (theirs, own),
            // Both wait for what never comes.
            (Err(_), Err(_)) => return (true, None),
            (theirs, _) => {
                let who = if theirs.is_err() { "the reference" } else { "ours" };
                let cause = format!("{}: {who} does not end", verb_of(line));
                return (false, Some(Difference { shown: cause.clone(), cause }));
            }
        };
        let cause = cause::of_outcomes(&verb_of(line), first, &theirs, &own);
        let shown = |cause| Difference { cause, shown: format!("{theirs}\n-- ours:\n{own}") };
        (theirs.code != Some(0), cause.map(shown))
    }

    /// The cause of a difference between files after `line`: what we say of our own runs, that a failed line
    /// changes nothing and that a disk keeps its content, is looked at with the file as it was before.
    fn judge(
        &self,
        before: &[String],
        line: &str,
        failed: bool,
        found: FileDifference,
        ours: &FolderCopy,
    ) -> Difference {
        let FileDifference { what, name, shown } = found;
        let copy = self.copies.take();
        for line in before {
            let words = words(line);
            let Some((tool, args)) = words.split_first() else { continue };
            let tool = if tool == "qemu-io" { &self.ours.io } else { &self.ours.img };
            // One that does not end was told of before.
            let _ = catch_unwind(AssertUnwindSafe(|| tool.run_in(copy.path(), args)));
        }
        let [old, new] = [&copy, ours].map(|copy| copy.path().join(&name));
        let is_same = fs::read(&old).ok() == fs::read(&new).ok();
        let keeps_content = || {
            let args = ["compare".as_ref(), old.as_os_str(), new.as_os_str()];
            what == CONTENT && self.reference.img.run_in(ours.path(), &args).code == Some(0)
        };
        let verb = verb_of(line);
        let cause = match what {
            _ if failed && is_same => format!("{verb}: failed, and only the reference changed a file"),
            _ if keeps_content() => format!("{verb}: content that only ours kept"),
            CONTENT if words(line).iter().any(|word| word == "-B") => format!("{verb} -B: {what}"),
            _ => format!("{verb}: {what}"),
        };
        self.copies.give_back(copy);
        Difference { cause, shown }
    }

    /// A file that only one of the two left, or whose guest content differs, or an image of ours that the
    /// reference's check finds fault with.
    fn compare_files(&self, [reference, ours]: &[FolderCopy; 2]) -> Option<FileDifference> {
        let names: BTreeSet<String> = reference.changed().into_iter().chain(ours.changed()).collect();
        names.iter().find_map(|name| {
            let [theirs, own] = [reference, ours].map(|copy| copy.path().join(name));
            let differs = |what, shown| Some(FileDifference { what, name: name.clone(), shown });
            match (theirs.is_file(), own.is_file()) {
                (true, false) => return differs("a file that only the reference left", name.clone()),
                (false, true) => return differs("a file that only ours left", name.clone()),
                (false, false) => return None,
                (true, true) => {}
            }
            if fs::read(&theirs).ok() == fs::read(&own).ok() {
                return None;
            }
            let compared = self
                .reference
                .img
                .run_in(ours.path(), &["compare".as_ref(), theirs.as_os_str(), own.as_os_str()]);
            if compared.code == Some(1) {
                return differs(CONTENT, format!("{name}: {compared}"));
            }
            let [of_theirs, of_ours] = [(&theirs, reference), (&own, ours)].map(|(image, copy)| {
                self.reference.img.run_in(copy.path(), &["check".as_ref(), image.as_os_str()])
            });
            let worse = of_ours.code != of_theirs.code && !matches!(of_ours.code, Some(0 | 63));
            if worse { differs("check of our image", format!("{name}: {of_ours}")) } else { None }
        })
    }
}

/// A file that differs after a line.
struct FileDifference {
    what: &'static str,
    name: String,
    shown: String,
}

/// Of a disk, as a guest sees it.
const CONTENT: &str = "content";

/// The outcome with `name` wherever the tool wrote its own path.
fn named(outcome: Outcome, tool: &Tool, name: &str) -> Outcome {
    let path = tool.path().display().to_string();
    let (stdout, stderr) = (outcome.stdout.replace(&path, name), outcome.stderr.replace(&path, name));
    Outcome { stdout, stderr, ..outcome }
}

/// `qemu-img convert`, or `qemu-io`.
pub(super) fn verb_of(line: &str) -> String {
    let count = if line.starts_with("qemu-img") { 2 } else { 1 };
    line.split(' ').take(count).collect::<Vec<_>>().join(" ")
}
