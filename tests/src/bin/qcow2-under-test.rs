//! The command, for the tests of this package: the same entry as `qcow2`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(qcow2_cli::main_with(std::env::args_os()))
}
