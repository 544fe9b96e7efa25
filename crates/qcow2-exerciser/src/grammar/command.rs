//! Parsed commands.

/// A parsed command with its arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Read(Read),
    Write(Write),
    Discard {
        range: Range,
        style: Style,
    },
    Flush,
    AioFlush,
    Alloc(Range),
    Map,
    Truncate {
        size: u64,
        preallocation: Option<String>,
    },
    Length,
    Info,
    Sleep {
        milliseconds: u64,
    },
    Open(Open),
    Close,
    Reopen(Reopen),
    Abort,
    Raise {
        signal: i32,
    },
    Help {
        command: Option<String>,
    },
    Quit,
    Break(Break),
    /// Prints the text without running a request and counts as success (`aio_read -i`).
    Inject(&'static str),
    /// A command that no disk here supports; fails with this text.
    Impossible(String),
}

/// A breakpoint command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Break {
    /// Suspends the next request that reaches this event.
    Set {
        event: String,
        tag: String,
    },
    Remove {
        tag: String,
    },
    Resume {
        tag: String,
    },
    /// Waits until a request is suspended.
    Wait {
        tag: String,
    },
}

/// A byte range of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    /// First byte.
    pub(crate) offset: u64,
    /// Length in bytes.
    pub(crate) len: u64,
}

/// How the end of a request is reported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Style {
    /// No report.
    pub(crate) quiet: bool,
    /// One line of comma-separated values.
    pub(crate) csv: bool,
}

/// How a request is run; also decides its name in error messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Manner {
    /// One buffer (`read`, `write`).
    Plain,
    /// Several buffers (`readv`, `writev`).
    Vectored,
    /// On a thread of its own (`aio_read`, `aio_write`).
    Background,
}

/// Arguments of `read`, `readv` and `aio_read`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Read {
    pub(crate) range: Range,
    pub(crate) manner: Manner,
    pub(crate) style: Style,
    /// Print the bytes.
    pub(crate) dump: bool,
    /// The expected content.
    pub(crate) check: Option<Check>,
    /// Read the VM state instead of the disk.
    pub(crate) vm_state: bool,
}

/// Pattern verification: all bytes of a part of the request must have one value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Check {
    pub(crate) byte: u8,
    /// Bytes to skip from the start of the request.
    pub(crate) skip: u64,
    /// Number of bytes to check.
    pub(crate) len: u64,
}

/// Arguments of `write`, `writev` and `aio_write`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Write {
    pub(crate) range: Range,
    pub(crate) manner: Manner,
    pub(crate) style: Style,
    pub(crate) content: Content,
    /// Flush before the request is reported.
    pub(crate) durable: bool,
    /// Where the data goes.
    pub(crate) place: Place,
}

/// The data of a write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// The same byte everywhere.
    Byte(u8),
    /// The content of this file, repeated.
    File(String),
    /// Zeroes, by metadata where possible. `may_unmap`: clusters may be deallocated; `only_fast`: fail rather
    /// than write zeroes as data.
    Zeroes { may_unmap: bool, only_fast: bool },
}

/// Destination of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// The disk.
    Disk,
    /// The disk, as compressed clusters.
    Compressed,
    /// The VM state.
    VmState,
}

/// Arguments of `open`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Open {
    pub(crate) path: Option<String>,
    pub(crate) read_only: bool,
    pub(crate) snapshot: bool,
    pub(crate) copy_on_read: bool,
    pub(crate) no_cache: bool,
    pub(crate) native_aio: bool,
    pub(crate) force_share: bool,
    pub(crate) cache: Option<String>,
    pub(crate) discard: Option<String>,
    pub(crate) aio: Option<String>,
    pub(crate) options: Vec<String>,
}

/// Arguments of `reopen`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reopen {
    /// `Some(true)` for `-r`, `Some(false)` for `-w`.
    pub(crate) read_only: Option<bool>,
    pub(crate) cache: Option<String>,
    pub(crate) options: Vec<String>,
}
