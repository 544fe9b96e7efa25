//! The port for compression: one cluster at a time.

use alloc::string::String;
use core::fmt;

/// A stream that does not expand to exactly one cluster, or a failed codec.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CodecError {
    message: String,
}

impl CodecError {
    /// `message`: what is wrong with the stream, in lower case.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into() }
    }
}

impl fmt::Display for CodecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl core::error::Error for CodecError {}

/// One compression method. Any number of threads may use it concurrently; it reuses its contexts.
pub trait ClusterCodec: Send + Sync {
    /// Compresses `plain` (a whole cluster) into the start of `out`. Returns the stream's length, or `None`
    /// if it does not fit into `out`. Deterministic: the same input always gives the same stream.
    fn compress(&self, plain: &[u8], out: &mut [u8]) -> Result<Option<usize>, CodecError>;

    /// Expands `stream` into `out` (a whole cluster). Ignores bytes of `stream` after the end of the
    /// compressed data, and output past the end of `out`. Errors: damaged data, or data that does not fill
    /// `out`.
    fn expand(&self, stream: &[u8], out: &mut [u8]) -> Result<(), CodecError>;
}
