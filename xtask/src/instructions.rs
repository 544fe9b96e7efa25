//! Counts the instructions of hot paths with valgrind, and compares them with a table: a count does not depend
//! on what else the machine does, so a regression of a few percent shows in one run.

use crate::{cargo, find_program};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

/// What the counts were when somebody last looked, and the compiler that made the code.
const TABLE: &str = include_str!("instructions.txt");
/// A count may be this much above the table's, in percent; with another compiler than the table's `OTHER`.
const TOLERANCE: u64 = 6;
const OTHER: u64 = 40;

/// A path: what is prepared, and the `bench` that takes it once for each of its requests.
struct HotPath {
    name: &'static str,
    /// Commands of the tool, `;` between them.
    prepare: &'static str,
    bench: &'static str,
}

const PATHS: &[HotPath] = &[
    HotPath {
        name: "read",
        prepare: "create -q -f qcow2 -o preallocation=metadata {}/a.qcow2 1G",
        bench: "bench -t writeback -d 1 -s 4k {}/a.qcow2",
    },
    HotPath { name: "read below 16 layers", prepare: "", bench: "bench -t writeback -d 1 -s 4k {}/layer16" },
    HotPath {
        name: "write in place",
        prepare: "create -q -f qcow2 -o preallocation=metadata {}/a.qcow2 1G",
        bench: "bench -w -t writeback -d 1 -s 4k {}/a.qcow2",
    },
    HotPath {
        name: "write to a new cluster",
        prepare: "create -q -f qcow2 {}/a.qcow2 1G",
        bench: "bench -w -t writeback -d 1 -s 4k -S 64k {}/a.qcow2",
    },
];

/// Requests of the two runs whose difference is counted: what opening costs is in both.
const REQUESTS: (u64, u64) = (2_000, 12_000);

/// Builds the tool, counts, and compares. Skips with a word where valgrind is missing.
pub(crate) fn run(root: &Path) -> Result<(), String> {
    let Some(valgrind) = find_program("valgrind") else {
        return match std::env::var_os("QCOW2_REQUIRE_TOOLS") {
            Some(_) => Err("valgrind not found".to_owned()),
            None => {
                println!("skipped: valgrind not found");
                Ok(())
            }
        };
    };
    let build = ["build", "--release", "--locked", "-p", "qcow2-cli"];
    succeed(Command::new(cargo()).args(build).current_dir(root))?;
    let tool = root.join("target/release/qcow2");
    let folder = root.join("target/instructions");
    std::fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    make_layers(&tool, &folder)?;
    let (compiler, table) = table()?;
    let same = version()? == compiler;
    let tolerance = if same { TOLERANCE } else { OTHER };
    println!("table of {compiler}; tolerance {tolerance} %");
    let mut worse = Vec::new();
    for path in PATHS {
        let count = count(&valgrind, &tool, &folder, path)?;
        let known = *table.get(path.name).ok_or_else(|| format!("{}: not in the table", path.name))?;
        println!("{:<24} {count:>6} instructions, in the table {known:>6}", path.name);
        if count * 100 > known * (100 + tolerance) {
            worse.push(path.name);
        }
    }
    match worse.is_empty() {
        true => Ok(()),
        false => Err(format!("more instructions than in xtask/src/instructions.txt: {}", worse.join(", "))),
    }
}

/// Sixteen overlays, each with a cluster of its own, over a full disk.
fn make_layers(tool: &Path, folder: &Path) -> Result<(), String> {
    run_tool(tool, folder, "create -q -f qcow2 -o preallocation=metadata {}/layer0 1G")?;
    for layer in 1..=16 {
        let below = layer - 1;
        run_tool(
            tool,
            folder,
            &format!("create -q -f qcow2 -F qcow2 -b {{}}/layer{below} {{}}/layer{layer}"),
        )?;
        let write = format!("write -q {}M 4k", layer * 50);
        succeed(
            Command::new(tool)
                .args(["io", "-f", "qcow2", "-c", &write])
                .arg(folder.join(format!("layer{layer}"))),
        )?;
    }
    Ok(())
}

fn count(valgrind: &Path, tool: &Path, folder: &Path, path: &HotPath) -> Result<u64, String> {
    let mut counts = [0, 0];
    for (requests, count) in [REQUESTS.0, REQUESTS.1].into_iter().zip(&mut counts) {
        for command in path.prepare.split(';').filter(|command| !command.is_empty()) {
            run_tool(tool, folder, command)?;
        }
        let out = Command::new(valgrind)
            .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
            .arg(tool)
            .args(words(path.bench, folder))
            .args(["-c", &requests.to_string()])
            .output()
            .map_err(|e| format!("valgrind: {e}"))?;
        let text = String::from_utf8_lossy(&out.stderr);
        let collected = text.lines().find_map(|line| line.split_once("Collected :"));
        let number = collected.and_then(|(_, number)| number.trim().parse::<u64>().ok());
        *count = number.filter(|_| out.status.success()).ok_or_else(|| format!("valgrind: {text}"))?;
    }
    Ok(counts[1].saturating_sub(counts[0]) / (REQUESTS.1 - REQUESTS.0))
}

fn words(command: &str, folder: &Path) -> Vec<String> {
    command.split_whitespace().map(|word| word.replace("{}", &folder.to_string_lossy())).collect()
}

fn run_tool(tool: &Path, folder: &Path, command: &str) -> Result<(), String> {
    succeed(Command::new(tool).args(words(command, folder)))
}

fn succeed(command: &mut Command) -> Result<(), String> {
    let status = command.status().map_err(|e| format!("{command:?}: {e}"))?;
    if status.success() { Ok(()) } else { Err(format!("{command:?}: {status}")) }
}

/// The compiler's version, and the counts by name.
fn table() -> Result<(&'static str, BTreeMap<&'static str, u64>), String> {
    let mut lines = TABLE.lines().filter(|line| !line.starts_with('#'));
    let compiler = lines.next().ok_or("instructions.txt: no compiler")?;
    let pair = |line: &'static str| {
        let (name, count) = line.rsplit_once(' ')?;
        Some((name.trim_end(), count.parse().ok()?))
    };
    let counts: Option<_> = lines.map(pair).collect();
    Ok((compiler, counts.ok_or("instructions.txt: a line is no name and count")?))
}

fn version() -> Result<String, String> {
    let out = Command::new("rustc").arg("--version").output().map_err(|e| format!("rustc: {e}"))?;
    Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned())
}
