//! A small virtio driver on the other side of the socket: what a machine's monitor and kernel do together.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test may stop")]

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
const HEADER: u64 = 0x3000;
const STATUS: u64 = 0x3100;
const DATA: u64 = 0x10000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

struct Driver {
    memory: GuestMemoryMmap,
    frontend: Frontend,
    kick: EventFd,
    call: EventFd,
    sent: u16,
}

impl Driver {
    fn connect(socket: &Path) -> Self {
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

    fn describe(&self, index: u64, address: u64, len: u32, flags: u16, next: u16) {
        let at = |inside| GuestAddress(index * 16 + inside);
        self.memory.write_obj(address, at(0)).unwrap();
        self.memory.write_obj(len, at(8)).unwrap();
        self.memory.write_obj(flags, at(12)).unwrap();
        self.memory.write_obj(next, at(14)).unwrap();
    }

    /// Hands the chain that starts at descriptor 0 over and waits for it; returns how many bytes were
    /// written.
    fn submit(&mut self) -> u32 {
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

    fn request(&mut self, kind: u32, sector: u64, data: &[u8], wanted: u32) -> (u8, Vec<u8>) {
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

    fn config(&mut self, offset: u32, len: u32) -> Vec<u8> {
        let empty = vec![0; len as usize];
        self.frontend.get_config(offset, len, VhostUserConfigFlags::empty(), &empty).unwrap().1
    }
}

/// Runs `drive` against a device that shows an empty disk of 4 MiB; returns what `drive` does.
fn with_device<T: Send>(image: &Path, drive: impl FnOnce(&Path, &Disk) -> T + Send) -> T {
    Disk::create(image, 4 << 20).unwrap().close().unwrap();
    let disk = Disk::options().writable().open(image).unwrap();
    let device = Device::new(Arc::clone(disk.as_guest_disk()), Settings::default()).unwrap();
    let (device, stop) = (Arc::new(device), AtomicBool::new(false));
    let socket = image.with_extension("sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let result = std::thread::scope(|scope| {
        let server = scope.spawn(|| serve(&device, listener, &|| stop.load(Ordering::Acquire)));
        let result = drive(&socket, &disk);
        stop.store(true, Ordering::Release);
        server.join().unwrap().unwrap();
        result
    });
    drop(device);
    disk.close().unwrap();
    result
}

#[test]
fn a_driver_reads_what_it_wrote_and_so_does_the_next() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.qcow2");
    with_device(&image, |socket, disk| {
        let mut driver = Driver::connect(socket);
        assert_eq!(driver.config(0, 8), 8192_u64.to_le_bytes());
        assert_eq!(driver.request(1, 100, &[7; 4096], 0), (0, vec![]));
        assert_eq!(driver.request(0, 100, &[], 4096), (0, vec![7; 4096]));
        assert_eq!(driver.request(4, 0, &[], 0), (0, vec![]));
        assert_eq!(driver.request(0, 8192, &[], 512).0, 1);
        // A larger disk is announced by the space that describes it.
        disk.resize(8 << 20).unwrap();
        assert_eq!(driver.config(0, 8), 16_384_u64.to_le_bytes());
        assert_eq!(driver.request(1, 16_000, &[8; 512], 0), (0, vec![]));
        drop(driver);
        let mut next = Driver::connect(socket);
        assert_eq!(next.request(0, 100, &[], 4096), (0, vec![7; 4096]));
        assert_eq!(next.request(0, 16_000, &[], 512), (0, vec![8; 512]));
    });
    let disk = Disk::open(&image).unwrap();
    let mut bytes = [0; 4096];
    disk.read_at(51_200, &mut bytes).unwrap();
    assert_eq!(bytes, [7; 4096]);
}

#[test]
fn broken_chains_hurt_nobody() {
    let folder = tempfile::tempdir().unwrap();
    with_device(&folder.path().join("disk.qcow2"), |socket, _| {
        let mut driver = Driver::connect(socket);
        // A chain that leads back to itself, one outside memory, one without a place for the status.
        driver.describe(0, HEADER, 16, NEXT, 0);
        assert_eq!(driver.submit(), 0);
        driver.describe(0, u64::MAX - 4, 16, NEXT, 1);
        driver.describe(1, STATUS, 1, WRITE, 0);
        assert_eq!(driver.submit(), 0);
        driver.describe(0, HEADER, 16, 0, 0);
        assert_eq!(driver.submit(), 0);
        assert_eq!(driver.request(1, 0, &[9; 512], 0), (0, vec![]));
        assert_eq!(driver.request(0, 0, &[], 512), (0, vec![9; 512]));
    });
}
