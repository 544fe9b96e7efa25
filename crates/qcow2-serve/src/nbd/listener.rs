//! Where clients connect.

use super::socket::Socket;
#[cfg(unix)]
use crate::local::LocalListener;
use std::fmt;
use std::io;
use std::net::TcpListener;
#[cfg(unix)]
use std::os::{fd::AsFd, unix::net::UnixStream};
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
    /// The socket with this number, counted from 0, of those that a service manager has handed over.
    HandedOver(u32),
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
            Address::HandedOver(number) => {
                write!(f, "cannot listen on socket {number} of the service manager: {}", self.error)
            }
        }
    }
}

impl std::error::Error for ListenError {}

/// A socket that listens. A unix socket's file goes when it is dropped.
#[derive(Debug)]
pub struct Listener {
    socket: Listening,
    /// Has a thread return that waits for clients. `None`: the socket is shut down for it, which others that
    /// have it would notice.
    #[cfg(unix)]
    waker: Option<(UnixStream, UnixStream)>,
}

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
            #[cfg(unix)]
            Address::HandedOver(number) => super::activation::take(*number).map_err(failed),
            #[cfg(not(unix))]
            Address::Unix(_) | Address::HandedOver(_) => Err(failed(io::ErrorKind::Unsupported.into())),
        }
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
                format!("nbd+unix:///?socket={}", socket.path().display())
            }
        }
    }

    /// The same for a socket that others have too.
    #[cfg(unix)]
    pub(super) fn with_waker(mut listener: Self) -> io::Result<Self> {
        listener.waker = Some(UnixStream::pair()?);
        Ok(listener)
    }

    /// Waits for the next client.
    pub(super) fn accept(&self) -> io::Result<Socket> {
        #[cfg(unix)]
        self.await_client()?;
        match &self.socket {
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

    /// Waits where the socket is not shut down to wake a thread. Errors: it was woken.
    #[cfg(unix)]
    fn await_client(&self) -> io::Result<()> {
        use rustix::event::{PollFd, PollFlags, poll};
        let Some((woken, _)) = &self.waker else { return Ok(()) };
        let socket = match &self.socket {
            Listening::Tcp(listener) => listener.as_fd(),
            Listening::Unix(listener) => listener.socket().as_fd(),
        };
        let mut both = [
            PollFd::from_borrowed_fd(woken.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(socket, PollFlags::IN),
        ];
        poll(&mut both, None)?;
        if both[0].revents().is_empty() { Ok(()) } else { Err(io::ErrorKind::Interrupted.into()) }
    }

    /// Has a thread that waits for clients return with an error.
    pub(super) fn wake(&self) {
        #[cfg(unix)]
        if let Some((_, waker)) = &self.waker {
            let _ = waker.shutdown(std::net::Shutdown::Both);
            return;
        }
        #[cfg(unix)]
        {
            use rustix::net::{Shutdown, shutdown};
            let _ = match &self.socket {
                Listening::Tcp(listener) => shutdown(listener, Shutdown::Both),
                Listening::Unix(listener) => shutdown(listener.socket(), Shutdown::Both),
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

impl From<Listening> for Listener {
    fn from(socket: Listening) -> Self {
        Self {
            socket,
            #[cfg(unix)]
            waker: None,
        }
    }
}

impl From<TcpListener> for Listener {
    fn from(listener: TcpListener) -> Self {
        Listening::Tcp(listener).into()
    }
}

#[cfg(unix)]
impl From<LocalListener> for Listener {
    fn from(listener: LocalListener) -> Self {
        Listening::Unix(listener).into()
    }
}
