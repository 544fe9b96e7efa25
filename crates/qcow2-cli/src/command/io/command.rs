//! The commands as values.

/// A command, understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Command {
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
    /// A request that is said to be impossible, and counted, without being made.
    Inject(&'static str),
    /// Something that no disk here can do; the text says so.
    Impossible(String),
}

/// Stops at steps of the engine, where the disk has them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Break {
    /// The next request that reaches this step stops there.
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
    /// Waits until a request has stopped.
    Wait {
        tag: String,
    },
}

/// Bytes of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    /// The first byte.
    pub(super) offset: u64,
    /// How many.
    pub(super) len: u64,
}

/// How the end of a request is told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Style {
    /// Not at all.
    pub(super) quiet: bool,
    /// In one line for programs.
    pub(super) csv: bool,
}

/// Whether a request is waited for, and what it is called when it fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Manner {
    /// One buffer.
    Plain,
    /// Several buffers.
    Vectored,
    /// In the background.
    Background,
}

/// `read`, `readv`, `aio_read`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Read {
    pub(super) range: Range,
    pub(super) manner: Manner,
    pub(super) style: Style,
    /// Show the bytes.
    pub(super) dump: bool,
    /// The byte that all of them must be.
    pub(super) check: Option<Check>,
    /// Of the machine's state instead of its disk.
    pub(super) vm_state: bool,
}

/// What the bytes read must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Check {
    pub(super) byte: u8,
    /// Bytes of the request before the checked ones.
    pub(super) skip: u64,
    /// How many are checked.
    pub(super) len: u64,
}

/// `write`, `writev`, `aio_write`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Write {
    pub(super) range: Range,
    pub(super) manner: Manner,
    pub(super) style: Style,
    pub(super) content: Content,
    /// Durable at once.
    pub(super) durable: bool,
    /// Where the bytes go, and how.
    pub(super) place: Place,
}

/// What is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// The same byte all over.
    Byte(u8),
    /// The content of a file, again and again.
    File(String),
    /// Zeroes that need no data: `may_unmap`: the space may go; `only_fast`: fail rather than write them.
    Zeroes { may_unmap: bool, only_fast: bool },
}

/// Where bytes are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// On the disk.
    Disk,
    /// On the disk, compressed.
    Compressed,
    /// In the machine's state.
    VmState,
}

/// `open`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Open {
    pub(super) path: Option<String>,
    pub(super) read_only: bool,
    pub(super) snapshot: bool,
    pub(super) copy_on_read: bool,
    pub(super) no_cache: bool,
    pub(super) native_aio: bool,
    pub(super) force_share: bool,
    pub(super) cache: Option<String>,
    pub(super) discard: Option<String>,
    pub(super) aio: Option<String>,
    pub(super) options: Vec<String>,
}

/// `reopen`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Reopen {
    /// `Some(true)` for `-r`, `Some(false)` for `-w`.
    pub(super) read_only: Option<bool>,
    pub(super) cache: Option<String>,
    pub(super) options: Vec<String>,
}
