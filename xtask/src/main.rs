//! The workspace's developer tools. `cargo xtask ci` is what CI runs; each of its checks is a subcommand too.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a tool for the terminal")]

mod bench;
mod campaign;
mod ci;
mod deps;
mod dist;
mod docs;
mod examples;
mod figures;
mod finding;
mod fixtures;
mod fuzz;
mod instructions;
mod lex;
mod libvirt;
mod map;
mod mutants;
mod peers;
mod purity;
mod source;
mod tidy;
mod tour;
mod tree;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("xtask: {message}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[String]) -> Result<(), String> {
    let root = tree::root();
    match args {
        [name, rest @ ..] if ["crash", "damage", "hunt"].contains(&&**name) => {
            return campaign::run(&root, name, rest);
        }
        [name, rest @ ..] if name == "docs" => return docs::run(&root, rest),
        [name, rest @ ..] if name == "fuzz" => return fuzz::run(&root, rest),
        [name, rest @ ..] if name == "libvirt" => return libvirt::run(&root, rest),
        [name, rest @ ..] if name == "bench" => return bench::run(&root, rest),
        [name, rest @ ..] if name == "peers" => return peers::run(&root, rest),
        [name, rest @ ..] if name == "mutants" => return mutants::run(&root, rest),
        _ => {}
    }
    let [name] = args else { return Err(usage()) };
    match name.as_str() {
        "ci" => return ci::all(&root),
        "dist" => return dist::run(&root),
        "fixtures" => return fixtures::make(&root),
        "tour" => return tour::run(&root),
        _ => {}
    }
    let step = ci::STEPS.iter().find(|step| step.name == name).ok_or_else(usage)?;
    (step.run)(&root)
}

fn usage() -> String {
    let mut text = "usage: cargo xtask COMMAND\n  ci        every check below, as CI runs it".to_owned();
    for step in ci::STEPS {
        text.push_str(&format!("\n  {:<9} {}", step.name, step.about));
    }
    text.push_str("\n\n  tour      convert, overlay, check and back on a sample disk, each command printed");
    text.push_str("\n  dist      the command for distribution, its debug information in a separate file");
    text.push_str("\n  docs      manual pages and shell completions, in target/docs or the given folder");
    text.push_str("\n  libvirt   libvirt with ours as qemu-img (needs root, libvirtd, virsh): volumes,");
    text.push_str("\n            and, given the path of a qemu-system, snapshots of a domain");
    text.push_str("\n  crash     simulate power cuts during random operations: --seconds N, --seed N");
    text.push_str(
        "\n  damage    damage images, check and repair them beside qemu-img: --images N, --seconds N,",
    );
    text.push_str("\n            --seed N, --keep FOLDER");
    text.push_str(
        "\n  hunt      look for differences from qemu-img and qemu-io: --seconds N, --lines N, --seed N",
    );
    text.push_str(
        "\n  fuzz      every fuzz target on a nightly compiler: --seconds N, --target NAME, --list",
    );
    text.push_str("\n  mutants   apply known faults to a copy of the tree, one by one, and see whether");
    text.push_str("\n            the tests notice: --list, PATTERN");
    text.push_str("\n  bench     time our command against qemu-img in pairs:");
    text.push_str("\n            --group io|convert|compress, --pairs N, --files DIR");
    text.push_str("\n  peers     other libraries for qcow2 images beside ours: --rounds N, --scratch FOLDER");
    text.push_str("\n  fixtures  regenerate tests/data with QEMU's tools");
    text
}

/// The cargo executable that runs this tool.
fn cargo() -> OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

/// Looks a program up on the search path and in sbin, which is often not on it.
fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    folders.map(|folder| folder.join(name)).find(|file| file.is_file())
}
