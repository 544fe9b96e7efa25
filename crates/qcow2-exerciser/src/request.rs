//! How a disk is to be opened, as options and commands ask for it.

use crate::grammar::{Open, Reopen};
use qcow2_io::CacheMode;
use std::fmt;

/// How a disk is asked for: the options of `open` and of the program.
///
/// The default is what qemu-io does without options: for reading and writing, each write durable when it is
/// reported, discards counted.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct OpenRequest {
    /// The name as typed; `None` where the options say it all.
    pub path: Option<String>,
    /// Whether the name is an option string.
    pub image_opts: bool,
    /// The format, where it is given.
    pub format: Option<String>,
    /// Whether it is only read.
    pub read_only: bool,
    /// Whether changes go to a scratch overlay.
    pub snapshot: bool,
    /// Whether what is read from below is copied to the top.
    pub copy_on_read: bool,
    /// Whether other users do not matter.
    pub force_share: bool,
    /// Whether discards reach the disk.
    pub discards: bool,
    /// How changes reach the medium.
    pub cache: CacheMode,
    /// Whether the kernel's own asynchronous I/O was asked for, which needs a cache mode without page cache.
    pub native_aio: bool,
    /// Further options, `key=value,...` each.
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
    /// Sets the cache mode by its name (`none`, `writeback`, ...), if one is given.
    pub fn set_cache(&mut self, name: Option<&str>) -> Result<(), RequestError> {
        if let Some(name) = name {
            self.cache = CacheMode::parse(name).ok_or_else(|| RequestError::Cache(name.to_owned()))?;
        }
        Ok(())
    }

    /// Sets whether discards count (`unmap`, `on`, `ignore`, `off`), if it is said.
    pub fn set_discard(&mut self, name: Option<&str>) -> Result<(), RequestError> {
        self.discards = match name {
            None => return Ok(()),
            Some("unmap" | "on") => true,
            Some("ignore" | "off") => false,
            Some(other) => return Err(RequestError::Discard(other.to_owned())),
        };
        Ok(())
    }

    /// Notes the way of asynchronous I/O (`threads`, `native`, `io_uring`); all are one here, but for what
    /// they ask of the cache mode.
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

/// What `open` asks for.
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

/// The request for the same disk in another way. Errors: the text after the program's name.
pub(crate) fn changed(old: &OpenRequest, reopen: Reopen) -> Result<OpenRequest, String> {
    let mut new = old.clone();
    new.set_cache(reopen.cache.as_deref()).map_err(|error| error.to_string())?;
    if let Some(read_only) = reopen.read_only {
        new.read_only = read_only;
    }
    for text in &reopen.options {
        for item in text.split(',') {
            let key = item.split('=').next().unwrap_or_default();
            if key.starts_with("cache.") && reopen.cache.is_some() {
                return Err("Cannot set both -c and the cache options".to_owned());
            }
            if key == "read-only" && reopen.read_only.is_some() {
                return Err("Cannot set both -r/-w and 'read-only'".to_owned());
            }
            if !CHANGEABLE.contains(&key) {
                return Err(format!("Cannot change the option '{key}'"));
            }
        }
    }
    new.options.extend(reopen.options);
    Ok(new)
}

/// The options that may change while a disk is open.
const CHANGEABLE: [&str; 9] = [
    "read-only",
    "cache.direct",
    "cache.no-flush",
    "lazy-refcounts",
    "l2-cache-size",
    "refcount-cache-size",
    "cache-size",
    "discard",
    "overlap-check",
];
