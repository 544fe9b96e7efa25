//! Benchmarks this tool against qemu-img, in pairs of runs, and prints a table for BENCHMARKS.md. The figure
//! that matters is the median of the pairwise ratios; absolute times depend on the machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// Default number of pairs.
const PAIRS: usize = 5;
const GIB: u64 = 1 << 30;
/// Chunk size for touching memory, in bytes.
const CHUNK: usize = 1 << 20;
/// Memory to touch before a command that writes much: more than the command writes. Bytes.
const READY: usize = 4 << 30;

/// One comparison: preparation before each run, and the arguments for both tools. `{}` is the scratch folder.
struct Row {
    name: &'static str,
    group: &'static str,
    /// Commands of qemu-img or cp that create the files anew.
    prepare: &'static [&'static str],
    args: &'static str,
    /// Extra arguments for qemu-img, so that it runs at its best.
    theirs: &'static str,
}

impl Row {
    /// True if the time includes copying into new pages of the page cache.
    fn writes_much(&self) -> bool {
        ["convert", "crypt"].contains(&self.group)
            || (self.group != "rewrite" && self.args.contains("-O raw"))
    }

    /// The cp command that copies the same bytes without knowing the format, where comparing with cp is fair.
    fn copy(&self) -> Option<&'static str> {
        match self.name {
            "convert raw to qcow2" => Some("--sparse=always {}/real.raw {}/out.qcow2"),
            "convert qcow2 to raw" => Some("--sparse=always {}/real.raw {}/out.raw"),
            _ => None,
        }
    }
}

/// A step that visits scattered clusters, each once: 0.382 of 4 GiB.
macro_rules! step {
    () => {
        "1640628224"
    };
}

/// Random reads of a disk whose clusters are spread over so many layers; all of it is made by `setup_depth`.
macro_rules! depth {
    ($layers:literal, $top:literal) => {
        Row {
            name: concat!("4 KiB random reads of 512 MiB, clusters in ", $layers, " layers"),
            group: "chain",
            prepare: &[],
            args: concat!("bench -f qcow2 -c 100000 -d 1 -S ", step!(), " {}/", $layers, "-", $top, ".qcow2"),
            theirs: "",
        }
    };
}

/// The depths of the rows above.
const DEPTHS: [u64; 4] = [1, 8, 64, 256];

