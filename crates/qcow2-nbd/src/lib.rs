//! The NBD protocol (network block device).
//!
//! | part | what it is |
//! |---|---|
//! | [`proto`] | every message as bytes and as a value, in both directions; for clients and servers |
//! | [`client`] | a client without I/O: the handshake, then any number of requests at once |
//! | [`server`] | a server without I/O: the handshake, then requests judged and replies encoded |
//! | [`blocking`] | both on connections that block: a client for any number of threads, a server with some |
//! | [`tls`] | encryption of a connection, for clients and servers (feature `tls`) |
//!
//! The crate opens no socket and, but for the feature `tls`, depends on nothing but the standard library. Only
//! the blocking half looks at a clock, but for one bound, and only its server starts threads. Whatever a peer
//! sends leads to a value or an error, in
//! bounded memory.
//!
//! A client of the whole protocol: fixed newstyle, newstyle and old-style servers; simple, structured and
//! extended replies; meta contexts; limits of a request's size; the request of TLS, which the caller runs. A
//! server of all that but the old style.
//!
//! # A read
//!
//! ```no_run
//! use qcow2_nbd::blocking::{Connection, Job, Plain, Transfer, negotiate};
//! use qcow2_nbd::client::{Negotiation, Step};
//! use qcow2_nbd::proto::Command;
//! use std::net::TcpStream;
//!
//! let mut stream = TcpStream::connect("127.0.0.1:10809")?;
//! let Step::Ready(export) = negotiate(&mut stream, Negotiation::with_export("disk"))? else {
//!     return Err("no export".into());
//! };
//! let connection = Connection::new(Plain(stream.try_clone()?), stream, export.mode);
//! let mut sector = [0; 512];
//! let job = Job::new(Command::READ, 0, 512, Transfer::Receive(&mut sector));
//! connection.run(&mut [job])?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![forbid(unsafe_code)]

pub mod blocking;
pub mod client;
pub mod proto;
pub mod server;
pub mod tls;
