//! Lines over a unix socket: the server's side and a client's.

use super::command::Command;
use crate::local::{LocalListener, Stream};
use serde_json::{Map, Value, json};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Clients at once; further ones are told that there are too many.
const MAX_CLIENTS: usize = 16;
/// Bytes of a line.
const MAX_LINE: u64 = 64 << 10;
/// How often a waiting thread looks whether the server stops.
const LOOK: Duration = Duration::from_millis(100);
/// How long a client may take to read an answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Carries commands out.
pub trait Operator: Sync {
    /// Carries `command` out and returns its answer. `tell` sends an event. Errors: a text for people.
    fn run(&self, command: &Command, tell: &(dyn Fn(Value) + Sync)) -> Result<Value, String>;
}

/// A control socket.
pub struct Control<'a> {
    operator: &'a dyn Operator,
    stop: &'a (dyn Fn() -> bool + Sync),
    clients: AtomicUsize,
}

impl<'a> Control<'a> {
    /// A socket whose commands `operator` carries out, until `stop` says true.
    pub fn new(operator: &'a dyn Operator, stop: &'a (dyn Fn() -> bool + Sync)) -> Self {
        Self { operator, stop, clients: AtomicUsize::new(0) }
    }

    /// Serves the clients of `listener`, each on a thread, until `stop` says true; a command that runs then
    /// is finished first. Errors: of the listener.
    pub fn serve(&self, listener: &LocalListener) -> io::Result<()> {
        let listener = listener.inner();
        listener.set_nonblocking(true)?;
        std::thread::scope(|scope| {
            while !(self.stop)() {
                match listener.accept() {
                    Ok((stream, _)) => {
                        scope.spawn(move || {
                            self.clients.fetch_add(1, Ordering::AcqRel);
                            // A client that goes away ends its own connection only.
                            let _ = self.serve_client(&stream);
                            self.clients.fetch_sub(1, Ordering::AcqRel);
                        });
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(LOOK),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(())
        })
    }

    fn serve_client(&self, stream: &Stream) -> io::Result<()> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(LOOK))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        if self.clients.load(Ordering::Acquire) > MAX_CLIENTS {
            return send(stream, &json!({"error": format!("more than {MAX_CLIENTS} clients at once")}));
        }
        let mut lines = Lines { reader: BufReader::new(stream), line: Vec::new() };
        while let Some(line) = lines.next(self.stop)? {
            send(stream, &self.answer(stream, line))?;
        }
        Ok(())
    }

    /// The answer to a line.
    fn answer(&self, stream: &Stream, line: Result<String, String>) -> Value {
        let command = match line.map(|line| Command::parse(&line)) {
            Ok(Ok(command)) => command,
            Ok(Err(error)) => return answered(error.id.clone(), Err(error.to_string())),
            Err(text) => return answered(None, Err(text)),
        };
        // A client that does not read its events learns how it ended all the same, if it ever reads.
        let tell = |event| drop(send(stream, &event));
        let done = self.operator.run(&command, &tell);
        answered(command.id, done)
    }
}

fn answered(id: Option<Value>, done: Result<Value, String>) -> Value {
    let mut answer = Map::new();
    if let Some(id) = id {
        answer.insert("id".to_owned(), id);
    }
    match done {
        Ok(value) => answer.insert("return".to_owned(), value),
        Err(text) => answer.insert("error".to_owned(), Value::String(text)),
    };
    Value::Object(answer)
}

fn send(mut stream: &Stream, value: &Value) -> io::Result<()> {
    stream.write_all(format!("{value}\n").as_bytes())
}

/// Lines of bounded length from a socket with a timeout.
struct Lines<'a> {
    reader: BufReader<&'a Stream>,
    line: Vec<u8>,
}

impl Lines<'_> {
    /// The next line; inside, an error says what is wrong with it. `None` once the client is gone or `stop`
    /// says true.
    fn next(&mut self, stop: &dyn Fn() -> bool) -> io::Result<Option<Result<String, String>>> {
        self.line.clear();
        loop {
            if stop() {
                return Ok(None);
            }
            let room = MAX_LINE + 1 - self.line.len() as u64;
            match (&mut self.reader).take(room).read_until(b'\n', &mut self.line) {
                Ok(0) => return Ok(None),
                Ok(_) if self.line.ends_with(b"\n") => {
                    let text = std::str::from_utf8(&self.line).map(|line| line.trim_end().to_owned());
                    return Ok(Some(text.map_err(|_| "the line is no UTF-8".to_owned())));
                }
                Ok(_) if self.line.len() as u64 > MAX_LINE => {
                    // What follows is the rest of this line: there is no next one to find.
                    return Err(io::ErrorKind::InvalidData.into());
                }
                Ok(_) => {}
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// A connection to a control socket.
pub struct Client {
    reader: BufReader<Stream>,
}

impl Client {
    /// Connects to the socket at `path`.
    pub fn connect(path: &Path) -> io::Result<Self> {
        Ok(Self { reader: BufReader::new(Stream::connect(path)?) })
    }

    /// Sends a command and waits for its answer; `events` gets what comes before it. Inside, the text of an
    /// error of the server. Errors: of the connection; `InvalidData` for what is no answer.
    pub fn call(&mut self, command: &Value, events: &dyn Fn(&Value)) -> io::Result<Result<Value, String>> {
        send(self.reader.get_ref(), command)?;
        loop {
            let mut line = String::new();
            if self.reader.read_line(&mut line)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let Ok(Value::Object(mut answer)) = serde_json::from_str(&line) else {
                return Err(io::ErrorKind::InvalidData.into());
            };
            if let Some(value) = answer.shift_remove("return") {
                return Ok(Ok(value));
            }
            match answer.shift_remove("error") {
                Some(Value::String(text)) => return Ok(Err(text)),
                _ => events(&Value::Object(answer)),
            }
        }
    }
}