const ROWS: &[Row] = &[
    depth!("1", "0"),
    depth!("8", "7"),
    depth!("64", "63"),
    depth!("256", "255"),
    Row {
        name: "4 KiB random reads, one at a time",
        group: "io",
        prepare: &[],
        args: concat!("bench -f qcow2 -c 300000 -d 1 -S ", step!(), " {}/full.qcow2"),
        theirs: "",
    },
    Row {
        name: "4 KiB random reads, 32 at a time",
        group: "io",
        prepare: &[],
        args: concat!("bench -f qcow2 -c 300000 -d 32 -S ", step!(), " {}/full.qcow2"),
        theirs: "",
    },
    Row {
        name: "4 KiB random writes that allocate, one at a time",
        group: "io",
        prepare: &["create -q -f qcow2 {}/new.qcow2 4G"],
        args: concat!("bench -f qcow2 -w -c 50000 -d 1 -S ", step!(), " {}/new.qcow2"),
        theirs: "",
    },
    Row {
        name: "4 KiB random writes that allocate, 32 at a time",
        group: "io",
        prepare: &["create -q -f qcow2 {}/new.qcow2 4G"],
        args: concat!("bench -f qcow2 -w -c 50000 -d 32 -S ", step!(), " {}/new.qcow2"),
        theirs: "",
    },
    Row {
        name: "4 KiB random writes to an overlay (copy on write), one at a time",
        group: "io",
        prepare: &["create -q -f qcow2 -b full.qcow2 -F qcow2 {}/over.qcow2"],
        args: concat!("bench -f qcow2 -w -c 15000 -d 1 -S ", step!(), " {}/over.qcow2"),
        theirs: "",
    },
    Row {
        name: "4 KiB random writes to an overlay (copy on write), 32 at a time",
        group: "io",
        prepare: &["create -q -f qcow2 -b full.qcow2 -F qcow2 {}/over.qcow2"],
        args: concat!("bench -f qcow2 -w -c 15000 -d 32 -S ", step!(), " {}/over.qcow2"),
        theirs: "",
    },
    Row {
        name: "convert raw to qcow2",
        group: "convert",
        prepare: &[],
        args: "convert -f raw -O qcow2 {}/real.raw {}/out.qcow2",
        theirs: "-W -m 8",
    },
    Row {
        name: "convert qcow2 to raw",
        group: "convert",
        prepare: &[],
        args: "convert -f qcow2 -O raw {}/real.qcow2 {}/out.raw",
        theirs: "-W -m 8",
    },
    Row {
        name: "compare, equal content",
        group: "convert",
        prepare: &[],
        args: "compare -f raw -F qcow2 {}/real.raw {}/real.qcow2",
        theirs: "",
    },
    Row {
        name: "commit, 100,000 scattered clusters of 4 KiB",
        group: "chain",
        prepare: &["cp {}/empty.qcow2 {}/base.qcow2", "cp {}/layer.qcow2 {}/over.qcow2"],
        args: "commit -q -f qcow2 {}/over.qcow2",
        theirs: "",
    },
    Row {
        name: "rebase past a layer of 100,000 scattered clusters of 4 KiB",
        group: "chain",
        prepare: &[
            "cp {}/empty.qcow2 {}/base.qcow2",
            "create -q -f qcow2 -o cluster_size=4k -b layer.qcow2 -F qcow2 {}/over.qcow2",
        ],
        args: "rebase -q -f qcow2 -b base.qcow2 -F qcow2 {}/over.qcow2",
        theirs: "",
    },
    Row {
        name: "rebase onto a copy of the backing file, all equal",
        group: "chain",
        prepare: &[
            "cp {}/empty.qcow2 {}/base.qcow2",
            "cp {}/layer.qcow2 {}/copy.qcow2",
            "create -q -f qcow2 -b layer.qcow2 -F qcow2 {}/over.qcow2",
        ],
        args: "rebase -q -f qcow2 -b copy.qcow2 -F qcow2 {}/over.qcow2",
        theirs: "",
    },
    Row {
        name: "compare with a copy, 100,000 scattered clusters of 4 KiB",
        group: "chain",
        prepare: &["cp {}/empty.qcow2 {}/base.qcow2", "cp {}/layer.qcow2 {}/copy.qcow2"],
        args: "compare -q -f qcow2 -F qcow2 {}/layer.qcow2 {}/copy.qcow2",
        theirs: "",
    },
    Row {
        name: "write zlib",
        group: "compress",
        prepare: &[],
        args: "convert -c -f raw -O qcow2 {}/real.raw {}/zlib.qcow2",
        theirs: "-W -m 8",
    },
    Row {
        name: "write zstd",
        group: "compress",
        prepare: &[],
        args: "convert -c -o compression_type=zstd -f raw -O qcow2 {}/real.raw {}/zstd.qcow2",
        theirs: "-W -m 8",
    },
    Row {
        name: "read zlib to raw",
        group: "compress",
        prepare: &[],
        args: "convert -f qcow2 -O raw {}/real-zlib.qcow2 {}/out.raw",
        theirs: "-W -m 8",
    },
    Row {
        name: "read zstd to raw",
        group: "compress",
        prepare: &[],
        args: "convert -f qcow2 -O raw {}/real-zstd.qcow2 {}/out.raw",
        theirs: "-W -m 8",
    },
    Row {
        name: "raw to qcow2, over an older copy",
        group: "rewrite",
        prepare: &[],
        args: "convert -n --target-is-zero -f raw -O qcow2 {}/real.raw {}/kept.qcow2",
        theirs: "-W -m 8",
    },
    Row {
        name: "qcow2 to raw, over an older copy",
        group: "rewrite",
        prepare: &[],
        args: "convert -n --target-is-zero -f qcow2 -O raw {}/real.qcow2 {}/kept.raw",
        theirs: "-W -m 8",
    },
    Row {
        name: "zlib to raw, over an older copy",
        group: "rewrite",
        prepare: &[],
        args: "convert -n --target-is-zero -f qcow2 -O raw {}/real-zlib.qcow2 {}/kept.raw",
        theirs: "-W -m 8",
    },
    Row {
        name: "zstd to raw, over an older copy",
        group: "rewrite",
        prepare: &[],
        args: "convert -n --target-is-zero -f qcow2 -O raw {}/real-zstd.qcow2 {}/kept.raw",
        theirs: "-W -m 8",
    },
    Row {
        name: "convert raw to LUKS in qcow2",
        group: "crypt",
        prepare: &[
            "create -q -f qcow2 --object secret,id=s,data=abc -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 {}/new.qcow2 1G",
        ],
        args: "convert -n --object secret,id=s,data=abc -f raw --target-image-opts {}/random.raw driver=qcow2,encrypt.key-secret=s,file.filename={}/new.qcow2",
        theirs: "-W -m 8",
    },
    Row {
        name: "convert LUKS in qcow2 to raw",
        group: "crypt",
        prepare: &[],
        args: "convert --object secret,id=s,data=abc --image-opts driver=qcow2,encrypt.key-secret=s,file.filename={}/luks.qcow2 -O raw {}/out.raw",
        theirs: "-W -m 8",
    },
    Row {
        name: "create, preallocation=metadata",
        group: "tables",
        prepare: &[],
        args: "create -q -f qcow2 -o preallocation=metadata {}/new.qcow2 1T",
        theirs: "",
    },
    Row { name: "check", group: "tables", prepare: &[], args: "check {}/tables.qcow2", theirs: "" },
    Row {
        name: "map --output=json",
        group: "tables",
        prepare: &[],
        args: "map --output=json {}/tables.qcow2",
        theirs: "",
    },
    Row {
        name: "snapshot create",
        group: "tables",
        prepare: &["cp --sparse=always {}/tables.qcow2 {}/new.qcow2", "sync {}/new.qcow2"],
        args: "snapshot -c s {}/new.qcow2",
        theirs: "",
    },
    Row {
        name: "snapshot delete",
        group: "tables",
        prepare: &["cp --sparse=always {}/snapshot.qcow2 {}/new.qcow2", "sync {}/new.qcow2"],
        args: "snapshot -d s {}/new.qcow2",
        theirs: "",
    },
];

