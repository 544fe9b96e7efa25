//! `cargo xtask damage`: damaged images, checked and repaired by our command and by qemu-img.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "a tool for the terminal")]

use qcow2_tests::campaign::Campaign;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

const USAGE: &str =
    "usage: cargo xtask damage [--images N | --seconds N] [--seed N] [--threads N] [--keep FOLDER]
  two of five images are damaged at random, the others are semantic mutants;
  --images 1 --seed N is one of them again";

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(message) => {
            println!("{message}\n{USAGE}");
            ExitCode::from(2)
        }
    }
}

fn run() -> Result<bool, String> {
    let program = std::env::current_exe().map_err(|e| format!("this program is not found: {e}"))?;
    let mut campaign = Campaign {
        ours: program.with_file_name(format!("qcow2-under-test{}", std::env::consts::EXE_SUFFIX)),
        images: 5000,
        time: Duration::from_secs(365 * 24 * 3600),
        seed: 0,
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        keep: None,
    };
    let mut args = std::env::args().skip(1);
    while let Some(name) = args.next() {
        let text = args.next().ok_or_else(|| format!("{name} needs a value"))?;
        let number = text.parse::<u64>().map_err(|_| format!("{name} needs a number"));
        match name.as_str() {
            "--images" => campaign.images = number?,
            "--seconds" => (campaign.images, campaign.time) = (u64::MAX, Duration::from_secs(number?)),
            "--seed" => campaign.seed = number?,
            "--threads" => campaign.threads = number? as usize,
            "--keep" => campaign.keep = Some(PathBuf::from(text)),
            _ => return Err(format!("unknown option {name}")),
        }
    }
    let folder = std::env::temp_dir().join(format!("qcow2-damage-{}", std::process::id()));
    let table = campaign.run(&folder);
    let removed = std::fs::remove_dir_all(&folder);
    let table = table.ok_or("qemu-img is not installed")?;
    removed.map_err(|e| format!("{}: {e}", folder.display()))?;
    for note in &table.notes {
        println!("note: {note}");
    }
    let broken = table.broken();
    broken.iter().for_each(|what| println!("WRONG: {what}"));
    println!("{table}first seed {}, {} rules broken", campaign.seed, broken.len());
    Ok(broken.is_empty())
}
