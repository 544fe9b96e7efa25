//! The command as the tests of this package run it: the same entry point as `qcow2`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(qcow2_cli::main_with(std::env::args_os()))
}