/// Measurements of one run.
#[derive(Clone, Copy)]
struct Taken {
    wall: f64,
    cpu: f64,
    peak_mib: f64,
    /// Run time that `bench` itself prints, without open and close.
    said: Option<f64>,
}

struct Bench {
    scratch: PathBuf,
    ours: PathBuf,
    pairs: usize,
    /// Keep the files that the rows read for another run.
    keep: bool,
}

/// Runs the rows. `args`: `--group io|convert|compress|rewrite|chain|crypt|tables`, `--pairs N`, `--files
/// DIR` (real files for a disk, /usr by default), `--scratch DIR`, `--row TEXT` (only rows whose name
/// contains it), `--keep yes` (keep the files made for the rows and reuse them in the next run).
pub(crate) fn run(root: &Path, args: &[String]) -> Result<(), String> {
    let (mut group, mut pairs, mut files, mut scratch) =
        (None, PAIRS, "/usr".to_owned(), std::env::temp_dir());
    let (mut wanted, mut keep) = (String::new(), false);
    let mut rest = args.iter();
    while let Some(name) = rest.next() {
        let value = rest.next().ok_or_else(|| format!("{name} needs a value"))?;
        match name.as_str() {
            "--group" => group = Some(value.clone()),
            "--pairs" => pairs = value.parse().map_err(|_| format!("--pairs {value}: not a number"))?,
            "--files" => files = value.clone(),
            "--scratch" => scratch = value.into(),
            "--row" => wanted = value.clone(),
            "--keep" => keep = value == "yes",
            _ => return Err(format!("unknown option {name}")),
        }
    }
    let is_wanted = |row: &&Row| group.as_ref().is_none_or(|g| g == row.group) && row.name.contains(&wanted);
    let rows: Vec<&Row> = ROWS.iter().filter(is_wanted).collect();
    build(root)?;
    let bench =
        Bench { scratch: scratch.join("qcow2-bench"), ours: root.join("target/release/qcow2"), pairs, keep };
    fs::create_dir_all(&bench.scratch).map_err(|e| format!("{}: {e}", bench.scratch.display()))?;
    let result = bench.setup(&rows, &files).and_then(|()| bench.table(&rows));
    if !bench.keep {
        let _ = fs::remove_dir_all(&bench.scratch);
    }
    result
}

