//! Builds the targets with cargo-fuzz, runs one, and reads what libFuzzer tells about it.

use super::{Target, runs};
use crate::cargo;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Instant, UNIX_EPOCH};

/// Limits of one input: more is a finding.
const RSS_MIB: u64 = 512;
const TIMEOUT_SECONDS: u64 = 10;

/// What a target did.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    pub(super) seconds: u64,
    pub(super) executions: u64,
    /// Edges of the control flow that were reached, and how many there are in the program.
    pub(super) edges: u64,
    pub(super) of: u64,
    pub(super) features: u64,
    /// Inputs that were added to the corpus.
    pub(super) added: u64,
    pub(super) peak_mib: u64,
    /// Where the input that failed is, or the log if there is none.
    pub(super) finding: Option<String>,
}

/// The programs, built.
pub(super) struct Runner {
    folder: PathBuf,
    programs: PathBuf,
}

impl Runner {
    /// Builds every target. Errors: what is missing, and how to get it; the build failed.
    pub(super) fn prepare(root: &Path) -> Result<Self, String> {
        let rustc = Command::new("rustup").args(["run", "nightly", "rustc", "-vV"]).output();
        let rustc = rustc.ok().filter(|output| output.status.success()).ok_or(NO_NIGHTLY)?;
        let version = String::from_utf8_lossy(&rustc.stdout).into_owned();
        let host =
            version.lines().find_map(|line| line.strip_prefix("host: ")).ok_or("rustc tells no host")?;
        if !runs(nightly_cargo(&version).args(["fuzz", "--version"])) {
            return Err(NO_CARGO_FUZZ.to_owned());
        }
        let folder = root.join("fuzz");
        // No target runs unsafe code of ours, so the address sanitizer would only halve the executions.
        let build = ["fuzz", "build", "--sanitizer", "none"];
        let status = nightly_cargo(&version).args(build).current_dir(&folder).status();
        match status.map_err(|e| format!("cannot run rustup: {e}"))? {
            status if status.success() => {}
            status => return Err(format!("cargo {}: {status}", build.join(" "))),
        }
        Ok(Self { programs: folder.join("target").join(host).join("release"), folder })
    }

    /// Runs `target` for `seconds`.
    pub(super) fn run(&self, target: &Target, seconds: u64) -> Outcome {
        println!("== {} for {seconds} s", target.name);
        let started = Instant::now();
        let mut outcome = self.try_run(target, seconds).unwrap_or_else(|error| Outcome {
            finding: Some(format!("did not run: {error}")),
            ..Outcome::default()
        });
        outcome.seconds = started.elapsed().as_secs();
        if let Some(finding) = &outcome.finding {
            println!("{}: {finding}", target.name);
        }
        outcome
    }

    fn try_run(&self, target: &Target, seconds: u64) -> std::io::Result<Outcome> {
        let own = |kind: &str| self.folder.join(kind).join(target.name);
        let (corpus, artifacts) = (own("corpus"), own("artifacts"));
        fs::create_dir_all(&corpus)?;
        fs::create_dir_all(&artifacts)?;
        let log = artifacts.with_extension("log");
        let mut command = Command::new(self.programs.join(target.name));
        command.arg(&corpus).arg(self.folder.join("seeds").join(target.seeds));
        command.args([
            format!("-max_total_time={seconds}"),
            format!("-max_len={}", target.max_len),
            format!("-rss_limit_mb={RSS_MIB}"),
            format!("-timeout={TIMEOUT_SECONDS}"),
            format!("-artifact_prefix={}/", artifacts.display()),
            "-print_final_stats=1".to_owned(),
        ]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&log)?);
        let status = command.status()?;
        let mut outcome = read_log(&String::from_utf8_lossy(&fs::read(&log)?));
        if !status.success() && outcome.finding.is_none() {
            outcome.finding = Some(format!("{status}, see {}", log.display()));
        }
        Ok(outcome)
    }
}

