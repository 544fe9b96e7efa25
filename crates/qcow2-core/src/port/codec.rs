//! Compressing and expanding one cluster.

use alloc::string::String;
use core::fmt;

/// Compressed bytes that do not expand to exactly one cluster, or a codec that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CodecError {
    message: String,
}

impl CodecError {
    /// `message` is lower case and says what was wrong with the stream.
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

/// One compression method. Contexts are kept and reused inside; usable from any number of threads.
pub trait ClusterCodec: Send + Sync {
    /// Compresses `plain` (a whole cluster) into the front of `out` and returns the stream's length, or
    /// `None` where it would not fit into `out`. The same input gives the same stream, whatever ran before.
    fn compress(&self, plain: &[u8], out: &mut [u8]) -> Result<Option<usize>, CodecError>;

    /// Expands `stream` into `out` (a whole cluster), which must become full. Bytes of `stream` after the end
    /// of the compressed data are ignored; output past a full `out` is ignored. Errors: broken or short data.
    fn expand(&self, stream: &[u8], out: &mut [u8]) -> Result<(), CodecError>;
}
