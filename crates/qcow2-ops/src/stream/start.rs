//! What a stream is, by its first bytes.

use super::read::fill;
use crate::error::{Error, ErrorKind, Result};
use qcow2_core::ImageFormat;
use qcow2_core::format::header::MAGIC;
use qcow2_core::format::signature::{PROBE_LEN, probe};
use std::io::{Chain, Cursor, Read};

/// A stream whose first bytes have been looked at: they are read again.
pub type Begun<R> = Chain<Cursor<Vec<u8>>, R>;

/// Looks at the first bytes of a stream, and returns its format: `given`, or what a file that begins like
/// this would be taken for. Only raw disks and qcow2 images can be read from a stream; a container of another
/// format is refused, since copied as raw its bytes would not be the disk in it.
///
/// Errors: `Unsupported` for another format; `Open` for a stream without a byte, which is what a program that
/// failed leaves; `Read`.
///
/// ```
/// use qcow2_core::ImageFormat;
///
/// let (format, _) = qcow2_ops::begin_stream(&b"bytes of a disk"[..], None)?;
/// assert_eq!(format, ImageFormat::Raw);
/// assert!(qcow2_ops::begin_stream(&b"vhdxfile"[..], None).is_err());
/// assert!(qcow2_ops::begin_stream(&b""[..], None).is_err());
/// # Ok::<(), qcow2_ops::Error>(())
/// ```
pub fn begin_stream<R: Read>(mut input: R, given: Option<&str>) -> Result<(ImageFormat, Begun<R>)> {
    let mut start = vec![0; PROBE_LEN];
    let len = fill(&mut input, &mut start)?;
    start.truncate(len);
    let format = match given {
        Some(name) => ImageFormat::from_name(name),
        None => format_of(&start),
    };
    if !matches!(format, ImageFormat::Raw | ImageFormat::Qcow2) {
        let message = format!("format '{}' cannot be read from a stream", format.name());
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    if start.is_empty() {
        return Err(Error::new(ErrorKind::Open, "the stream is empty"));
    }
    Ok((format, Cursor::new(start).chain(input)))
}

fn format_of(start: &[u8]) -> ImageFormat {
    match probe(start) {
        Some(container) => ImageFormat::from_name(container.name()),
        // A header that is cut off or has no version: whoever opens the image says what is wrong with it.
        None if start.starts_with(&MAGIC) => ImageFormat::Qcow2,
        None => ImageFormat::Raw,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(bytes: &[u8], given: Option<&str>, expected: Result<ImageFormat, ErrorKind>) {
        let begun = begin_stream(bytes, given).map(|(format, mut stream)| {
            let mut again = Vec::new();
            stream.read_to_end(&mut again).unwrap();
            assert_eq!(again, bytes);
            format
        });
        assert_eq!(begun.map_err(|error| error.kind()), expected, "{given:?}");
    }

    #[test]
    fn formats_are_found_as_in_files() {
        let long: Vec<u8> = (0..=255).cycle().take(3 * PROBE_LEN).collect();
        check(&long, None, Ok(ImageFormat::Raw));
        check(b"QFI\xfb\0\0\0\x03", None, Ok(ImageFormat::Qcow2));
        check(b"QFI\xfb", None, Ok(ImageFormat::Qcow2));
        check(b"bytes", Some("qcow2"), Ok(ImageFormat::Qcow2));
    }

    #[test]
    fn other_containers_are_raw_only_if_the_caller_says_so() {
        let mut vdi = vec![0; 64];
        vdi.extend_from_slice(b"\x7f\x10\xda\xbe");
        for bytes in [b"KDMV", &b"QFI\xfb\0\0\0\x01"[..], b"conectix", b"LUKS\xba\xbe\0\x01", &vdi] {
            check(bytes, None, Err(ErrorKind::Unsupported));
            check(bytes, Some("raw"), Ok(ImageFormat::Raw));
        }
        check(b"bytes", Some("vmdk"), Err(ErrorKind::Unsupported));
    }

    #[test]
    fn an_empty_stream_is_no_disk() {
        for given in [None, Some("raw"), Some("qcow2")] {
            check(b"", given, Err(ErrorKind::Open));
        }
    }
}
