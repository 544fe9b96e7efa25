//! The `qcow2` command.
fn main() {}
