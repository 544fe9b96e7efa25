//! `--describe`: every verb and option as JSON, for programs that make manual pages and completions of them.

use super::help::LIMITS;
use super::table::COMMON;
use super::{GENERAL, OptionSpec, VERBS};
use crate::failure::Failure;
use crate::session::Session;
use qcow2_report::json::pretty;
use serde_json::{Value, json};

/// Prints the tables.
pub(crate) fn print_description(session: &Session) -> Result<(), Failure> {
    let verbs: Vec<Value> = VERBS
        .iter()
        .map(|verb| {
            let operands: Vec<Value> =
                verb.operands.iter().map(|(name, help)| json!({"name": name, "help": help})).collect();
            json!({
                "name": verb.name,
                "summary": verb.summary,
                "synopsis": verb.synopsis,
                "options": options(verb.options.iter().chain(COMMON)),
                "operands": operands,
            })
        })
        .collect();
    let version = env!("CARGO_PKG_VERSION");
    let general = options(GENERAL.iter());
    let table = json!({"version": version, "options": general, "verbs": verbs, "limits": LIMITS});
    session.print(&pretty(&table))
}

/// Those that the help shows.
fn options(specs: impl Iterator<Item = &'static OptionSpec>) -> Vec<Value> {
    let shown = specs.filter(|spec| !spec.help.is_empty());
    shown
        .map(|spec| {
            json!({
                "short": spec.short.map(String::from),
                "long": spec.long,
                "value": spec.value,
                "help": spec.help,
            })
        })
        .collect()
}
