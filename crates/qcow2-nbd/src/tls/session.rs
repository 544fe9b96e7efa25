//! A session of TLS on two halves of a connection.

use super::TlsError;
use super::name::subject;
use crate::blocking::Incoming;
use rustls::Connection;
use std::fmt;
use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What both halves share.
struct Shared {
    tls: Connection,
    /// The connection failed: nothing more is sent.
    failed: bool,
}

#[derive(Clone)]
struct Session(Arc<Mutex<Shared>>);

impl Session {
    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    /// Appends everything that TLS has to send.
    fn take_encrypted(&mut self, out: &mut Vec<u8>) -> io::Result<()> {
        while self.tls.wants_write() {
            self.tls.write_tls(out)?;
        }
        Ok(())
    }
}

/// The half that is read.
pub struct TlsReader<R> {
    session: Session,
    incoming: R,
    received: Received,
}

/// Encrypted bytes that TLS has not taken yet.
struct Received {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Received {
    /// Passes some of them on to TLS.
    fn pass_on(&mut self, tls: &mut Connection) -> Result<(), rustls::Error> {
        let (mut left, start) = (&self.bytes[self.start..self.end], self.start);
        // TLS takes a part at a time. It takes none only if its buffers are full, which they are not here.
        let taken = tls.read_tls(&mut left);
        self.start = self.end - left.len();
        tls.process_new_packets()?;
        match taken {
            Err(error) if self.start == start => Err(rustls::Error::General(error.to_string())),
            _ => Ok(()),
        }
    }

    /// Waits for more. Returns false at the end of the connection.
    fn wait(&mut self, incoming: &mut impl Read) -> io::Result<bool> {
        self.start = 0;
        self.end = 0;
        self.end = incoming.read(&mut self.bytes)?;
        Ok(self.end > 0)
    }

    fn is_empty(&self) -> bool {
        self.start == self.end
    }
}

impl<R> TlsReader<R> {
    /// The half that it reads from, for other deadlines: whoever reads from it breaks the session.
    pub fn get_mut(&mut self) -> &mut R {
        &mut self.incoming
    }

    /// The subject of the peer's certificate, which was verified if the credentials say so, as text:
    /// `C=GB,O=Example,CN=client`, escaped as in RFC 4514. `None`: it has no certificate.
    pub fn peer_name(&self) -> Option<String> {
        let shared = self.session.lock();
        shared.tls.peer_certificates()?.first().and_then(|certificate| subject(certificate))
    }
}

impl<R: Read> Read for TlsReader<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        loop {
            let mut shared = self.session.lock();
            loop {
                match shared.tls.reader().read(buf) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    read => return read,
                }
                if self.received.is_empty() {
                    break;
                }
                if let Err(error) = self.received.pass_on(&mut shared.tls) {
                    shared.failed = true;
                    return Err(io::Error::new(io::ErrorKind::InvalidData, error.to_string()));
                }
            }
            drop(shared);
            match self.received.wait(&mut self.incoming) {
                Ok(true) => {}
                Ok(false) => {
                    self.session.lock().failed = true;
                    // An end that TLS was not told of: somebody else may have cut the connection.
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                Err(error) => {
                    self.session.lock().failed |= error.kind() != io::ErrorKind::Interrupted;
                    return Err(error);
                }
            }
        }
    }
}

impl<R: Incoming> Incoming for TlsReader<R> {
    fn begin(&mut self) {
        self.incoming.begin();
    }
}

/// The half that is written. When it is dropped after a connection that did not fail, the peer is told that
/// nothing more comes.
pub struct TlsWriter<W: Write> {
    session: Session,
    outgoing: W,
    encrypted: Vec<u8>,
}

impl<W: Write> TlsWriter<W> {
    /// The half that it writes to, for other deadlines: whoever writes to it breaks the session.
    pub fn get_mut(&mut self) -> &mut W {
        &mut self.outgoing
    }

    /// Has TLS do something and sends what it has to send then.
    fn send<T>(&mut self, step: impl FnOnce(&mut Connection) -> io::Result<T>) -> io::Result<T> {
        let done = {
            let mut shared = self.session.lock();
            if shared.failed {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            let done = step(&mut shared.tls)?;
            shared.take_encrypted(&mut self.encrypted)?;
            done
        };
        let sent = self.outgoing.write_all(&self.encrypted);
        self.encrypted.clear();
        if sent.is_err() {
            // A part of a record may be gone.
            self.session.lock().failed = true;
        }
        sent.map(|()| done)
    }
}

impl<W: Write> Write for TlsWriter<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let part = &buf[..buf.len().min(PART)];
        self.send(|tls| tls.writer().write(part))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send(|_| Ok(()))?;
        self.outgoing.flush()
    }
}

impl<W: Write> Drop for TlsWriter<W> {
    fn drop(&mut self) {
        let told = self.send(|tls| {
            tls.send_close_notify();
            Ok(())
        });
        // The connection ends either way.
        let _ = told.and_then(|()| self.outgoing.flush());
    }
}

impl<R> fmt::Debug for TlsReader<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsReader").finish_non_exhaustive()
    }
}

impl<W: Write> fmt::Debug for TlsWriter<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsWriter").finish_non_exhaustive()
    }
}

/// Runs the handshake of `tls`. `name`: whom the peer's certificate has to be for.
pub(super) fn handshake<R: Read, W: Write>(
    tls: Connection,
    name: &str,
    incoming: R,
    outgoing: W,
) -> Result<(TlsReader<R>, TlsWriter<W>), TlsError> {
    let session = Session(Arc::new(Mutex::new(Shared { tls, failed: false })));
    let received = Received { bytes: vec![0; BUFFER], start: 0, end: 0 };
    let mut reader = TlsReader { session: session.clone(), incoming, received };
    let mut writer = TlsWriter { session: session.clone(), outgoing, encrypted: Vec::new() };
    match agree(name, &mut reader, &mut writer) {
        Ok(()) => Ok((reader, writer)),
        Err(error) => {
            session.lock().failed = true;
            Err(error)
        }
    }
}

fn agree<R: Read, W: Write>(
    name: &str,
    reader: &mut TlsReader<R>,
    writer: &mut TlsWriter<W>,
) -> Result<(), TlsError> {
    loop {
        writer.flush()?;
        {
            let mut shared = reader.session.lock();
            if !shared.tls.is_handshaking() {
                return Ok(());
            }
            if !reader.received.is_empty() {
                let Err(error) = reader.received.pass_on(&mut shared.tls) else { continue };
                drop(shared);
                // Tells the peer why.
                let _ = writer.flush();
                return Err(TlsError::of(&error, name));
            }
        }
        if !reader.received.wait(&mut reader.incoming)? {
            return Err(TlsError::Io(io::ErrorKind::UnexpectedEof.into()));
        }
    }
}

/// Bytes that are encrypted in one step: several records.
const PART: usize = 64 << 10;
/// What is read at once.
const BUFFER: usize = 64 << 10;
