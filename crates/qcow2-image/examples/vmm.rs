//! A virtual machine monitor's block device: four queues, and data that the monitor transfers with its own
//! I/O.
#![allow(clippy::print_stdout)]
use qcow2_image::Disk;
use qcow2_image::core::{ExtentState, GuestOffset, GuestRange, Piece};
use std::io::ErrorKind;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::{error::Error, fs::File, ops::Range, os::unix::fs::FileExt, path::Path, sync::Arc, thread};

pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

pub(crate) enum Request {
    Read(u64, usize),
    Write(u64, Vec<u8>),
    Discard(Range<u64>),
    Flush,
}

pub(crate) struct Device(pub(crate) Disk, File);

impl Device {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let disk = Disk::options().writable().open(path)?;
        let image = disk.as_image().ok_or("not a qcow2 image")?;
        // Host offsets are offsets in the data storage, so it has to be the file that is opened here.
        if !image.data_storage().is_some_and(|data| Arc::ptr_eq(data, image.storage())) {
            return Err("the image has an external data file".into());
        }
        Ok(Self(disk, File::options().read(true).write(true).open(path)?))
    }

    /// Serves one queue on the calling thread, until its sender is dropped. Answers each request, a read with
    /// the bytes.
    pub(crate) fn serve(&self, queue: Receiver<(Request, Sender<Vec<u8>>)>) -> Result<()> {
        for (request, done) in queue {
            let mut answer = Vec::new();
            match request {
                Request::Read(at, len) => answer = self.read(at, vec![0; len])?,
                Request::Write(at, bytes) => self.write(at, &bytes)?,
                Request::Discard(range) => self.0.discard(range)?,
                Request::Flush => self.0.flush()?,
            }
            done.send(answer)?;
        }
        Ok(())
    }

    fn read(&self, mut at: u64, mut bytes: Vec<u8>) -> Result<Vec<u8>> {
        let (image, mut rest) = (self.0.as_image().ok_or("not a qcow2 image")?, &mut bytes[..]);
        while !rest.is_empty() {
            let pin = image.pin(); // The extent's clusters are not reused while the pin lives.
            let extent = pin.extent_at(range(at, rest.len())?)?;
            let (now, later) = rest.split_at_mut(extent.len as usize);
            let done = match extent.state {
                ExtentState::Zero { .. } => {
                    now.fill(0);
                    true
                }
                ExtentState::Data { host: Some(host) } => match self.1.read_exact_at(now, host.value()) {
                    // Past the end of the file, where the engine reads zeroes.
                    Err(error) if error.kind() == ErrorKind::UnexpectedEof => false,
                    read => read.map(|()| true)?,
                },
                _ => false, // Compressed, or from the backing file.
            };
            drop(pin); // The engine must not be called while this thread holds a pin.
            if !done {
                self.0.read_at(at, now)?;
            }
            (at, rest) = (at + extent.len, later);
        }
        Ok(bytes)
    }

    fn write(&self, mut at: u64, mut bytes: &[u8]) -> Result<()> {
        let image = self.0.as_image().ok_or("not a qcow2 image")?;
        while !bytes.is_empty() {
            let ticket = image.prepare_write(range(at, bytes.len())?)?; // Prepare: allocate clusters.
            let (now, later) = bytes.split_at(ticket.range().len() as usize);
            for piece in ticket.pieces() {
                match piece {
                    Piece::Guest { host } => self.1.write_all_at(now, host.value())?, // Move the data.
                    Piece::Bytes { host, bytes } => self.1.write_all_at(bytes, host.value())?,
                    Piece::Zeroes { host, len } => {
                        self.1.write_all_at(&vec![0; len as usize], host.value())?
                    }
                    _ => return Err("unknown kind of piece".into()),
                }
            }
            // Commit: readers see the data from here on. This thread holds no ticket when it takes the next.
            ticket.commit()?;
            (at, bytes) = (at + now.len() as u64, later);
        }
        Ok(())
    }
}

fn range(at: u64, len: usize) -> Result<GuestRange> {
    GuestRange::new(GuestOffset::new(at), len as u64).ok_or_else(|| "past 2^64".into())
}

/// The guest's side: sends a request to a queue and waits for the answer.
pub(crate) fn ask(queue: &Sender<(Request, Sender<Vec<u8>>)>, request: Request) -> Result<Vec<u8>> {
    let (done, answer) = channel();
    queue.send((request, done))?;
    Ok(answer.recv()?)
}

fn main() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("disk.qcow2");
    Disk::create(&path, 64 << 20)?.close()?;
    let device = Device::open(&path)?;
    let queues = [(); 4].map(|()| channel());
    thread::scope(|scope| {
        let guest = queues.map(|(sender, queue)| {
            scope.spawn(|| device.serve(queue));
            sender
        });
        for (at, queue) in (0..).step_by(16 << 20).zip(&guest) {
            ask(queue, Request::Write(at, vec![7; 100_000]))?;
        }
        device.0.resize(128 << 20)?; // Live.
        ask(&guest[0], Request::Write(100 << 20, b"in the new part".to_vec()))?;
        ask(&guest[1], Request::Discard(0..1 << 20))?;
        ask(&guest[2], Request::Flush)?;
        println!("{:?}", String::from_utf8(ask(&guest[3], Request::Read(100 << 20, 15))?)?);
        Ok(())
    })
    .and_then(|()| Ok(device.0.close()?))
}
