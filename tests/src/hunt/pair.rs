//! Runs a history of command lines with both tools, each in a folder of its own.

use super::cause;
use crate::copies::{Copies, FolderCopy};
use crate::side_by_side::words;
use qcow2_blockdev::parse_size;
use qcow2_testkit::oracle::{Outcome, Qemu, Tool};
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::ops::Range;
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
            let before = copies.each_ref().map(FolderCopy::state);
            let (failed, said) = self.run_line(line, at == 0, &copies);
            let files = |found: FileDifference| self.judge(&history[..at], line, failed, found, &copies);
            seen.1 = said.or_else(|| {
                let judged: Vec<Difference> = self.compare_files(&copies).map(files).collect();
                // What is wrong with a changed file says more than what is seen of it from above.
                let own = judged.iter().find(|difference| !difference.cause.ends_with(ABOVE));
                own.or(judged.first()).cloned()
            });
            let changed = |side: usize| copies[side].state() != before[side];
            // A line that failed may have changed files with the reference, in ways that no guest sees: what
            // follows would begin with other files.
            if seen.1.is_some() || failed && changed(0) && !changed(1) {
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
        copies: &[FolderCopy; 2],
    ) -> Difference {
        let FileDifference { what, name, shown } = found;
        let [theirs, ours] = copies;
        let (others, sizes) = (part_of(line, false), part_of(line, true));
        let split: Vec<String> = before.iter().cloned().chain(others).collect();
        if let Some(sizes) =
            sizes.filter(|sizes| sizes != line && self.becomes(&split, sizes, &name, [theirs, ours]))
        {
            return self.judge(&split, &sizes, failed, FileDifference { what, name, shown }, copies);
        }
        let (was_theirs, copy) = (self.replay(&self.reference, before), self.replay(&self.ours, before));
        let is_same = |one: &FolderCopy, other: &FolderCopy| {
            let [one, other] = [one, other].map(|copy| fs::read(copy.path().join(&name)).ok());
            one == other
        };
        let [old, new] = [&copy, ours].map(|copy| copy.path().join(&name));
        let keeps_content = || {
            let args = ["compare".as_ref(), old.as_os_str(), new.as_os_str()];
            what == CONTENT && self.reference_says(ours, &args).is_some_and(|said| said.code == Some(0))
        };
        let check = |image: &Path| self.reference_says(ours, &["check".as_ref(), image.as_os_str()]);
        let counted_too_low = || {
            let low = |said: Outcome| said.code == Some(2) && said.stderr.contains("ERROR cluster ");
            check(&old).is_some_and(low)
        };
        let is_as_damaged = || {
            let errors = |image| check(image).map(|said| (said.code, said.stderr));
            errors(&old) == errors(&new)
        };
        let verb = match failed && what == CONTENT && self.only_compressed_differ(line, &name, ours, theirs) {
            true => "qemu-io failed, within its compressed writes".to_owned(),
            false => deed_of(line),
        };
        let cause = match what {
            CONTENT if is_same(&copy, ours) && is_same(&was_theirs, theirs) => {
                format!("{verb}: {what}{ABOVE}")
            }
            _ if failed && (is_same(&copy, ours) || keeps_content()) => {
                format!("{verb}: failed, and only the reference changed a file")
            }
            _ if keeps_content() => format!("{verb}: content that only ours kept"),
            CONTENT if verb == "qemu-io truncate" && self.only_ours_is_zero(&name, ours, theirs) => {
                format!("{verb}: content that is zeroes only in ours")
            }
            CHECK if is_as_damaged() => format!("{verb}: {what}, as damaged as before"),
            CONTENT if self.is_copy_of_layout(line, &name, [ours, theirs]) => {
                format!("{verb}: {what} of an image copied as raw")
            }
            CONTENT if counted_too_low() => {
                format!("{verb}: content of an image with a count that was too low")
            }
            CONTENT
                if words(line).iter().any(|word| word == "-B")
                    && self.only_ours_copied(line, &shown, ours, theirs) =>
            {
                format!("{verb} -B: {what} that only ours copied")
            }
            _ => format!("{verb}: {what}"),
        };
        [was_theirs, copy].into_iter().for_each(|copy| self.copies.give_back(copy));
        Difference { cause, shown }
    }

    /// True if after the lines `before` and then `line` the file `name` is with both tools what it is in
    /// their folders.
    fn becomes(&self, before: &[String], line: &str, name: &str, [theirs, ours]: [&FolderCopy; 2]) -> bool {
        let lines: Vec<String> = before.iter().cloned().chain([line.to_owned()]).collect();
        let is_same = |tools: &Qemu, copy: &FolderCopy| {
            let again = self.replay(tools, &lines);
            let [one, other] = [copy, &again].map(|copy| fs::read(copy.path().join(name)).ok());
            self.copies.give_back(again);
            one.is_some() && one == other
        };
        is_same(&self.reference, theirs) && is_same(&self.ours, ours)
    }

    /// True if the compressed writes of `line` reach every difference between the two disks `name`.
    fn only_compressed_differ(&self, line: &str, name: &str, ours: &FolderCopy, theirs: &FolderCopy) -> bool {
        let mut written = compressed_writes(line);
        written.sort_by_key(|range| range.start);
        let bytes = [ours, theirs].map(|copy| self.guest_bytes(copy, name));
        let ([Some(own), Some(reference)], false) = (bytes, written.is_empty()) else { return false };
        let mut at = 0;
        let last = own.len()..own.len();
        let all_else_is_equal = written.into_iter().chain([last]).all(|range| {
            let between = at..range.start.clamp(at, own.len());
            at = range.end.clamp(between.end, own.len());
            own[between.clone()] == reference[between]
        });
        own.len() == reference.len() && all_else_is_equal
    }

    /// True if the new disk that is the last word of `line` shows what its source shows, which is the word
    /// before, from the first difference that `shown` tells of to the end: in our folder, not in the other.
    fn only_ours_copied(&self, line: &str, shown: &str, ours: &FolderCopy, theirs: &FolderCopy) -> bool {
        let words = words(line);
        let ([.., source, target], Some(start)) = (&words[..], first_mismatch(shown)) else { return false };
        let is_copied = |copy: &FolderCopy| {
            let [source, target] = [source, target].map(|name| self.guest_bytes(copy, name));
            Some(source?.get(start..)? == target?.get(start..)?)
        };
        (is_copied(ours), is_copied(theirs)) == (Some(true), Some(false))
    }

    /// True if the disk `name` is as long in both folders, and where they differ ours is zero.
    fn only_ours_is_zero(&self, name: &str, ours: &FolderCopy, theirs: &FolderCopy) -> bool {
        let [own, reference] = [ours, theirs].map(|copy| self.guest_bytes(copy, name));
        let (Some(own), Some(reference)) = (own, reference) else { return false };
        let mut pairs = own.iter().zip(&reference);
        own.len() == reference.len() && pairs.all(|(own, reference)| own == reference || *own == 0)
    }

    /// What a guest reads from the disk `name`.
    fn guest_bytes(&self, copy: &FolderCopy, name: &str) -> Option<Vec<u8>> {
        let raw = copy.path().with_extension("raw");
        let args = ["convert".as_ref(), "-O".as_ref(), "raw".as_ref(), OsStr::new(name), raw.as_os_str()];
        let converted = self.reference_says(copy, &args)?.code == Some(0);
        let bytes = fs::read(&raw).ok().filter(|_| converted);
        let _ = fs::remove_file(raw);
        bytes
    }

    /// True if in both folders the disk `name` is equal to the bytes of one image that `line` names, or of
    /// all that it names, one behind the other.
    fn is_copy_of_layout(&self, line: &str, name: &str, folders: [&FolderCopy; 2]) -> bool {
        let words = line.split(|c: char| !c.is_alphanumeric() && c != '.');
        let is_file = |source: &&str| *source != name && folders[0].path().join(source).is_file();
        let sources: Vec<&str> = words.filter(is_file).collect();
        let is_copy = |source: &str, copy: &FolderCopy| {
            let args = ["compare", "-f", "raw", source, name].map(OsStr::new);
            self.reference_says(copy, &args).is_some_and(|said| said.code == Some(0))
        };
        let is_all = |copy: &FolderCopy| {
            let mut all = Vec::new();
            for source in &sources {
                all.extend(fs::read(copy.path().join(source)).unwrap_or_default());
                all.resize(all.len().next_multiple_of(512), 0);
            }
            self.guest_bytes(copy, name) == Some(all)
        };
        sources.iter().any(|source| folders.into_iter().all(|copy| is_copy(source, copy)))
            || (sources.len() > 1 && folders.into_iter().all(is_all))
    }

    /// A folder after the lines `before` with one of the tools.
    fn replay(&self, tools: &Qemu, before: &[String]) -> FolderCopy {
        let copy = self.copies.take();
        for line in before {
            let words = words(line);
            let Some((name, args)) = words.split_first() else { continue };
            let tool = if name == "qemu-io" { &tools.io } else { &tools.img };
            // One that does not end was told of before.
            let _ = catch_unwind(AssertUnwindSafe(|| tool.run_in(copy.path(), args)));
        }
        copy
    }

    /// What the reference's qemu-img says in a folder; `None` if it does not end in time.
    fn reference_says(&self, copy: &FolderCopy, args: &[&OsStr]) -> Option<Outcome> {
        catch_unwind(AssertUnwindSafe(|| self.reference.img.run_in(copy.path(), args))).ok()
    }

    /// The files that only one of the two left, or whose guest content differs, and the images of ours that
    /// the reference's check finds fault with.
    fn compare_files<'a>(
        &'a self,
        [reference, ours]: &'a [FolderCopy; 2],
    ) -> impl Iterator<Item = FileDifference> + 'a {
        let names: BTreeSet<String> = reference.changed().into_iter().chain(ours.changed()).collect();
        names.into_iter().filter_map(move |name| {
            let [theirs, own] = [reference, ours].map(|copy| copy.path().join(&name));
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
            let args = ["compare".as_ref(), theirs.as_os_str(), own.as_os_str()];
            let Some(compared) = self.reference_says(ours, &args) else {
                return differs("files that are not compared in time", name.clone());
            };
            if compared.code == Some(1) {
                return differs(CONTENT, format!("{name}: {compared}"));
            }
            let checked =
                |image: &Path, copy| self.reference_says(copy, &["check".as_ref(), image.as_os_str()]);
            let (Some(of_theirs), Some(of_ours)) = (checked(&theirs, reference), checked(&own, ours)) else {
                return differs("files that are not checked in time", name.clone());
            };
            let worse = of_ours.code != of_theirs.code && !matches!(of_ours.code, Some(0 | 63));
            if worse { differs(CHECK, format!("{name}: {of_ours}")) } else { None }
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
/// Of an image in which the reference finds other damage than in its own.
const CHECK: &str = "check of our image";
/// Of a disk that neither tool changed: it differs by what it stands on.
const ABOVE: &str = " of a disk above what changed";

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

/// The guest bytes that the compressed writes of a line of qemu-io reach.
fn compressed_writes(line: &str) -> Vec<Range<usize>> {
    if !line.starts_with("qemu-io ") {
        return Vec::new();
    }
    let words = words(line);
    let places = words.iter().filter_map(|word| word.strip_prefix("write -q -c ")?.split(' ').next());
    let range = |at: &str| {
        // One that does not begin with a cluster is refused before it writes.
        let start = parse_size(at).ok().filter(|at| at.is_multiple_of(512))? as usize;
        Some(start..start.checked_add(COMPRESSED)?)
    };
    places.filter_map(range).collect()
}

/// Bytes of each compressed write that the grammar makes.
const COMPRESSED: usize = 64 << 10;

/// The first byte that differs, in what a comparison says.
fn first_mismatch(compared: &str) -> Option<usize> {
    let (_, rest) = compared.split_once("Content mismatch at offset ")?;
    rest.split('!').next()?.parse().ok()
}

/// A line of qemu-io with only the commands that give the disk a new size, or with only the others. `None`
/// for any other line, and where none is left.
fn part_of(line: &str, sizes: bool) -> Option<String> {
    let commands: Vec<&str> = line.strip_prefix("qemu-io ").map(|_| line.split(" -c ").collect())?;
    // The last command is followed by the name of the disk.
    let ((last, rest), (first, _)) = (commands.split_last()?, commands.split_first()?);
    let (_, name) = last.rsplit_once(' ')?;
    let last = last.strip_suffix(name)?.trim_end();
    let all = rest.get(1..)?.iter().copied().chain([last]);
    let left: Vec<&str> = all.filter(|command| command.starts_with("'truncate ") == sizes).collect();
    (!left.is_empty()).then(|| format!("{first} -c {} {name}", left.join(" -c ")))
}

/// [`verb_of`] a line, and for qemu-io also what it does if a new size is the only change it makes.
fn deed_of(line: &str) -> String {
    let words = words(line);
    let commands =
        words.windows(2).filter(|pair| pair[0] == "-c").filter_map(|pair| pair[1].split(' ').next());
    let harmless = ["read", "readv", "map", "alloc", "length", "info", "flush", "help", "quit"];
    let mut changing = commands.filter(|command| !harmless.contains(command)).peekable();
    match verb_of(line) {
        verb if verb == "qemu-io" && changing.peek().is_some() && changing.all(|it| it == "truncate") => {
            format!("{verb} truncate")
        }
        verb => verb,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_qemu_io_that_only_truncates_is_told_apart() {
        for (line, expected) in [
            ("qemu-io -c 'truncate 3M' a", "qemu-io truncate"),
            ("qemu-io -c 'read -q 0 1' -c 'truncate -m off 3M' a", "qemu-io truncate"),
            ("qemu-io -c 'write 0 1' -c 'truncate 3M' a", "qemu-io"),
            ("qemu-io -c map a", "qemu-io"),
            ("qemu-img resize a 3M", "qemu-img resize"),
        ] {
            assert_eq!(deed_of(line), expected);
        }
    }

    #[test]
    fn new_sizes_are_taken_out_of_a_line_of_qemu_io() {
        for (line, sizes, others) in [
            (
                "qemu-io -n -c 'write -q 2M 1M' -c 'truncate -m metadata 2M' a",
                Some("qemu-io -n -c 'truncate -m metadata 2M' a"),
                Some("qemu-io -n -c 'write -q 2M 1M' a"),
            ),
            (
                "qemu-io -c 'truncate 3M' -c flush -c 'truncate 2M' a",
                Some("qemu-io -c 'truncate 3M' -c 'truncate 2M' a"),
                Some("qemu-io -c flush a"),
            ),
            ("qemu-io -c 'truncate 3M' a", Some("qemu-io -c 'truncate 3M' a"), None),
            ("qemu-io -c 'write -q 0 1' a", None, Some("qemu-io -c 'write -q 0 1' a")),
            ("qemu-img resize a 3M", None, None),
        ] {
            assert_eq!((part_of(line, true).as_deref(), part_of(line, false).as_deref()), (sizes, others));
        }
    }

    #[test]
    fn what_compressed_writes_reach_is_found() {
        let written = |line| compressed_writes(line);
        let line = "qemu-io -c 'write -q -c 64k 64k' -c 'write -q 0 1' -c 'write -q -c 512 64k' a";
        assert_eq!(written(line), [0x10000..0x20000, 0x200..0x10200]);
        assert_eq!(written("qemu-img -c 'write -q -c 64k 64k' a"), []);
        assert_eq!(written("qemu-io -c 'write -q -c foo 64k' -c 'write -q -c 511 64k' a"), []);
    }

    #[test]
    fn the_offset_of_a_mismatch_is_found() {
        let said = "exit code: Some(1)\nstdout:\nContent mismatch at offset 1025!\n";
        assert_eq!(first_mismatch(said), Some(1025));
        assert_eq!(first_mismatch("Images are identical."), None);
    }
}
