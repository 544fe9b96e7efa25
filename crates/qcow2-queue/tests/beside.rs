//! A queue and what happens beside it: changes of the whole image, cold tables, errors, an early end.
#![allow(missing_docs, clippy::unwrap_used)]

use qcow2_core::{
    ErrorKind, GuestDisk, HostOffset, Image, ImageFormat, OpenOptions, RawDisk, ResolvedSource, Storage,
    StorageError, ZeroMode, forward_storage,
};
use qcow2_image::{Disk, NewDisk};
use qcow2_queue::{GuestOffset, GuestRange, IoBuffer, Queue, QueueOptions, Request};
use qcow2_testkit::rng::Rng;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

const BLOCK: u64 = 4096;

fn write(at: u64, value: u8) -> Request {
    let buffer = IoBuffer::from(vec![value; BLOCK as usize]);
    Request::Write { offset: GuestOffset::new(at), buffer }
}

fn read(at: u64) -> Request {
    Request::Read { offset: GuestOffset::new(at), buffer: IoBuffer::zeroed(BLOCK as usize) }
}

/// Snapshots are taken and the disk is resized while blocks are rewritten in place: no request that is in
/// flight then writes into what the snapshot has.
#[test]
fn snapshots_and_resizes_beside_writes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let disk = Disk::create(&path, 8 << 20).unwrap();
    disk.write_at(0, &vec![1; 1 << 20]).unwrap();
    let (end, mut rng) = (AtomicBool::new(false), Rng::new(1));
    let kept = thread::scope(|scope| {
        let changes = scope.spawn(|| {
            let mut kept = Vec::new();
            for n in 0..20 {
                let name = format!("s{n}");
                disk.create_snapshot(&name).unwrap();
                let mut bytes = vec![0; 1 << 20];
                disk.open_snapshot(&name).unwrap().read_at(0, &mut bytes).unwrap();
                kept.push(bytes);
                disk.resize((9 + n) << 20).unwrap();
            }
            end.store(true, Ordering::Relaxed);
            kept
        });
        let mut queue = Queue::new(disk.as_guest_disk(), &QueueOptions::default());
        let mut token = 0;
        while !end.load(Ordering::Relaxed) && !changes.is_finished() {
            while queue.in_flight() < 32 {
                // One block each: two requests in flight to the same one would have no order.
                queue.submit(token, write(token % 256 * BLOCK, rng.below(250) as u8));
                token += 1;
            }
            // The system has not been told of them yet: time for a snapshot, if it does not wait for them.
            thread::sleep(Duration::from_micros(200));
            queue.wait(|done| done.result.unwrap()).unwrap();
        }
        drop(queue);
        changes.join().unwrap()
    });
    for (n, wanted) in kept.iter().enumerate() {
        let mut bytes = vec![0; 1 << 20];
        disk.open_snapshot(&format!("s{n}")).unwrap().read_at(0, &mut bytes).unwrap();
        assert!(bytes == *wanted, "snapshot {n} has changed after it was taken");
    }
    disk.close().unwrap();
}

/// A snapshot waits for a write in place that is in flight: until it has finished the cluster is the disk's
/// alone.
#[test]
fn a_snapshot_waits_for_what_is_in_flight() {
    let folder = tempfile::tempdir().unwrap();
    let disk = Disk::create(folder.path().join("disk"), 1 << 20).unwrap();
    disk.write_at(0, &[1; BLOCK as usize]).unwrap();
    let mut queue = Queue::new(disk.as_guest_disk(), &QueueOptions::default());
    thread::scope(|scope| {
        queue.submit(1, write(0, 2));
        let snapshot = scope.spawn(|| disk.create_snapshot("s").map(drop).unwrap());
        thread::sleep(Duration::from_millis(if queue.uses_ring() { 100 } else { 0 }));
        assert!(!(queue.uses_ring() && snapshot.is_finished()), "it did not wait");
        queue.wait(|done| done.result.unwrap()).unwrap();
        snapshot.join().unwrap();
    });
    // Shared now: this one goes elsewhere.
    queue.submit(2, write(0, 3));
    queue.wait(|done| done.result.unwrap()).unwrap();
    drop(queue);
    let first = |disk: &Disk| {
        let mut byte = [0];
        disk.read_at(0, &mut byte).unwrap();
        byte[0]
    };
    assert_eq!(first(&disk), 3);
    assert!(first(&disk.open_snapshot("s").unwrap()) != 3);
    disk.close().unwrap();
}

