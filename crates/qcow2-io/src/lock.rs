//! Image locks, compatible with QEMU's.
//!
//! Each program holds one-byte locks on the image file: byte 100 + p means "I use permission p", byte 200 + p
//! means "others must not use permission p". All locks are shared locks, so any number of programs can hold
//! the same byte. A program that wants permission p checks that nobody holds byte 200 + p; a program that
//! does not share p checks that nobody holds byte 100 + p. The locks belong to the open file description
//! (Linux `F_OFD_*` locks), so two openings in one process conflict too, and closing the file releases them.
//!
//! | opened | uses | does not share |
//! |---|---|---|
//! | for reading | consistent read | write, resize |
//! | for writing | consistent read, write, resize | write, resize |
//! | for reading, [`Locking::FixedLength`] | consistent read | resize |
//! | for writing, [`Locking::FixedLength`] | consistent read, write | resize |
//! | for reading, [`Locking::Shared`] | consistent read | nothing |
//! | for writing, [`Locking::Shared`] | consistent read, write | nothing |
//!
//! The last four use resize too if [`OpenFile::resizes`](crate::OpenFile::resizes) is set. Reading with
//! [`OpenFile::metadata_only`](crate::OpenFile::metadata_only) does not use consistent read.
//!
//! On systems and file systems without such locks nothing is locked, as in QEMU: NFS without a lock daemon,
//! some FUSE and 9p mounts. One question to the file tells.

use crate::sys;
use std::fmt;
use std::fs::File;
use std::io;

/// How an image is locked while it is open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Locking {
    /// QEMU's choice for the format: raw disks and LUKS containers are [`Shared`](Self::Shared), all other
    /// images [`NoOtherWriters`](Self::NoOtherWriters). An unknown format counts as "all other".
    #[default]
    Auto,
    /// Nobody else may write while it is open: readers share with readers, a writer is alone.
    NoOtherWriters,
    /// Others may write but not resize: for external data files and for a window of a raw disk.
    FixedLength,
    /// Announces what is used and excludes nobody: for raw disks, whose users coordinate themselves, and for
    /// reading an image that another program may be writing to (`-U`), which may be inconsistent.
    Shared,
    /// No locks: for files that are not images, or whose lock this program holds elsewhere.
    Off,
}

/// A permission on an image, numbered as in QEMU: the distance of its byte from 100 or 200.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Permission {
    /// Reading a consistent image.
    ConsistentRead = 0,
    /// Writing.
    Write = 1,
    /// Writing that does not change what the guest reads.
    WriteUnchanged = 2,
    /// Changing the length.
    Resize = 3,
}

impl Permission {
    const ALL: [Self; 4] = [Self::ConsistentRead, Self::Write, Self::WriteUnchanged, Self::Resize];

    /// QEMU's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::ConsistentRead => "consistent read",
            Self::Write => "write",
            Self::WriteUnchanged => "write unchanged",
            Self::Resize => "resize",
        }
    }

    fn used_byte(self) -> u64 {
        100 + self as u64
    }

    fn unshared_byte(self) -> u64 {
        200 + self as u64
    }
}

/// Another program holds a conflicting lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LockConflict {
    permission: Permission,
    shared: bool,
}

impl LockConflict {
    /// The permission that conflicts.
    pub fn permission(&self) -> Permission {
        self.permission
    }

    /// `false`: this program wanted the permission and another one does not share it. `true`: another program
    /// uses a permission that this one does not share.
    pub fn is_shared(&self) -> bool {
        self.shared
    }
}

impl fmt::Display for LockConflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = self.permission.name();
        match self.shared {
            true => write!(f, "another program has \"{what}\" permission, which must not be shared"),
            false => write!(f, "another program does not share \"{what}\" permission"),
        }
    }
}

impl std::error::Error for LockConflict {}

/// Why locking failed.
#[derive(Debug)]
pub(crate) enum LockError {
    Conflict(LockConflict),
    System(io::Error),
}

/// What the opening will do with the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Access {
    /// True if reads must be consistent.
    pub(crate) consistent: bool,
    pub(crate) writable: bool,
    /// True if a writer changes the length even under a locking that lets others write.
    pub(crate) resizes: bool,
}

/// Locks `file` for `locking` and `access`, until it is closed or [`unlock_image`] is called. On failure all
/// locks taken are released.
pub(crate) fn lock_image(file: &File, locking: Locking, access: Access) -> Result<(), LockError> {
    use Permission::{ConsistentRead, Resize, Write};
    let unshared: &[Permission] = match locking {
        Locking::Off => return Ok(()),
        Locking::Shared => &[],
        Locking::FixedLength => &[Resize],
        Locking::Auto | Locking::NoOtherWriters => &[Write, Resize],
    };
    // A sole writer owns the format's metadata and grows the file as needed, so it always uses resize.
    let resizes = access.writable && (access.resizes || unshared.contains(&Write));
    let used = [(ConsistentRead, access.consistent), (Write, access.writable), (Resize, resizes)];
    let uses: Vec<Permission> =
        used.iter().filter(|(_, used)| *used).map(|(permission, _)| *permission).collect();
    // What file systems without locks answer is not only "unsupported": ENOLCK, ENOSYS, EINVAL and EACCES are
    // in use. A file that answers the question has locks, and then every error counts.
    if sys::is_byte_locked(file, 0).is_err() {
        return Ok(());
    }
    take(file, &uses, unshared).inspect_err(|_| unlock_image(file))
}

