//! What the exerciser asks of the program around it.

use crate::request::OpenRequest;
use qcow2_core::GuestDisk;
use qcow2_io::Debugger;
use qcow2_ops::info::Qcow2Info;
use std::error::Error;
use std::io;
use std::sync::Arc;

/// The ports of an exerciser.
#[derive(Clone, Copy)]
pub struct Ports<'a> {
    /// Where disks come from.
    pub opener: &'a dyn Opener,
    /// Where text goes.
    pub console: &'a dyn Console,
    /// How errors are worded.
    pub words: &'a dyn Words,
}

/// Opens what commands name. The exerciser opens nothing by itself.
pub trait Opener {
    /// Opens the disk that `request` asks for, its backing chain included. Called by
    /// [`Exerciser::open`](crate::Exerciser::open) and by the commands `open` and `reopen`; no other disk is
    /// open then. Errors: what is told to the user.
    fn open(&self, request: &OpenRequest) -> Result<OpenedDisk, Refusal>;

    /// The first bytes of the file `name`, at most `limit`, for `write -s`. No file is read unless an opener
    /// allows it: by default this is an error.
    fn read_file(&self, name: &str, limit: u64) -> io::Result<Vec<u8>> {
        let _ = (name, limit);
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// A disk that an [`Opener`] opened, and how requests treat it.
#[non_exhaustive]
pub struct OpenedDisk {
    /// The disk with its chain.
    pub disk: Arc<dyn GuestDisk>,
    /// Whether it may be changed. An image that may is closed by the exerciser.
    pub writable: bool,
    /// Whether every write is followed by a flush before it is reported.
    pub durable_writes: bool,
    /// Whether discards reach the disk; if not, they are reported and left out.
    pub discards: bool,
    /// Lines for the user, each as it is.
    pub warnings: Vec<String>,
    /// The breakpoints of a [`BlkdebugStorage`](qcow2_io::BlkdebugStorage) below the disk.
    pub debugger: Option<Arc<Debugger>>,
}

impl OpenedDisk {
    /// A disk whose discards count, whose writes are durable when they are flushed, and about which there is
    /// nothing to say.
    pub fn new(disk: Arc<dyn GuestDisk>, writable: bool) -> Self {
        Self { disk, writable, durable_writes: false, discards: true, warnings: Vec::new(), debugger: None }
    }
}

/// Why a disk is not opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Refusal {
    /// What follows `can't open device NAME: `.
    pub reason: String,
    /// Further lines, each as it is.
    pub hints: Vec<String>,
}

impl Refusal {
    /// A reason without further lines.
    pub fn new(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), hints: Vec::new() }
    }
}

/// Where text goes, in the order in which it is given.
pub trait Console {
    /// Results, line ends included.
    fn out(&self, text: &str);

    /// A line for those who look for trouble, without its end.
    fn complain(&self, line: &str);

    /// The same for a trouble that is not about the form of a command: a program has its name before it.
    fn complain_named(&self, text: &str);
}

/// How the caller words what the engine says.
///
/// A function from an error to its text is one, and shows nothing in `info` beyond qemu-io's own lines.
pub trait Words {
    /// The text of `error`, which follows `read failed: ` and its like: an error of the engine, or of a
    /// procedure with the engine's among its sources.
    fn error(&self, error: &(dyn Error + 'static)) -> String;

    /// What `info` shows of an image after cluster size and offset of the machine's state; whole lines.
    fn details(&self, info: &Qcow2Info) -> String {
        let _ = info;
        String::new()
    }
}

impl<F: Fn(&(dyn Error + 'static)) -> String> Words for F {
    fn error(&self, error: &(dyn Error + 'static)) -> String {
        self(error)
    }
}
