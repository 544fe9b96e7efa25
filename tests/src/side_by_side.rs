//! Runs the same command line with qemu-img and with our program, each in its own copy of the same folder.

use crate::copies::{Copies, FolderCopy};
use crate::fixtures::lone_source;
use qcow2_core::format::bitmap::Bitmap;
use qcow2_core::{Image, Layers, OpenOptions};
use qcow2_io::OpenFile;
use qcow2_testkit::oracle::{Outcome, Tool};
use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Both programs, and the start folder of each run.
pub struct SideBySide {
    reference: Tool,
    ours: Tool,
    root: PathBuf,
    copies: Copies,
}

/// What one command line did in both folders.
pub struct Comparison {
    /// The command line.
    pub line: String,
    /// Outcome of qemu-img.
    pub reference: Outcome,
    /// Outcome of our program.
    pub ours: Outcome,
    /// How the two differ; empty if they do not.
    pub differences: String,
}

impl SideBySide {
    /// `ours`: our program, which will be called as `qemu-img`. `root`: an empty folder, in which `make`
    /// creates the start folder. Prints a skip and returns `None` if qemu-img is missing.
    pub fn new(ours: &Path, root: &Path, make: impl FnOnce(&Tool, &Path)) -> Option<Self> {
        let reference = Tool::find("qemu-img")?;
        let (bin, start) = (root.join("bin"), root.join("start"));
        fs::create_dir(&bin).expect("a new folder for the program");
        fs::create_dir(&start).expect("a new folder to start from");
        #[cfg(unix)]
        for name in ["qemu-img", "qemu-io"] {
            std::os::unix::fs::symlink(ours, bin.join(name)).expect("a link to the program");
        }
        make(&reference, &start);
        let copies = Copies::new(start, root.to_owned());
        Some(Self { reference, ours: Tool::at(bin.join("qemu-img")), root: root.to_owned(), copies })
    }

    /// Our program, called as `qemu-img`.
    pub fn ours(&self) -> &Tool {
        &self.ours
    }

    /// qemu-img.
    pub fn reference(&self) -> &Tool {
        &self.reference
    }

    /// The start folder of each run.
    pub fn start(&self) -> PathBuf {
        self.root.join("start")
    }

    /// Runs `line` with both and compares exit codes and output. Verbs that create or change images get a
    /// copy of the folder each, and the files are compared afterwards: changed images by their guest content,
    /// and ours must pass a check.
    pub fn run(&self, line: &str) -> Comparison {
        let args = words(line);
        let repairs = args.iter().any(|arg| arg == "-r" || arg.starts_with("--repair"));
        let makes = args.first().is_some_and(|verb| MAKING.contains(&verb.as_str()))
            || (repairs && args.first().is_some_and(|verb| verb == "check"));
        let copies = makes.then(|| [self.copies.take(), self.copies.take()]);
        let start = self.start();
        let folders = match &copies {
            Some(copies) => copies.each_ref().map(FolderCopy::path),
            None => [&*start, &*start],
        };
        let reference = self.reference.run_in(folders[0], &args);
        let ours = self.ours.run_in(folders[1], &args);
        let mut differences = said_differently(&reference, &ours, &self.ours, &self.reference);
        if let Some(copies) = copies {
            self.compare_files(&copies, &mut differences);
            copies.into_iter().for_each(|copy| self.copies.give_back(copy));
        }
        Comparison { line: line.to_owned(), reference, ours, differences }
    }