fn build(root: &Path) -> Result<(), String> {
    let mut cargo = Command::new(crate::cargo());
    cargo.args(["build", "--quiet", "--release", "--package", "qcow2-cli"]).current_dir(root);
    check(&mut cargo).map(|_| ())
}

/// Runs the command and returns its output.
fn check(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(format!("{command:?}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr)))
}

/// The seconds in the last line of `bench`.
fn said_seconds(output: &str) -> Option<f64> {
    let (_, rest) = output.split_once("Run completed in ")?;
    rest.split(' ').next()?.parse().ok()
}

impl Bench {
    fn words(&self, text: &str) -> Vec<String> {
        text.split_whitespace().map(|word| word.replace("{}", &self.scratch.display().to_string())).collect()
    }

    /// Runs a qemu-img command that creates a file, unless an earlier run left the file.
    fn make(&self, text: &str) -> Result<(), String> {
        let made = self.words(text).pop().is_some_and(|name| Path::new(&name).exists());
        if made { Ok(()) } else { self.qemu(text) }
    }

    /// Runs a `cp` or `sync` command, or otherwise a qemu-img command.
    fn command(&self, text: &str) -> Result<(), String> {
        let words = self.words(text);
        match words.split_first() {
            Some((program, args)) if program == "cp" || program == "sync" => {
                check(Command::new(program).args(args)).map(drop)
            }
            _ => self.qemu(text),
        }
    }

    fn qemu(&self, text: &str) -> Result<(), String> {
        check(Command::new("qemu-img").args(self.words(text))).map(|_| ())
    }

    /// Creates the files that the rows read.
    fn setup(&self, rows: &[&Row], files: &str) -> Result<(), String> {
        if rows.iter().any(|row| row.group == "io") {
            self.qemu("create -q -f qcow2 {}/full.qcow2 4G")?;
            let fill = format!("write -q -P 7 0 {}", GIB);
            for quarter in 0..4 {
                let command = fill.replacen(" 0 ", &format!(" {} ", quarter * GIB), 1);
                let image = self.words("{}/full.qcow2");
                check(Command::new("qemu-io").args(["-t", "unsafe", "-c", &command]).args(image))?;
            }
        }
        if rows.iter().any(|row| row.group == "chain") {
            self.qemu("create -q -f qcow2 -o cluster_size=4k {}/empty.qcow2 4G")?;
            self.qemu("create -q -u -f qcow2 -o cluster_size=4k -b base.qcow2 -F qcow2 {}/layer.qcow2 4G")?;
            self.command("cp {}/empty.qcow2 {}/base.qcow2")?;
            // An odd number of clusters per step visits no cluster twice.
            self.qemu(
                "bench -t unsafe -w --pattern 7 -c 100000 -d 32 -S 1640632320 -f qcow2 {}/layer.qcow2",
            )?;
        }
        for layers in DEPTHS {
            let top = format!("/{layers}-{}.qcow2", layers - 1);
            if rows.iter().any(|row| row.args.ends_with(&top)) {
                self.setup_depth(layers)?;
            }
        }
        if rows.iter().any(|row| row.group == "crypt") {
            self.setup_encrypted()?;
        }
        if rows.iter().any(|row| row.group == "tables") {
            self.qemu("create -q -f qcow2 -o preallocation=metadata {}/tables.qcow2 1T")?;
            self.command("cp --sparse=always {}/tables.qcow2 {}/snapshot.qcow2")?;
            check(Command::new(&self.ours).args(self.words("snapshot -c s {}/snapshot.qcow2")))?;
        }
        if rows.iter().any(|row| ["convert", "compress", "rewrite"].contains(&row.group)) {
            let raw = self.scratch.join("real.raw");
            if !raw.exists() {
                let mut disk = Command::new("mke2fs");
                disk.args(["-q", "-t", "ext4", "-d", files]).arg(&raw).arg("6G");
                check(&mut disk)?;
            }
        }
        if rows.iter().any(|row| ["convert", "rewrite"].contains(&row.group)) {
            self.make("convert -W -m 8 -f raw -O qcow2 {}/real.raw {}/real.qcow2")?;
        }
        if rows.iter().any(|row| row.group == "rewrite") {
            self.make("convert -f raw -O qcow2 {}/real.raw {}/kept.qcow2")?;
            self.make("convert -f raw -O raw {}/real.raw {}/kept.raw")?;
        }
        if rows.iter().any(|row| row.args.contains("real-zlib")) {
            self.make("convert -W -m 8 -c -f raw -O qcow2 {}/real.raw {}/real-zlib.qcow2")?;
        }
        if rows.iter().any(|row| row.args.contains("real-zstd")) {
            self.make(
                "convert -W -m 8 -c -o compression_type=zstd -f raw -O qcow2 {}/real.raw {}/real-zstd.qcow2",
            )?;
        }
        Ok(())
    }

    /// A chain of `layers` layers, each with the clusters of a disk of 512 MiB that a hash gives it.
    fn setup_depth(&self, layers: u64) -> Result<(), String> {
        for layer in 0..layers {
            let image = format!("{{}}/{layers}-{layer}.qcow2");
            let below = format!("-b {layers}-{}.qcow2 -F qcow2", layer.wrapping_sub(1));
            let below = if layer > 0 { &below } else { "" };
            self.qemu(&format!("create -q -f qcow2 {below} {image} 512M"))?;
            let mut fill = Command::new("qemu-io");
            fill.args(["-t", "unsafe", "-f", "qcow2"]);
            let own = |cluster: &u64| (cluster.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) % layers == layer;
            for cluster in (0..8192).filter(own) {
                fill.args(["-c", &format!("write -q -P {} {} 64k", layer % 250 + 1, cluster << 16)]);
            }
            check(fill.args(self.words(&image)))?;
        }
        Ok(())
    }

    /// A disk of 1 GiB of random data, and the same encrypted.
    fn setup_encrypted(&self) -> Result<(), String> {
        let raw = self.scratch.join("random.raw");
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        };
        let bytes: Vec<u8> = (0..GIB / 8).flat_map(|_| next()).collect();
        fs::write(&raw, bytes).map_err(|e| format!("{}: {e}", raw.display()))?;
        let secret = "--object secret,id=s,data=abc";
        let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
        self.qemu(&format!("convert {secret} -f raw -O qcow2 -o {options} {{}}/random.raw {{}}/luks.qcow2"))
    }

    fn table(&self, rows: &[&Row]) -> Result<(), String> {
        println!(
            "| row | qemu-img wall s | ours wall s | faster (median of {} pairs) | min - max |",
            self.pairs
        );
        println!("|---|---|---|---|---|");
        rows.iter().try_for_each(|row| self.row(row))
    }

    fn row(&self, row: &Row) -> Result<(), String> {
        let (mut ours, mut theirs, mut copies) = (Vec::new(), Vec::new(), Vec::new());
        let mut sizes = (0, 0);
        for pair in 0..=self.pairs {
            let mut args = self.words(row.args);
            self.prepare(row)?;
            let mine = self.time(&self.ours, &args)?;
            sizes.0 = self.output_size(&args);
            args.splice(1..1, self.words(row.theirs));
            self.prepare(row)?;
            let other = self.time(Path::new("qemu-img"), &args)?;
            sizes.1 = self.output_size(&args);
            let copy = match row.copy() {
                Some(args) => {
                    self.prepare(row)?;
                    Some(self.time(Path::new("cp"), &self.words(args))?)
                }
                None => None,
            };
            // The first pair warms the page cache and is not counted.
            if pair > 0 {
                ours.push(mine);
                theirs.push(other);
                copies.extend(copy);
            }
        }
        compared(row.name, &theirs, &ours);
        if !copies.is_empty() {
            compared("- against `cp --sparse=always` of the raw file", &copies, &ours);
        }
        let mut said: Vec<f64> =
            ours.iter().zip(&theirs).filter_map(|(a, b)| Some(b.said? / a.said?)).collect();
        said.sort_by(f64::total_cmp);
        if let [first, .., last] = said[..] {
            let seconds = |runs: &[Taken]| median(runs.iter().filter_map(|t| t.said));
            println!(
                "| - as `bench` reports, without open and close | {:.2} | {:.2} | {:.2}x | {first:.2} - {last:.2} |",
                seconds(&theirs),
                seconds(&ours),
                said[said.len() / 2],
            );
        }
        if row.group != "io" {
            let cpu = |runs: &[Taken]| median(runs.iter().map(|t| t.cpu));
            let peak = |runs: &[Taken]| median(runs.iter().map(|t| t.peak_mib));
            println!(
                "| - cpu s, peak MiB, output bytes | {:.2}, {:.0}, {} | {:.2}, {:.0}, {} | size {:.4} | |",
                cpu(&theirs),
                peak(&theirs),
                sizes.1,
                cpu(&ours),
                peak(&ours),
                sizes.0,
                sizes.0 as f64 / sizes.1.max(1) as f64,
            );
        }
        Ok(())
    }

    /// Recreates the files of a row, and touches memory for what it writes.
    fn prepare(&self, row: &Row) -> Result<(), String> {
        for out in ["out.qcow2", "out.raw", "zlib.qcow2", "zstd.qcow2", "new.qcow2", "over.qcow2"] {
            let _ = fs::remove_file(self.scratch.join(out));
        }
        row.prepare.iter().try_for_each(|command| self.command(command))?;
        if row.writes_much() {
            // If a hypervisor takes free memory back, the first touch of a page costs several times the copy
            // into it, and hits whichever command runs first. After this both commands find backed pages.
            drop((0..READY / CHUNK).map(|_| vec![1_u8; CHUNK]).collect::<Vec<_>>());
        }
        Ok(())
    }

    fn output_size(&self, args: &[String]) -> u64 {
        args.last().and_then(|name| fs::metadata(name).ok()).map_or(0, |m| m.len())
    }

    /// One run under `/usr/bin/time`, which reports CPU seconds and peak memory.
    fn time(&self, program: &Path, args: &[String]) -> Result<Taken, String> {
        let report = self.scratch.join("time");
        let mut command = Command::new("/usr/bin/time");
        command.args(["-f", "%U %S %M", "-o"]).arg(&report).arg(program).args(args);
        let began = Instant::now();
        let output = check(&mut command)?;
        let wall = began.elapsed().as_secs_f64();
        let text = fs::read_to_string(&report).map_err(|e| format!("{}: {e}", report.display()))?;
        let figures: Vec<f64> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        let [user, system, peak] = figures[..] else { return Err(format!("time wrote '{text}'")) };
        Ok(Taken { wall, cpu: user + system, peak_mib: peak / 1024.0, said: said_seconds(&output) })
    }
}

/// Prints the medians of two commands that ran alternately, and of the ratios of each pair.
fn compared(name: &str, theirs: &[Taken], ours: &[Taken]) {
    let mut ratios: Vec<f64> = ours.iter().zip(theirs).map(|(a, b)| b.wall / a.wall).collect();
    ratios.sort_by(f64::total_cmp);
    let wall = |runs: &[Taken]| median(runs.iter().map(|t| t.wall));
    let (Some(first), Some(last)) = (ratios.first(), ratios.last()) else { return };
    println!(
        "| {name} | {:.2} | {:.2} | {:.2}x | {first:.2} - {last:.2} |",
        wall(theirs),
        wall(ours),
        ratios[ratios.len() / 2],
    );
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}
