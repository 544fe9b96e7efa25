//! One thread that copies a disk with eight reads and writes in flight, as an event loop would.
#![allow(clippy::print_stdout, reason = "an example")]
use qcow2_image::{Disk, NewDisk};
use qcow2_queue::{GuestOffset, IoBuffer, Queue, QueueOptions, Request};
use std::error::Error;

const PIECE: u64 = 64 << 10;

fn main() -> Result<(), Box<dyn Error>> {
    let folder = tempfile::tempdir()?;
    let from = Disk::create(folder.path().join("from.qcow2"), 4 << 20)?;
    from.write_at(1 << 20, &vec![7; 1 << 20])?;
    let to = NewDisk::raw().size(from.size()).create(folder.path().join("to.raw"))?;

    let options = QueueOptions::default().with_threads(2);
    let mut reads = Queue::new(from.as_guest_disk(), &options);
    let mut writes = Queue::new(to.as_guest_disk(), &options);
    println!("by io_uring: {} and {}", reads.uses_ring(), writes.uses_ring());
    let mut free: Vec<_> = (0..8).map(|_| IoBuffer::zeroed(PIECE as usize)).collect();
    let mut next = 0;
    while next < from.size() || free.len() < 8 {
        while next < from.size()
            && let Some(buffer) = free.pop()
        {
            // The offset is the token too.
            reads.submit(next, Request::Read { offset: GuestOffset::new(next), buffer });
            next += PIECE;
        }
        let mut done = Vec::new();
        // Returns at once if there is nothing to wait for.
        reads.wait(|completion| done.push(completion))?;
        for completion in done {
            completion.result?;
            let (offset, buffer) =
                (GuestOffset::new(completion.token), completion.buffer.unwrap_or_default());
            writes.submit(completion.token, Request::Write { offset, buffer });
        }
        let mut failed = None;
        let mut written = |completion: qcow2_queue::Completion| {
            failed = completion.result.err().or(failed.take());
            free.extend(completion.buffer);
        };
        // The reads that are in flight are waited for above, and the writes only behind the last of those.
        match reads.in_flight() {
            0 => writes.wait(&mut written)?,
            _ => writes.poll(&mut written)?,
        };
        failed.map_or(Ok(()), Err)?;
    }
    drop((reads, writes));
    let mut byte = [0];
    to.read_at((2 << 20) - 1, &mut byte)?;
    println!("{} bytes copied, the last of the data is {}", to.size(), byte[0]);
    to.close()?;
    Ok(from.close()?)
}