    /// Runs `lines` one after the other in one copy of the folder for each program, and compares every exit
    /// code and output, and all files at the end. A line that begins with `qemu-io` runs that; one with
    /// `qemu-nbd` starts the reference's server on the socket `nbd.sock`, until the end of the job.
    pub fn run_job(&self, lines: &[&str]) -> Comparison {
        let copies = [self.copies.take(), self.copies.take()];
        let folders = copies.each_ref().map(FolderCopy::path);
        let (mut differences, mut servers, mut last) = (String::new(), Vec::new(), None);
        for (at, line) in lines.iter().enumerate() {
            let args = words(line);
            let (tool, args) = match args.split_first() {
                Some((name, rest)) if name == "qemu-nbd" => {
                    servers.extend(folders.map(|folder| Server::start(folder, rest)));
                    continue;
                }
                Some((name, rest)) if name == "qemu-io" => (name.as_str(), rest),
                _ => ("qemu-img", &args[..]),
            };
            let [theirs, own] =
                [&self.reference, &self.ours].map(|img| Tool::at(img.path().with_file_name(tool)));
            let (mut reference, mut ours) = (theirs.run_in(folders[0], args), own.run_in(folders[1], args));
            // Later commands see files that the earlier ones have changed.
            for run in [&mut reference, &mut ours].into_iter().filter(|_| at > 0) {
                run.stdout = run.stdout.split_inclusive('\n').map(without_own).collect();
            }
            let wrong = said_differently(&reference, &ours, &own, &theirs);
            if !wrong.is_empty() {
                let _ = writeln!(differences, "{line}\n{wrong}");
            }
            last = Some((reference, ours));
        }
        drop(servers);
        self.compare_files(&copies, &mut differences);
        copies.into_iter().for_each(|copy| self.copies.give_back(copy));
        let (reference, ours) = last.expect("a command in every job");
        Comparison { line: lines.join("\n"), reference, ours, differences }
    }

    fn compare_files(&self, [reference, ours]: &[FolderCopy; 2], differences: &mut String) {
        let names: BTreeSet<String> = reference.changed().into_iter().chain(ours.changed()).collect();
        for name in names {
            let [theirs, own] = [reference, ours].map(|copy| copy.path().join(&name));
            match (theirs.is_file(), own.is_file()) {
                (true, false) => {
                    let _ = writeln!(differences, "file {name}: only qemu-img left it");
                }
                (false, true) => {
                    let _ = writeln!(differences, "file {name}: only ours left it");
                }
                (true, true) if content(&theirs) != content(&own) => {
                    self.compare_images(&theirs, &own, differences);
                }
                _ => {}
            }
        }
    }

    /// Images with different bytes must at least have the same guest content.
    fn compare_images(&self, theirs: &Path, own: &Path, differences: &mut String) {
        // Two encryptions of one disk differ, and only a caller that has the key can compare them.
        if self.is_encrypted(theirs) && self.is_encrypted(own) {
            return;
        }
        let args = ["compare".as_ref(), theirs.as_os_str(), own.as_os_str()];
        let compared = self.reference.run_in(&self.root, &args);
        if compared.code != Some(0) {
            let _ = writeln!(differences, "content differs: {compared}");
        }
        let check = |image: &Path| self.reference.run_in(&self.root, &["check".as_ref(), image.as_os_str()]);
        let checked = check(own);
        // A repair may leave errors that it was not asked to fix; then QEMU's image has them too.
        if !matches!(checked.code, Some(0 | 63)) && checked.code != check(theirs).code {
            let _ = writeln!(differences, "our image is not clean: {checked}");
        }
        let (theirs, own) = (bitmaps(theirs), bitmaps(own));
        if theirs != own {
            let _ = writeln!(differences, "bitmaps: {theirs:?}\n-- ours: {own:?}");
        }
    }

    fn is_encrypted(&self, image: &Path) -> bool {
        let args = ["info".as_ref(), "--output=json".as_ref(), image.as_os_str()];
        self.reference.run_in(&self.root, &args).stdout.contains("\"encrypted\": true")
    }
}

/// A server that is stopped when dropped.
struct Server(Child);

