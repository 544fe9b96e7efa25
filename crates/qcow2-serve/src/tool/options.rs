//! qemu-nbd's options as a table.

use qcow2_getopt::OptionSpec;
use std::fmt::Write;

/// What an option means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the table below says what each is")]
#[non_exhaustive]
pub enum Opt {
    Help,
    Version,
    Bind,
    Port,
    Socket,
    StartOffset,
    ReadOnly,
    AllocationDepth,
    BitmapContext,
    Connect,
    Disconnect,
    Scratch,
    Snapshot,
    NoCache,
    Cache,
    Aio,
    Discard,
    DetectZeroes,
    Clients,
    Format,
    Persistent,
    Verbose,
    List,
    Object,
    ExportName,
    Description,
    HandshakeLimit,
    ImageOpts,
    Fork,
    PidFile,
    Trace,
    TlsCredentials,
    TlsAuthorization,
    TlsHostname,
    SelinuxLabel,
}

/// In the order of qemu-nbd's table, which shows in its complaints about abbreviations.
pub static OPTIONS: &[OptionSpec<Opt>] = &[
    option(Opt::Help, Some('h'), "help", None, "show this help and exit"),
    option(Opt::Version, Some('V'), "version", None, "show the version and exit"),
    option(Opt::Bind, Some('b'), "bind", Some("IFACE"), "address to listen on (0.0.0.0)"),
    option(Opt::Port, Some('p'), "port", Some("PORT"), "port to listen on (10809)"),
    option(Opt::Socket, Some('k'), "socket", Some("PATH"), "listen on a unix socket"),
    option(
        Opt::StartOffset,
        Some('o'),
        "offset",
        Some("OFFSET"),
        "begin the export at this byte of the image",
    ),
    option(Opt::ReadOnly, Some('r'), "read-only", None, "clients cannot change the image"),
    option(Opt::AllocationDepth, Some('A'), "allocation-depth", None, "tell clients the allocation depth"),
    option(Opt::BitmapContext, Some('B'), "bitmap", Some("NAME"), "tell clients what this bitmap marks"),
    option(Opt::Connect, Some('c'), "connect", Some("DEV"), "refused: the kernel's devices are not driven"),
    option(Opt::Disconnect, Some('d'), "disconnect", None, "refused, as --connect"),
    option(Opt::Scratch, Some('s'), "snapshot", None, "changes go to a temporary overlay"),
    option(Opt::Snapshot, Some('l'), "load-snapshot", Some("SNAPSHOT"), "serve this snapshot of the image"),
    option(Opt::NoCache, Some('n'), "nocache", None, "around the page cache, as --cache=none"),
    option(Opt::Cache, None, "cache", Some("MODE"), "cache mode (writeback)"),
    option(Opt::Aio, None, "aio", Some("MODE"), "threads, native or io_uring; all work alike"),
    option(Opt::Discard, None, "discard", Some("MODE"), "trims: ignore or unmap (ignore)"),
    option(Opt::DetectZeroes, None, "detect-zeroes", Some("MODE"), "written zeroes: off, on or unmap (off)"),
    option(Opt::Clients, Some('e'), "shared", Some("NUM"), "clients at once, 0 for any number (1)"),
    option(Opt::Format, Some('f'), "format", Some("FMT"), "format of the image"),
    option(Opt::Persistent, Some('t'), "persistent", None, "stay when the last client has left"),
    option(Opt::Verbose, Some('v'), "verbose", None, "accepted and ignored"),
    option(Opt::List, Some('L'), "list", None, "list the exports of another server"),
    option(Opt::Object, None, "object", Some("OBJECT"), "define an object, such as a secret"),
    option(Opt::ExportName, Some('x'), "export-name", Some("NAME"), "name of the export (empty)"),
    option(Opt::Description, Some('D'), "description", Some("TEXT"), "text for people who list the exports"),
    option(
        Opt::HandshakeLimit,
        None,
        "handshake-limit",
        Some("SECONDS"),
        "how long a client may negotiate, 0 for ever (10)",
    ),
    option(Opt::ImageOpts, None, "image-opts", None, "FILENAME is an option string (driver=qcow2,...)"),
    option(Opt::Fork, None, "fork", None, "serve in the background, and end when clients can connect"),
    option(
        Opt::PidFile,
        None,
        "pid-file",
        Some("PATH"),
        "write the number of the server's process to a file",
    ),
    option(Opt::TlsCredentials, None, "tls-creds", Some("ID"), "clients must speak TLS, with this object"),
    option(
        Opt::TlsHostname,
        None,
        "tls-hostname",
        Some("NAME"),
        "with -L: the name that the server's certificate must be for",
    ),
    option(Opt::TlsAuthorization, None, "tls-authz", Some("ID"), "who may connect over TLS is this object's"),
    option(Opt::SelinuxLabel, None, "selinux-label", Some("LABEL"), "refused: sockets get no label"),
    option(Opt::Trace, Some('T'), "trace", Some("TRACE"), "accepted; there are no trace events"),
];

/// The help.
pub fn help() -> String {
    let mut text =
        "Serve an image to NBD clients.\n\nUsage:\n  qemu-nbd [OPTIONS] FILENAME\n\nOptions:\n".to_owned();
    for spec in OPTIONS {
        let short = spec.short.map_or(String::new(), |short| format!("-{short}, "));
        let value = spec.value.map_or(String::new(), |value| format!(" {value}"));
        let names = format!("{short}--{}{value}", spec.long.unwrap_or_default());
        // Writing to text cannot fail.
        let _ = writeln!(text, "  {names:<30}{}", spec.help);
    }
    text
}

const fn option(
    opt: Opt,
    short: Option<char>,
    long: &'static str,
    value: Option<&'static str>,
    help: &'static str,
) -> OptionSpec<Opt> {
    OptionSpec { opt, short, long: Some(long), exact: false, own: false, value, help }
}
