//! The commands as values.

/// A command, understood.
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
    /// A request that is said to be impossible, and counted, without being made.
    Inject(&'static str),
    /// Something that no disk here can do; the text says so.
    Impossible(String),
}

/// Stops at steps of the engine, where the disk has them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Break {
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
pub(crate) struct Range {
    /// The first byte.
    pub(crate) offset: u64,
    /// How many.
    pub(crate) len: u64,
}

/// How the end of a request is told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Style {
    /// Not at all.
    pub(crate) quiet: bool,
    /// In one line for programs.
    pub(crate) csv: bool,
}

/// Whether a request is waited for, and what it is called when it fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Manner {
    /// One buffer.
    Plain,
    /// Several buffers.
    Vectored,
    /// In the background.
    Background,
}

/// `read`, `readv`, `aio_read`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Read {
    pub(crate) range: Range,
    pub(crate) manner: Manner,
    pub(crate) style: Style,
    /// Show the bytes.
    pub(crate) dump: bool,
    /// The byte that all of them must be.
    pub(crate) check: Option<Check>,
    /// Of the machine's state instead of its disk.
    pub(crate) vm_state: bool,
}

/// What the bytes read must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Check {
    pub(crate) byte: u8,
    /// Bytes of the request before the checked ones.
    pub(crate) skip: u64,
    /// How many are checked.
    pub(crate) len: u64,
}

/// `write`, `writev`, `aio_write`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Write {
    pub(crate) range: Range,
    pub(crate) manner: Manner,
    pub(crate) style: Style,
    pub(crate) content: Content,
    /// Durable at once.
    pub(crate) durable: bool,
    /// Where the bytes go, and how.
    pub(crate) place: Place,
}

/// What is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// The same byte all over.
    Byte(u8),
    /// The content of a file, again and again.
    File(String),
    /// Zeroes that need no data: `may_unmap`: the space may go; `only_fast`: fail rather than write them.
    Zeroes { may_unmap: bool, only_fast: bool },
}

/// Where bytes are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// On the disk.
    Disk,
    /// On the disk, compressed.
    Compressed,
    /// In the machine's state.
    VmState,
}

/// `open`.
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

/// `reopen`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reopen {
    /// `Some(true)` for `-r`, `Some(false)` for `-w`.
    pub(crate) read_only: Option<bool>,
    pub(crate) cache: Option<String>,
    pub(crate) options: Vec<String>,
}