/// Releases the locks that [`lock_image`] took. Closing the file is not enough: while another thread forks
/// and before the child calls exec, the child has a copy of every descriptor, and the locks live as long as
/// any copy.
pub(crate) fn unlock_image(file: &File) {
    for permission in Permission::ALL {
        // If unlocking fails, closing the last copy of the descriptor releases the byte.
        let _ = sys::unlock_byte(file, permission.used_byte());
        let _ = sys::unlock_byte(file, permission.unshared_byte());
    }
}

/// Takes all bytes first and checks second: of two programs that start at once, at least one sees the other.
fn take(file: &File, uses: &[Permission], unshared: &[Permission]) -> Result<(), LockError> {
    let bytes = uses.iter().map(|p| p.used_byte()).chain(unshared.iter().map(|p| p.unshared_byte()));
    for byte in bytes {
        sys::lock_byte(file, byte).map_err(LockError::System)?;
    }
    for permission in Permission::ALL {
        let held = |byte| sys::is_byte_locked(file, byte).map_err(LockError::System);
        if uses.contains(&permission) && held(permission.unshared_byte())? {
            return Err(LockError::Conflict(LockConflict { permission, shared: false }));
        }
        if unshared.contains(&permission) && held(permission.used_byte())? {
            return Err(LockError::Conflict(LockConflict { permission, shared: true }));
        }
    }
    Ok(())
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use super::*;

    type Opening = (Locking, Access);

    /// The second opener's lock conflict, if any, while the first opening exists: the permission, and whether
    /// the first one has it.
    fn second(first: Opening, second: Opening) -> Option<(&'static str, bool)> {
        let file = tempfile::NamedTempFile::new().unwrap();
        let one = file.reopen().unwrap();
        lock_image(&one, first.0, first.1).unwrap();
        let result = lock_image(&file.reopen().unwrap(), second.0, second.1);
        let conflict = match result {
            Ok(()) => None,
            Err(LockError::Conflict(conflict)) => Some((conflict.permission().name(), conflict.is_shared())),
            Err(LockError::System(error)) => panic!("{error}"),
        };
        drop(one);
        lock_image(&file.reopen().unwrap(), Locking::Auto, WRITE.1).unwrap();
        conflict
    }

    const fn access(writable: bool, resizes: bool) -> Access {
        Access { consistent: true, writable, resizes }
    }

    const READ: Opening = (Locking::Auto, access(false, false));
    const WRITE: Opening = (Locking::Auto, access(true, false));
    const FORCE: Opening = (Locking::Shared, access(false, false));
    const WRITE_RAW: Opening = (Locking::Shared, access(true, false));
    const RESIZE_RAW: Opening = (Locking::Shared, access(true, true));
    const READ_PART: Opening = (Locking::FixedLength, access(false, false));
    const WRITE_PART: Opening = (Locking::FixedLength, access(true, false));
    const WRITE_DATA_FILE: Opening = (Locking::FixedLength, access(true, true));

    #[test]
    fn readers_share_and_a_writer_is_exclusive() {
        assert_eq!(second(READ, READ), None);
        assert_eq!(second(WRITE, FORCE), None);
        assert_eq!(second(FORCE, WRITE), None);
        assert_eq!(second(WRITE_RAW, WRITE_RAW), None);
        assert_eq!(second(READ, WRITE_RAW), Some(("write", false)));
        assert_eq!(second(WRITE_RAW, READ), Some(("write", true)));
        assert_eq!(second(WRITE, (Locking::Off, WRITE.1)), None);
        assert_eq!(second(WRITE, WRITE), Some(("write", false)));
        assert_eq!(second(READ, WRITE), Some(("write", false)));
        assert_eq!(second(WRITE, READ), Some(("write", true)));
    }

    #[test]
    fn fixed_length_locking_shares_write_but_not_resize() {
        let no_resize = Some(("resize", false));
        let resized = Some(("resize", true));
        for other in [FORCE, WRITE_RAW, READ_PART, WRITE_PART] {
            assert_eq!(second(READ_PART, other), None);
            assert_eq!(second(WRITE_PART, other), None);
        }
        assert_eq!(second(READ_PART, RESIZE_RAW), no_resize);
        assert_eq!(second(RESIZE_RAW, READ_PART), resized);
        assert_eq!(second(READ_PART, WRITE_DATA_FILE), no_resize);
        assert_eq!(second(WRITE_DATA_FILE, WRITE_DATA_FILE), no_resize);
        assert_eq!(second(WRITE_RAW, RESIZE_RAW), None);
    }

    #[test]
    fn metadata_only_readers_do_not_use_consistent_read() {
        let look = |locking| (locking, Access { consistent: false, ..READ.1 });
        assert_eq!(second(WRITE, look(Locking::Shared)), None);
        assert_eq!(second(WRITE, look(Locking::Auto)), Some(("write", true)));
        assert_eq!(second(look(Locking::Auto), WRITE), Some(("write", false)));
    }
}
