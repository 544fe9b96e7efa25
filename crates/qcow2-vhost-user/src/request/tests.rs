use super::*;
use crate::device::Settings;
use qcow2_core::{DiskExtent, ExtentState, GuestDisk};
use std::sync::{Arc, Mutex};

/// A disk of 64 sectors in memory, with a list of what was asked of it.
struct Memory {
    bytes: Mutex<Vec<u8>>,
    calls: Mutex<Vec<String>>,
}

impl Memory {
    fn note(&self, call: String) -> qcow2_core::Result<()> {
        self.calls.lock().unwrap().push(call);
        Ok(())
    }
}

impl GuestDisk for Memory {
    fn size(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }

    fn read_at(&self, offset: GuestOffset, buf: &mut [u8]) -> qcow2_core::Result<()> {
        let at = offset.value() as usize;
        buf.copy_from_slice(&self.bytes.lock().unwrap()[at..at + buf.len()]);
        self.note(format!("read {at} {}", buf.len()))
    }

    fn write_at(&self, offset: GuestOffset, buf: &[u8]) -> qcow2_core::Result<()> {
        let at = offset.value() as usize;
        self.bytes.lock().unwrap()[at..at + buf.len()].copy_from_slice(buf);
        self.note(format!("write {at} {}", buf.len()))
    }

    fn write_zeroes(&self, range: GuestRange, mode: ZeroMode) -> qcow2_core::Result<()> {
        self.note(format!("zero {} {} {mode:?}", range.start().value(), range.len()))
    }

    fn discard(&self, range: GuestRange) -> qcow2_core::Result<()> {
        self.note(format!("discard {} {}", range.start().value(), range.len()))
    }

    fn flush(&self) -> qcow2_core::Result<()> {
        self.note("flush".to_owned())
    }

    fn extent_at(&self, range: GuestRange) -> qcow2_core::Result<DiskExtent> {
        Ok(DiskExtent { len: range.len(), state: ExtentState::Data { host: None } })
    }

    fn resize(&self, _size: u64) -> qcow2_core::Result<()> {
        Ok(())
    }
}

/// Bytes that are nobody's memory.
impl Incoming for &[u8] {
    fn write_to(&mut self, _: &dyn GuestDisk, _: GuestRange) -> qcow2_core::Result<Option<usize>> {
        Ok(None)
    }
}

impl Outgoing for &mut Vec<u8> {
    fn read_from(&mut self, _: &dyn GuestDisk, _: GuestRange) -> qcow2_core::Result<Option<usize>> {
        Ok(None)
    }
}

struct Bench {
    disk: Arc<Memory>,
    device: Device,
}

fn bench_of(sectors: usize, settings: Settings) -> Bench {
    let bytes = (0..sectors * 512).map(|at| (at / 512) as u8).collect();
    let disk = Arc::new(Memory { bytes: Mutex::new(bytes), calls: Mutex::default() });
    Bench { device: Device::new(Arc::clone(&disk) as _, settings).unwrap(), disk }
}

fn bench() -> Bench {
    bench_of(64, Settings { serial: "disk-7".to_owned(), ..Settings::default() })
}

