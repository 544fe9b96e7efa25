//! Names of files as text, without loss.

use qcow2_core::format::text::{bytes_of, text_of};
use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

/// The [text](qcow2_core::format::text) of a name that the system gives. Where the system's names are not
/// bytes (not a Unix), what is not Unicode in it is replaced.
///
/// ```
/// use qcow2_io::{path_of, text_of_name};
/// use std::path::Path;
///
/// assert_eq!(text_of_name("disk".as_ref()), "disk");
/// assert_eq!(path_of(&text_of_name("disk".as_ref())), Path::new("disk"));
/// ```
pub fn text_of_name(name: &OsStr) -> String {
    #[cfg(unix)]
    {
        text_of(std::os::unix::ffi::OsStrExt::as_bytes(name))
    }
    #[cfg(not(unix))]
    {
        text_of(name.to_string_lossy().as_bytes())
    }
}

/// The path that a text names, the inverse of [`text_of_name`].
pub fn path_of(text: &str) -> Cow<'_, Path> {
    match bytes_of(text) {
        Cow::Borrowed(_) => Cow::Borrowed(Path::new(text)),
        Cow::Owned(bytes) => Cow::Owned(PathBuf::from(name_of(bytes))),
    }
}

fn name_of(bytes: Vec<u8>) -> OsString {
    #[cfg(unix)]
    {
        std::os::unix::ffi::OsStringExt::from_vec(bytes)
    }
    #[cfg(not(unix))]
    {
        String::from_utf8_lossy(&bytes).into_owned().into()
    }
}
