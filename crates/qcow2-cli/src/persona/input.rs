//! Texts of options that are not what they should be.

use super::name::{key_values, option};
use crate::failure::Failure;
use qcow2_blockdev::{CompressionError, KeyValueError, OptionError};

impl From<KeyValueError> for Failure {
    fn from(error: KeyValueError) -> Self {
        Self::new(key_values(&error))
    }
}

impl From<OptionError> for Failure {
    fn from(error: OptionError) -> Self {
        let (reason, hints) = option(&error);
        hints.into_iter().fold(Self::new(reason), Self::hint)
    }
}

/// Of options that qemu-img does not have.
impl From<CompressionError> for Failure {
    fn from(error: CompressionError) -> Self {
        match error {
            CompressionError::Option(error) => error.into(),
            CompressionError::OnlyDeflate(name) => {
                Self::new(format!("Parameter '{name}' is for compression_type=zlib"))
            }
            other => Self::new(format!("Invalid compression: {other}")),
        }
    }
}
