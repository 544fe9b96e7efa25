//! Connections: one monitor after the other, until the caller wants to stop.

use crate::backend::Backend;
use crate::device::Device;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fmt;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use vhost_user_backend::{ShutdownHandle, VhostUserDaemon};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// How often `stop` is asked.
const LOOK: Duration = Duration::from_millis(50);

/// Why serving ended early.
#[derive(Debug)]
#[non_exhaustive]
pub enum ServeError {
    /// The listener failed.
    Listen(std::io::Error),
    /// Threads or event descriptors for a connection could not be made.
    Connection(vhost_user_backend::Error),
    /// The last flush failed: what the guest wrote after its own last flush may be lost.
    Flush(qcow2_core::Error),
}

impl fmt::Display for ServeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Listen(error) => write!(f, "the socket cannot be listened on: {error}"),
            Self::Connection(error) => write!(f, "a connection failed: {error}"),
            Self::Flush(error) => write!(f, "the disk cannot be flushed: {error}"),
        }
    }
}

impl std::error::Error for ServeError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Listen(error) => Some(error),
            Self::Flush(error) => Some(error),
            Self::Connection(_) => None,
        }
    }
}

/// Serves `device` to whoever connects to `listener`, one monitor at a time; the next waits until the one
/// before has gone. Returns once `stop` says true: requests that were begun are finished and the disk is
/// flushed. The disk is flushed too whenever a monitor goes.
///
/// A monitor that breaks the protocol loses its connection and nothing else. Errors: see [`ServeError`].
pub fn serve(
    device: &Arc<Device>,
    listener: UnixListener,
    stop: &(dyn Fn() -> bool + Sync),
) -> Result<(), ServeError> {
    let socket = listener.try_clone().map_err(ServeError::Listen)?;
    let mut listener = vhost::vhost_user::Listener::from(listener);
    while wait_for_monitor(&socket, stop)? {
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let backend = Arc::new(Backend::new(Arc::clone(device)));
        let mut daemon = VhostUserDaemon::new("vhost-user-blk".to_owned(), backend, memory)
            .map_err(ServeError::Connection)?;
        daemon.start(&mut listener).map_err(ServeError::Connection)?;
        watch(daemon.shutdown_handle(), stop, || {
            // How the monitor went is its own matter: a machine that is killed just closes the socket.
            let _ = daemon.wait();
        });
        // Joins the threads of the queues.
        drop(daemon);
        device.disk().flush().map_err(ServeError::Flush)?;
    }
    device.disk().flush().map_err(ServeError::Flush)
}

/// Waits until somebody connects (true) or `stop` says true (false).
fn wait_for_monitor(socket: &impl AsFd, stop: &(dyn Fn() -> bool + Sync)) -> Result<bool, ServeError> {
    let timeout = Timespec { tv_sec: 0, tv_nsec: LOOK.subsec_nanos().into() };
    while !stop() {
        let mut descriptors = [PollFd::new(socket, PollFlags::IN)];
        match poll(&mut descriptors, Some(&timeout)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return Ok(true),
            Err(error) => return Err(ServeError::Listen(error.into())),
        }
    }
    Ok(false)
}

/// Runs `work`, and shuts the connection down once `stop` says true.
fn watch(connection: Option<ShutdownHandle>, stop: &(dyn Fn() -> bool + Sync), work: impl FnOnce()) {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            while !done.load(Ordering::Acquire) {
                if stop() {
                    connection.iter().for_each(ShutdownHandle::shutdown);
                    return;
                }
                std::thread::park_timeout(LOOK);
            }
        });
        work();
        done.store(true, Ordering::Release);
        watcher.thread().unpark();
    });
}
