//! Trace options: there are no trace events here, and who names one hears so.

use crate::failure::Failure;
use crate::session::Session;
use qcow2_blockdev::KeyValues;

/// Takes the value of `-T`: names of events, or options that name them. Returns whether a list of events was
/// asked for, which ends the program. Errors: an option that is not one; a list of events that cannot be
/// read.
pub(crate) fn accept(session: &Session, text: &str) -> Result<bool, Failure> {
    if matches!(text, "help" | "?" | "") {
        return Ok(!text.is_empty());
    }
    let list = KeyValues::parse_pairs(text, Some("enable"))?;
    if let Some(pair) = list.pairs().iter().find(|pair| !OPTIONS.contains(&pair.key.as_str())) {
        return Err(Failure::new(format!("Invalid parameter '{}'", pair.key)));
    }
    let program = session.program();
    let unknown = |place: &str, event: &str| {
        let name = event.strip_prefix('-').unwrap_or(event);
        if !name.contains('*') {
            session.complain(&format!("{program}:{place} warning: trace event '{name}' does not exist"));
        }
    };
    if let Some(event) = list.last("enable") {
        unknown("", event);
    }
    let Some(path) = list.last("events") else { return Ok(false) };
    if qcow2_io::path_of(path).is_dir() {
        return Ok(false);
    }
    let events = std::fs::read_to_string(qcow2_io::path_of(path)).map_err(|error| {
        let text = error.raw_os_error().map_or_else(|| error.to_string(), qcow2_io::os_error_text);
        session.complain(&format!("{program}:{path}: {text}"));
        Failure::silent(crate::exit::FAILURE)
    })?;
    for (number, line) in (1..).zip(events.split_inclusive('\n')) {
        // As in QEMU, the last character of a line is its end.
        let line = line.char_indices().next_back().map_or("", |(end, _)| &line[..end]);
        if !line.is_empty() && !line.starts_with('#') {
            unknown(&format!("{path}:{number}:"), line);
        }
    }
    Ok(false)
}

const OPTIONS: [&str; 3] = ["enable", "events", "file"];
