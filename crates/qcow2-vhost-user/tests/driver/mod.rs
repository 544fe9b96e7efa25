//! A small virtio driver on the other side of the socket: what a machine's monitor and kernel do together.
#![allow(dead_code, reason = "each test uses a part")]

use qcow2_core::GuestDisk;
use qcow2_image::Disk;
use qcow2_vhost_user::{Device, Settings, serve};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

const MEMORY: usize = 1 << 20;
const QUEUE: u16 = 8;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
pub(crate) const HEADER: u64 = 0x3000;
pub(crate) const STATUS: u64 = 0x3100;
const DATA: u64 = 0x10000;
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;

pub(crate) struct Driver {
    memory: GuestMemoryMmap,
    frontend: Frontend,
    kick: EventFd,
    call: EventFd,
    sent: u16,
}

impl Driver {
    pub(crate) fn connect(socket: &Path) -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(MEMORY as u64).unwrap();
        let region = (GuestAddress(0), MEMORY, Some(FileOffset::new(file, 0)));
        let memory = GuestMemoryMmap::<()>::from_ranges_with_files([region]).unwrap();
        let mut frontend = Frontend::connect(socket, 1).unwrap();
        frontend.set_owner().unwrap();
        let features = frontend.get_features().unwrap();
        // Without event indices: each answer is announced.
        frontend.set_features(features & !(1 << 29)).unwrap();
        let protocol = frontend.get_protocol_features().unwrap();
        frontend
            .set_protocol_features(
                protocol & (VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::MQ),
            )
            .unwrap();
        let base = memory.get_host_address(GuestAddress(0)).unwrap() as u64;
        let region = memory.find_region(GuestAddress(0)).unwrap();
        let region = VhostUserMemoryRegionInfo::from_guest_region(region).unwrap();
        frontend.set_mem_table(&[region]).unwrap();
        frontend.set_vring_num(0, QUEUE).unwrap();
        let ring = VringConfigData {
            queue_max_size: QUEUE,
            queue_size: QUEUE,
            flags: 0,
            desc_table_addr: base,
            used_ring_addr: base + USED,
            avail_ring_addr: base + AVAILABLE,
            log_addr: None,
        };
        frontend.set_vring_addr(0, &ring).unwrap();
        frontend.set_vring_base(0, 0).unwrap();
        let (kick, call) = (EventFd::new(0).unwrap(), EventFd::new(0).unwrap());
        frontend.set_vring_call(0, &call).unwrap();
        frontend.set_vring_kick(0, &kick).unwrap();
        frontend.set_vring_enable(0, true).unwrap();
        Self { memory, frontend, kick, call, sent: 0 }
    }

    pub(crate) fn describe(&self, index: u64, address: u64, len: u32, flags: u16, next: u16) {
        let at = |inside| GuestAddress(index * 16 + inside);
        self.memory.write_obj(address, at(0)).unwrap();
        self.memory.write_obj(len, at(8)).unwrap();
        self.memory.write_obj(flags, at(12)).unwrap();
        self.memory.write_obj(next, at(14)).unwrap();
    }

    /// Hands the chain that starts at descriptor 0 over and waits for it; returns how many bytes were
    /// written.
    pub(crate) fn submit(&mut self) -> u32 {
        let slot = u64::from(self.sent % QUEUE);
        self.memory.write_obj(0_u16, GuestAddress(AVAILABLE + 4 + 2 * slot)).unwrap();
        self.sent = self.sent.wrapping_add(1);
        self.memory.write_obj(self.sent, GuestAddress(AVAILABLE + 2)).unwrap();
        self.kick.write(1).unwrap();
        self.call.read().unwrap();
        let used: u16 = self.memory.read_obj(GuestAddress(USED + 2)).unwrap();
        assert_eq!(used, self.sent, "one answer for each request");
        self.memory.read_obj(GuestAddress(USED + 4 + 8 * slot + 4)).unwrap()
    }

    pub(crate) fn request(&mut self, kind: u32, sector: u64, data: &[u8], wanted: u32) -> (u8, Vec<u8>) {
        self.memory.write_obj(kind, GuestAddress(HEADER)).unwrap();
        self.memory.write_obj(sector, GuestAddress(HEADER + 8)).unwrap();
        self.memory.write_obj(0xff_u8, GuestAddress(STATUS)).unwrap();
        self.memory.write_slice(data, GuestAddress(DATA)).unwrap();
        self.describe(0, HEADER, 16, NEXT, 1);
        let (len, flags) = if wanted > 0 { (wanted, NEXT | WRITE) } else { (data.len() as u32, NEXT) };
        // A flush has no data, but an empty descriptor is not allowed.
        if len == 0 {
            self.describe(0, HEADER, 16, NEXT, 2);
        } else {
            self.describe(1, DATA, len, flags, 2);
        }
        self.describe(2, STATUS, 1, WRITE, 0);
        self.submit();
        let mut bytes = vec![0; wanted as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(DATA)).unwrap();
        (self.memory.read_obj(GuestAddress(STATUS)).unwrap(), bytes)
    }

    /// Describes a request with data in ranges of these lengths, with gaps between them, and hands it over.
    fn scattered(&mut self, kind: u32, sector: u64, parts: &[u32], flags: u16) -> u8 {
        self.memory.write_obj(kind, GuestAddress(HEADER)).unwrap();
        self.memory.write_obj(sector, GuestAddress(HEADER + 8)).unwrap();
        self.memory.write_obj(0xff_u8, GuestAddress(STATUS)).unwrap();
        self.describe(0, HEADER, 16, NEXT, 1);
        for (index, &len) in (1..).zip(parts) {
            self.describe(index, scattered_at(index, parts), len, NEXT | flags, index as u16 + 1);
        }
        let status = parts.len() as u64 + 1;
        self.describe(status, STATUS, 1, WRITE, 0);
        let written = self.submit();
        let data = if flags & WRITE == 0 { 0 } else { parts.iter().sum() };
        assert_eq!(written, data + 1);
        self.memory.read_obj(GuestAddress(STATUS)).unwrap()
    }

    pub(crate) fn scattered_read(&mut self, sector: u64, parts: &[u32]) -> (u8, Vec<u8>) {
        let status = self.scattered(0, sector, parts, WRITE);
        let mut all = Vec::new();
        for (index, &len) in (1..).zip(parts) {
            let mut bytes = vec![0; len as usize];
            self.memory.read_slice(&mut bytes, GuestAddress(scattered_at(index, parts))).unwrap();
            all.extend(bytes);
        }
        (status, all)
    }

    pub(crate) fn scattered_write(&mut self, sector: u64, bytes: &[u8], parts: &[u32]) -> u8 {
        let mut at = 0;
        for (index, &len) in (1..).zip(parts) {
            let place = GuestAddress(scattered_at(index, parts));
            self.memory.write_slice(&bytes[at..at + len as usize], place).unwrap();
            at += len as usize;
        }
        self.scattered(1, sector, parts, 0)
    }

    pub(crate) fn config(&mut self, offset: u32, len: u32) -> Vec<u8> {
        let empty = vec![0; len as usize];
        self.frontend.get_config(offset, len, VhostUserConfigFlags::empty(), &empty).unwrap().1
    }
}

