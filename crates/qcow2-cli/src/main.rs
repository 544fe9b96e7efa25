//! The `qcow2` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(qcow2_cli::main_with(std::env::args_os()))
}
