//! The program under the name qemu-nbd: its options, in its words.

use super::Request as Common;
use super::serving::{Serving, Words, serve};
use crate::args::{Getopt, NBD, Opt, Verb, print_verb_help, print_version};
use crate::exit;
use crate::failure::Failure;
use crate::numbers::parse_count;
use crate::persona;
use crate::session::Session;
use crate::trace;
use qcow2_io::{os_error_text, path_of};
#[cfg(unix)]
use qcow2_serve::background;
use qcow2_serve::export::{DetectZeroes, ExportError};
use qcow2_serve::nbd::{Address, ListenError, Listener, ServerOptions};
use std::time::Duration;

/// The tool as its help describes it.
static TOOL: Verb = Verb {
    name: "qemu-nbd",
    summary: "Serve an image to NBD clients",
    synopsis: "[OPTIONS] FILENAME",
    options: NBD,
    operands: &[("FILENAME", "the image, or an option string with --image-opts")],
    run: |session, args| run_as_tool(session, args.into_operands()),
};

/// Runs the tool.
pub(crate) fn run_as_tool(session: &Session, args: Vec<String>) -> Result<u8, Failure> {
    let mut getopt = Getopt::new(NBD, args, true);
    let mut request = Request::new();
    let try_help = format!("Try `{} --help' for more information.", session.called());
    loop {
        match getopt.next() {
            Ok(None) => break,
            Ok(Some(given)) => match given.opt {
                Opt::Help => return print_verb_help(session, &TOOL).map(|()| exit::SUCCESS),
                Opt::Version => return print_version(session).map(|()| exit::SUCCESS),
                Opt::Trace if trace::accept(session, &given.value)? => return Ok(exit::SUCCESS),
                opt => request.take(opt, given.value)?,
            },
            Err(text) => {
                session.complain(&format!("{}: {text}", session.called()));
                return Err(Failure::new(try_help));
            }
        }
    }
    let Ok([image]) = <[String; 1]>::try_from(getopt.into_operands()) else {
        return Err(Failure::new("Invalid number of arguments").hint(try_help));
    };
    if request.common.open.image_opts && request.common.open.format.is_some() {
        return Err(Failure::new("--image-opts and -f are mutually exclusive"));
    }
    let tool = Tool { forks: request.forks, pid_file: request.pid_file.take() };
    let serving = request.into_serving(image)?;
    #[cfg(unix)]
    if tool.forks && !background::is_here() {
        let code = background::start(session.called());
        return code.map_err(|error| Failure::new(format!("Failed to fork: {error}")));
    }
    serve(session, serving, &tool)
}

/// What the options ask for.
#[derive(Default)]
struct Request {
    /// What the verb has too.
    common: Common,
    host: String,
    port: Option<String>,
    forks: bool,
    pid_file: Option<String>,
    /// Options that may be given once.
    given: Vec<&'static str>,
}

impl Request {
    fn new() -> Self {
        let mut request = Self::default();
        let Common { open, export, server, .. } = &mut request.common;
        (open.discards, export.shared) = (false, false);
        (server.clients, server.patient, server.persistent) = (1, true, false);
        request
    }

    fn take(&mut self, opt: Opt, value: String) -> Result<(), Failure> {
        let refused = |text: String| Err(Failure::new(text));
        match opt {
            Opt::NoCache | Opt::Cache => {
                self.once("-n and --cache")?;
                let name = if opt == Opt::Cache { value.as_str() } else { "none" };
                if self.common.open.set_cache(Some(name)).is_err() {
                    return refused(format!("Invalid cache mode `{value}'"));
                }
            }
            Opt::Aio => {
                self.once("--aio")?;
                if self.common.open.set_aio(Some(&value)).is_err() {
                    return refused(format!("Invalid aio mode '{value}'"));
                }
            }
            Opt::Discard => {
                self.once("--discard")?;
                if self.common.open.set_discard(Some(&value)).is_err() {
                    return refused(format!("Invalid discard mode `{value}'"));
                }
            }
            Opt::DetectZeroes => self.detect_zeroes(&value)?,
            Opt::Socket if !value.starts_with('/') => {
                return refused("socket path must be absolute".to_owned());
            }
            Opt::Socket if value.len() >= MAX_SOCKET_PATH => {
                let text = format!("UNIX socket path '{value}' is too long");
                return Err(
                    Failure::new(text).hint(format!("Path must be less than {MAX_SOCKET_PATH} bytes"))
                );
            }
            Opt::Socket => self.common.addresses = vec![Address::Unix(path_of(&value).into())],
            Opt::Bind => self.host = value,
            Opt::Port => self.port = Some(value),
            Opt::StartOffset => self.common.export.start = number("offset", &value, u64::MAX)?,
            Opt::Clients => {
                let most = number("shared device number", &value, i32::MAX as u64)? as usize;
                self.common.export.shared = most != 1;
                self.common.server.clients = if most == 0 { ServerOptions::default().clients } else { most };
            }
            Opt::HandshakeLimit => {
                let seconds = number("handshake limit", &value, u32::MAX.into())?;
                self.common.server.handshake_limit = (seconds > 0).then(|| Duration::from_secs(seconds));
            }
            Opt::Snapshot => {
                let text = format!("Failed in parsing snapshot param `{value}'");
                self.common.take(opt, value).map_err(|failure| failure.with_message(text))?;
            }
            Opt::Connect | Opt::Disconnect => {
                return refused(
                    "kernel NBD devices are not supported; use nbd-client on the socket".to_owned(),
                );
            }
            Opt::Persistent => self.common.server.persistent = true,
            Opt::Fork => self.forks = true,
            Opt::PidFile => self.pid_file = Some(value),
            Opt::ExportName => self.common.names = vec![value],
            opt => self.common.take(opt, value)?,
        }
        Ok(())
    }

