//! The same command line given to qemu-img and to our own program, each in its own copy of the same folder.

use qcow2_testkit::oracle::{Outcome, Tool};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

/// Both programs, and the folder that each run starts from.
pub struct SideBySide {
    reference: Tool,
    ours: Tool,
    root: PathBuf,
}

/// What one command line did in both folders.
pub struct Comparison {
    /// The command line.
    pub line: String,
    /// What qemu-img said.
    pub reference: Outcome,
    /// What we said.
    pub ours: Outcome,
    /// How the two differ; empty: not at all.
    pub differences: String,
}

/// What holds the content of a folder together: name to bytes.
type Files = BTreeMap<String, Vec<u8>>;

impl SideBySide {
    /// `ours`: our program, which will be called as `qemu-img`. `root`: an empty folder, in which `make` makes the
    /// folder that each run starts from. Prints a skip and returns `None` where qemu-img is missing.
    pub fn new(ours: &Path, root: &Path, make: impl FnOnce(&Tool, &Path)) -> Option<Self> {
        let reference = Tool::find("qemu-img")?;
        let (bin, start) = (root.join("bin"), root.join("start"));
        fs::create_dir(&bin).expect("a new folder for the program");
        fs::create_dir(&start).expect("a new folder to start from");
        #[cfg(unix)]
        std::os::unix::fs::symlink(ours, bin.join("qemu-img")).expect("a link to the program");
        make(&reference, &start);
        Some(Self { reference, ours: Tool::at(bin.join("qemu-img")), root: root.to_owned() })
    }

    /// Our program, called as `qemu-img`.
    pub fn ours(&self) -> &Tool {
        &self.ours
    }

    /// qemu-img.
    pub fn reference(&self) -> &Tool {
        &self.reference
    }

    /// The folder that each run starts from.
    pub fn start(&self) -> PathBuf {
        self.root.join("start")
    }

    /// Gives `line` to both and compares exit code and output. Verbs that make images get a new copy of the folder each,
    /// named after `id`, and the files that are there afterwards are compared too: changed ones by what a guest sees in
    /// them, and ours must pass a check.
    pub fn run(&self, id: usize, line: &str) -> Comparison {
        let args = words(line);
        let repairs = args.iter().any(|arg| arg == "-r" || arg.starts_with("--repair"));
        let makes = args.first().is_some_and(|verb| MAKING.contains(&verb.as_str()))
            || (repairs && args.first().is_some_and(|verb| verb == "check"));
        let folders = match makes {
            true => ["reference", "ours"].map(|who| self.root.join(format!("{id}-{who}"))),
            false => [self.start(), self.start()],
        };
        for folder in folders.iter().filter(|_| makes) {
            copy_folder(&self.start(), folder);
        }
        let reference = self.reference.run_in(&folders[0], &args);
        let ours = self.ours.run_in(&folders[1], &args);
        let mut differences = said_differently(&reference, &ours, &self.ours, &self.reference);
        if makes {
            self.compare_files(&folders, &mut differences);
        }
        for folder in folders.iter().filter(|_| makes) {
            fs::remove_dir_all(folder).expect("a folder of this run");
        }
        Comparison { line: line.to_owned(), reference, ours, differences }
    }

    fn compare_files(&self, [reference, ours]: &[PathBuf; 2], differences: &mut String) {
        let before = files(&self.start());
        let (theirs, own) = (files(reference), files(ours));
        let names: BTreeSet<&String> = theirs.keys().chain(own.keys()).collect();
        for name in names {
            match (theirs.get(name), own.get(name)) {
                (Some(_), None) => {
                    let _ = writeln!(differences, "file {name}: only qemu-img left it");
                }
                (None, Some(_)) => {
                    let _ = writeln!(differences, "file {name}: only ours left it");
                }
                (Some(a), Some(b)) if a != b => {
                    let changed = before.get(name) != Some(a) || before.get(name) != Some(b);
                    if changed {
                        self.compare_images(&reference.join(name), &ours.join(name), differences);
                    }
                }
                _ => {}
            }
        }
    }

    /// Two images that are not the same bytes must at least be the same disk.
    fn compare_images(&self, theirs: &Path, own: &Path, differences: &mut String) {
        let args = ["compare".as_ref(), theirs.as_os_str(), own.as_os_str()];
        let compared = self.reference.run_in(&self.root, &args);
        if compared.code != Some(0) {
            let _ = writeln!(differences, "content differs: {compared}");
        }
        let check = |image: &Path| self.reference.run_in(&self.root, &["check".as_ref(), image.as_os_str()]);
        let checked = check(own);
        // A repair may leave what it was not asked for.
        if !matches!(checked.code, Some(0 | 63)) && checked.code != check(theirs).code {
            let _ = writeln!(differences, "our image is not clean: {checked}");
        }
    }
}

/// Verbs that make or change files; `check` does when it repairs.
const MAKING: [&str; 10] =
    ["amend", "bench", "bitmap", "commit", "convert", "create", "dd", "rebase", "resize", "snapshot"];