/// Holds back every read of one range until it is told not to.
struct Slow {
    inner: Arc<dyn Storage>,
    range: std::ops::Range<u64>,
    held: Mutex<bool>,
    freed: Condvar,
}

impl Storage for Slow {
    forward_storage!(inner: len write_at write_zeroes discard allocate set_len flush copy_source);

    fn read_at(&self, offset: HostOffset, buf: &mut [u8]) -> Result<usize, StorageError> {
        if self.range.contains(&offset.value()) {
            let mut held = self.held.lock().unwrap();
            while *held {
                held = self.freed.wait(held).unwrap();
            }
        }
        self.inner.read_at(offset, buf)
    }
}

/// A request whose table is being read does not hold up those whose tables are in memory.
#[test]
fn a_cold_table_holds_up_nobody_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let disk = NewDisk::qcow2().size(64 << 20).cluster_size(4096).create(&path).unwrap();
    disk.write_at(0, &[1; 4096]).unwrap();
    disk.write_at(32 << 20, &[2; 4096]).unwrap();
    disk.close().unwrap();
    // For writing: an image that takes no changes reads its tables in long pieces.
    let inner = qcow2_image::io::OpenFile::writable().open(&path).unwrap();
    let source = |storage| ResolvedSource::new(storage, ImageFormat::Qcow2, "disk");
    let l1 = u64::from_be_bytes({
        let mut bytes = [0; 8];
        inner.read_at(HostOffset::new(40), &mut bytes).unwrap();
        bytes
    });
    // A table of 4 KiB maps 2 MiB.
    let mut entry = [0; 8];
    inner.read_at(HostOffset::new(l1 + 16 * 8), &mut entry).unwrap();
    let table = u64::from_be_bytes(entry) & 0x00ff_ffff_ffff_fe00;
    let (held, freed) = (Mutex::new(true), Condvar::new());
    let slow = Arc::new(Slow { inner, range: table..table + 4096, held, freed });
    let image = Image::open(source(Arc::clone(&slow) as _), &OpenOptions::writable()).unwrap();
    let disk: Arc<dyn GuestDisk> = image;
    disk.read_at(GuestOffset::new(0), &mut [0; 1]).unwrap();
    let mut queue = Queue::new(&disk, &QueueOptions::default().with_threads(1));
    queue.submit(1, read(32 << 20));
    if !queue.uses_ring() {
        println!("skipped: this system refuses io_uring");
        *slow.held.lock().unwrap() = false;
        slow.freed.notify_all();
        return;
    }
    for token in 2..100 {
        queue.submit(token, read(0));
        let mut seen = Vec::new();
        queue.wait(|done| seen.push((done.token, done.buffer.unwrap()[0]))).unwrap();
        assert_eq!(seen, [(token, 1)]);
    }
    *slow.held.lock().unwrap() = false;
    slow.freed.notify_all();
    queue.wait(|done| assert_eq!((done.token, done.buffer.unwrap()[0]), (1, 2))).unwrap();
}

/// The tables of an image that takes no changes are in its index, not in the cache: a request finds them
/// there.
#[test]
fn a_disk_that_takes_no_changes_is_read_by_the_ring() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let disk = Disk::create(&path, 1 << 20).unwrap();
    disk.write_at(0, &[7; BLOCK as usize]).unwrap();
    disk.close().unwrap();
    let disk = Disk::open(&path).unwrap();
    disk.read_at(0, &mut [0]).unwrap();
    // Without threads, and with no I/O before it is asked for completions: what is in flight is in the ring.
    let mut queue = Queue::new(disk.as_guest_disk(), &QueueOptions::default().with_threads(0));
    queue.submit(1, read(0));
    if queue.uses_ring() {
        assert!(queue.cancel(1).is_none(), "it waits for a thread");
    }
    queue.wait(|done| assert_eq!(done.buffer.unwrap()[..], [7; BLOCK as usize])).unwrap();
}

