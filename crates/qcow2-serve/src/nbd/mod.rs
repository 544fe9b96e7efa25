//! NBD exports on sockets.
//!
//! [`Server::run`] accepts clients on all listeners and returns when it was told to stop, or when the last
//! client has left and the server is not to stay. Each client has a thread, and may have more from a crew
//! that all share, so clients do not wait for each other: one that is slow, or silent, or never reads, holds
//! up only itself.
//!
//! With a [`Security`] clients must speak TLS before they are told anything; its handshake is part of theirs,
//! within the same time.
//!
//! Memory is bounded by [`ServerOptions::clients`] (1000, and as many again that have been sent away and have
//! not noticed it yet). In its handshake a client takes a thread and at most one option of
//! `qcow2_nbd::proto::MAX_OPTION_DATA` bytes; with TLS, two buffers of 64 KiB and what rustls keeps of a
//! handshake that is not complete, 64 KiB more; after it, one buffer and a piece for each thread
//! (`qcow2_nbd::blocking::server`). A client has [`ServerOptions::handshake_limit`] for all of the handshake,
//! however its bytes are spread over that time; if there are more clients than allowed, those that have none
//! yet are sent away, the longest waiting first.

mod activation;
mod clients;
mod listener;
mod listing;
mod security;
mod socket;

pub use activation::{HandedOverToo, handed_over};
pub use clients::Stop;
pub use listener::{Address, ListenError, Listener};
pub use listing::{ListError, Listed, list};
pub use security::{Access, Security, SecurityError, TlsNames};

use crate::export::Export;
use clients::{Admission, Clients};
use qcow2_nbd::blocking::server::{Crew, Negotiated, Transmission, negotiate, transmit};
use qcow2_nbd::server::{Handshake, Offer, Session, Tls};
use socket::{Deadline, Hurried, Socket};
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::Duration;

/// Limits of a server.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct ServerOptions {
    /// Clients at once, in the handshake or after it. At least 1.
    pub clients: usize,
    /// Whether clients beyond that wait outside, as qemu-nbd has it. Otherwise clients in their handshake
    /// make room.
    pub patient: bool,
    /// Whether the server stays when the last client that had an export has left.
    pub persistent: bool,
    /// How long a handshake may take.
    pub handshake_limit: Option<Duration>,
    /// Threads for all clients together, beyond one for each.
    pub threads: usize,
    /// How long clients may take to read their last replies when the server stops.
    pub drain_limit: Duration,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            clients: MAX_CLIENTS,
            patient: false,
            persistent: true,
            handshake_limit: Some(HANDSHAKE_LIMIT),
            threads: THREADS,
            drain_limit: DRAIN_LIMIT,
        }
    }
}

/// A server of some exports.
pub struct Server {
    exports: Vec<Export>,
    security: Option<Security>,
    options: ServerOptions,
    clients: Clients,
    crew: Crew,
}

impl Server {
    /// A server of `exports`.
    pub fn new(exports: Vec<Export>, options: ServerOptions) -> Self {
        let (clients, crew) = (Clients::new(&options), Crew::new(options.threads));
        Self { exports, security: None, options, clients, crew }
    }

    /// The same for clients that have what `security` wants. `None`: for any, without TLS.
    #[must_use]
    pub fn with_security(mut self, security: Option<Security>) -> Self {
        self.security = security;
        self
    }

    /// Ends [`run`](Self::run), from any thread.
    pub fn stop(&self) -> Stop {
        self.clients.stop()
    }

    /// The exports.
    pub fn exports(&self) -> &[Export] {
        &self.exports
    }

