//! A campaign: many damaged images, checked and repaired by our command and by qemu-img, side by side.

mod sample;
mod table;

pub use sample::{Damage, Sample};
pub use table::{Column, Table};

use qcow2_testkit::oracle::{Outcome, Qemu, Tool};
use sample::DATA;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Kilobytes of data segment that our command may use: 256 MiB.
const MEMORY: u32 = 256 << 10;
/// Time limit of one run of our command.
const PATIENCE: Duration = Duration::from_secs(10);
/// Time limit of one run of the reference, which loops for ever on some images.
const REFERENCE_PATIENCE: Duration = Duration::from_secs(5);
/// What is run beside check and repair, one of them for each image. It must end in time, and not crash.
const OTHERS: &[&str] = &[
    "info --output=json",
    "info",
    "map",
    "map --output=json",
    "measure -O qcow2",
    "snapshot -l",
    "convert -O raw IMAGE extra.raw",
    "convert --salvage -O qcow2 IMAGE extra.raw",
    "compare IMAGE IMAGE",
    "bitmap --clear IMAGE b0",
    "bitmap --remove IMAGE b0",
    "rebase -u -b",
    "dd bs=4k count=16",
    "checksum",
    "amend -o compat=0.10",
    "resize IMAGE +1M",
    "snapshot -c new",
    "snapshot -a 1",
    "snapshot -d 1",
    "io -c",
];

/// What to run.
#[derive(Clone, Debug)]
pub struct Campaign {
    /// Our command.
    pub ours: PathBuf,
    /// How many images, two of five damaged at random and three semantic mutants.
    pub images: u64,
    /// No image is begun after this time.
    pub time: Duration,
    /// Seed of the first image; the others follow.
    pub seed: u64,
    /// How many images at once.
    pub threads: usize,
    /// Where the files of cases that break a rule are kept, and of those where the verdicts differ.
    pub keep: Option<PathBuf>,
}

impl Campaign {
    /// Runs the campaign in folders of `folder`. `None` where the reference is missing.
    pub fn run(&self, folder: &Path) -> Option<Table> {
        let Qemu { img: reference, .. } = Qemu::find()?;
        let (next, table, end) =
            (AtomicU64::new(0), Mutex::new(Table::default()), Instant::now() + self.time);
        if let Some(keep) = &self.keep {
            fs::create_dir_all(keep).expect("a folder for what is kept");
        }
        thread::scope(|scope| {
            for number in 0..self.threads {
                let (folder, reference) = (folder.join(number.to_string()), reference.clone());
                let (next, table) = (&next, &table);
                scope.spawn(move || {
                    fs::create_dir_all(&folder).expect("a new folder");
                    loop {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        if index >= self.images || Instant::now() >= end {
                            return;
                        }
                        let bench = Bench { campaign: self, reference: &reference, folder: &folder };
                        let seed = self.seed.wrapping_add(index);
                        let damage = if seed % 5 < 2 { Damage::Random } else { Damage::Semantic };
                        let case = bench.judge(seed, damage);
                        table.lock().expect("no panic").add(damage, case);
                    }
                });
            }
        });
        Some(table.into_inner().expect("no panic"))
    }
}

/// What a check says about an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing is wrong.
    Clean,
    /// Clusters are lost, and that is all.
    Leaks,
    /// Data may be wrong.
    Corrupt,
    /// The image cannot be checked, or not in full.
    Cannot,
}

/// What became of one image.
#[derive(Clone, Debug, Default)]
pub struct Case {
    /// The image, for messages.
    pub name: String,
    /// What each check found: ours, the reference's. `None` where one did not end.
    pub verdicts: (Option<Verdict>, Option<Verdict>),
    /// Runs of ours that crashed, or needed too much time or memory.
    pub failures: Vec<String>,
    /// True if the reference crashed or did not end.
    pub reference_failed: bool,
    /// What became of the image by both repairs, ours and the reference's, where the reference found fault.
    pub repairs: Option<(Repair, Repair)>,
}

/// What a repair made of an image, as the reference sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Repair {
    /// True if the reference finds nothing wrong any more.
    pub clean: bool,
    /// True if the program that repaired the image ended with success.
    pub success: bool,
    /// Guest clusters that read as in the whole image, those of zeroes not counted.
    pub kept: u64,
    /// Snapshots that the header counts.
    pub snapshots: u32,
}

struct Bench<'a> {
    campaign: &'a Campaign,
    reference: &'a Tool,
    folder: &'a Path,
}

