//! How to open a disk, from the options of the program and of the commands.

use crate::grammar::Open;
use qcow2_io::CacheMode;
use std::fmt;

/// Options for opening a disk: those of `open` and of the program.
///
/// The default is qemu-io's without options: read-write, every write durable before it is reported, discards
/// enabled.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct OpenRequest {
    /// File name as typed; `None` if the options name the file.
    pub path: Option<String>,
    /// True if `path` is an option string (`driver=...,file.filename=...`).
    pub image_opts: bool,
    /// Format, if given; otherwise it is probed.
    pub format: Option<String>,
    /// Open for reading only.
    pub read_only: bool,
    /// Write to a temporary overlay instead of the disk.
    pub snapshot: bool,
    /// Copy data that is read from the backing chain to the top layer.
    pub copy_on_read: bool,
    /// Open even if other programs have the file locked.
    pub force_share: bool,
    /// Discards reach the disk.
    pub discards: bool,
    /// Cache mode: page cache or not, flushes or not.
    pub cache: CacheMode,
    /// The kernel's native asynchronous I/O was requested; it requires a cache mode without page cache.
    pub native_aio: bool,
    /// Further options, each `key=value,...`.
    pub options: Vec<String>,
}

impl Default for OpenRequest {
    fn default() -> Self {
        Self {
            path: None,
            image_opts: false,
            format: None,
            read_only: false,
            snapshot: false,
            copy_on_read: false,
            force_share: false,
            discards: true,
            cache: CacheMode::Writethrough,
            native_aio: false,
            options: Vec::new(),
        }
    }
}

impl OpenRequest {
    /// Sets the cache mode by name (`none`, `writeback`, ...); `None` changes nothing. Errors: no such word.
    pub fn set_cache(&mut self, name: Option<&str>) -> Result<(), RequestError> {
        if let Some(name) = name {
            self.cache = CacheMode::parse(name).ok_or_else(|| RequestError::Cache(name.to_owned()))?;
        }
        Ok(())
    }

    /// Enables (`unmap`, `on`) or disables (`ignore`, `off`) discards; `None` changes nothing. Errors: no
    /// such word.
    pub fn set_discard(&mut self, name: Option<&str>) -> Result<(), RequestError> {
        self.discards = match name {
            None => return Ok(()),
            Some("unmap" | "on") => true,
            Some("ignore" | "off") => false,
            Some(other) => return Err(RequestError::Discard(other.to_owned())),
        };
        Ok(())
    }

    /// Sets the kind of asynchronous I/O (`threads`, `native`, `io_uring`); `None` changes nothing. All kinds
    /// work the same here; `native` only restricts the cache mode. Errors: no such word.
    pub fn set_aio(&mut self, name: Option<&str>) -> Result<(), RequestError> {
        match name {
            None => {}
            Some("native") => self.native_aio = true,
            Some("threads" | "io_uring") => self.native_aio = false,
            Some(other) => return Err(RequestError::Aio(other.to_owned())),
        }
        Ok(())
    }
}

/// A word that an option of opening does not take. `Display` is qemu-io's line, which both the command line
/// and the commands `open` and `reopen` print.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RequestError {
    /// No cache mode.
    Cache(String),
    /// No way to treat discards.
    Discard(String),
    /// No way of asynchronous I/O.
    Aio(String),
}

impl fmt::Display for RequestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cache(word) => write!(f, "Invalid cache option: {word}"),
            Self::Discard(word) => write!(f, "Invalid discard option: {word}"),
            Self::Aio(word) => write!(f, "Invalid aio option: {word}"),
        }
    }
}

impl std::error::Error for RequestError {}

/// The request of an `open` command. Errors: a word that an option does not take.
pub(crate) fn request_of(open: Open) -> Result<OpenRequest, RequestError> {
    let mut request = OpenRequest {
        path: open.path,
        read_only: open.read_only,
        snapshot: open.snapshot,
        copy_on_read: open.copy_on_read,
        force_share: open.force_share,
        native_aio: open.native_aio,
        options: open.options,
        ..OpenRequest::default()
    };
    if open.no_cache {
        request.cache = CacheMode::None;
    }
    request.set_cache(open.cache.as_deref())?;
    request.set_discard(open.discard.as_deref())?;
    request.set_aio(open.aio.as_deref())?;
    Ok(request)
}
