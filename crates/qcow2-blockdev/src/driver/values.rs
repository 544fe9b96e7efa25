//! The values of options that every node has, and of those of a file: checked also where they change nothing
//! here.

use crate::scalar::{OptionError, OptionErrorKind, read_number, read_switch};
use crate::tree::{Options, Scalar};

/// Refuses the first value that its option does not take.
pub(crate) fn check(options: &Options) -> Result<(), OptionError> {
    for (key, value) in options.iter().filter(|(_, value)| **value != Scalar::Null) {
        let text = value.to_string();
        let one_of = |allowed: &[&str]| match allowed.contains(&text.as_str()) {
            true => Ok(()),
            false => Err(OptionError::new(key, &text, OptionErrorKind::NotAChoice)),
        };
        match key {
            _ if SWITCHES.contains(&key) => read_switch(key, &text).map(drop)?,
            "discard" => one_of(&["ignore", "off", "unmap", "on"])?,
            "detect-zeroes" => one_of(&["off", "on", "unmap"])?,
            "locking" => one_of(&["auto", "on", "off"])?,
            "aio" => one_of(&["threads", "native", "io_uring"])?,
            "aio-max-batch" | "reconnect-delay" | "open-timeout" => read_number(key, &text).map(drop)?,
            _ => {}
        }
    }
    Ok(())
}

const SWITCHES: [&str; 7] = [
    "read-only",
    "auto-read-only",
    "force-share",
    "cache.direct",
    "cache.no-flush",
    "drop-cache",
    "x-check-cache-dropped",
];
