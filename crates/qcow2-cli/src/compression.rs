//! How compressed clusters are made: levels and windows that are the command's own options, because an image
//! does not record them and qemu-img has none.

use crate::failure::Failure;
use qcow2_blockdev::KeyValues;
use qcow2_codec::{Deflate, DeflateOptions, Zstd, zstd};
use qcow2_core::Codecs;
use std::sync::Arc;

/// What was asked for; `None`: the codec's own choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Compression {
    is_zstd: bool,
    level: Option<i32>,
    window_bits: Option<u32>,
}

impl Compression {
    /// zlib or zstd as they are best by default.
    pub(crate) const DEFAULT: Self = Self { is_zstd: false, level: None, window_bits: None };

    /// Takes the options that are meant here out of `list`. Errors: a value that is no number, a window for
    /// zstd, what the codec does not know.
    pub(crate) fn take(list: &mut KeyValues) -> Result<Self, Failure> {
        let is_zstd = list.last("compression_type") == Some("zstd");
        let level = number(LEVEL, list.take(LEVEL))?;
        let window_bits: Option<u32> = number(WINDOW_BITS, list.take(WINDOW_BITS))?;
        if is_zstd && window_bits.is_some() {
            return Err(Failure::new(format!("Parameter '{WINDOW_BITS}' is for compression_type=zlib")));
        }
        let taken = Self { is_zstd, level, window_bits };
        taken.codecs()?;
        Ok(taken)
    }

    /// Whether anything was asked for.
    pub(crate) fn is_given(&self) -> bool {
        self.level.is_some() || self.window_bits.is_some()
    }

    /// The codecs of both methods.
    pub(crate) fn codecs(&self) -> Result<Codecs, Failure> {
        let mut options = DeflateOptions::default();
        let mut zstd_level = zstd::DEFAULT_LEVEL;
        match self.level {
            Some(level) if self.is_zstd => zstd_level = level,
            Some(level) => options.level = u32::try_from(level).unwrap_or(0),
            None => {}
        }
        options.window_bits = self.window_bits.unwrap_or(options.window_bits);
        let refused = |error| Failure::new(format!("Invalid compression: {error}"));
        let deflate = Deflate::new(options).map_err(refused)?;
        let zstd = Zstd::new(zstd_level).map_err(refused)?;
        Ok(Codecs::new(Arc::new(deflate), Arc::new(zstd)))
    }
}

fn number<T: std::str::FromStr>(name: &str, text: Option<String>) -> Result<Option<T>, Failure> {
    let parse =
        |text: String| text.parse().map_err(|_| Failure::new(format!("Parameter '{name}' expects a number")));
    text.map(parse).transpose()
}

const LEVEL: &str = "compression_level";
const WINDOW_BITS: &str = "compression_window_bits";

/// What help says of the options of this room.
pub(crate) const HELP: &str = "\nWith -c also, not recorded in the image:\n\
    \x20 compression_level=<num> - zlib: 1 (quick) to 9 (small), 6 by default; zstd: up to 22, 3 by default\n\
    \x20 compression_window_bits=<num> - zlib: 12 by default, up to 15 for smaller clusters that not every \
    reader takes\n";

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(text: &str) -> Result<(Compression, usize), String> {
        let mut list = KeyValues::parse_image_options(&[text.to_owned()]);
        let compression = Compression::take(&mut list).map_err(|failure| format!("{failure:?}"))?;
        Ok((compression, list.pairs().len()))
    }

    #[test]
    fn levels_and_windows_are_taken_out_and_checked() {
        let none = Compression::DEFAULT;
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
            ("compression_level=fast", "expects a number"),
            ("compression_window_bits=16", "window bits are 16"),
            ("compression_type=zstd,compression_window_bits=15", "is for compression_type=zlib"),
        ] {
            let error = taken(text).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
    }
}
