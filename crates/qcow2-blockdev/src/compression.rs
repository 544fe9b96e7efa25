//! How compressed clusters are made: levels and windows, which an image does not record.

use crate::keyvalue::KeyValues;
use crate::scalar::{OptionError, OptionErrorKind};
use qcow2_codec::{Deflate, DeflateOptions, Zstd, zstd};
use qcow2_core::{CodecError, Codecs};
use std::error::Error;
use std::fmt;
use std::sync::Arc;

/// What was asked for; the default is each codec's own choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compression {
    is_zstd: bool,
    level: Option<i32>,
    window_bits: Option<u32>,
}

/// Why clusters cannot be compressed so.
#[derive(Debug)]
#[non_exhaustive]
pub enum CompressionError {
    /// A value that its option does not take.
    Option(OptionError),
    /// This option is not for zstd.
    OnlyDeflate(&'static str),
    /// The codec has no such level or window.
    Codec(CodecError),
}

impl fmt::Display for CompressionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Option(error) => error.fmt(f),
            Self::OnlyDeflate(option) => write!(f, "option '{option}' is for compression_type=zlib"),
            Self::Codec(error) => error.fmt(f),
        }
    }
}

impl Error for CompressionError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Codec(error) => error.source(),
            _ => None,
        }
    }
}

impl Compression {
    /// Takes `compression_level` and `compression_window_bits` out of `list`; the method is that of the
    /// `compression_type` there. Errors: a value that is no number, a window for zstd, what the codec does
    /// not know.
    ///
    /// ```
    /// use qcow2_blockdev::{Compression, KeyValues};
    ///
    /// let mut list = KeyValues::parse_image_options(&["compression_level=9,size=1G".to_owned()]);
    /// assert!(Compression::take(&mut list)?.is_given());
    /// assert_eq!(list.pairs().len(), 1);
    /// # Ok::<(), qcow2_blockdev::CompressionError>(())
    /// ```
    pub fn take(list: &mut KeyValues) -> Result<Self, CompressionError> {
        let is_zstd = list.last("compression_type") == Some("zstd");
        let level = number(LEVEL, list.take(LEVEL))?;
        let window_bits: Option<u32> = number(WINDOW_BITS, list.take(WINDOW_BITS))?;
        if is_zstd && window_bits.is_some() {
            return Err(CompressionError::OnlyDeflate(WINDOW_BITS));
        }
        let taken = Self { is_zstd, level, window_bits };
        taken.codecs()?;
        Ok(taken)
    }

    /// Whether anything was asked for.
    pub fn is_given(&self) -> bool {
        self.level.is_some() || self.window_bits.is_some()
    }

    /// The codecs of both methods. Errors: `Codec`.
    pub fn codecs(&self) -> Result<Codecs, CompressionError> {
        let mut options = DeflateOptions::default();
        let mut zstd_level = zstd::DEFAULT_LEVEL;
        match self.level {
            Some(level) if self.is_zstd => zstd_level = level,
            Some(level) => options.level = u32::try_from(level).unwrap_or(0),
            None => {}
        }
        options.window_bits = self.window_bits.unwrap_or(options.window_bits);
        let deflate = Deflate::new(options).map_err(CompressionError::Codec)?;
        let zstd = Zstd::new(zstd_level).map_err(CompressionError::Codec)?;
        Ok(Codecs::new(Arc::new(deflate), Arc::new(zstd)))
    }
}

fn number<T: std::str::FromStr>(name: &str, text: Option<String>) -> Result<Option<T>, CompressionError> {
    let parse = |text: String| {
        let error = || OptionError::new(name, &text, OptionErrorKind::NotANumber);
        text.parse().map_err(|_| CompressionError::Option(error()))
    };
    text.map(parse).transpose()
}

const LEVEL: &str = "compression_level";
const WINDOW_BITS: &str = "compression_window_bits";

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(text: &str) -> Result<(Compression, usize), String> {
        let mut list = KeyValues::parse_image_options(&[text.to_owned()]);
        let compression = Compression::take(&mut list).map_err(|error| error.to_string())?;
        Ok((compression, list.pairs().len()))
    }

    #[test]
    fn levels_and_windows_are_taken_out_and_checked() {
        let none = Compression::default();
        assert_eq!(taken("cluster_size=4k"), Ok((none, 1)));
        let level = |level| Compression { level: Some(level), ..none };
        assert_eq!(taken("compression_level=9,cluster_size=4k"), Ok((level(9), 1)));
        assert_eq!(taken("compression_level=1,compression_level=2"), Ok((level(2), 0)));
        let zstd = Compression { is_zstd: true, ..level(19) };
        assert_eq!(taken("compression_level=19,compression_type=zstd"), Ok((zstd, 1)));
        let wide = Compression { window_bits: Some(15), ..none };
        assert_eq!(taken("compression_window_bits=15"), Ok((wide, 0)));
        for (text, says) in [
            ("compression_level=10", "deflate level is 10"),
            ("compression_level=-1", "deflate level is 0, allowed are 1 to 9"),
            ("compression_level=23,compression_type=zstd", "zstd level is 23"),
            ("compression_level=fast", "takes a number"),
            ("compression_window_bits=16", "window bits are 16"),
            ("compression_type=zstd,compression_window_bits=15", "is for compression_type=zlib"),
        ] {
            let error = taken(text).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
    }
}