    fn once(&mut self, name: &'static str) -> Result<(), Failure> {
        if self.given.contains(&name) {
            return Err(Failure::new(format!("{name} can only be specified once")));
        }
        self.given.push(name);
        Ok(())
    }

    /// Unmapping is looked up in what was given before, as in the tool.
    fn detect_zeroes(&mut self, value: &str) -> Result<(), Failure> {
        self.common.export.detect_zeroes = DetectZeroes::parse(value).ok_or_else(|| {
            Failure::new(format!("Failed to parse detect_zeroes mode: invalid parameter value: {value}"))
        })?;
        match self.common.export.detect_zeroes {
            DetectZeroes::Unmap if !self.common.open.discards => Err(Failure::new(
                "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
            )),
            _ => Ok(()),
        }
    }

    fn into_serving(mut self, image: String) -> Result<Serving, Failure> {
        let name = self.common.names.first().map_or("", String::as_str);
        for (what, text) in [("name", name), ("description", &self.common.export.description)] {
            if text.len() > MAX_STRING {
                return Err(Failure::new(format!("export {what} '{text}' too long")));
            }
        }
        if self.common.addresses.is_empty() {
            let (host, port) = (&*self.host, self.port.as_deref().unwrap_or("10809"));
            self.common.addresses.push(Address::tcp(host, port).ok_or_else(|| {
                let host = if host.is_empty() { "0.0.0.0" } else { host };
                let text = format!("address resolution failed for {host}:{port}: ");
                Failure::new(text + "Servname not supported for ai_socktype")
            })?);
        }
        Ok(self.common.into_serving(vec![image]))
    }
}

/// Reads a number as the tool does: decimal, octal or hexadecimal, without a suffix.
fn number(what: &str, text: &str, most: u64) -> Result<u64, Failure> {
    parse_count(what, text, 0..=most).map_err(|_| Failure::new(format!("Invalid {what} '{text}'")))
}

fn reason(error: &std::io::Error) -> String {
    error.raw_os_error().map_or_else(|| error.to_string(), os_error_text)
}

/// qemu-nbd's words.
struct Tool {
    /// Whether this process is to serve in the background.
    forks: bool,
    pid_file: Option<String>,
}

impl Words for Tool {
    fn not_bound(&self, error: &ListenError) -> Failure {
        let reason = reason(&error.error);
        Failure::new(match &error.address {
            Address::Unix(path) => format!("Failed to bind socket to {}: {reason}", path.display()),
            Address::Tcp { host, port } if error.error.raw_os_error().is_none() => {
                format!("address resolution failed for {host}:{port}: Name or service not known")
            }
            _ => format!("Failed to bind socket: {reason}"),
        })
    }

    fn not_opened(&self, image: &str, failure: Failure) -> Failure {
        failure.without_name().after_words(&format!("Failed to blk_new_open '{image}': "))
    }

    fn not_loaded(&self, image: &str, failure: Failure, missing: bool) -> Failure {
        match missing {
            true => Failure::new("Failed to load snapshot: Can't find snapshot"),
            false => self.not_opened(image, failure),
        }
    }

    fn no_export(&self, error: ExportError) -> Failure {
        Failure::new(match error {
            ExportError::NoBitmap(name) => format!("Bitmap '{name}' is not found"),
            ExportError::Start { start, size } => {
                format!("Offset ({start}) cannot be greater than size of the containing file ({size})")
            }
            error => persona::chain(&error),
        })
    }

    fn ready(&self, _session: &Session, _listeners: &[Listener]) -> Result<(), Failure> {
        #[cfg(unix)]
        if let Some(path) = &self.pid_file {
            background::write_pid(path_of(path).as_ref())
                .map_err(|error| Failure::new(format!("Could not create '{path}': {}", reason(&error))))?;
        }
        #[cfg(unix)]
        if self.forks {
            background::detach().map_err(|error| Failure::new(format!("Failed to daemonize: {error}")))?;
        }
        Ok(())
    }
}

/// Bytes of a path that a socket's address has no room for.
const MAX_SOCKET_PATH: usize = 108;
/// The longest string of the protocol.
const MAX_STRING: usize = 4096;
