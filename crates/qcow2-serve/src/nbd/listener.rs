//! Where clients connect.

use super::socket::Socket;
#[cfg(unix)]
use crate::local::LocalListener;
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

impl Address {
    /// Reads `HOST:PORT`; an IPv6 address stands in brackets. `None`: it is none.
    pub fn parse_tcp(text: &str) -> Option<Self> {
        let (host, port) = text.rsplit_once(':')?;
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        Self::tcp(bare.unwrap_or(host), port)
    }

    /// A host, all addresses of the machine if it is empty, and a decimal port. `None`: it is no port.
    pub fn tcp(host: &str, port: &str) -> Option<Self> {
        let host = if host.is_empty() { "0.0.0.0" } else { host };
        Some(Self::Tcp { host: host.to_owned(), port: port.parse().ok()? })
    }
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
pub struct Listener(Listening);

#[derive(Debug)]
enum Listening {
    Tcp(TcpListener),
    #[cfg(unix)]
    Unix(LocalListener),
}

impl Listener {
    /// Listens on `address`. A unix socket that a server left behind, on which nobody listens, is replaced.
    pub fn bind(address: &Address) -> Result<Self, ListenError> {
        let failed = |error| ListenError { address: address.clone(), error };
        match address {
            Address::Tcp { host, port } => {
                TcpListener::bind((host.as_str(), *port)).map(Self::from).map_err(failed)
            }
            #[cfg(unix)]
            Address::Unix(path) => LocalListener::bind(path).map(Self::from),
            #[cfg(not(unix))]
            Address::Unix(_) => Err(failed(io::ErrorKind::Unsupported.into())),
        }
    }

    /// Where it listens, as clients name it: an NBD URI without the export's name.
    pub fn uri(&self) -> String {
        match &self.0 {
            Listening::Tcp(socket) => match socket.local_addr() {
                Ok(address) => format!("nbd://{address}/"),
                Err(_) => "nbd://".to_owned(),
            },
            #[cfg(unix)]
            Listening::Unix(socket) => {
                format!("nbd+unix:///?socket={}", socket.path().display())
            }
        }
    }

    /// Waits for the next client.
    pub(super) fn accept(&self) -> io::Result<Socket> {
        match &self.0 {
            Listening::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                // Replies wait for nothing: they are gathered already.
                let _ = stream.set_nodelay(true);
                Ok(Socket::Tcp(stream))
            }
            #[cfg(unix)]
            Listening::Unix(listener) => listener.socket().accept().map(|(stream, _)| Socket::Unix(stream)),
        }
    }

    /// Has a thread that waits for clients return with an error.
    pub(super) fn wake(&self) {
        #[cfg(unix)]
        {
            use rustix::net::{Shutdown, shutdown};
            let _ = match &self.0 {
                Listening::Tcp(listener) => shutdown(listener, Shutdown::Both),
                Listening::Unix(listener) => shutdown(listener.socket(), Shutdown::Both),
            };
        }
        #[cfg(not(unix))]
        {
            let Listening::Tcp(listener) = &self.0;
            if let Ok(address) = listener.local_addr() {
                let _ = std::net::TcpStream::connect(address);
            }
        }
    }
}

impl From<TcpListener> for Listener {
    fn from(listener: TcpListener) -> Self {
        Self(Listening::Tcp(listener))
    }
}

#[cfg(unix)]
impl From<LocalListener> for Listener {
    fn from(listener: LocalListener) -> Self {
        Self(Listening::Unix(listener))
    }
}
