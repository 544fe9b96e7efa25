//! Errors of a disk as the protocol's numbers.

use qcow2_core::{Error, ErrorKind};
use qcow2_nbd::proto::ErrorCode;

/// The number that says most about `error`: that of the system where there is one.
pub(super) fn error_code(error: &Error) -> ErrorCode {
    let code = error.storage_error().and_then(|error| error.os_code());
    match (code, error.kind()) {
        // EPERM, EACCES, EROFS.
        (Some(1 | 13 | 30), _) | (None, ErrorKind::ReadOnly) => ErrorCode::PERM,
        (Some(12), _) => ErrorCode::NO_MEMORY,
        // EFBIG, ENOSPC, EDQUOT.
        (Some(27 | 28 | 122), _) | (None, ErrorKind::NoSpace) => ErrorCode::NO_SPACE,
        (Some(95), _) | (None, ErrorKind::Unsupported) => ErrorCode::NOT_SUPPORTED,
        (None, ErrorKind::OutOfRange | ErrorKind::InvalidOption) => ErrorCode::INVALID,
        _ => ErrorCode::IO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qcow2_core::{StorageError, StorageErrorKind};

    #[test]
    fn a_client_is_told_the_number_that_the_system_gave() {
        let engine = |kind| error_code(&Error::new(kind, "what happened"));
        let system = |code| {
            let error = StorageError::new(StorageErrorKind::Io, "call").with_os_code(code);
            error_code(&Error::from(error))
        };
        assert_eq!(engine(ErrorKind::NoSpace), ErrorCode::NO_SPACE);
        assert_eq!(engine(ErrorKind::ReadOnly), ErrorCode::PERM);
        assert_eq!(engine(ErrorKind::Corrupt), ErrorCode::IO);
        assert_eq!(engine(ErrorKind::Poisoned), ErrorCode::IO);
        for (code, told) in [
            (5, ErrorCode::IO),
            (28, ErrorCode::NO_SPACE),
            (122, ErrorCode::NO_SPACE),
            (30, ErrorCode::PERM),
            (12, ErrorCode::NO_MEMORY),
            (95, ErrorCode::NOT_SUPPORTED),
            (110, ErrorCode::IO),
        ] {
            assert_eq!(system(code), told, "{code}");
        }
    }
}
