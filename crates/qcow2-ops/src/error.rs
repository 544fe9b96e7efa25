//! The error of all procedures: a matchable kind, the failed step, and the cause.

use qcow2_core::find_cause;
use std::fmt;

/// The result of a procedure.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What a procedure was doing when it failed; enough to choose an exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Opening an image, or detecting its format.
    Open,
    /// Creating an image.
    Create,
    /// Reading the block status: which ranges are allocated, zero or data.
    Extents,
    /// Reading guest bytes.
    Read,
    /// Writing, zeroing or flushing.
    Write,
    /// Preallocating space.
    Preallocate,
    /// Reading or parsing metadata.
    Metadata,
    /// No snapshot or bitmap has that name.
    NotFound,
    /// An option's value is invalid, or excludes another option.
    InvalidOption,
    /// This kind of disk does not support the operation.
    Unsupported,
    /// Closing an image after the procedure.
    Close,
    /// [`Progress::should_stop`](crate::Progress::should_stop) returned true.
    Stopped,
    /// Another procedure changes the layers of the same live disk.
    Busy,
}

/// A failed procedure. `Display` prints this error without its sources; follow `source()` for the rest.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    context: String,
    disk: Option<String>,
    sizes_differ: bool,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind`. `context` is lower case: which step failed, on which disk, and where.
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self { kind, context: context.into(), disk: None, sizes_differ: false, source: None }
    }

    /// Sets the name of the disk that failed, for procedures with several disks.
    pub fn with_disk(mut self, name: impl Into<String>) -> Self {
        self.disk = Some(name.into());
        self
    }

    /// Says that the disks differ in size, and are equal up to the end of the shorter one.
    pub(crate) fn with_different_sizes(mut self) -> Self {
        self.sizes_differ = true;
        self
    }

    /// Adds the underlying error.
    pub fn with_source(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.source = Some(Box::new(source));
        self
    }

    /// The source of this error, if it is directly an error of type `T`: the caller's own error, which one of
    /// the [ports](crate::port) returned. Errors: this error unchanged, if its source is another.
    pub fn caller_error<T: std::error::Error + 'static>(mut self) -> Result<T, Self> {
        match self.source.take().map(|source| source.downcast::<T>()) {
            Some(Ok(found)) => Ok(*found),
            Some(Err(other)) => Err(self.with_boxed_source(other)),
            None => Err(self),
        }
    }

    pub(crate) fn with_boxed_source(mut self, source: Box<dyn std::error::Error + Send + Sync>) -> Self {
        self.source = Some(source);
        self
    }

    /// What the procedure was doing.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The failed step and its location, as `Display` prints them.
    pub fn context(&self) -> &str {
        &self.context
    }

    /// The name of the disk that failed, for procedures with several.
    pub fn disk(&self) -> Option<&str> {
        self.disk.as_deref()
    }

    /// True if a comparison got past the end of the shorter disk before it failed.
    pub fn sizes_differ(&self) -> bool {
        self.sizes_differ
    }

    /// The first engine error among the sources, if there is one.
    pub fn core_error(&self) -> Option<&qcow2_core::Error> {
        find_cause(self)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.context)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|s| &**s as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn core_error_finds_the_engine_error() {
        let below = qcow2_core::Error::new(qcow2_core::ErrorKind::Corrupt, "l2 entry 3 is damaged");
        let error = Error::new(ErrorKind::Read, "reading at byte 512").with_source(below);
        assert_eq!(error.to_string(), "reading at byte 512");
        assert_eq!(error.core_error().map(|e| e.kind()), Some(qcow2_core::ErrorKind::Corrupt));
        assert!(Error::new(ErrorKind::Stopped, "stopped").core_error().is_none());
    }
}
