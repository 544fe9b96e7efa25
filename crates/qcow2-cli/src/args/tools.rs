//! Options of what stands in for other tools than qemu-img: `io`, `serve`, and the name qemu-nbd.

use super::spec::{FORCE_SHARE, FORMAT, HELP, IMAGE_OPTS, OBJECT, option};
use super::{Opt, OptionSpec};

/// In the order of qemu-io's table, which shows in its complaints about abbreviations.
pub(super) static IO: &[OptionSpec] = &[
    HELP,
    option(Opt::Version, Some('V'), "version", None, "show the version and exit"),
    option(Opt::Command, Some('c'), "cmd", Some("COMMAND"), "run this command ('help' lists them)"),
    FORMAT,
    option(Opt::ReadOnly, Some('r'), "read-only", None, "for reading only"),
    option(Opt::Scratch, Some('s'), "snapshot", None, "changes go to a temporary overlay"),
    option(Opt::NoCache, Some('n'), "nocache", None, "around the page cache, as -t none"),
    option(Opt::CopyOnRead, Some('C'), "copy-on-read", None, "copy to the image what is read from below it"),
    option(Opt::Misalign, Some('m'), "misalign", None, "accepted; buffers are aligned where it matters"),
    option(Opt::NativeAio, Some('k'), "native-aio", None, "as -i native"),
    option(Opt::Aio, Some('i'), "aio", Some("MODE"), "threads, native or io_uring; all work alike"),
    option(Opt::Cache, Some('t'), "cache", Some("CACHE"), "cache mode (writethrough)"),
    option(Opt::Discard, Some('d'), "discard", Some("MODE"), "discards: ignore or unmap (unmap)"),
    option(Opt::Trace, Some('T'), "trace", Some("TRACE"), "accepted and ignored"),
    FORCE_SHARE,
    OBJECT,
    IMAGE_OPTS,
];

pub(super) static SERVE: &[OptionSpec] = &[
    HELP,
    option(Opt::Socket, Some('k'), "socket", Some("PATH"), "listen on a unix socket"),
    option(Opt::Listen, None, "listen", Some("HOST:PORT"), "listen on TCP (127.0.0.1:10809 by default)"),
    option(Opt::ReadOnly, Some('r'), "read-only", None, "clients cannot change the images"),
    option(Opt::ExportName, Some('x'), "name", Some("NAME"), "name of an export, once for each image"),
    option(Opt::Description, Some('D'), "description", Some("TEXT"), "text for people who list the exports"),
    FORMAT,
    option(Opt::Cache, Some('t'), "cache", Some("CACHE"), "cache mode (writeback)"),
    option(Opt::Discard, Some('d'), "discard", Some("MODE"), "trims: ignore or unmap (unmap)"),
    option(Opt::Scratch, Some('s'), "snapshot", None, "changes go to a temporary overlay"),
    option(Opt::Snapshot, Some('l'), "load-snapshot", Some("SNAPSHOT"), "serve this snapshot, read-only"),
    option(Opt::BitmapContext, Some('B'), "bitmap", Some("NAME"), "clients may ask what this bitmap marks"),
    option(Opt::AllocationDepth, Some('A'), "allocation-depth", None, "clients may ask for layers of ranges"),
    option(Opt::Clients, Some('e'), "clients", Some("COUNT"), "clients at once (1000)"),
    option(Opt::TlsCredentials, None, "tls-creds", Some("ID"), "clients must speak TLS, with this object"),
    option(Opt::TlsAuthorization, None, "tls-authz", Some("ID"), "who may connect over TLS is this object's"),
    option(Opt::Control, None, "control", Some("PATH"), "a unix socket for 'qcow2 ctl'"),
    option(
        Opt::Record,
        None,
        "record",
        Some("FILE"),
        "with --control: where the name of the top file is kept, which is opened at the next start",
    ),
    option(
        Opt::VhostUserBlk,
        None,
        "vhost-user-blk",
        Some("PATH"),
        "a unix socket where a machine's monitor gets the image as a vhost-user-blk device",
    ),
    option(Opt::Queues, None, "queues", Some("COUNT"), "queues of that device (1)"),
    option(Opt::Serial, None, "serial", Some("TEXT"), "serial number of that device"),
    OBJECT,
    IMAGE_OPTS,
    FORCE_SHARE,
];
