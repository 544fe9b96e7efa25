//! Ports: what the exerciser needs from the program around it.

use crate::request::OpenRequest;
use qcow2_core::{GuestDisk, Preallocation};
use qcow2_io::Debugger;
use qcow2_ops::info::Qcow2Info;
use std::error::Error;
use std::io;
use std::sync::Arc;

/// The ports of an exerciser.
#[derive(Clone, Copy)]
pub struct Ports<'a> {
    /// Opens disks.
    pub opener: &'a dyn Opener,
    /// Receives the output.
    pub console: &'a dyn Console,
    /// Words the errors.
    pub words: &'a dyn Words,
}

/// Opens disks and files by name. The exerciser opens nothing itself.
pub trait Opener {
    /// Opens the disk that `request` describes, with its backing chain.
    /// [`Exerciser::open`](crate::Exerciser::open) and the commands `open` and `reopen` call it, always while
    /// no other disk is open. Errors: the text for the user.
    fn open(&self, request: &OpenRequest) -> Result<OpenedDisk, Refusal>;

    /// Reads at most `limit` bytes from the start of the file `name`, for `write -s`. The default refuses: no
    /// file is read unless an opener allows it.
    fn read_file(&self, name: &str, limit: u64) -> io::Result<Vec<u8>> {
        let _ = (name, limit);
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// An open disk and how requests treat it.
#[non_exhaustive]
pub struct OpenedDisk {
    /// The disk with its chain.
    pub disk: Arc<dyn GuestDisk>,
    /// True if the disk may be changed. If it is an image, the exerciser then closes it.
    pub writable: bool,
    /// True if every write is followed by a flush before it is reported.
    pub durable_writes: bool,
    /// True if discards reach the disk. Otherwise they are ignored and reported as successful.
    pub discards: bool,
    /// Lines for the user, printed as they are.
    pub warnings: Vec<String>,
    /// Breakpoints of a [`BlkdebugStorage`](qcow2_io::BlkdebugStorage) below the disk.
    pub debugger: Option<Arc<Debugger>>,
}

impl OpenedDisk {
    /// A disk with discards enabled, writes that become durable when flushed, no warnings and no breakpoints.
    pub fn new(disk: Arc<dyn GuestDisk>, writable: bool) -> Self {
        Self { disk, writable, durable_writes: false, discards: true, warnings: Vec::new(), debugger: None }
    }
}

/// Why a disk could not be opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Refusal {
    /// The text after `can't open device NAME: `.
    pub reason: String,
    /// Further lines, printed as they are.
    pub hints: Vec<String>,
}

impl Refusal {
    /// A refusal without further lines.
    pub fn new(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), hints: Vec::new() }
    }
}

/// Receives the output, in order.
pub trait Console {
    /// Results, for standard output. `text` includes its line ends.
    fn out(&self, text: &str);

    /// A line for standard error, without its line end.
    fn complain(&self, line: &str);

    /// Like [`complain`](Self::complain), but a program prints its name first: used for all errors except
    /// wrong syntax.
    fn complain_named(&self, text: &str);
}

/// Words the errors of the engine.
///
/// Any function from an error to its text implements it; `info` then prints qemu-io's own lines only.
pub trait Words {
    /// The text after `read failed: ` and the like. `error` is an error of the engine, or of a procedure
    /// (`qcow2_ops`) with the engine's error among its sources.
    fn error(&self, error: &(dyn Error + 'static)) -> String;

    /// The lines of a `truncate` that failed, the first of which gets the program's name. `disk` has its old
    /// size; `mode` was asked for.
    fn not_resized(
        &self,
        error: &qcow2_ops::Error,
        mode: Preallocation,
        disk: &dyn GuestDisk,
    ) -> Vec<String> {
        let _ = (mode, disk);
        vec![format!("Could not resize: {}", self.error(error))]
    }

    /// True if an image that gets marked as corrupt while it is open is gone for all further commands, as it
    /// is in QEMU. The default leaves what can be read readable.
    fn corrupt_images_go(&self) -> bool {
        false
    }

    /// Lines that `info` prints after the cluster size and the offset of the VM state; whole lines.
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