impl Bench {
    /// The status, the bytes for the guest, and the calls that the disk saw.
    fn run(&self, from_guest: &[u8], wanted: usize) -> (Status, Vec<u8>, Vec<String>) {
        let mut to_guest = Vec::new();
        let transfer = Transfer { sent: from_guest.len(), from_guest, to_guest: &mut to_guest, wanted };
        let status = self.device.answer(transfer, &mut Vec::new());
        (status, to_guest, std::mem::take(&mut self.disk.calls.lock().unwrap()))
    }
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn reads_and_writes_move_bytes() {
    let bench = bench();
    let (status, bytes, calls) = bench.run(&header(READ, 3), 1024);
    assert_eq!((status, calls), (Status::Done, vec!["read 1536 1024".to_owned()]));
    assert_eq!(bytes, [[3_u8; 512], [4; 512]].concat());
    let (status, _, calls) = bench.run(&[header(WRITE, 63), vec![9; 512]].concat(), 0);
    assert_eq!((status, calls), (Status::Done, vec!["write 32256 512".to_owned()]));
    assert_eq!(bench.run(&header(READ, 63), 512).1, [9; 512]);
    assert_eq!(bench.run(&header(FLUSH, 0), 0).2, ["flush"]);
    assert_eq!(bench.run(&header(GET_ID, 0), 20).1, *b"disk-7\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn long_requests_go_in_pieces() {
    let bench = bench_of(4096, Settings::default());
    let (status, bytes, calls) = bench.run(&header(READ, 0), PIECE + 512);
    assert_eq!((status, bytes.len()), (Status::Done, PIECE + 512));
    assert_eq!(calls, ["read 0 1048576", "read 1048576 512"]);
}

#[test]
fn discards_and_zeroes_carry_their_ranges() {
    let bench = bench();
    let two = [header(DISCARD, 0), segment(1, 2, 0), segment(8, 8, 0)].concat();
    assert_eq!(bench.run(&two, 0).2, ["discard 512 1024", "discard 4096 4096"]);
    let two = [header(WRITE_ZEROES, 0), segment(1, 2, 0), segment(8, 8, 1), segment(9, 0, 0)].concat();
    assert_eq!(bench.run(&two, 0).2, ["zero 512 1024 KeepAllocated", "zero 4096 4096 MayUnmap"]);
}

#[test]
fn what_a_guest_must_not_ask_changes_nothing() {
    let bench = bench();
    let refused: &[(&[u8], usize, Status)] = &[
        (&header(READ, 63), 1024, Status::Failed),
        (&header(READ, 64), 512, Status::Failed),
        (&header(READ, u64::MAX), 512, Status::Failed),
        (&header(READ, u64::MAX / 512), 512, Status::Failed),
        (&header(READ, 0), 100, Status::Failed),
        (&header(READ, 0)[..15], 512, Status::Failed),
        (&[], 0, Status::Failed),
        (&[header(WRITE, 0), vec![0; 511]].concat(), 0, Status::Failed),
        (&[header(WRITE, 63), vec![0; 1024]].concat(), 0, Status::Failed),
        (&header(DISCARD, 0), 0, Status::Failed),
        (&[header(DISCARD, 0), segment(0, 1, 1)].concat(), 0, Status::Unsupported),
        (&[header(DISCARD, 0), segment(0, 1, 0), segment(60, 5, 0)].concat(), 0, Status::Failed),
        (&[header(DISCARD, 0), vec![0; 15]].concat(), 0, Status::Failed),
        (&[header(DISCARD, 0), segment(0, 0, 0).repeat(65)].concat(), 0, Status::Failed),
        (&[header(WRITE_ZEROES, 0), segment(0, 1, 2)].concat(), 0, Status::Unsupported),
        (&[header(WRITE_ZEROES, 0), segment(u64::MAX, 1, 0)].concat(), 0, Status::Failed),
        (&header(2, 0), 0, Status::Unsupported),
        (&header(u32::MAX, 0), 0, Status::Unsupported),
    ];
    for (number, (bytes, wanted, status)) in refused.iter().enumerate() {
        assert_eq!(bench.run(bytes, *wanted), (*status, Vec::new(), Vec::new()), "request {number}");
    }
}

#[test]
fn a_read_only_device_refuses_changes() {
    let bench = bench_of(64, Settings { read_only: true, ..Settings::default() });
    let changes = [
        [header(WRITE, 0), vec![0; 512]].concat(),
        [header(DISCARD, 0), segment(0, 1, 0)].concat(),
        [header(WRITE_ZEROES, 0), segment(0, 1, 0)].concat(),
    ];
    for change in changes {
        assert_eq!(bench.run(&change, 0), (Status::Failed, Vec::new(), Vec::new()));
    }
    assert_eq!(bench.run(&header(READ, 0), 512).0, Status::Done);
}

#[test]
fn without_flushes_or_without_cache_each_change_is_durable() {
    let bench = bench();
    let write = [header(WRITE, 0), vec![0; 512]].concat();
    let durable = ["write 0 512", "flush"];
    bench.device.set_flushes(false);
    assert_eq!(bench.run(&write, 0).2, durable);
    bench.device.set_flushes(true);
    assert_eq!(bench.run(&write, 0).2, ["write 0 512"]);
    bench.device.set_cache(false);
    assert_eq!(bench.run(&write, 0).2, durable);
    assert_eq!(bench.run(&[header(DISCARD, 0), segment(0, 1, 0)].concat(), 0).2, ["discard 0 512", "flush"]);
}

#[test]
fn what_reaches_the_disk_is_told() {
    let told = Arc::new(Mutex::new(Vec::new()));
    let note = Arc::clone(&told);
    let Bench { disk, device } = bench_of(4096, Settings::default());
    let device = device.with_observer(move |ended| note.lock().unwrap().push((ended.kind, ended.bytes)));
    let bench = Bench { disk, device };
    let check = |from_guest: &[u8], wanted, expected: &[(Kind, u64)]| {
        bench.run(from_guest, wanted);
        assert_eq!(std::mem::take(&mut *told.lock().unwrap()), expected);
    };
    // One request, though the disk gets it in pieces.
    check(&header(READ, 0), PIECE + 512, &[(Kind::Read, PIECE as u64 + 512)]);
    let write = [header(WRITE, 0), vec![1; 1024]].concat();
    check(&write, 0, &[(Kind::Write, 1024)]);
    check(&header(FLUSH, 0), 0, &[(Kind::Flush, 0)]);
    let two = [segment(1, 2, 0), segment(9, 0, 0), segment(8, 8, 0)].concat();
    let discard = [header(DISCARD, 0), two.clone()].concat();
    check(&discard, 0, &[(Kind::Discard, 1024), (Kind::Discard, 4096)]);
    let zeroes = [header(WRITE_ZEROES, 0), two].concat();
    check(&zeroes, 0, &[(Kind::WriteZeroes, 1024), (Kind::WriteZeroes, 4096)]);
    bench.device.set_cache(false);
    check(&write, 0, &[(Kind::Write, 1024), (Kind::Flush, 0)]);
    // What the disk never sees.
    check(&header(GET_ID, 0), 20, &[]);
    check(&header(READ, 4096), 512, &[]);
    check(&header(u32::MAX, 0), 0, &[]);
}

#[test]
fn settings_outside_their_ranges_are_refused() {
    let disk = || bench().disk as Arc<dyn GuestDisk>;
    let text = |settings| Device::new(disk(), settings).unwrap_err().to_string();
    let with = Settings::default;
    assert_eq!(text(Settings { queues: 0, ..with() }), "0 queues: allowed are 1 to 64");
    assert_eq!(
        text(Settings { queue_size: 100, ..with() }),
        "queues of 100: allowed are powers of two from 4 to 1024"
    );
    assert_eq!(
        text(Settings { serial: "x".repeat(21), ..with() }),
        "a serial number of 21 bytes: at most 20"
    );
}
