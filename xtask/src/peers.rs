//! Other libraries for qcow2 images beside ours: the same requests, in turns, each in a process of its own.

use crate::cargo;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A library: its package in `xtask/peers`, and whether several threads may use one disk.
const PEERS: &[(&str, bool)] =
    &[("ours", true), ("imago-sync", true), ("imago-async", true), ("qcow2-rs", false)];
const DEPTHS: [usize; 3] = [1, 8, 64];
const THREADS: [usize; 3] = [1, 2, 4];
/// Requests of a run: of reads, and of writes, each of which allocates a cluster of the disk of 4 GiB.
const READS: usize = 200_000;
const WRITES: usize = 20_000;

/// `peers [--scratch FOLDER] [--rounds N]`. Needs qemu-img and qemu-io, and the network for the others'
/// crates.
pub(crate) fn run(root: &Path, args: &[String]) -> Result<(), String> {
    let (mut scratch, mut rounds) = (std::env::temp_dir().join("qcow2-peers"), 5);
    let mut words = args.iter();
    while let Some(word) = words.next() {
        let value = words.next().ok_or_else(|| format!("{word} needs a value"))?;
        match &**word {
            "--scratch" => scratch = PathBuf::from(value).join("qcow2-peers"),
            "--rounds" => rounds = value.parse().map_err(|_| format!("{value}: how many rounds?"))?,
            other => return Err(format!("{other}: unknown")),
        }
    }
    let built: Vec<_> = PEERS.iter().map(|(name, _)| build(root, name)).collect::<Result<_, _>>()?;
    std::fs::create_dir_all(&scratch).map_err(|e| format!("{}: {e}", scratch.display()))?;
    let done = compare(&built, &scratch, rounds);
    let removed = std::fs::remove_dir_all(&scratch).map_err(|e| format!("{}: {e}", scratch.display()));
    done.and(removed)
}

fn build(root: &Path, name: &str) -> Result<PathBuf, String> {
    let folder = root.join("xtask/peers");
    let package = format!("peers-{name}");
    let target = root.join("target/peers");
    let mut command = Command::new(cargo());
    command.args(["build", "--release", "--locked", "-p", &package]).current_dir(folder);
    succeed(command.arg("--target-dir").arg(&target))?;
    Ok(target.join("release").join(package))
}

fn compare(built: &[PathBuf], scratch: &Path, rounds: usize) -> Result<(), String> {
    println!("Requests of 4 KiB a second; medians of {rounds} rounds in turns, and ours as a multiple.\n");
    let names: Vec<_> = PEERS.iter().map(|(name, _)| *name).collect();
    println!("| | {} |\n|---|{}", names.join(" | "), "---|".repeat(names.len()));
    for depth in DEPTHS {
        make_chain(scratch, depth)?;
        for threads in THREADS {
            let task = Task { kind: "read", threads, count: READS };
            row(&format!("read, {depth} layers, {threads} threads"), built, scratch, rounds, &task)?;
        }
    }
    for threads in THREADS {
        let task = Task { kind: "write", threads, count: WRITES };
        row(&format!("allocating write, {threads} threads"), built, scratch, rounds, &task)?;
    }
    Ok(())
}

struct Task {
    kind: &'static str,
    threads: usize,
    count: usize,
}

fn row(name: &str, built: &[PathBuf], scratch: &Path, rounds: usize, task: &Task) -> Result<(), String> {
    let mut rates = vec![Vec::new(); built.len()];
    for _ in 0..rounds {
        for ((program, (_, has_threads)), rates) in built.iter().zip(PEERS).zip(&mut rates) {
            if task.threads == 1 || *has_threads {
                rates.push(measure(program, scratch, task)?);
            }
        }
    }
    let medians: Vec<_> = rates.iter_mut().map(|rates| median(rates)).collect();
    let ours = medians[0].unwrap_or(0.0);
    let cell = |rate: &Option<f64>| match rate {
        Some(rate) => format!("{rate:.0} ({:.2}x)", ours / rate),
        None => "-".to_owned(),
    };
    println!("| {name} | {} |", medians.iter().map(cell).collect::<Vec<_>>().join(" | "));
    Ok(())
}

fn median(rates: &mut [f64]) -> Option<f64> {
    rates.sort_by(f64::total_cmp);
    rates.get(rates.len() / 2).copied()
}

/// One run; of writes with a check of what is left.
fn measure(program: &Path, scratch: &Path, task: &Task) -> Result<f64, String> {
    let image = match task.kind {
        "write" => {
            tool("qemu-img", scratch, &["create", "-q", "-f", "qcow2", "new", "4G"])?;
            "new"
        }
        _ => "top",
    };
    let mut command = Command::new(program);
    // Not all of them look for a backing file beside the image.
    command.current_dir(scratch).arg(scratch.join(image)).arg(task.kind);
    command.args([task.threads.to_string(), task.count.to_string()]);
    let out = command.output().map_err(|e| format!("{}: {e}", program.display()))?;
    let text = String::from_utf8_lossy(&out.stdout);
    let rate = text.trim().parse().map_err(|_| {
        format!("{} {}: {}", program.display(), task.kind, String::from_utf8_lossy(&out.stderr))
    })?;
    if task.kind == "write" {
        let check = Command::new("qemu-img").args(["check", "-q"]).arg(scratch.join(image)).status();
        if !check.is_ok_and(|status| status.success()) {
            println!("({}: qemu-img check finds fault with what it left)", program.display());
        }
    }
    Ok(rate)
}

/// A chain of `depth` layers, `top` at the top: 256 MiB of data at the bottom, and in each layer above it
/// some clusters.
fn make_chain(scratch: &Path, depth: usize) -> Result<(), String> {
    tool("qemu-img", scratch, &["create", "-q", "-f", "qcow2", "layer0", "256M"])?;
    tool("qemu-io", scratch, &["-f", "qcow2", "-c", "write -q -P 5 0 256M", "layer0"])?;
    for layer in 1..depth {
        let (below, name) = (format!("layer{}", layer - 1), format!("layer{layer}"));
        tool("qemu-img", scratch, &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &below, &name])?;
        let write = |n: usize| format!("write -q -P {layer} {}M 64k", (layer * 37 + n * 16) % 256);
        let writes: Vec<_> = (0..16).flat_map(|n| ["-c".to_owned(), write(n)]).collect();
        let mut args = vec!["-f", "qcow2"];
        args.extend(writes.iter().map(|word| &**word));
        args.push(&name);
        tool("qemu-io", scratch, &args)?;
    }
    let top = scratch.join("top");
    let _ = std::fs::remove_file(&top);
    std::fs::rename(scratch.join(format!("layer{}", depth - 1)), top).map_err(|e| e.to_string())
}

fn tool(name: &str, scratch: &Path, args: &[&str]) -> Result<(), String> {
    succeed(Command::new(name).args(args).current_dir(scratch))
}

fn succeed(command: &mut Command) -> Result<(), String> {
    let status = command.status().map_err(|e| format!("{command:?}: {e}"))?;
    if status.success() { Ok(()) } else { Err(format!("{command:?}: {status}")) }
}
