//! Sessions of TLS between our client and our server, on sockets.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a test may stop")]

use qcow2_nbd::tls::{
    Client, Credentials, CredentialsError, Identity, Server, TlsError, TlsReader, TlsWriter,
};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

type Ends = (TlsReader<UnixStream>, TlsWriter<UnixStream>);

fn pem(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tls").join(format!("{name}.pem")))
        .unwrap()
}

fn identity(name: &str) -> Option<Identity> {
    Some(Identity { certificate: pem(&format!("{name}-cert")), key: pem(&format!("{name}-key")) })
}

fn credentials(authority: &str, name: Option<&str>, verify_peer: bool) -> Credentials {
    let mut credentials = Credentials::new(pem(&format!("{authority}-cert")));
    credentials.identity = name.and_then(identity);
    credentials.verify_peer = verify_peer;
    credentials
}

/// Two connected sockets. What should never wait does not wait for ever.
fn sockets() -> (UnixStream, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    for socket in [&ours, &theirs] {
        socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        socket.set_write_timeout(Some(Duration::from_secs(60))).unwrap();
    }
    (ours, theirs)
}

fn halves(socket: &UnixStream) -> (UnixStream, UnixStream) {
    (socket.try_clone().unwrap(), socket.try_clone().unwrap())
}

fn agree(
    client: &Credentials,
    name: Option<&str>,
    server: &Credentials,
) -> (Result<Ends, TlsError>, Result<Ends, TlsError>) {
    let (client, server) = (Client::new(client).unwrap(), Server::new(server).unwrap());
    let (ours, theirs) = sockets();
    let server = thread::spawn(move || {
        let (incoming, outgoing) = halves(&theirs);
        server.handshake(incoming, outgoing)
    });
    let (incoming, outgoing) = halves(&ours);
    drop(ours);
    let client = client.handshake(name, incoming, outgoing);
    (client, server.join().unwrap())
}

/// A client with a certificate, and a server that wants one.
fn connected() -> (Ends, Ends) {
    let client = credentials("ca", Some("client"), true);
    let (ours, theirs) = agree(&client, Some("localhost"), &credentials("ca", Some("server"), true));
    (ours.unwrap(), theirs.unwrap())
}

fn refused(name: Option<&str>, authority: &str, server: &str) -> TlsError {
    let client = credentials(authority, None, true);
    agree(&client, name, &credentials("ca", Some(server), false)).0.unwrap_err()
}

#[test]
fn servers_that_are_not_trusted() {
    for name in ["localhost", "127.0.0.1"] {
        agree(&credentials("ca", None, true), Some(name), &credentials("ca", Some("server"), false))
            .0
            .unwrap();
    }
    assert!(matches!(refused(Some("localhost"), "other-ca", "server"), TlsError::UnknownIssuer));
    assert!(matches!(refused(Some("localhost"), "ca", "old-server"), TlsError::Expired));
    for name in ["example.org", "127.0.0.2", "::1", "no name", ""] {
        let error = refused(Some(name), "ca", "server");
        assert!(matches!(&error, TlsError::WrongName(wrong) if wrong == name), "{name}: {error}");
    }
    let error = Client::new(&credentials("ca", None, true)).unwrap().handshake(None, io::empty(), io::sink());
    assert!(matches!(error.unwrap_err(), TlsError::NoName));
    // A client for whom any server will do.
    for (name, server) in [(None, "server"), (Some("example.org"), "old-server")] {
        let client = credentials("other-ca", None, false);
        agree(&client, name, &credentials("ca", Some(server), false)).0.unwrap();
    }
}

#[test]
fn ends_know_each_others_names() {
    let (ours, theirs) = connected();
    assert_eq!(ours.0.peer_name().as_deref(), Some("CN=qcow2 test server"));
    assert_eq!(theirs.0.peer_name().as_deref(), Some("CN=qcow2 test client"));
    // A server asks nobody whom it does not verify.
    let client = credentials("ca", Some("client"), true);
    let (_, theirs) = agree(&client, Some("localhost"), &credentials("ca", Some("server"), false));
    assert_eq!(theirs.unwrap().0.peer_name(), None);
}

#[test]
fn clients_that_are_not_trusted() {
    connected();
    let server = credentials("ca", Some("server"), true);
    let (ours, theirs) = agree(&credentials("ca", None, true), Some("localhost"), &server);
    assert!(theirs.unwrap_err().to_string().contains("peer sent no certificates"));
    // With TLS 1.3 the client learns it later.
    let error = ours.unwrap().0.read(&mut [0]).unwrap_err();
    assert!(error.to_string().contains("CertificateRequired"), "{error}");
    let server = credentials("other-ca", Some("server"), true);
    let (_, theirs) = agree(&credentials("ca", Some("client"), true), Some("localhost"), &server);
    assert!(matches!(theirs.unwrap_err(), TlsError::UnknownIssuer));
}