/// Runs the campaign beside qemu-img for `seconds`, from a seed that the clock chooses. Errors: it does not
/// build.
pub(super) fn differ(root: &Path, seconds: u64) -> Result<Outcome, String> {
    println!("== differ for {seconds} s");
    let build = ["build", "--quiet", "--package", "qcow2-tests", "--bins"];
    let status = Command::new(cargo()).args(build).current_dir(root).status();
    if !status.map_err(|e| format!("cannot run cargo: {e}"))?.success() {
        return Err("the campaign beside qemu-img does not build".to_owned());
    }
    let started = Instant::now();
    let folder = root.join("fuzz/artifacts/differ");
    let first = UNIX_EPOCH.elapsed().map_or(1, |now| now.as_secs() * 1_000_000);
    let mut command = Command::new(cargo());
    command.args(["run", "--quiet", "--package", "qcow2-tests", "--bin", "differ", "--"]).current_dir(root);
    let output = command.args([seconds.to_string(), first.to_string()]).arg(&folder).output();
    let output = output.map_err(|e| format!("cannot run cargo: {e}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    print!("{text}");
    let finding = (!output.status.success()).then(|| "see above".to_owned());
    Ok(Outcome { seconds: started.elapsed().as_secs(), finding, ..read_log(&text) })
}

/// Cargo of the toolchain called nightly, whatever ran this tool. Where that is a stable compiler by another
/// name, it has to be told that it may do what nightly compilers do.
fn nightly_cargo(version: &str) -> Command {
    let mut command = Command::new("rustup");
    command.args(["run", "nightly", "cargo"]).env_remove("CARGO").env_remove("RUSTUP_TOOLCHAIN");
    if !version.contains("-nightly") {
        command.env("RUSTC_BOOTSTRAP", "1");
    }
    command
}

/// Reads what libFuzzer wrote.
fn read_log(log: &str) -> Outcome {
    let number = |text: &str| text.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(0);
    let last = |word: &str| log.rsplit_once(word).map_or(0, |(_, rest)| number(rest));
    Outcome {
        seconds: 0,
        executions: last("stat::number_of_executed_units:"),
        edges: last(" cov: "),
        of: log.split_once("modules   (").map_or(0, |(_, rest)| number(rest)),
        features: last(" ft: "),
        added: last("stat::new_units_added:"),
        peak_mib: last("stat::peak_rss_mb:"),
        finding: log
            .split_once("Test unit written to ")
            .and_then(|(_, rest)| Some(rest.lines().next()?.to_owned())),
    }
}

const NO_NIGHTLY: &str =
    "cargo-fuzz needs a nightly compiler: rustup toolchain install nightly --profile minimal";
const NO_CARGO_FUZZ: &str = "cargo-fuzz is missing: cargo install cargo-fuzz --locked";

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "INFO: Loaded 1 modules   (88123 inline 8-bit counters): 88123 [0x5, 0x6),\n\
        #2\tINITED cov: 40 ft: 41 corp: 1/1b exec/s: 0 rss: 40Mb\n\
        #900\tNEW    cov: 310 ft: 900 corp: 30/8Kb lim: 4096 exec/s: 90 rss: 44Mb L: 4/9 MS: 1 ChangeBit-\n";

    fn check(end: &str, executions: u64, finding: Option<&str>) {
        let seen = read_log(&format!("{LOG}{end}"));
        assert_eq!((seen.edges, seen.of, seen.features), (310, 88123, 900));
        assert_eq!((seen.executions, seen.finding.as_deref()), (executions, finding));
    }

    #[test]
    fn logs_of_finished_and_failed_runs_are_read() {
        let stats =
            "stat::number_of_executed_units: 1000\nstat::new_units_added:  29\nstat::peak_rss_mb: 44\n";
        check(stats, 1000, None);
        check(
            &format!("{stats}artifact_prefix='a/'; Test unit written to a/crash-1\nBase64: AA=="),
            1000,
            Some("a/crash-1"),
        );
        check("", 0, None);
    }
}
