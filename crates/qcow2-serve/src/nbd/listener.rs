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
#[cfg(unix)]
use std::sync::atomic::{AtomicBool, Ordering};
#[cfg(unix)]
use std::time::Duration;

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
    waker: Option<Waker>,
}

#[cfg(unix)]
#[derive(Debug)]
struct Waker {
    woken: UnixStream,
    wakes: UnixStream,
    /// A thread waits for a client, or is about to look whether it should.
    is_accepting: AtomicBool,
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
        let (woken, wakes) = UnixStream::pair()?;
        listener.waker = Some(Waker { woken, wakes, is_accepting: AtomicBool::new(false) });
        Ok(listener)
    }

    /// Waits for the next client, on one thread at a time.
    pub(super) fn accept(&self) -> io::Result<Socket> {
        #[cfg(unix)]
        if let Some(waker) = &self.waker {
            waker.is_accepting.store(true, Ordering::SeqCst);
            let accepted = self.await_client(waker).and_then(|()| self.accept_now());
            waker.is_accepting.store(false, Ordering::SeqCst);
            return accepted;
        }
        self.accept_now()
    }

    fn accept_now(&self) -> io::Result<Socket> {
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
    fn await_client(&self, waker: &Waker) -> io::Result<()> {
        use rustix::event::{PollFd, PollFlags, poll};
        let socket = match &self.socket {
            Listening::Tcp(listener) => listener.as_fd(),
            Listening::Unix(listener) => listener.socket().as_fd(),
        };
        let mut both = [
            PollFd::from_borrowed_fd(waker.woken.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(socket, PollFlags::IN),
        ];
        poll(&mut both, None)?;
        if both[0].revents().is_empty() { Ok(()) } else { Err(io::ErrorKind::Interrupted.into()) }
    }

    /// Has a thread that waits for clients return, with an error unless a client has come.
    pub(super) fn wake(&self) {
        #[cfg(unix)]
        if let Some(waker) = &self.waker {
            let _ = waker.wakes.shutdown(std::net::Shutdown::Both);
            if self.has_left(waker) {
                return;
            }
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

#[cfg(unix)]
impl Listener {
    /// Whether no thread waits for a client any more. Where the socket blocks, and somebody else who has it
    /// took the client that was seen, a thread waits for the next one and for nothing else: it gets one.
    /// Whether the socket blocks is not changed, since that would be changed for the others too.
    fn has_left(&self, waker: &Waker) -> bool {
        for _ in 0..KNOCKS {
            for _ in 0..LOOKS {
                if !waker.is_accepting.load(Ordering::SeqCst) {
                    return true;
                }
                std::thread::sleep(LOOK_PAUSE);
            }
            // Where this fails nobody else can connect either.
            let _ = self.knock();
        }
        !waker.is_accepting.load(Ordering::SeqCst)
    }

    /// Connects to itself.
    fn knock(&self) -> io::Result<()> {
        match &self.socket {
            Listening::Tcp(listener) => {
                std::net::TcpStream::connect_timeout(&listener.local_addr()?, KNOCK_LIMIT).map(drop)
            }
            Listening::Unix(listener) => UnixStream::connect_addr(&listener.socket().local_addr()?).map(drop),
        }
    }
}

/// How often a client is sent to a thread that waits for one, how often it is looked before each whether the
/// thread has returned, and how long each takes.
#[cfg(unix)]
const KNOCKS: usize = 20;
#[cfg(unix)]
const LOOKS: usize = 50;
#[cfg(unix)]
const LOOK_PAUSE: Duration = Duration::from_millis(1);
#[cfg(unix)]
const KNOCK_LIMIT: Duration = Duration::from_millis(100);

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

#[cfg(all(test, unix))]
#[allow(clippy::unwrap_used, reason = "a test may stop")]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    /// Wakes a thread that has seen a client which somebody else took: it waits where nothing but a client
    /// has it return.
    #[track_caller]
    fn check(listener: Listener) {
        let listener = Listener::with_waker(listener).unwrap();
        std::thread::scope(|scope| {
            let is_accepting = &listener.waker.as_ref().unwrap().is_accepting;
            is_accepting.store(true, Ordering::SeqCst);
            let waits = scope.spawn(|| {
                let accepted = listener.accept_now();
                is_accepting.store(false, Ordering::SeqCst);
                accepted
            });
            listener.wake();
            waits.join().unwrap().unwrap();
            // It was not shut down, but this server waits no more.
            assert!(listener.knock().is_ok());
            let error = listener.accept().unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::Interrupted);
        });
    }

    #[test]
    fn a_thread_whose_client_was_taken_by_somebody_else_is_woken() {
        let folder = tempfile::tempdir().unwrap();
        let local = UnixListener::bind(folder.path().join("s")).unwrap();
        check(LocalListener::from(local).into());
        check(TcpListener::bind("127.0.0.1:0").unwrap().into());
    }
}
