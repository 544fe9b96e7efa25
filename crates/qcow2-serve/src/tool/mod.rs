//! The command line of qemu-nbd: arguments in, what to serve out, and its words for what fails.
//!
//! The program around it opens the image and prints.

mod options;
mod process;
mod words;

pub use options::{OPTIONS, Opt, help};
pub use process::Process;
pub use words::{listing, no_export, no_tls, not_bound, not_listed, system_text};

use crate::export::{DetectZeroes, ExportOptions};
use crate::nbd::{Address, ServerOptions, TlsNames, handed_over};
use qcow2_getopt::Getopt;
use std::path::PathBuf;
use std::time::Duration;

/// What a command line asks for.
#[derive(Debug)]
#[non_exhaustive]
pub enum Command {
    /// The help.
    Help,
    /// The version.
    Version,
    /// To list the exports of another server.
    List(Box<AskedList>),
    /// To serve an image.
    Serve(Box<Asked>),
}

/// A server whose exports are to be listed.
#[derive(Debug)]
#[non_exhaustive]
pub struct AskedList {
    /// Where it is.
    pub address: Address,
    /// Names of the objects for TLS.
    pub tls: TlsNames,
}

/// An image to serve, and how.
#[derive(Debug)]
#[non_exhaustive]
pub struct Asked {
    /// File name, or option string.
    pub image: String,
    /// True if it is an option string.
    pub image_opts: bool,
    /// Its format, if given.
    pub format: Option<String>,
    /// Open it for reading only.
    pub read_only: bool,
    /// Changes go to a temporary overlay.
    pub scratch: bool,
    /// A snapshot of it: an id, a name, or both as a list of `key=value`.
    pub snapshot: Option<String>,
    /// Name of the cache mode, a valid one.
    pub cache: String,
    /// Kind of asynchronous I/O, a valid one.
    pub aio: String,
    /// Discards reach the image.
    pub discards: bool,
    /// Names of the objects for TLS.
    pub tls: TlsNames,
    /// How it is exported.
    pub export: ExportOptions,
    /// Limits of the server.
    pub server: ServerOptions,
    /// Where to listen.
    pub address: Address,
    /// What becomes of the process.
    pub process: Process,
}

/// Why a command line is refused.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Refusal {
    /// A line that comes first, complete.
    pub complaint: Option<String>,
    /// The text after the program's name.
    pub text: String,
    /// A line that follows, complete.
    pub hint: Option<String>,
}

/// What takes effect where it stands among the options, before the ones behind it are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Early<'a> {
    /// The definition of an object.
    Object(&'a str),
    /// A trace option.
    Trace(&'a str),
}

/// Why a command line was not read to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stopped<E> {
    /// It is refused.
    Refused(Refusal),
    /// Whoever takes what has effect early does not want to go on.
    Early(E),
}

impl<E> From<Refusal> for Stopped<E> {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl Refusal {
    fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), ..Self::default() }
    }
}

