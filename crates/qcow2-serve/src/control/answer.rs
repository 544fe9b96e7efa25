//! What the answers to commands are made of.

use qcow2_core::GuestDisk;
use qcow2_core::format::header::CryptMethod;
use serde_json::Value;
use std::error::Error;

/// The answer with what went wrong after it was done.
pub(super) fn with_remark(mut answer: Value, unclean: Option<impl Error>) -> Value {
    if let (Value::Object(members), Some(error)) = (&mut answer, unclean) {
        members.insert("warning".to_owned(), Value::String(text(&error)));
    }
    answer
}

/// An error with its causes.
pub(super) fn text(error: impl Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// Refuses what would hold bytes of an encrypted disk, as `what`, without encryption.
pub(super) fn keeps_no_secret(disk: &dyn GuestDisk, what: &str) -> Result<(), String> {
    let is_plain = match disk.as_image() {
        Some(image) => image.header().crypt_method == CryptMethod::None,
        None => disk.as_raw().is_some(),
    };
    if is_plain { Ok(()) } else { Err(format!("the disk is encrypted, and {what} would not be")) }
}
