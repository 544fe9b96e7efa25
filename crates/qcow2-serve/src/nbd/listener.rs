//! Where clients connect.

use super::socket::Socket;
use std::fmt;
use std::io;
use std::net::TcpListener;
use std::path::PathBuf;

/// An address to listen on.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Address {
    /// Path of a unix socket.
    Unix(PathBuf),
    /// A host and a port.
    Tcp {
        /// Name or IP address.
        host: String,
        /// Port; 0 lets the system choose.
        port: u16,
    },
}

/// Why nobody can connect.
#[derive(Debug)]
#[non_exhaustive]
pub struct ListenError {
    /// The address.
    pub address: Address,
    /// What the system says.
    pub error: io::Error,
}

impl fmt::Display for ListenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.address {
            Address::Unix(path) => write!(f, "cannot listen on {}: {}", path.display(), self.error),
            Address::Tcp { host, port } => write!(f, "cannot listen on {host}:{port}: {}", self.error),
        }
    }
}

impl std::error::Error for ListenError {}

/// A socket that listens. A unix socket's file goes when it is dropped.
#[derive(Debug)]
pub struct Listener {
    socket: Listening,
    /// The file to remove.
    file: Option<PathBuf>,
}

#[derive(Debug)]
enum Listening {
    Tcp(TcpListener),
    #[cfg(unix)]
    Unix(std::os::unix::net::UnixListener),
}

impl Listener {
    /// Listens on `address`. A unix socket that a server left behind, on which nobody listens, is replaced.
    pub fn bind(address: &Address) -> Result<Self, ListenError> {
        let bound = match address {
            Address::Tcp { host, port } => TcpListener::bind((host.as_str(), *port))
                .map(|socket| Self { socket: Listening::Tcp(socket), file: None }),
            Address::Unix(path) => bind_unix(path),
        };
        bound.map_err(|error| ListenError { address: address.clone(), error })
    }

    /// Where it listens, as clients name it: an NBD URI without the export's name.
    pub fn uri(&self) -> String {
        match &self.socket {
            Listening::Tcp(socket) => match socket.local_addr() {
                Ok(address) => format!("nbd://{address}/"),
                Err(_) => "nbd://".to_owned(),
            },
            #[cfg(unix)]
            Listening::Unix(socket) => {
                let address = socket.local_addr().ok();
                let path = address.as_ref().and_then(|address| address.as_pathname());
                let path = path.map(|path| path.display().to_string()).unwrap_or_default();
                format!("nbd+unix:///?socket={path}")
            }
        }
    }

    /// Waits for the next client.
    pub(super) fn accept(&self) -> io::Result<Socket> {
        match &self.socket {
            Listening::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                // Replies wait for nothing: they are gathered already.
                let _ = stream.set_nodelay(true);
                Ok(Socket::Tcp(stream))
            }
            #[cfg(unix)]
            Listening::Unix(listener) => listener.accept().map(|(stream, _)| Socket::Unix(stream)),
        }
    }

    /// Has a thread that waits for clients return with an error.
    pub(super) fn wake(&self) {
        #[cfg(unix)]
        {
            use rustix::net::{Shutdown, shutdown};
            let _ = match &self.socket {
                Listening::Tcp(listener) => shutdown(listener, Shutdown::Both),
                Listening::Unix(listener) => shutdown(listener, Shutdown::Both),
            };
        }
        #[cfg(not(unix))]
        {
            let Listening::Tcp(listener) = &self.socket;
            if let Ok(address) = listener.local_addr() {
                let _ = std::net::TcpStream::connect(address);
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(path) = &self.file {
            let _ = std::fs::remove_file(path);
        }
    }
}

#[cfg(unix)]
fn bind_unix(path: &std::path::Path) -> io::Result<Listener> {
    use std::os::unix::fs::FileTypeExt;
    use std::os::unix::net::{UnixListener, UnixStream};
    let is_left_behind = || {
        let is_socket = std::fs::symlink_metadata(path).is_ok_and(|data| data.file_type().is_socket());
        let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
        is_socket && UnixStream::connect(path).is_err_and(refused)
    };
    let socket = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_left_behind() => {
            std::fs::remove_file(path)?;
            UnixListener::bind(path)?
        }
        bound => bound?,
    };
    Ok(Listener { socket: Listening::Unix(socket), file: Some(path.to_owned()) })
}

#[cfg(not(unix))]
fn bind_unix(_path: &std::path::Path) -> io::Result<Listener> {
    Err(io::ErrorKind::Unsupported.into())
}