/// Reads the arguments of a program that was `called` so, which may have got sockets from a service manager.
/// `early` gets objects and trace options in their order.
pub fn parse<E>(
    called: &str,
    args: Vec<String>,
    early: impl FnMut(Early<'_>) -> Result<(), E>,
) -> Result<Command, Stopped<E>> {
    parse_with(called, args, handed_over(), early)
}

/// The same for so many sockets.
fn parse_with<E>(
    called: &str,
    args: Vec<String>,
    sockets: u32,
    mut early: impl FnMut(Early<'_>) -> Result<(), E>,
) -> Result<Command, Stopped<E>> {
    let mut getopt = Getopt::new(OPTIONS, args, true);
    let mut request = Request::new(sockets);
    let try_help = format!("Try `{called} --help' for more information.");
    loop {
        match getopt.next() {
            Ok(None) => break,
            Ok(Some(given)) => match given.opt {
                Opt::Help => return Ok(Command::Help),
                Opt::Version => return Ok(Command::Version),
                Opt::Object => early(Early::Object(&given.value)).map_err(Stopped::Early)?,
                Opt::Trace => early(Early::Trace(&given.value)).map_err(Stopped::Early)?,
                opt => request.take(opt, given.value)?,
            },
            Err(text) => {
                let complaint = Some(format!("{called}: {text}"));
                return Err(Refusal { complaint, ..Refusal::new(try_help) }.into());
            }
        }
    }
    if request.lists {
        return request
            .finish_list(getopt.into_operands().is_empty())
            .map(|list| Command::List(Box::new(list)))
            .map_err(Stopped::from);
    }
    let Ok([image]) = <[String; 1]>::try_from(getopt.into_operands()) else {
        return Err(Refusal { hint: Some(try_help), ..Refusal::new("Invalid number of arguments") }.into());
    };
    Ok(Command::Serve(Box::new(request.finish(image)?)))
}

/// Options while they are read.
struct Request {
    asked: Asked,
    socket: Option<PathBuf>,
    host: String,
    port: Option<String>,
    /// How many were handed over.
    sockets: u32,
    lists: bool,
    /// An option that is about an image was given.
    is_about_image: bool,
    /// The socket is to have a label.
    is_labelled: bool,
    /// The image is to become a device of the kernel's.
    is_for_kernel: bool,
    /// Options that may be given once.
    given: Vec<&'static str>,
}

impl Request {
    fn new(sockets: u32) -> Self {
        let (mut export, mut server) = (ExportOptions::default(), ServerOptions::default());
        (export.shared, export.discards) = (false, false);
        (server.clients, server.patient, server.persistent) = (1, true, false);
        let tls = TlsNames { is_lax: true, ..TlsNames::default() };
        let asked = Asked {
            image: String::new(),
            image_opts: false,
            format: None,
            read_only: false,
            scratch: false,
            snapshot: None,
            cache: "writeback".to_owned(),
            aio: "threads".to_owned(),
            discards: false,
            tls,
            export,
            server,
            address: Address::Unix(PathBuf::new()),
            process: Process::default(),
        };
        let (socket, host, port, given) = Default::default();
        Self {
            asked,
            socket,
            host,
            port,
            sockets,
            lists: false,
            is_about_image: false,
            is_labelled: false,
            is_for_kernel: false,
            given,
        }
    }

    fn take(&mut self, opt: Opt, value: String) -> Result<(), Refusal> {
        let refused = |text: String| Err(Refusal::new(text));
        self.is_about_image |= ABOUT_IMAGES.contains(&opt);
        let asked = &mut self.asked;
        match opt {
            Opt::NoCache | Opt::Cache => {
                let name = if opt == Opt::Cache { value } else { "none".to_owned() };
                self.once("-n and --cache")?;
                if !CACHE_MODES.contains(&&*name) {
                    return refused(format!("Invalid cache mode `{name}'"));
                }
                self.asked.cache = name;
            }
            Opt::Aio => {
                self.once("--aio")?;
                if !AIO_KINDS.contains(&&*value) {
                    return refused(format!("Invalid aio mode '{value}'"));
                }
                self.asked.aio = value;
            }
            Opt::Discard => {
                self.once("--discard")?;
                self.asked.discards = match &*value {
                    "unmap" | "on" => true,
                    "ignore" | "off" => false,
                    _ => return refused(format!("Invalid discard mode `{value}'")),
                };
            }
            Opt::DetectZeroes => self.detect_zeroes(&value)?,
            Opt::Socket if !value.starts_with('/') => {
                return refused("socket path must be absolute".to_owned());
            }
            Opt::Socket if value.len() >= MAX_SOCKET_PATH => {
                let hint = Some(format!("Path must be less than {MAX_SOCKET_PATH} bytes"));
                return Err(Refusal {
                    hint,
                    ..Refusal::new(format!("UNIX socket path '{value}' is too long"))
                });
            }
            Opt::Socket => self.socket = Some(value.into()),
            Opt::Bind => self.host = value,
            Opt::Port => self.port = Some(value),
            Opt::StartOffset => asked.export.start = number("offset", &value, u64::MAX)?,
            Opt::Clients => {
                let most = number("shared device number", &value, i32::MAX as u64)? as usize;
                asked.export.shared = most != 1;
                asked.server.clients = if most == 0 { ServerOptions::default().clients } else { most };
            }
            Opt::HandshakeLimit => {
                let seconds = number("handshake limit", &value, u32::MAX.into())?;
                asked.server.handshake_limit = (seconds > 0).then(|| Duration::from_secs(seconds));
            }
            Opt::Connect | Opt::Disconnect => self.is_for_kernel = true,
            Opt::List => self.lists = true,
            opt => self.take_any(opt, value),
        }
        Ok(())
    }

    /// Options that any value is fine for.
    fn take_any(&mut self, opt: Opt, value: String) {
        let asked = &mut self.asked;
        match opt {
            Opt::ReadOnly => asked.read_only = true,
            Opt::Scratch => asked.scratch = true,
            Opt::Format => asked.format = Some(value),
            Opt::ImageOpts => asked.image_opts = true,
            Opt::Snapshot => asked.snapshot = Some(value),
            Opt::Persistent => asked.server.persistent = true,
            Opt::Fork => asked.process.forks = true,
            Opt::PidFile => asked.process.pid_file = Some(value),
            Opt::ExportName => asked.export.name = value,
            Opt::Description => asked.export.description = value,
            Opt::BitmapContext => asked.export.bitmaps.push(value),
            Opt::AllocationDepth => asked.export.allocation_depth = true,
            Opt::TlsCredentials => asked.tls.credentials = Some(value),
            Opt::TlsAuthorization => asked.tls.authorization = Some(value),
            Opt::TlsHostname => asked.tls.hostname = Some(value),
            Opt::SelinuxLabel => self.is_labelled = true,
            _ => {}
        }
    }

    fn once(&mut self, name: &'static str) -> Result<(), Refusal> {
        if self.given.contains(&name) {
            return Err(Refusal::new(format!("{name} can only be specified once")));
        }
        self.given.push(name);
        Ok(())
    }

    /// Unmapping is looked up in what was given before, as in the tool.
    fn detect_zeroes(&mut self, value: &str) -> Result<(), Refusal> {
        let parsed = DetectZeroes::parse(value).ok_or_else(|| {
            Refusal::new(format!("Failed to parse detect_zeroes mode: invalid parameter value: {value}"))
        })?;
        if parsed == DetectZeroes::Unmap && !self.asked.discards {
            return Err(Refusal::new(
                "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
            ));
        }
        self.asked.export.detect_zeroes = parsed;
        Ok(())
    }

    fn finish(self, image: String) -> Result<Asked, Refusal> {
        self.check_activation()?;
        if self.is_for_kernel {
            let text = "kernel NBD devices are not supported; use nbd-client on the socket";
            return Err(Refusal::new(text));
        }
        self.check_tls()?;
        if self.is_labelled {
            return Err(Refusal::new("SELinux labels of sockets are not supported"));
        }
        let address = self.address();
        let mut asked = self.asked;
        if asked.image_opts && asked.format.is_some() {
            return Err(Refusal::new("--image-opts and -f are mutually exclusive"));
        }
        for (what, text) in [("name", &asked.export.name), ("description", &asked.export.description)] {
            if text.len() > MAX_STRING {
                return Err(Refusal::new(format!("export {what} '{text}' too long")));
            }
        }
        (asked.address, asked.image) = (address?, image);
        Ok(asked)
    }

    /// Who was handed a socket is not told of another one.
    fn check_activation(&self) -> Result<(), Refusal> {
        let what = match self.sockets {
            0 => return Ok(()),
            _ if self.is_for_kernel => "NBD device can't be set when using socket activation",
            _ if self.socket.is_some() => "Unix socket can't be set when using socket activation",
            _ if !self.host.is_empty() => "The interface can't be set when using socket activation",
            _ if self.port.is_some() => "TCP port number can't be set when using socket activation",
            _ if self.is_labelled => "SELinux label can't be set when using socket activation",
            _ if self.lists => "List mode is incompatible with socket activation",
            1 => return Ok(()),
            _ => "qemu-nbd does not support socket activation with LISTEN_FDS > 1",
        };
        Err(Refusal::new(what))
    }

    fn address(&self) -> Result<Address, Refusal> {
        if self.sockets > 0 {
            return Ok(Address::HandedOver(0));
        }
        if let Some(path) = &self.socket {
            return Ok(Address::Unix(path.clone()));
        }
        let (host, port) = (&self.host, self.port.as_deref().unwrap_or("10809"));
        Address::tcp(host, port).ok_or_else(|| {
            let host = if host.is_empty() { "0.0.0.0" } else { host };
            let text = format!("address resolution failed for {host}:{port}: ");
            Refusal::new(text + "Servname not supported for ai_socktype")
        })
    }

    /// Which options of TLS stand together.
    fn check_tls(&self) -> Result<(), Refusal> {
        let TlsNames { credentials, authorization, hostname, .. } = &self.asked.tls;
        Err(Refusal::new(match credentials {
            None if authorization.is_some() => "--tls-authz is not permitted without --tls-creds",
            None if hostname.is_some() => "--tls-hostname is not permitted without --tls-creds",
            Some(_) if authorization.is_some() && self.lists => {
                "TLS authorization is incompatible with export list"
            }
            Some(_) if hostname.is_some() && !self.lists => "TLS hostname is only supported with export list",
            _ => return Ok(()),
        }))
    }

    fn finish_list(self, has_no_image: bool) -> Result<AskedList, Refusal> {
        let what = match () {
            () if !has_no_image => "a file name",
            () if self.is_about_image => "per-device settings",
            () if self.asked.process.forks => "forking",
            () => {
                self.check_activation()?;
                self.check_tls()?;
                let address = self.address()?;
                return Ok(AskedList { address, tls: self.asked.tls });
            }
        };
        Err(Refusal::new(format!("List mode is incompatible with {what}")))
    }
}

/// Reads a number as the tool does, by C's rules: decimal, octal or hexadecimal, with a sign, without a
/// suffix. Where all 64 bits are allowed a negative number wraps.
fn number(what: &str, text: &str, most: u64) -> Result<u64, Refusal> {
    let refused = || Refusal::new(format!("Invalid {what} '{text}'"));
    let unsigned = text.trim_start_matches([' ', '\t', '\n', '\x0b', '\x0c', '\r']);
    let is_negative = unsigned.starts_with('-');
    let unsigned = unsigned.strip_prefix(['-', '+']).unwrap_or(unsigned);
    let hexadecimal = unsigned.strip_prefix("0x").or_else(|| unsigned.strip_prefix("0X"));
    let (digits, radix) = match hexadecimal {
        Some(digits) => (digits, 16),
        None if unsigned.len() > 1 && unsigned.starts_with('0') => (&unsigned[1..], 8),
        None => (unsigned, 10),
    };
    let value = u64::from_str_radix(digits, radix).ok().filter(|_| !digits.starts_with('+'));
    let value = value.ok_or_else(refused)?;
    let value = if is_negative { value.wrapping_neg() } else { value };
    if value > most { Err(refused()) } else { Ok(value) }
}

/// Options that a list of exports has no use for, and refuses.
const ABOUT_IMAGES: [Opt; 11] = [
    Opt::Connect,
    Opt::ExportName,
    Opt::Description,
    Opt::Snapshot,
    Opt::BitmapContext,
    Opt::AllocationDepth,
    Opt::Format,
    Opt::Aio,
    Opt::Discard,
    Opt::Cache,
    Opt::NoCache,
];
const CACHE_MODES: [&str; 5] = ["none", "writeback", "writethrough", "directsync", "unsafe"];
const AIO_KINDS: [&str; 3] = ["threads", "native", "io_uring"];
/// Bytes of a path that a socket's address has no room for.
const MAX_SOCKET_PATH: usize = 108;
/// The longest string of the protocol.
const MAX_STRING: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    fn refuse_bad(early: Early<'_>) -> Result<(), String> {
        match early {
            Early::Object("bad") | Early::Trace("bad") => Err(format!("{early:?}")),
            _ => Ok(()),
        }
    }

    fn text(stopped: Stopped<String>) -> String {
        match stopped {
            Stopped::Refused(refusal) => refusal.text,
            Stopped::Early(text) => text,
        }
    }

    #[track_caller]
    fn check(line: &str, expected: Result<(), &str>) {
        let args = line.split_whitespace().map(str::to_owned).collect();
        let seen = parse("qemu-nbd", args, refuse_bad).map(|_| ()).map_err(text);
        assert_eq!(seen, expected.map_err(str::to_owned), "{line}");
    }

    #[test]
    fn lines_and_what_is_wrong_with_them() {
        check("disk", Ok(()));
        check("-k /s -e 0x10 -t --discard=unmap --detect-zeroes=unmap -o 0777 disk", Ok(()));
        check("", Err("Invalid number of arguments"));
        check("disk disk", Err("Invalid number of arguments"));
        check("--bogus disk", Err("Try `qemu-nbd --help' for more information."));
        check("-k s disk", Err("socket path must be absolute"));
        check("-e 1.5 disk", Err("Invalid shared device number '1.5'"));
        check("-e -1 disk", Err("Invalid shared device number '-1'"));
        for number in ["-0", "+1", "-1", "-18446744073709551615", "0x10", "017"] {
            check(&format!("-o {number} disk"), Ok(()));
        }
        for number in ["0x", "08", "5k", "-", "+-5", "--5", "18446744073709551616", "0x+1", "0+1"] {
            check(&format!("-o {number} disk"), Err(&format!("Invalid offset '{number}'")));
        }
        check("-e -0 disk", Ok(()));
        check("-e +0x1 disk", Ok(()));
        check("-n --cache=none disk", Err("-n and --cache can only be specified once"));
        check(
            "-p 70000 disk",
            Err("address resolution failed for 0.0.0.0:70000: Servname not supported for ai_socktype"),
        );
    }

    #[test]
    fn objects_and_traces_take_effect_where_they_stand() {
        let (object, trace) = ("Object(\"bad\")", "Trace(\"bad\")");
        check("--object bad", Err(object));
        check("--object good --object bad -T bad disk", Err(object));
        check("-L --object bad", Err(object));
        check("--object bad -k s disk", Err(object));
        check("-k s --object bad disk", Err("socket path must be absolute"));
        check("-T bad --object bad --nosuch", Err(trace));
        check("--object good -T good disk", Ok(()));
        check("--object good -T good", Err("Invalid number of arguments"));
    }

    /// In the reference's words.
    #[test]
    fn a_socket_that_was_handed_over_is_the_only_one() {
        for (sockets, line, expected) in [
            (1, "disk", None),
            (1, "-k /s disk", Some("Unix socket can't be set when using socket activation")),
            (1, "-k /s -p 1 disk", Some("Unix socket can't be set when using socket activation")),
            (1, "-b 0.0.0.0 disk", Some("The interface can't be set when using socket activation")),
            (1, "-p 10809 disk", Some("TCP port number can't be set when using socket activation")),
            (1, "--selinux-label x disk", Some("SELinux label can't be set when using socket activation")),
            (1, "-L", Some("List mode is incompatible with socket activation")),
            (2, "disk", Some("qemu-nbd does not support socket activation with LISTEN_FDS > 1")),
            (0, "-k /s disk", None),
        ] {
            let args = line.split(' ').map(str::to_owned).collect();
            let seen = parse_with("qemu-nbd", args, sockets, refuse_bad).map_err(text);
            assert_eq!(seen.err().as_deref(), expected, "{sockets} {line}");
        }
    }

    #[test]
    fn one_client_is_the_default_and_0_any_number() {
        let asked =
            |line: &str| match parse("qemu-nbd", line.split(' ').map(str::to_owned).collect(), refuse_bad) {
                Ok(Command::Serve(asked)) => asked,
                other => panic!("{other:?}"),
            };
        let one = asked("disk");
        assert!(!one.export.shared && one.server.clients == 1 && !one.server.persistent && !one.discards);
        let many = asked("-e 0 -t disk");
        assert!(many.export.shared && many.server.clients > 100 && many.server.persistent);
    }
}
