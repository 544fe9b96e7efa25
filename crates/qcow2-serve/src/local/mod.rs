//! Unix sockets that servers listen on. Where the system has none, none is made.

#[cfg(not(unix))]
mod missing;

#[cfg(not(unix))]
pub(crate) use missing::{Socket, Stream};
#[cfg(unix)]
pub(crate) use std::os::unix::net::{UnixListener as Socket, UnixStream as Stream};

use crate::nbd::{Address, ListenError};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// A unix socket that listens. Its file is removed when it is dropped.
#[derive(Debug)]
pub struct LocalListener {
    listener: Socket,
    /// The file to remove.
    file: Option<PathBuf>,
}

impl LocalListener {
    /// Listens at `path`. A socket that a server left behind there, on which nobody listens, is replaced.
    pub fn bind(path: &Path) -> Result<Self, ListenError> {
        let bound = match Socket::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_left_behind(path) => {
                fs::remove_file(path).and_then(|()| Socket::bind(path))
            }
            bound => bound,
        };
        match bound {
            Ok(listener) => Ok(Self { listener, file: Some(path.to_owned()) }),
            Err(error) => Err(ListenError { address: Address::Unix(path.to_owned()), error }),
        }
    }

    /// The socket.
    #[cfg(unix)]
    pub fn socket(&self) -> &std::os::unix::net::UnixListener {
        &self.listener
    }

    pub(crate) fn inner(&self) -> &Socket {
        &self.listener
    }

    /// Its path; empty if it has none.
    pub fn path(&self) -> PathBuf {
        #[cfg(unix)]
        {
            let address = self.listener.local_addr().ok();
            let path = address.as_ref().and_then(|address| address.as_pathname());
            path.map(Path::to_owned).unwrap_or_default()
        }
        #[cfg(not(unix))]
        PathBuf::new()
    }
}

/// Somebody else has made the socket, and keeps its file.
#[cfg(unix)]
impl From<std::os::unix::net::UnixListener> for LocalListener {
    fn from(listener: std::os::unix::net::UnixListener) -> Self {
        Self { listener, file: None }
    }
}

impl Drop for LocalListener {
    fn drop(&mut self) {
        if let Some(path) = &self.file {
            // Whoever has removed it already is not to be told.
            let _ = fs::remove_file(path);
        }
    }
}

/// Whether `path` is a socket on which nobody listens.
#[cfg(not(unix))]
fn is_left_behind(_path: &Path) -> bool {
    false
}

/// Whether `path` is a socket on which nobody listens.
#[cfg(unix)]
fn is_left_behind(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    let is_socket = fs::symlink_metadata(path).is_ok_and(|data| data.file_type().is_socket());
    let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    is_socket && Stream::connect(path).is_err_and(refused)
}

#[cfg(all(test, unix))]
#[allow(clippy::unwrap_used, reason = "a test may stop")]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_left_behind_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let (path, file) = (folder.path().join("s"), folder.path().join("f"));
        // What a killed server leaves.
        drop(Socket::bind(&path).unwrap());
        let listener = LocalListener::bind(&path).unwrap();
        assert_eq!(listener.path(), path);
        Stream::connect(&path).unwrap();
        // One that lives, and a file that is none.
        fs::write(&file, "kept").unwrap();
        for path in [&path, &file] {
            let error = LocalListener::bind(path).unwrap_err();
            assert_eq!(error.error.kind(), io::ErrorKind::AddrInUse);
        }
        assert_eq!(fs::read(&file).unwrap(), b"kept");
        drop(listener);
        assert!(!path.exists());
    }
}
