//! Random reads and writes of 4 KiB at a depth, by one thread: a queue on a disk, and a bare ring on the same
//! file. `cargo bench -p qcow2-queue -- IMAGE [DEPTH] [COUNT] [direct]`; every cluster of the image must be
//! written already, and is written over.
#![allow(clippy::print_stdout)]

#[cfg(target_os = "linux")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    linux::main()
}

#[cfg(not(target_os = "linux"))]
fn main() {
    println!("a ring is something of Linux");
}

#[cfg(target_os = "linux")]
mod linux {
    use qcow2_core::HostOffset;
    use qcow2_core::Storage;
    use qcow2_image::Disk;
    use qcow2_image::io::{CacheMode, FilePart, FileRing, FileStorage};
    use qcow2_queue::{GuestOffset, IoBuffer, Queue, QueueOptions, Request};
    use std::error::Error;
    use std::time::Instant;

    const BLOCK: u64 = 4096;

    type Result<T> = std::result::Result<T, Box<dyn Error>>;

    /// Offsets in a disorder that is the same every time.
    struct Offsets(u64, u64);

    impl Offsets {
        fn next(&mut self) -> u64 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 33) % self.1 * BLOCK
        }
    }

    struct Run {
        depth: u32,
        count: u64,
        write: bool,
    }

    /// Requests a second.
    fn rate(run: &Run, start: Instant) -> f64 {
        run.count as f64 / start.elapsed().as_secs_f64()
    }

    fn queued_by_threads(disk: &Disk, run: &Run) -> Result<f64> {
        queued(disk, run, 0)
    }

    fn queued(disk: &Disk, run: &Run, ring: u32) -> Result<f64> {
        let guest = disk.as_guest_disk();
        let mut queue = Queue::new(guest, &QueueOptions::default().with_depth(ring));
        assert!(ring == 0 || queue.uses_ring(), "this system refuses io_uring, or this disk");
        let mut offsets = Offsets(1, disk.size() / BLOCK);
        let mut buffers: Vec<_> = (0..run.depth).map(|_| IoBuffer::zeroed(BLOCK as usize)).collect();
        let (mut begun, mut done, start) = (0, 0, Instant::now());
        while done < run.count {
            while begun < run.count
                && let Some(buffer) = buffers.pop()
            {
                let offset = GuestOffset::new(offsets.next());
                let request = match run.write {
                    true => Request::Write { offset, buffer },
                    false => Request::Read { offset, buffer },
                };
                queue.submit(begun, request);
                begun += 1;
            }
            let mut failed = None;
            done += queue.wait(|completion| {
                failed = completion.result.err().or(failed.take());
                buffers.extend(completion.buffer);
            })? as u64;
            failed.map_or(Ok(()), Err)?;
        }
        Ok(rate(run, start))
    }

    /// The same requests to the file as if it were raw: what io_uring itself can do here.
    fn bare(file: &FileStorage, size: u64, run: &Run) -> Result<f64> {
        let mut ring = FileRing::new(run.depth)?;
        let mut offsets = Offsets(1, size / BLOCK);
        let mut buffers: Vec<_> = (0..run.depth).map(|_| IoBuffer::zeroed(BLOCK as usize)).collect();
        let (mut begun, mut done, start) = (0, 0, Instant::now());
        while done < run.count {
            while begun < run.count
                && let Some(buffer) = buffers.pop()
            {
                let offset = HostOffset::new(offsets.next());
                let part = FilePart { bytes: 0..BLOCK as usize, offset };
                let started = match run.write {
                    true => ring.write((), file, buffer, &part),
                    false => ring.read((), file, buffer, &[part]),
                };
                started.map_err(|_| "no room in the ring")?;
                begun += 1;
            }
            ring.wait()?;
            ring.poll(|transfer| {
                done += 1;
                buffers.push(transfer.buffer);
            });
        }
        Ok(rate(run, start))
    }

    pub(crate) fn main() -> Result<()> {
        let arguments: Vec<String> = std::env::args().filter(|word| !word.starts_with("--")).collect();
        let number = |at: usize, otherwise| arguments.get(at).map_or(Ok(otherwise), |text| text.parse());
        let (depth, count) = (number(2, 32)? as u32, number(3, 1_000_000)?);
        let Some(path) = arguments.get(1) else {
            println!("no image was named, so nothing is measured");
            return Ok(());
        };
        let cache = if arguments.iter().any(|word| word == "direct") {
            CacheMode::None
        } else {
            CacheMode::Writeback
        };
        let disk = Disk::options().writable().cache(cache).open(path)?;
        disk.write_at(0, &[0; BLOCK as usize])?;
        let image = disk.as_image().ok_or("not a qcow2 image")?;
        let storage = image.storage().copy_source().and_then(|any| any.downcast_ref::<FileStorage>());
        let file = storage.ok_or("not in a file")?;
        let size = image.storage().len()?.min(disk.size());
        let raw = FileStorage::from_file(
            tempfile::tempfile_in(std::path::Path::new(path).parent().unwrap_or("".as_ref()))?,
            true,
        )?;
        for at in (0..size).step_by(1 << 20) {
            raw.write_at(HostOffset::new(at), &[7; 1 << 20])?;
        }
        for write in [false, true] {
            let run = Run { depth, count, write };
            for round in 1..=5 {
                let bare = bare(if write { &raw } else { file }, size, &run)?;
                let queued = queued(&disk, &run, depth)?;
                let threads = queued_by_threads(&disk, &run)?;
                let kind = if write { "write" } else { "read" };
                println!(
                    "{kind} {round}: queue {queued:.0}, threads {threads:.0}, bare ring {bare:.0} a second; queue of bare {:.2}",
                    queued / bare
                );
            }
        }
        disk.close()?;
        Ok(())
    }
}
