//! Shows a read as the bytes that a client sends, and reads them as a server does.
//!
//! `cargo run -p qcow2-nbd --example messages`
#![allow(clippy::print_stdout)]

use qcow2_nbd::proto::{Command, Mode, Request};
use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let request = Request { command: Command::READ, flags: 0, cookie: 7, offset: 4096, len: 512 };
    let mut bytes = Vec::new();
    request.encode(Mode::Structured, &mut bytes).map_err(|error| format!("{error:?}"))?;
    println!("{} bytes: {bytes:02x?}", bytes.len());
    let (seen, used) = Request::decode(&bytes, Mode::Structured).map_err(|error| format!("{error:?}"))?;
    println!("{} bytes at {} with cookie {}", seen.len, seen.offset, seen.cookie);
    assert_eq!(used, bytes.len());
    Ok(())
}