/// A command line as words: blanks part them, single quotes keep them together, `\'` is a single quote.
pub fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quoted, mut begun) = (Vec::new(), String::new(), false, false);
    let mut chars = line.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\\' if chars.next_if_eq(&'\'').is_some() => {
                word.push('\'');
                begun = true;
            }
            '\'' => (quoted, begun) = (!quoted, true),
            ' ' if !quoted => {
                if begun {
                    words.push(std::mem::take(&mut word));
                }
                begun = false;
            }
            c => {
                word.push(c);
                begun = true;
            }
        }
    }
    if begun {
        words.push(word);
    }
    words
}

fn said_differently(reference: &Outcome, ours: &Outcome, our_tool: &Tool, their_tool: &Tool) -> String {
    let mut differences = String::new();
    if reference.code != ours.code {
        let _ = writeln!(differences, "exit code: {:?}, ours {:?}", reference.code, ours.code);
    }
    // Some messages begin with the program's own path.
    let plain = |text: &str, tool: &Tool| {
        let text = without_progress(&text.replace(&tool.path().display().to_string(), "qemu-img"));
        without_numbers(&without_numbers(&text, NODE), DURATION)
    };
    for (what, theirs, own) in
        [("stdout", &reference.stdout, &ours.stdout), ("stderr", &reference.stderr, &ours.stderr)]
    {
        let (theirs, own) = (plain(theirs, their_tool), plain(own, our_tool));
        if theirs != own {
            let _ = writeln!(differences, "{what}:\n{theirs}\n-- ours:\n{own}");
        }
    }
    differences
}

/// Takes away `    (12.34/100%)` and carriage return: how often progress is shown is a matter of time.
fn without_progress(text: &str) -> String {
    let shown = |piece: &&str| piece.starts_with("    (") && piece.ends_with("/100%)");
    let (mut rest, mut out) = (text, String::new());
    while let Some((piece, after)) = rest.split_once('\r') {
        if !shown(&piece) {
            out.push_str(piece);
            out.push('\r');
        }
        rest = after;
    }
    out + rest
}

/// Takes the numbers behind `words` away, which are others at each run.
fn without_numbers(text: &str, words: &str) -> String {
    let mut pieces = text.split(words);
    let before = pieces.next().unwrap_or_default().to_owned();
    let number = |c: char| c.is_ascii_digit() || c == '.';
    pieces.fold(before, |out, piece| out + words + piece.trim_start_matches(number))
}

/// Before the number of a node that has no name.
const NODE: &str = "#block";
/// Before the seconds that `bench` took.
const DURATION: &str = "Run completed in ";

fn files(folder: &Path) -> Files {
    let mut files = Files::new();
    for entry in fs::read_dir(folder).expect("a folder of the test") {
        let entry = entry.expect("an entry of the test's folder");
        if entry.path().is_file() {
            let name = entry.file_name().to_string_lossy().into_owned();
            files.insert(name, fs::read(entry.path()).expect("a file of the test"));
        }
    }
    files
}

/// A folder that `make` makes with qemu-img, once for all tests that ask with the same `key` (the text of what makes it): it
/// is kept on `shelf`, and nobody may change it. `None` where qemu-img is missing.
pub fn made_once(shelf: &Path, key: &str, make: impl FnOnce(&Tool, &Path)) -> Option<PathBuf> {
    let reference = Tool::find("qemu-img")?;
    let version = reference.run_in(shelf, &["--version"]).success().stdout;
    let key = crc32fast::hash([version.as_bytes(), key.as_bytes()].concat().as_slice());
    let place = shelf.join(format!("start-{key:08x}"));
    if !place.exists() {
        // Other processes may be at it too: the first that is done puts it there.
        let fresh = shelf.join(format!("start-{key:08x}-{}", std::process::id()));
        fs::create_dir(&fresh).expect("a new folder on the shelf");
        make(&reference, &fresh);
        if let Err(error) = fs::rename(&fresh, &place) {
            assert!(place.exists(), "a folder for the shelf: {error}");
            fs::remove_dir_all(&fresh).expect("a folder of this run");
        }
    }
    Some(place)
}

/// Copies a folder of files; holes stay holes, which images in it may be about.
pub fn copy_folder(from: &Path, to: &Path) {
    let args = ["-a".as_ref(), "--sparse=always".as_ref(), from.as_os_str(), to.as_os_str()];
    Tool::find("cp").expect("cp").run_in(Path::new("."), &args).success();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_taken_away() {
        assert_eq!(without_progress("    (0.00/100%)\r    (100.00/100%)\rdone\n"), "done\n");
        assert_eq!(without_progress("a\rb"), "a\rb");
    }

    #[test]
    fn numbers_that_change_are_taken_away() {
        assert_eq!(without_numbers("a #block12, '#block7'.", NODE), "a #block, '#block'.");
        assert_eq!(without_numbers("a b 12", NODE), "a b 12");
        assert_eq!(
            without_numbers("Run completed in 0.001 seconds.", DURATION),
            "Run completed in  seconds."
        );
    }

    #[test]
    fn words_and_quotes() {
        assert_eq!(words("create -o 'a b' x ''"), ["create", "-o", "a b", "x", ""]);
        assert_eq!(words(" -o'a'b  c "), ["-oab", "c"]);
        assert_eq!(words(r"{\'a b\'} \x"), ["{'a", "b'}", r"\x"]);
        assert!(words("").is_empty());
    }
}
