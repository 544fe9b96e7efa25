//! The target `differ` of `cargo xtask fuzz`: images of every shape, valid and damaged, beside qemu-img.
//!
//! Both are asked whether the image can be opened, what a check says, and what its content is. The answers
//! are the same, with two exceptions that are allowed:
//!
//! - Where the reference refuses a damaged image, for the sake of its snapshots or bitmaps for example, ours
//!   may read the disk, if that is what it was before the damage, or what the reference reads once the header
//!   names neither snapshots nor bitmaps: a damaged size is the size for both.
//! - Where the file ends before the snapshot table does, the reference takes the rest to be zeroes, and ours
//!   says so instead of showing snapshots without a name.
//!
//! An image on which they differ is kept in the folder, under its seed.
#![allow(clippy::print_stdout, reason = "a tool for the terminal")]

use qcow2_testkit::oracle::Tool;
use qcow2_testkit::rng::Rng;
use qcow2_testkit::shaped::draw;
use qcow2_testkit::world::TOP;
use qcow2_tests::fixtures::codecs;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

const USAGE: &str = "usage: differ SECONDS FIRST-SEED FOLDER";

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(message) => {
            println!("{message}");
            ExitCode::from(2)
        }
    }
}

fn run() -> Result<bool, String> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [seconds, first, folder] = &args[..] else { return Err(USAGE.to_owned()) };
    let number = |text: &String| text.parse::<u64>().map_err(|_| USAGE.to_owned());
    let (seconds, first, folder) = (number(seconds)?, number(first)?, PathBuf::from(folder));
    let reference = Tool::find("qemu-img").ok_or("qemu-img not found")?;
    let ours = std::env::current_exe().map_err(|e| e.to_string())?.with_file_name("qcow2-under-test");
    // Under its own name the program shows more of a damaged image than qemu-img does.
    fs::create_dir_all(&folder).map_err(|e| e.to_string())?;
    let called = folder.join("qemu-img");
    let _ = fs::remove_file(&called);
    std::os::unix::fs::symlink(ours, &called).map_err(|e| e.to_string())?;
    let tools = [reference, Tool::at(called)];
    let end = Instant::now() + Duration::from_secs(seconds);
    let (mut images, mut damaged, mut allowed, mut wrong) = (0u64, 0u64, 0u64, 0u64);
    for seed in first.. {
        if Instant::now() > end {
            break;
        }
        let mut rng = Rng::new(seed);
        let shaped = draw(&mut rng, &codecs())?;
        // The toy cipher of encrypted images is ours alone.
        if shaped.shape.encryption.is_some() {
            continue;
        }
        let kinds = if rng.one_in(4) { Vec::new() } else { shaped.damage(&mut rng, 1) };
        shaped.shelf.save(&folder).map_err(|e| e.to_string())?;
        images += 1;
        damaged += u64::from(!kinds.is_empty());
        match compare(&tools, &folder, shaped.model.bytes()) {
            Answers::Same => {}
            Answers::Allowed(reason) if !kinds.is_empty() => {
                println!("seed {seed}, damaged {kinds:?}: allowed: {reason}");
                allowed += 1;
            }
            Answers::Allowed(difference) | Answers::Differ(difference) => {
                println!("seed {seed}, damaged {kinds:?}: {difference}");
                let kept = folder.join(format!("seed-{seed}"));
                fs::create_dir_all(&kept).map_err(|e| e.to_string())?;
                shaped.shelf.save(&kept).map_err(|e| e.to_string())?;
                wrong += 1;
            }
        }
    }
    println!(
        "{images} images, {damaged} damaged; {wrong} answers differ, besides {allowed} that are allowed"
    );
    println!("stat::number_of_executed_units: {images}");
    Ok(wrong == 0)
}

/// What the two answered.
enum Answers {
    Same,
    /// They differ as they may, for this reason.
    Allowed(String),
    Differ(String),
}

/// What the tools answer about the image in `folder`, whose disk was `content` before it was damaged.
fn compare(tools: &[Tool; 2], folder: &Path, content: &[u8]) -> Answers {
    let codes = |args: &[&str]| tools.each_ref().map(|tool| tool.run_in(folder, args).code);
    let [theirs, own] = tools.each_ref().map(|tool| tool.run_in(folder, &["info", "-f", "qcow2", TOP]));
    let cut = theirs.code == Some(0) && own.stderr.contains("snapshot table ends inside an entry");
    if theirs.code != own.code && !cut {
        return Answers::Differ(format!("info ends with {:?}, ours with {:?}", theirs.code, own.code));
    }
    let [theirs, own] = codes(&["check", "-q", "-f", "qcow2", TOP]);
    if theirs != own {
        return Answers::Differ(format!("check ends with {theirs:?}, ours with {own:?}"));
    }
    let read = |tool: &Tool, top: &str, name: &str| {
        let ended = tool.run_in(folder, &["convert", "-f", "qcow2", "-O", "raw", top, name]);
        let first = ended.stderr.lines().next().unwrap_or_default().to_owned();
        fs::read(folder.join(name)).ok().filter(|_| ended.code == Some(0)).ok_or(first)
    };
    let (theirs, own) = (read(&tools[0], TOP, "theirs.raw"), read(&tools[1], TOP, "own.raw"));
    match (theirs, own) {
        (Ok(theirs), Ok(own)) if theirs != own => Answers::Differ("the content differs".to_owned()),
        (Err(theirs), Ok(own)) if own == content => {
            Answers::Allowed(format!("we read what was written; theirs: {theirs}"))
        }
        (Err(theirs), Ok(own))
            if bare(folder).and_then(|name| read(&tools[0], name, "bare.raw").ok()).as_ref()
                == Some(&own) =>
        {
            Answers::Allowed(format!("the same disk without snapshots and bitmaps; theirs: {theirs}"))
        }
        (Err(theirs), Ok(_)) => {
            Answers::Differ(format!("ours reads another disk than was written; theirs: {theirs}"))
        }
        (Ok(_), Err(own)) => Answers::Differ(format!("theirs converts, ours: {own}")),
        _ if cut => Answers::Allowed("the snapshot table is cut".to_owned()),
        _ => Answers::Same,
    }
}

/// A copy of the image whose header names neither snapshots nor bitmaps.
fn bare(folder: &Path) -> Option<&'static str> {
    let mut bytes = fs::read(folder.join(TOP)).ok()?;
    bytes.get_mut(60..64)?.fill(0);
    bytes.get_mut(88..96)?.fill(0);
    fs::write(folder.join("bare.qcow2"), bytes).ok()?;
    Some("bare.qcow2")
}
