//! Sockets that a service manager has handed over: `LISTEN_FDS` of them for the process `LISTEN_PID`, from
//! descriptor 3 on.

use super::Address;
#[cfg(unix)]
use super::Listener;
#[cfg(unix)]
use std::io;

/// How many sockets were handed over to this process.
pub fn handed_over() -> u32 {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u32>().ok());
    match number("LISTEN_PID") {
        Some(pid) if pid == std::process::id() => number("LISTEN_FDS").unwrap_or(0),
        _ => 0,
    }
}

impl Address {
    /// Where a server listens that was told nothing: on the sockets that were handed over to it, or on port
    /// 10809 of this machine alone.
    pub fn standard() -> Vec<Self> {
        match handed_over().min(MAX_SOCKETS) {
            0 => vec![Self::Tcp { host: "127.0.0.1".to_owned(), port: 10_809 }],
            count => (0..count).map(Self::HandedOver).collect(),
        }
    }
}

/// Sockets that are listened on, at most; a service manager has no more than a few.
const MAX_SOCKETS: u32 = 1024;

/// Listens on the socket with this number, counted from 0.
#[cfg(unix)]
pub(super) fn take(number: u32) -> io::Result<Listener> {
    use rustix::net::{AddressFamily, getsockname};
    let number = i32::try_from(number).ok().and_then(|number| number.checked_add(FIRST));
    let descriptor = qcow2_io::inherited_descriptor(number.ok_or(io::ErrorKind::InvalidInput)?)?;
    let listener = match getsockname(&descriptor)?.address_family() {
        AddressFamily::UNIX => {
            crate::local::LocalListener::from(std::os::unix::net::UnixListener::from(descriptor)).into()
        }
        AddressFamily::INET | AddressFamily::INET6 => std::net::TcpListener::from(descriptor).into(),
        _ => return Err(io::ErrorKind::Unsupported.into()),
    };
    Listener::with_waker(listener)
}

/// The first of the descriptors.
#[cfg(unix)]
pub(super) const FIRST: i32 = 3;
