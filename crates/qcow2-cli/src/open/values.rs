//! The values of options that every node has, and of those of a file: checked also where they change nothing
//! here.

use crate::failure::Failure;
use crate::imagename::Node;
use crate::imageopts::{read_number, read_switch};

/// Refuses the first value that is none of its option's. Errors: QEMU's words.
pub(super) fn check(node: &Node) -> Result<(), Failure> {
    for (key, value) in node.options.iter() {
        let Some(text) = node.options.text(key).filter(|_| !value.is_null()) else { continue };
        let one_of = |allowed: &[&str], complaint: String| match allowed.contains(&text.as_str()) {
            true => Ok(()),
            false => Err(Failure::new(complaint)),
        };
        let wrong = format!("invalid parameter value: {text}");
        match key {
            _ if SWITCHES.contains(&key) => read_switch(key, &text).map(drop)?,
            "discard" => one_of(&["ignore", "off", "unmap", "on"], "Invalid discard option".to_owned())?,
            "detect-zeroes" => one_of(&["off", "on", "unmap"], wrong)?,
            "locking" => one_of(&["auto", "on", "off"], wrong)?,
            "aio" => one_of(&["threads", "native", "io_uring"], wrong)?,
            "aio-max-batch" => read_number(key, &text).map(drop)?,
            _ => {}
        }
    }
    Ok(())
}

/// Said of requests that the system is to queue where its page cache stands between.
pub(crate) const NATIVE_NEEDS_DIRECT: &str =
    "aio=native was specified, but it requires cache.direct=on, which was not specified.";

const SWITCHES: [&str; 7] = [
    "read-only",
    "auto-read-only",
    "force-share",
    "cache.direct",
    "cache.no-flush",
    "drop-cache",
    "x-check-cache-dropped",
];
