//! Clients that misbehave hold up nobody else, and the server's memory stays within its bound.

use super::tls::{credentials, half_open, is_let_in, secure_folder};
use super::{Server, folder};
use qcow2_nbd::proto::{Command, Mode, OptionCode, OptionRequest, Request};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

/// A connection on which the server has sent its greeting.
fn greeted(server: &Server) -> UnixStream {
    let mut stream = UnixStream::connect(server.folder.join("s")).unwrap();
    stream.read_exact(&mut [0; 18]).unwrap();
    stream
}

/// A connection in the transmission phase, with simple replies.
fn ready(server: &Server) -> UnixStream {
    let mut stream = greeted(server);
    let mut bytes = 3u32.to_be_bytes().to_vec();
    OptionRequest::ExportName(String::new()).encode(&mut bytes);
    stream.write_all(&bytes).unwrap();
    stream.read_exact(&mut [0; 10]).unwrap();
    stream
}

fn request(command: Command, len: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    let request = Request { command, flags: 0, cookie: 1, offset: 0, len };
    request.encode(Mode::Simple, &mut bytes).unwrap();
    bytes
}

/// Kibibytes.
const MOST_MEMORY: u64 = 160 << 10;

#[test]
fn a_thousand_connections_that_lead_nowhere() {
    let folder = folder();
    let server = Server::start(folder.path(), &["disk"]);
    let good = server.connect();
    for number in 0..1000 {
        let mut stream = UnixStream::connect(folder.path().join("s")).unwrap();
        match number % 4 {
            0 => {}
            1 => stream.write_all(&[0; 4]).unwrap(),
            2 => stream.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap(),
            _ => {
                let _ = stream.read(&mut [0; 7]);
            }
        }
    }
    // And half handshakes that stay, more than there may be clients.
    let half: Vec<_> = (0..1100)
        .map(|number| {
            let mut stream = greeted(&server);
            stream.write_all(&3u32.to_be_bytes()[..number % 4]).unwrap();
            stream
        })
        .collect();
    good.write(0, &[1; 4096]);
    let late = server.connect();
    assert_eq!(late.read(0, 4096), [1; 4096]);
    let memory = server.memory();
    assert!(memory < MOST_MEMORY, "{memory} KiB");
    drop((half, good, late));
    assert!(server.end("-TERM").success());
}

/// Thousands of clients that agree on TLS and then stop: those beyond the limit make room for others, the
/// longest waiting first, and each of the others has its thread and what a handshake has received.
#[test]
fn a_thousand_handshakes_of_tls_that_stop() {
    let folder = secure_folder();
    let creds = credentials("srv", "on");
    let server = Server::start(folder.path(), &["--object", &creds, "--tls-creds", "t", "disk"]);
    let half: Vec<_> = (0..1100usize)
        .map(|number| {
            let mut stream = half_open(folder.path());
            // Nothing, a part of a head, a part of a record, and one that is longer than may be.
            let part = [&[][..], &[22, 3], &[22, 3, 1, 2, 0, 1, 0, 1], &[22, 3, 1, 0x40, 0]][number % 4];
            stream.write_all(part).unwrap();
            stream
        })
        .collect();
    // A client whose bytes come one by one is served like any other.
    let mut slow = UnixStream::connect(folder.path().join("s")).unwrap();
    let mut bytes = 3u32.to_be_bytes().to_vec();
    OptionRequest::plain(OptionCode::STARTTLS).encode(&mut bytes);
    for byte in bytes {
        slow.write_all(&[byte]).unwrap();
        assert!(byte != 5 || is_let_in(folder.path(), "cli"));
    }
    slow.read_exact(&mut [0; 38]).unwrap();
    assert!(is_let_in(folder.path(), "cli"));
    let memory = server.memory();
    assert!(memory < MOST_MEMORY, "{memory} KiB");
    println!("{memory} KiB with {} handshakes", half.len());
    drop(half);
    assert!(server.end("-TERM").success());
}

#[test]
fn clients_that_never_read_or_never_end_hold_up_nobody() {
    let folder = folder();
    let server = Server::start(folder.path(), &["disk"]);
    let mut stuck = Vec::new();
    for number in 0..40 {
        let mut stream = ready(&server);
        let bytes = match number % 4 {
            // Replies that nobody takes.
            0 => request(Command::READ, 32 << 20).repeat(50),
            1 => request(Command::READ, 60 << 10).repeat(50),
            // A payload that never comes, and one that comes in part.
            2 => request(Command::WRITE, 32 << 20),
            _ => [request(Command::WRITE, 1 << 20), vec![0; 1000]].concat(),
        };
        stream.write_all(&bytes).unwrap();
        stuck.push(stream);
    }
    let good = server.connect();
    for number in 1..200u8 {
        good.write(u64::from(number) * 4096, &[number; 4096]);
        assert_eq!(good.read(u64::from(number) * 4096, 4096), [number; 4096]);
    }
    good.flush();
    assert_eq!(good.read(0, 1 << 20).len(), 1 << 20);
    let memory = server.memory();
    assert!(memory < MOST_MEMORY * 2, "{memory} KiB");
    // Not even the end waits for them for long.
    assert!(server.end("-TERM").success());
}