/// A write that waits while the image is closed is refused, or it is there afterwards: never done into a
/// closed file.
#[test]
fn a_write_beside_a_close_is_not_lost() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    Disk::create(&path, 1 << 20).unwrap().close().unwrap();
    let source = || {
        let storage = qcow2_image::io::OpenFile::writable().open(&path).unwrap();
        ResolvedSource::new(storage, ImageFormat::Qcow2, "disk")
    };
    let image = Image::open(source(), &OpenOptions::writable()).unwrap();
    image.write_at(GuestOffset::new(0), &[1; 512]).unwrap();
    let written = thread::scope(|scope| {
        let pin = image.pin();
        let close = scope.spawn(|| image.close());
        thread::sleep(Duration::from_millis(50));
        // Behind the close, which waits for the pin.
        let write = scope.spawn(|| image.write_at(GuestOffset::new(1 << 19), &[2; 512]));
        thread::sleep(Duration::from_millis(50));
        drop(pin);
        close.join().unwrap().unwrap();
        write.join().unwrap()
    });
    drop(image);
    let image = Image::open(source(), &OpenOptions::writable()).unwrap();
    let mut byte = [0];
    image.read_at(GuestOffset::new(1 << 19), &mut byte).unwrap();
    assert_eq!(byte[0], if written.is_ok() { 2 } else { 0 });
    image.close().unwrap();
}

/// What a disk itself refuses, or wants to see, the ring does not do past it.
#[test]
fn a_disk_for_reading_and_a_filter_are_not_passed_by() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    std::fs::write(&path, [1; 8192]).unwrap();
    let storage = qcow2_image::io::OpenFile::writable().open(&path).unwrap();
    let raw: Arc<dyn GuestDisk> = Arc::new(RawDisk::new(storage, false).unwrap());
    let mut queue = Queue::new(&raw, &QueueOptions::default());
    queue.submit(1, write(0, 2));
    queue.wait(|done| assert_eq!(done.result.unwrap_err().kind(), ErrorKind::ReadOnly)).unwrap();
    drop(queue);
    assert!(std::fs::read(&path).unwrap() == [1; 8192]);

    let base = folder.path().join("base");
    let disk = Disk::create(&base, 1 << 20).unwrap();
    disk.write_at(0, &[5; 4096]).unwrap();
    disk.close().unwrap();
    let top = NewDisk::qcow2().backing_file("base", ImageFormat::Qcow2).follow_backing_files();
    let top = top.create(folder.path().join("top")).unwrap();
    let copying = qcow2_image::io::CopyOnRead::new(Arc::clone(top.as_guest_disk()));
    let copying: Arc<dyn GuestDisk> = Arc::new(copying);
    let mut queue = Queue::new(&copying, &QueueOptions::default());
    assert!(!queue.uses_ring(), "it would pass the filter by");
    queue.submit(1, read(0));
    queue.wait(|done| done.result.unwrap()).unwrap();
    drop(queue);
    let extent = top.as_image().unwrap().extent_at(GuestRange::new(GuestOffset::new(0), 4096).unwrap());
    assert!(matches!(extent.unwrap().state, qcow2_core::ExtentState::Data { .. }), "nothing was copied");
}

/// Panics at each request.
struct Broken;

impl GuestDisk for Broken {
    fn size(&self) -> u64 {
        1 << 20
    }
    fn read_at(&self, _: GuestOffset, _: &mut [u8]) -> qcow2_core::Result<()> {
        panic!("a disk of somebody else's")
    }
    fn write_at(&self, _: GuestOffset, _: &[u8]) -> qcow2_core::Result<()> {
        Ok(())
    }
    fn write_zeroes(&self, _: GuestRange, _: ZeroMode) -> qcow2_core::Result<()> {
        Ok(())
    }
    fn discard(&self, _: GuestRange) -> qcow2_core::Result<()> {
        Ok(())
    }
    fn flush(&self) -> qcow2_core::Result<()> {
        Ok(())
    }
    fn extent_at(&self, range: GuestRange) -> qcow2_core::Result<qcow2_core::DiskExtent> {
        Ok(qcow2_core::DiskExtent { len: range.len(), state: qcow2_core::ExtentState::Unallocated })
    }
    fn resize(&self, _: u64) -> qcow2_core::Result<()> {
        Ok(())
    }
}