impl Bench<'_> {
    /// Checks, repairs and reads one image.
    fn judge(&self, seed: u64, damage: Damage) -> Case {
        let sample = Sample::new(seed, damage);
        let mut case = Case { name: format!("{damage:?} {seed}, {}", sample.kind), ..Case::default() };
        if let Some(data) = &sample.data {
            self.write(DATA, data);
        }
        for name in ["ours.qcow2", "theirs.qcow2", "other.qcow2"] {
            self.write(name, &sample.bytes);
        }
        case.verdicts = (
            self.ours(&mut case, "check -f qcow2 ours.qcow2").map(|run| verdict(&run)),
            self.theirs(&mut case, &["check", "-f", "qcow2", "theirs.qcow2"]).map(|run| verdict(&run)),
        );
        let other = OTHERS[(seed % OTHERS.len() as u64) as usize];
        self.ours(&mut case, &other_line(other));
        if case.verdicts.1 != Some(Verdict::Clean) {
            let mine = self.ours(&mut case, "check -f qcow2 -r all ours.qcow2");
            let other = self.theirs(&mut case, &["check", "-f", "qcow2", "-r", "all", "theirs.qcow2"]);
            let mine = self.repaired(&mut case, mine, "ours.qcow2", &sample);
            let other = self.repaired(&mut case, other, "theirs.qcow2", &sample);
            case.repairs = Some((mine, other));
        }
        if let (Some(keep), true) = (&self.campaign.keep, case.is_wrong() || case.differs()) {
            let name = format!("{damage:?}-{seed}.qcow2").to_lowercase();
            fs::write(keep.join(name), &sample.bytes).expect("a file that is kept");
        }
        case
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.folder.join(name), bytes).expect("a small file");
    }

    /// Runs our command under its limits. What is compared is what it does in place of qemu-img.
    fn ours(&self, case: &mut Case, line: &str) -> Option<Outcome> {
        let shell = Tool::at("bash");
        let name = if line.starts_with("check ") { "qemu-img" } else { "qcow2" };
        let program = self.campaign.ours.display();
        let script = format!("ulimit -d {MEMORY}; exec -a {name} '{program}' {line}");
        match shell.run_within(self.folder, &["-c", &script], PATIENCE) {
            Ok(outcome) if !crashed(&outcome) => return Some(outcome),
            Ok(outcome) => case.failures.push(format!("{line}: {outcome}")),
            Err(late) => case.failures.push(late),
        }
        None
    }

    fn theirs(&self, case: &mut Case, args: &[&str]) -> Option<Outcome> {
        let outcome = self.reference.run_within(self.folder, args, REFERENCE_PATIENCE).ok();
        let outcome = outcome.filter(|outcome| !crashed(outcome));
        case.reference_failed |= outcome.is_none();
        outcome
    }

    fn repaired(&self, case: &mut Case, run: Option<Outcome>, name: &str, sample: &Sample) -> Repair {
        let clean = self.theirs(case, &["check", "-f", "qcow2", name]).map(|run| verdict(&run));
        Repair {
            clean: clean == Some(Verdict::Clean),
            success: run.is_some_and(|run| run.code == Some(0)),
            kept: self.kept(case, name, &sample.whole).unwrap_or(0),
            snapshots: self.snapshots(name),
        }
    }

    fn snapshots(&self, name: &str) -> u32 {
        let mut header = [0; 64];
        let read = File::open(self.folder.join(name)).and_then(|mut file| file.read_exact(&mut header));
        read.map_or(0, |()| u32::from_be_bytes([header[60], header[61], header[62], header[63]]))
    }

    /// The judge of what is kept is the reference.
    fn kept(&self, case: &mut Case, name: &str, whole: &[Vec<u8>]) -> Option<u64> {
        let line = ["convert", "--salvage", "-f", "qcow2", "-O", "raw", name, "kept.raw"];
        self.theirs(case, &line).filter(|run| run.code == Some(0))?;
        let total: usize = whole.iter().map(Vec::len).sum();
        let mut bytes = Vec::new();
        // No more: a damaged size may be anything.
        let read = File::open(self.folder.join("kept.raw"))
            .and_then(|file| file.take(total as u64).read_to_end(&mut bytes));
        read.map_err(|error: io::Error| error.to_string()).expect("a file that was just made");
        let mut at = 0;
        let same = whole.iter().filter(|cluster| {
            let start = at;
            at += cluster.len();
            cluster.iter().any(|&byte| byte != 0) && bytes.get(start..at) == Some(&cluster[..])
        });
        Some(same.count() as u64)
    }
}

fn verdict(outcome: &Outcome) -> Verdict {
    match outcome.code {
        Some(0) => Verdict::Clean,
        Some(2) => Verdict::Corrupt,
        Some(3) => Verdict::Leaks,
        _ => Verdict::Cannot,
    }
}

/// Ended by a signal, or by a panic, whose exit code is 101.
fn crashed(outcome: &Outcome) -> bool {
    outcome.code.is_none_or(|code| code == 101 || code > 127)
}

/// One line of [`OTHERS`] with the image's name and format in it.
fn other_line(line: &str) -> String {
    let (verb, rest) = line.split_once(' ').unwrap_or((line, ""));
    let image = "other.qcow2";
    match verb {
        "compare" => format!("compare -f qcow2 -F qcow2 {image} {image}"),
        "dd" => format!("dd -f qcow2 -O raw if={image} of=extra.raw {rest}"),
        "io" => format!("io -f qcow2 -c 'write -P 1 0 64k' -c 'read 0 1M' -c 'discard 64k 64k' {image}"),
        "snapshot" => format!("snapshot {rest} {image}"),
        "rebase" => format!("rebase -f qcow2 -u -b '' {image}"),
        _ if rest.contains("IMAGE") => format!("{verb} -f qcow2 {}", rest.replace("IMAGE", image)),
        _ => format!("{verb} -f qcow2 {rest} {image}"),
    }
}
