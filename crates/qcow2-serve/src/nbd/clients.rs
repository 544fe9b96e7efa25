//! Who is connected, how many may be, and when the server ends.

use super::ServerOptions;
use super::socket::Socket;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Ends a server, from any thread.
#[derive(Clone)]
pub struct Stop {
    shared: Arc<Shared>,
}

impl Stop {
    /// The server stops. It returns when what is under way is finished.
    pub fn stop(&self) {
        self.shared.state().is_stopping = true;
        self.shared.changed.notify_all();
    }
}

/// The clients of a server.
pub(super) struct Clients {
    shared: Arc<Shared>,
    most: usize,
    is_patient: bool,
    is_persistent: bool,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Default)]
struct State {
    /// In the order in which they came.
    clients: Vec<Client>,
    next_id: u64,
    is_stopping: bool,
}

struct Client {
    id: u64,
    socket: Arc<Socket>,
    has_export: bool,
    /// Sent away; its thread has not noticed yet.
    is_leaving: bool,
}

impl Clients {
    pub(super) fn new(options: &ServerOptions) -> Self {
        let shared = Arc::new(Shared { state: Mutex::default(), changed: Condvar::new() });
        let (most, is_patient) = (options.clients.max(1), options.patient);
        Self { shared, most, is_patient, is_persistent: options.persistent }
    }

    pub(super) fn stop(&self) -> Stop {
        Stop { shared: Arc::clone(&self.shared) }
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.shared.state().is_stopping
    }

    pub(super) fn wait_for_stop(&self) {
        let mut state = self.shared.state();
        while !state.is_stopping {
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until another client may be accepted. Returns false if none will be.
    pub(super) fn wait_for_room(&self) -> bool {
        let mut state = self.shared.state();
        while !state.is_stopping && self.is_patient && state.clients.len() >= self.most {
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        !state.is_stopping
    }

    /// Takes the client on `socket` in, until what is returned is dropped. `None`: there is no room for it.
    pub(super) fn admit(&self, socket: &Arc<Socket>) -> Option<Admission<'_>> {
        let mut state = self.shared.state();
        if state.clients.len() >= self.most {
            // Those that are leaving take memory still.
            if state.clients.len() >= self.most * 2 {
                return None;
            }
            let idle = state.clients.iter_mut().find(|client| !client.has_export && !client.is_leaving)?;
            idle.is_leaving = true;
            idle.socket.close();
        }
        let id = state.next_id;
        state.next_id += 1;
        let socket = Arc::clone(socket);
        state.clients.push(Client { id, socket, has_export: false, is_leaving: false });
        Some(Admission { clients: self, id })
    }

    /// Ends all connections: nothing more is read; replies are sent, for as long as `limit`.
    pub(super) fn drain(&self, limit: Duration) {
        let mut state = self.shared.state();
        state.clients.iter().for_each(|client| client.socket.close_for_reading());
        let begun = Instant::now();
        while !state.clients.is_empty() {
            let left = limit.saturating_sub(begun.elapsed());
            if left.is_zero() {
                state.clients.iter().for_each(|client| client.socket.close());
                return;
            }
            let woken = self.shared.changed.wait_timeout(state, left);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// A client's right to be served.
pub(super) struct Admission<'a> {
    clients: &'a Clients,
    id: u64,
}

impl Admission<'_> {
    /// The client has an export: from now on it is not sent away for others.
    pub(super) fn has_export(&self) {
        let mut state = self.clients.shared.state();
        if let Some(client) = state.clients.iter_mut().find(|client| client.id == self.id) {
            client.has_export = true;
        }
    }
}

impl Drop for Admission<'_> {
    fn drop(&mut self) {
        let mut state = self.clients.shared.state();
        let Some(at) = state.clients.iter().position(|client| client.id == self.id) else { return };
        let left = state.clients.remove(at);
        left.socket.close();
        let was_last = left.has_export && state.clients.is_empty();
        if was_last && !self.clients.is_persistent {
            state.is_stopping = true;
        }
        drop(state);
        self.clients.shared.changed.notify_all();
    }
}