#[test]
fn a_disk_that_panics_is_an_error() {
    let disk: Arc<dyn GuestDisk> = Arc::new(Broken);
    let mut queue = Queue::new(&disk, &QueueOptions::default().with_threads(1));
    queue.submit(1, read(0));
    queue.submit(2, write(0, 1));
    let mut done = Vec::new();
    while queue.in_flight() > 0 {
        queue.wait(|completion| done.push((completion.token, completion.result.is_ok()))).unwrap();
    }
    assert_eq!(done, [(1, false), (2, true)]);
}

#[test]
fn errors_come_with_the_request_and_its_buffer() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    Disk::create(&path, 1 << 20).unwrap().close().unwrap();
    let disk = Disk::open(&path).unwrap();
    for depth in [0, 8] {
        let mut queue = Queue::new(disk.as_guest_disk(), &QueueOptions::default().with_depth(depth));
        let far = GuestRange::new(GuestOffset::new(1 << 20), 1).unwrap();
        let requests = [
            (read((1 << 20) - 1), ErrorKind::OutOfRange),
            (read(u64::MAX - 2), ErrorKind::OutOfRange),
            (write(0, 1), ErrorKind::ReadOnly),
            (Request::Zeroes { range: far, mode: ZeroMode::MayUnmap }, ErrorKind::OutOfRange),
        ];
        for (token, (request, kind)) in (0..).zip(requests) {
            let has_buffer = matches!(request, Request::Read { .. } | Request::Write { .. });
            queue.submit(token, request);
            queue
                .wait(|done| {
                    assert_eq!((done.token, done.buffer.is_some()), (token, has_buffer));
                    assert_eq!(done.result.unwrap_err().kind(), kind);
                })
                .unwrap();
        }
        assert_eq!((queue.in_flight(), queue.wait(|_| ()).unwrap()), (0, 0));
    }
}

/// What has begun is done when the queue is gone; of what has not, nothing is. Either way no byte is moved
/// afterwards.
#[test]
fn a_dropped_queue_leaves_whole_blocks() {
    for depth in [0, 64] {
        let folder = tempfile::tempdir().unwrap();
        let disk = Disk::create(folder.path().join("disk"), 1 << 20).unwrap();
        disk.write_at(0, &vec![1; 1 << 20]).unwrap();
        let options = QueueOptions::default().with_depth(depth).with_threads(1);
        let mut queue = Queue::new(disk.as_guest_disk(), &options);
        for block in 0..256 {
            queue.submit(block, write(block * BLOCK, 2));
            if block % 100 == 50 {
                queue.poll(|done| done.result.unwrap()).unwrap();
            }
        }
        drop(queue);
        let mut bytes = vec![0; 1 << 20];
        disk.read_at(0, &mut bytes).unwrap();
        assert!(bytes.chunks(BLOCK as usize).all(|block| block.iter().all(|byte| *byte == block[0])));
        let mut again = vec![0; 1 << 20];
        disk.read_at(0, &mut again).unwrap();
        assert!(bytes == again);
        disk.close().unwrap();
    }
}

#[test]
fn what_has_not_begun_is_given_back() {
    let folder = tempfile::tempdir().unwrap();
    let disk = Disk::create(folder.path().join("disk"), 1 << 20).unwrap();
    // Nobody does anything before the queue is asked for completions.
    let options = QueueOptions::default().with_depth(0).with_threads(0);
    let mut queue = Queue::new(disk.as_guest_disk(), &options);
    queue.submit(1, write(0, 7));
    queue.submit(2, write(BLOCK, 8));
    let Some(Request::Write { buffer, .. }) = queue.cancel(1) else { panic!("the first has begun") };
    assert_eq!((buffer[0], queue.in_flight()), (7, 1));
    assert!(queue.cancel(1).is_none() && queue.cancel(3).is_none());
    queue.wait(|done| assert_eq!(done.token, 2)).unwrap();
    assert!(queue.cancel(2).is_none());
    drop(queue);
    let mut bytes = [1; 2 * BLOCK as usize];
    disk.read_at(0, &mut bytes).unwrap();
    assert_eq!((bytes[0], bytes[BLOCK as usize]), (0, 8));
}