#[test]
fn credentials_of_no_use() {
    use CredentialsError as E;
    let with = |authorities: &[u8], certificate: &[u8], key: &[u8]| {
        let mut credentials = Credentials::new(authorities.to_vec());
        let identity = Identity { certificate: certificate.to_vec(), key: key.to_vec() };
        credentials.identity = Some(identity).filter(|identity| !identity.certificate.is_empty());
        let server = Server::new(&credentials).err();
        if server != Some(E::NoIdentity) {
            assert_eq!(Client::new(&credentials).err(), server);
        }
        server
    };
    let (ca, certificate, key) = (pem("ca-cert"), pem("server-cert"), pem("server-key"));
    assert_eq!(with(&ca, &certificate, &key), None);
    assert_eq!(with(&ca, b"", &key), Some(E::NoIdentity));
    assert_eq!(with(&ca, &certificate, &pem("client-key")), Some(E::KeyMismatch));
    for junk in [&b""[..], b"junk", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", &key] {
        assert_eq!(with(junk, &certificate, &key), Some(E::Authorities));
    }
    assert_eq!(with(&ca, b"junk", &key), Some(E::Certificate));
    for junk in [&b""[..], &ca, b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"] {
        assert_eq!(with(&ca, &certificate, junk), Some(E::Key));
    }
}

fn stream(seed: u8) -> Vec<u8> {
    (0..5_000_003u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8 ^ seed).collect()
}

/// Both ends send more than sockets hold before they are done with reading, and each half has its thread.
#[test]
fn both_ways_at_once() {
    let (ours, theirs) = connected();
    let mut threads = Vec::new();
    for ((mut reader, mut writer), sent, expected) in [(ours, 1, 2), (theirs, 2, 1)] {
        threads.push(thread::spawn(move || {
            writer.write_all(&stream(sent)).unwrap();
            writer.flush().unwrap();
            drop(writer);
        }));
        threads.push(thread::spawn(move || {
            let mut bytes = Vec::new();
            reader.read_to_end(&mut bytes).unwrap();
            assert!(bytes == stream(expected));
        }));
    }
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

/// The peer reads nothing until all that it sends has been read: our writer waits, our reader does not.
#[test]
fn a_writer_that_waits_holds_up_no_reader() {
    let ((mut reader, mut writer), (mut their_reader, mut their_writer)) = connected();
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let peer = thread::spawn(move || {
        their_writer.write_all(&stream(2)).unwrap();
        their_writer.flush().unwrap();
        wait.recv().unwrap();
        let mut bytes = vec![0; stream(1).len()];
        their_reader.read_exact(&mut bytes).unwrap();
        assert!(bytes == stream(1));
    });
    let sender = thread::spawn(move || {
        writer.write_all(&stream(1)).unwrap();
        writer.flush().unwrap();
        writer
    });
    let mut bytes = vec![0; stream(2).len()];
    reader.read_exact(&mut bytes).unwrap();
    assert!(bytes == stream(2));
    go.send(()).unwrap();
    peer.join().unwrap();
    sender.join().unwrap();
}

#[test]
fn an_end_that_was_told_and_one_that_was_not() {
    let ((mut reader, _writer), theirs) = connected();
    drop(theirs);
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);

    let (ours, theirs, wire) = connected_by_a_wire();
    let (mut reader, mut writer) = ours;
    wire.shutdown(std::net::Shutdown::Both).unwrap();
    assert_eq!(reader.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    assert_eq!(writer.write(&[0]).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    drop(theirs);
}

/// The third is the server's socket, below TLS.
fn connected_by_a_wire() -> (Ends, Ends, UnixStream) {
    let client = Client::new(&credentials("ca", None, false)).unwrap();
    let server = Server::new(&credentials("ca", Some("server"), false)).unwrap();
    let (ours, theirs) = sockets();
    let (incoming, outgoing) = halves(&theirs);
    let server = thread::spawn(move || server.handshake(incoming, outgoing).unwrap());
    let (incoming, outgoing) = halves(&ours);
    let client = client.handshake(None, incoming, outgoing).unwrap();
    (client, server.join().unwrap(), theirs)
}

/// Bytes that somebody changed on their way, or that are no TLS at all.
#[test]
fn changed_bytes_are_an_error() {
    let (ours, mut theirs) = sockets();
    theirs.write_all(b"NBDMAGIC and so on, which is no record").unwrap();
    let client = Client::new(&credentials("ca", None, false)).unwrap();
    let (incoming, outgoing) = halves(&ours);
    assert!(matches!(client.handshake(None, incoming, outgoing).unwrap_err(), TlsError::Failed(_)));
    let ((mut reader, mut writer), (_their_reader, mut their_writer), mut wire) = connected_by_a_wire();
    their_writer.write_all(b"whole").unwrap();
    their_writer.flush().unwrap();
    let mut bytes = [0; 5];
    reader.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"whole");
    // A record of 32 bytes that the session's key has not made.
    wire.write_all(&[&[23, 3, 3, 0, 32][..], &[7; 32]].concat()).unwrap();
    assert_eq!(reader.read(&mut bytes).unwrap_err().kind(), io::ErrorKind::InvalidData);
    assert_eq!(writer.write(&[0]).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
}
