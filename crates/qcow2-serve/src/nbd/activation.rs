//! Sockets that a service manager has handed over: `LISTEN_FDS` of them for the process `LISTEN_PID`, from
//! descriptor 3 on.

use super::Address;
#[cfg(unix)]
use super::Listener;
use std::fmt;
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
    /// Where a server listens that was told to listen on `named`. If that is nothing: on the sockets that
    /// were handed over to it, or, unless it has other sockets (`has_others`), on port 10809 of this machine
    /// alone. Errors: it was told something, and clients of the sockets that were handed over would wait for
    /// ever.
    pub fn choose(named: Vec<Self>, has_others: bool) -> Result<Vec<Self>, HandedOverToo> {
        Self::choose_with(named, has_others, handed_over())
    }

    /// The same for so many sockets.
    fn choose_with(named: Vec<Self>, has_others: bool, sockets: u32) -> Result<Vec<Self>, HandedOverToo> {
        match sockets.min(MAX_SOCKETS) {
            0 if named.is_empty() && !has_others => {
                Ok(vec![Self::Tcp { host: "127.0.0.1".to_owned(), port: 10_809 }])
            }
            0 => Ok(named),
            count if named.is_empty() => Ok((0..count).map(Self::HandedOver).collect()),
            _ => Err(HandedOverToo),
        }
    }
}

/// A server was told where to listen, and a service manager has handed sockets over to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HandedOverToo;

impl fmt::Display for HandedOverToo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a service manager has handed sockets over (LISTEN_FDS): no others can be named")
    }
}

impl std::error::Error for HandedOverToo {}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_that_were_handed_over_are_the_only_ones() {
        let named = || vec![Address::Unix("/s".into())];
        let choose = |named, has_others, sockets| Address::choose_with(named, has_others, sockets);
        let port = Address::Tcp { host: "127.0.0.1".to_owned(), port: 10_809 };
        assert_eq!(choose(vec![], false, 0), Ok(vec![port]));
        assert_eq!(choose(vec![], true, 0), Ok(vec![]));
        assert_eq!(choose(named(), false, 0), Ok(named()));
        let both = vec![Address::HandedOver(0), Address::HandedOver(1)];
        assert_eq!(choose(vec![], false, 2), Ok(both.clone()));
        assert_eq!(choose(vec![], true, 2), Ok(both));
        assert_eq!(choose(named(), false, 1), Err(HandedOverToo));
        assert_eq!(choose(vec![], false, u32::MAX).map(|all| all.len()), Ok(MAX_SOCKETS as usize));
    }
}