/// Where the range with this index is, from 1 on.
fn scattered_at(index: u64, parts: &[u32]) -> u64 {
    let before: u32 = parts[..index as usize - 1].iter().sum();
    DATA + u64::from(before) + 1001 * index
}

struct AtDrop<F: Fn()>(F);

impl<F: Fn()> Drop for AtDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// Runs `drive` against a device that shows `disk`.
pub(crate) fn with_disk<T: Send>(
    disk: Arc<dyn GuestDisk>,
    socket: &Path,
    drive: impl FnOnce(&Path) -> T + Send,
) -> T {
    let device = Arc::new(Device::new(disk, Settings::default()).unwrap());
    let (listener, stop) = (UnixListener::bind(socket).unwrap(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let server = scope.spawn(|| serve(&device, listener, &|| stop.load(Ordering::Acquire)));
        // Also where `drive` panics: the scope waits for the server.
        let end = AtDrop(|| stop.store(true, Ordering::Release));
        let result = drive(socket);
        drop(end);
        server.join().unwrap().unwrap();
        result
    })
}

/// Runs `drive` against a device that shows an empty disk of 4 MiB; returns what `drive` does.
pub(crate) fn with_device<T: Send>(image: &Path, drive: impl FnOnce(&Path, &Disk) -> T + Send) -> T {
    Disk::create(image, 4 << 20).unwrap().close().unwrap();
    let disk = Disk::options().writable().open(image).unwrap();
    let guest = Arc::clone(disk.as_guest_disk());
    let result = with_disk(guest, &image.with_extension("sock"), |socket| drive(socket, &disk));
    disk.close().unwrap();
    result
}
