//! `ctl`: commands for a server that runs.

use crate::args::Arguments;
use crate::exit;
use crate::failure::Failure;
use crate::session::Session;
use qcow2_blockdev::parse_size;
use qcow2_io::path_of;
use qcow2_report::json;
use qcow2_serve::control::{Client, top};
use serde_json::{Map, Value};
use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

/// How often `top` looks.
const LOOK: Duration = Duration::from_secs(1);

/// Runs the verb.
pub(crate) fn run(session: &Session, mut args: Arguments) -> Result<u8, Failure> {
    let verb = args.verb().name;
    while args.next(session)?.is_some() {}
    let operands = args.into_operands();
    let [socket, command, members @ ..] = &operands[..] else {
        return Err(Failure::usage(verb, "Expecting a socket and a command"));
    };
    let mut client = Client::connect(&path_of(socket)).map_err(|error| lost(socket, &error))?;
    if command == "top" {
        return watch(session, socket, &mut client, members.first());
    }
    let mut line = Map::from_iter([("command".to_owned(), Value::from(command.as_str()))]);
    for member in members {
        let (name, value) = member.split_once('=').ok_or_else(|| {
            Failure::new(format!("'{member}' is no member of a command: NAME=VALUE is expected"))
        })?;
        let number = matches!(name, "size" | "granularity" | "depth").then(|| parse_size(value).ok());
        let value = match number {
            Some(None) => return Err(Failure::new(format!("{name}: '{value}' is no number"))),
            Some(Some(number)) => Value::from(number),
            None => Value::from(value),
        };
        line.insert(name.to_owned(), value);
    }
    let tell = |event: &Value| session.complain(&event.to_string());
    match client.call(&Value::Object(line), &tell).map_err(|error| lost(socket, &error))? {
        Ok(Value::String(text)) => session.print(&text)?,
        Ok(answer) => session.print(&json::pretty(&answer))?,
        Err(text) => return Err(Failure::new(text)),
    }
    Ok(exit::SUCCESS)
}

fn lost(socket: &str, error: &io::Error) -> Failure {
    Failure::new(format!("{socket}: {error}"))
}

/// Shows what clients do, once a second, `times` times or until the server or the reader goes.
fn watch(
    session: &Session,
    socket: &str,
    client: &mut Client,
    times: Option<&String>,
) -> Result<u8, Failure> {
    let times = match times {
        Some(times) => times.parse().map_err(|_| Failure::new(format!("'{times}' is no number")))?,
        None => u64::MAX,
    };
    let ask = serde_json::json!({"command": "statistics"});
    let (mut before, mut begin) = (None, Instant::now());
    for _ in 0..times {
        let answer = client.call(&ask, &|_| ()).map_err(|error| lost(socket, &error))?;
        let now = answer.map_err(Failure::new)?;
        let seconds = begin.elapsed().as_secs_f64();
        begin = Instant::now();
        let clear = if io::stdout().is_terminal() { "\x1b[H\x1b[2J" } else { "" };
        session.print(&format!("{clear}{}", top(before.as_ref(), &now, seconds)))?;
        before = Some(now);
        std::thread::sleep(LOOK);
    }
    Ok(exit::SUCCESS)
}