    /// Serves clients of `listeners` until the server stops. Then nobody is accepted any more, requests that
    /// have been read are finished and answered, connections are closed, and the exports are flushed. Errors:
    /// of accepting, and the first of flushing.
    pub fn run(&self, listeners: &[Listener]) -> io::Result<()> {
        let accepted = std::thread::scope(|scope| {
            let threads: Vec<_> =
                listeners.iter().map(|listener| scope.spawn(move || self.accept(listener, scope))).collect();
            self.clients.wait_for_stop();
            for listener in listeners {
                listener.wake();
            }
            let ends: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap_or(Ok(()))).collect();
            self.clients.drain(self.options.drain_limit);
            ends.into_iter().collect::<io::Result<()>>()
        });
        // All of them, whatever the first one says.
        let flushed: Vec<_> = self.exports.iter().map(Export::flush).collect();
        accepted.and(flushed.into_iter().collect::<Result<(), _>>().map_err(io::Error::other))
    }

    /// Accepts clients of one listener, each on a thread of its own.
    fn accept<'scope>(
        &'scope self,
        listener: &'scope Listener,
        scope: &'scope std::thread::Scope<'scope, '_>,
    ) -> io::Result<()> {
        while self.clients.wait_for_room() {
            let socket = match listener.accept() {
                Ok(socket) => Arc::new(socket),
                Err(_) if self.clients.is_stopping() => break,
                // The client is gone already, somebody else has taken it, or there are too many files for
                // now.
                Err(error) if is_temporary(&error) => {
                    std::thread::sleep(ACCEPT_PAUSE);
                    continue;
                }
                Err(error) => {
                    self.stop().stop();
                    return Err(error);
                }
            };
            let Some(admission) = self.clients.admit(&socket) else { continue };
            let served = std::thread::Builder::new().spawn_scoped(scope, move || {
                // Why a client has gone is nobody's business but its own.
                let _ = self.serve(&socket, &admission);
                drop(admission);
            });
            // Without a thread the client is dropped with its admission.
            drop(served);
        }
        Ok(())
    }

    fn serve(&self, socket: &Socket, admission: &Admission<'_>) -> io::Result<()> {
        let deadline = Deadline::new(self.options.handshake_limit);
        let client = Client { socket, admission, deadline: &deadline };
        match negotiate(&mut client.hurried(), self.offer())? {
            Negotiated::Session(session) => {
                client.is_ready()?;
                self.transmit(&session, socket, socket)
            }
            Negotiated::StartTls(handshake) => self.serve_encrypted(handshake, &client),
            Negotiated::Ended(_) => Ok(()),
        }
    }

    /// Goes on with a client that awaits TLS.
    #[cfg(feature = "tls")]
    fn serve_encrypted(&self, mut handshake: Handshake, client: &Client<'_>) -> io::Result<()> {
        use qcow2_nbd::blocking::server::resume;
        let Some(security) = &self.security else { return Ok(()) };
        let mut halves = security.establish(client.hurried(), client.hurried())?;
        handshake.secured();
        let Negotiated::Session(session) = resume(&mut halves, handshake)? else { return Ok(()) };
        client.is_ready()?;
        self.transmit(&session, halves.reader, halves.writer)
    }

    #[cfg(not(feature = "tls"))]
    fn serve_encrypted(&self, _: Handshake, _: &Client<'_>) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn transmit<R, W>(&self, session: &Session, incoming: R, outgoing: W) -> io::Result<()>
    where
        R: Read + Send,
        W: Write + Send,
    {
        let Some(export) = self.exports.get(session.export()) else { return Ok(()) };
        transmit(incoming, outgoing, Transmission { session, disk: export, crew: &self.crew })
    }

    /// What a client is offered that comes now.
    fn offer(&self) -> Arc<Offer> {
        let mut offer = Offer::new(self.exports.iter().map(Export::facts).collect());
        offer.tls = if self.security.is_some() { Tls::Required } else { Tls::None };
        Arc::new(offer)
    }
}

/// A client in its handshake.
struct Client<'a> {
    socket: &'a Socket,
    admission: &'a Admission<'a>,
    deadline: &'a Deadline,
}

impl Client<'_> {
    fn hurried(&self) -> Hurried<'_> {
        Hurried::new(self.socket, self.deadline)
    }

    /// It has an export, and may take its time from now on.
    fn is_ready(&self) -> io::Result<()> {
        self.deadline.lift();
        self.socket.be_patient()?;
        self.admission.has_export();
        Ok(())
    }
}

fn is_temporary(error: &io::Error) -> bool {
    // ENFILE, EMFILE, ENOMEM, ENOBUFS.
    let is_short = matches!(error.raw_os_error(), Some(23 | 24 | 12 | 105));
    use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    is_short || matches!(error.kind(), ConnectionAborted | Interrupted | WouldBlock)
}

/// Clients at once, where nothing else is said.
const MAX_CLIENTS: usize = 1000;
/// Threads beyond one for each client.
const THREADS: usize = 32;
/// Origin: qemu-nbd.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
const DRAIN_LIMIT: Duration = Duration::from_secs(3);
/// How long a server that is short of files waits before it accepts again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(10);