impl Server {
    /// Serves what `args` name on the socket `nbd.sock` in `folder`, and waits until it listens.
    fn start(folder: &Path, args: &[String]) -> Self {
        let mut command = Command::new("qemu-nbd");
        command.current_dir(folder).args(["-t", "-k"]).arg(folder.join("nbd.sock")).args(args);
        let server = Self(command.stdin(Stdio::null()).spawn().expect("qemu-nbd beside qemu-img"));
        let started = Instant::now();
        while !folder.join("nbd.sock").exists() {
            assert!(started.elapsed() < Duration::from_secs(20), "qemu-nbd does not listen");
            thread::sleep(Duration::from_millis(20));
        }
        server
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Name, log2 of the granularity, enabled, in use, and the marked ranges if it is not in use.
type SeenBitmap = (String, u8, bool, bool, Option<Vec<(u64, u64)>>);

/// The consistent bitmaps of the image at `path`; none if it cannot be opened as qcow2.
fn bitmaps(path: &Path) -> Vec<SeenBitmap> {
    let Ok(storage) = OpenFile::read_only().open(path) else { return Vec::new() };
    let mut options = OpenOptions::default();
    (options.layers, options.metadata_only) = (Layers::TopOnly, true);
    let Ok(image) = Image::open(lone_source(storage), &options) else { return Vec::new() };
    let marked = |bitmap: &Bitmap| {
        let bits = image.bitmap_bits(&bitmap.name).expect("the bits of a usable bitmap");
        bits.marked_runs().collect()
    };
    let seen = |bitmap: &Bitmap| {
        let runs = (!bitmap.in_use).then(|| marked(bitmap));
        (bitmap.name_text(), bitmap.granularity_bits, bitmap.auto, bitmap.in_use, runs)
    };
    image.bitmaps().unwrap_or_default().iter().map(seen).collect()
}

/// Verbs that create or change files; `check` does when it repairs.
const MAKING: [&str; 10] =
    ["amend", "bench", "bitmap", "commit", "convert", "create", "dd", "rebase", "resize", "snapshot"];

/// Splits a command line into words: at blanks, except inside single quotes; `\'` is a single quote.
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
        without_varying(&text.replace(&tool.path().display().to_string(), "qemu-img"))
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

/// Removes what differs from run to run: progress, the numbers of nodes, durations and rates.
pub(crate) fn without_varying(text: &str) -> String {
    let text = without_numbers(&without_numbers(&without_progress(text), NODE), DURATION);
    match text.contains(RATE) {
        true => text.split_inclusive('\n').map(without_rate).collect(),
        false => text,
    }
}

/// The line without the time and the rates that the exerciser prints after the number of requests.
fn without_rate(line: &str) -> &str {
    match line.split_once(RATE) {
        Some((before, rest)) if rest.trim_end().ends_with(" ops/sec)") => before,
        _ => line,
    }
}

/// The line without numbers that two equal images need not have in common: how long the file is and how much
/// of the disk it takes, dates, random numbers.
pub(crate) fn without_own(line: &str) -> String {
    let (begin, indent) = (line.trim_start(), line.len() - line.trim_start().len());
    let is_length = begin.starts_with("\"virtual-size\": ") && indent > 8;
    if is_length || OWN.iter().any(|name| begin.starts_with(name)) {
        let (name, value) = line.split_once(": ").unwrap_or_default();
        return format!("{name}: 0{}", &value[value.trim_end_matches([',', '\n']).len()..]);
    }
    let shape = |word: &str, mark: char| {
        word.split(mark).count() == 3 && word.chars().all(|c| c == mark || c.is_ascii_digit())
    };
    let plain = |word: &str| match shape(word.trim_end(), '-') || shape(word.trim_end(), ':') {
        true => word.replace(|c: char| c.is_ascii_digit(), "0"),
        false => word.to_owned(),
    };
    line.split_inclusive(' ').map(plain).collect()
}

/// How lines begin that show something of which every image has its own.
const OWN: [&str; 10] = [
    "disk size: ",
    "file length: ",
    "Image end offset: ",
    "\"actual-size\": ",
    "\"date-nsec\": ",
    "\"date-sec\": ",
    "\"image-end-offset\": ",
    "\"iters\": ",
    "\"master-key-iters\": ",
    "\"uuid\": ",
];

/// Removes ` (12.34/100%)` and carriage returns: how often progress is printed depends on timing.
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

/// Removes the numbers after `words`, which differ from run to run.
fn without_numbers(text: &str, words: &str) -> String {
    let mut pieces = text.split(words);
    let before = pieces.next().unwrap_or_default().to_owned();
    let number = |c: char| c.is_ascii_digit() || c == '.';
    pieces.fold(before, |out, piece| out + words + piece.trim_start_matches(number))
}

/// Prefix of the generated number of an unnamed node.
const NODE: &str = "#block";
/// Text between the number of requests and the time they took.
const RATE: &str = " ops; ";
/// Text before the duration that `bench` prints.
const DURATION: &str = "Run completed in ";

fn content(path: &Path) -> Vec<u8> {
    fs::read(path).expect("a file of the test")
}

/// A folder that `make` creates with qemu-img, once for all tests that use the same `key` (the text of what
/// makes it). It is kept on `shelf` and must not be changed. `None` if qemu-img is missing.
pub fn made_once(shelf: &Path, key: &str, make: impl FnOnce(&Tool, &Path)) -> Option<PathBuf> {
    let reference = Tool::find("qemu-img")?;
    let version = reference.run_in(shelf, &["--version"]).success().stdout;
    let key = crc32fast::hash([version.as_bytes(), key.as_bytes()].concat().as_slice());
    let place = shelf.join(format!("start-{key:08x}"));
    // One thread per process makes it. Several processes may make it at once: the first to finish moves it to
    // the shelf.
    static MAKING: Mutex<()> = Mutex::new(());
    let _making = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
    if !place.exists() {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_removed() {
        assert_eq!(without_progress("    (0.00/100%)\r    (100.00/100%)\rdone\n"), "done\n");
        assert_eq!(without_progress("a\rb"), "a\rb");
    }

    #[test]
    fn varying_numbers_are_removed() {
        assert_eq!(without_numbers("a #block12, '#block7'.", NODE), "a #block, '#block'.");
        assert_eq!(without_numbers("a b 12", NODE), "a b 12");
        assert_eq!(
            without_numbers("Run completed in 0.001 seconds.", DURATION),
            "Run completed in  seconds."
        );
    }

    #[test]
    fn what_every_image_has_of_its_own_is_removed() {
        for (line, expected) in [
            ("    \"actual-size\": 12,\n", "    \"actual-size\": 0,\n"),
            ("    \"uuid\": \"a-b\"\n", "    \"uuid\": 0\n"),
            ("disk size: 12 KiB\n", "disk size: 0\n"),
            ("    \"virtual-size\": 4,\n", "    \"virtual-size\": 4,\n"),
            ("                \"virtual-size\": 4,\n", "                \"virtual-size\": 0,\n"),
            (
                "1 sn 0 B 2026-11-28 06:00:59 00:00:00.000 0\n",
                "1 sn 0 B 0000-00-00 00:00:00 00:00:00.000 0\n",
            ),
        ] {
            assert_eq!(without_own(line), expected);
        }
    }

    #[test]
    fn rates_are_removed() {
        assert_eq!(without_rate("64 KiB, 1 ops; 00.03 sec (1.6 MiB/sec and 25.6 ops/sec)\n"), "64 KiB, 1");
        assert_eq!(without_rate("a ops; b\n"), "a ops; b\n");
    }

    #[test]
    fn quotes_and_escapes_group_words() {
        assert_eq!(words("create -o 'a b' x ''"), ["create", "-o", "a b", "x", ""]);
        assert_eq!(words(" -o'a'b  c "), ["-oab", "c"]);
        assert_eq!(words(r"{\'a b\'} \x"), ["{'a", "b'}", r"\x"]);
        assert!(words("").is_empty());
    }
}
