//! The target `differ` of `cargo xtask fuzz`: images of every shape, valid and damaged, beside qemu-img.
//!
//! Both are asked whether the image can be opened, what a check says, and what its content is. On valid
//! images every answer is the same. On damaged ones the reference stops at some things that we read past,
//! and the other way round; there the answers agree in all but a few of a thousand, and content that both
//! read is the same.
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
/// Answers about damaged images that may differ, of a thousand.
const MAY_DIFFER: u64 = 5;

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
    let (mut images, mut damaged, mut differ, mut wrong) = (0u64, 0, 0, 0);
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
        let Some(difference) = compare(&tools, &folder) else { continue };
        println!("seed {seed}, damaged {kinds:?}: {difference}");
        match kinds.is_empty() || difference.contains("content") {
            true => wrong += 1,
            false => differ += 1,
        }
    }
    println!("{images} images, {damaged} damaged; {differ} answers differ, {wrong} are wrong");
    println!("stat::number_of_executed_units: {images}");
    Ok(wrong == 0 && differ * 1000 <= damaged.max(1000) * MAY_DIFFER)
}

/// What the tools answer differently about the image in `folder`.
fn compare(tools: &[Tool; 2], folder: &Path) -> Option<String> {
    let codes = |args: &[&str]| tools.each_ref().map(|tool| tool.run_in(folder, args).code);
    let [theirs, own] = codes(&["info", "-f", "qcow2", TOP]);
    if theirs != own {
        return Some(format!("info ends with {theirs:?}, ours with {own:?}"));
    }
    let [theirs, own] = codes(&["check", "-q", "-f", "qcow2", TOP]);
    if theirs != own {
        return Some(format!("check ends with {theirs:?}, ours with {own:?}"));
    }
    let read = |tool: &Tool, name: &str| {
        let code = tool.run_in(folder, &["convert", "-f", "qcow2", "-O", "raw", TOP, name]).code;
        fs::read(folder.join(name)).ok().filter(|_| code == Some(0))
    };
    let (theirs, own) = (read(&tools[0], "theirs.raw"), read(&tools[1], "own.raw"));
    match (theirs, own) {
        (Some(theirs), Some(own)) if theirs != own => Some("the content differs".to_owned()),
        (theirs, own) if theirs.is_some() != own.is_some() => {
            Some(format!("convert succeeds: {}, ours: {}", theirs.is_some(), own.is_some()))
        }
        _ => None,
    }
}
