//! Conformance suite for [`Storage`] implementations. Call [`check`] with a function that creates a fresh,
//! empty, growable and writable storage.
//!
//! Each case gets a storage of its own. All cases run; the report lists the failed ones with their reasons.
//!
//! ```
//! use qcow2_io::{MemoryStorage, conformance};
//! use std::sync::Arc;
//!
//! conformance::check("memory", &|| Arc::new(MemoryStorage::new()));
//! ```

use qcow2_core::{HostOffset, Storage, StorageError, StorageErrorKind, ZeroMode};
use std::fmt::Write as _;
use std::sync::Arc;

/// Creates one fresh storage of length 0.
pub type Make<'a> = &'a dyn Fn() -> Arc<dyn Storage>;

/// The result of a case; the error says what did not conform.
type Case = Result<(), String>;

/// A case and its name in the report.
type NamedCase = (&'static str, fn(&dyn Storage) -> Case);

const CASES: &[NamedCase] = &[
    ("an empty storage has no bytes", empty),
    ("reads stop at the end", reads_stop_at_the_end),
    ("gaps read as zeroes", gaps_read_as_zeroes),
    ("zeroes overwrite exactly their range", zeroes_overwrite_their_range),
    ("zeroes make the storage longer", zeroes_grow),
    ("changes of zero bytes change nothing", empty_changes),
    ("discarded bytes read as zeroes or keep their content", discard_keeps_the_rest),
    ("truncated bytes read as zeroes after growing again", cut_end_is_zero),
    ("allocate keeps content and may grow the storage", allocate_keeps_content),
    ("extents cover the range and no hole hides data", extents_are_honest),
    ("vectored writes are contiguous", vectored_writes),
    ("impossible ranges are refused", impossible_ranges),
    ("padded reads end in zeroes", padded_reads),
    ("limits are plausible", limits_are_sensible),
    ("concurrent writes of adjacent ranges do not mix", concurrent_neighbours),
    ("concurrent zeroing and writing of adjacent ranges do not mix", concurrent_zeroes),
    ("random operations match a byte array", random_history),
];

/// Runs every case on a storage of its own. Panics with the list of failed cases, if any failed.
pub fn check(name: &str, make: Make<'_>) {
    let mut report = String::new();
    for (what, case) in CASES {
        if let Err(why) = case(&*make()) {
            let _ = writeln!(report, "  {what}: {why}");
        }
    }
    assert!(report.is_empty(), "storage '{name}' does not conform:\n{report}");
}

/// Returns an error from a case unless the condition holds.
macro_rules! ensure {
    ($condition:expr, $($text:tt)+) => {
        if !$condition {
            return Err(format!($($text)+));
        }
    };
}

fn at(offset: u64) -> HostOffset {
    HostOffset::new(offset)
}

/// A storage error as text, with its cause.
fn text(error: StorageError) -> String {
    match std::error::Error::source(&error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

fn write(storage: &dyn Storage, offset: u64, data: &[u8]) -> Case {
    storage.write_at(at(offset), data).map_err(text)
}

fn len(storage: &dyn Storage) -> Result<u64, String> {
    storage.len().map_err(text)
}

fn read_all(storage: &dyn Storage) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0xEE; len(storage)? as usize];
    let count = storage.read_at(at(0), &mut bytes).map_err(text)?;
    ensure!(count == bytes.len(), "read {count} of {} bytes", bytes.len());
    Ok(bytes)
}

/// Compares the whole content and the length with `expected`.
fn same(storage: &dyn Storage, expected: &[u8], when: &str) -> Case {
    let bytes = read_all(storage)?;
    ensure!(bytes.len() == expected.len(), "{when}: {} bytes instead of {}", bytes.len(), expected.len());
    match bytes.iter().zip(expected).position(|(a, b)| a != b) {
        Some(i) => Err(format!("{when}: byte {i} is {:#x} instead of {:#x}", bytes[i], expected[i])),
        None => Ok(()),
    }
}

/// Pseudo-random bytes without a zero, different for every `seed`.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random(seed);
    (0..len).map(|_| (random.next() % 255 + 1) as u8).collect()
}

fn empty(storage: &dyn Storage) -> Case {
    ensure!(len(storage)? == 0, "a fresh storage has {} bytes", len(storage)?);
    ensure!(storage.is_empty().map_err(text)?, "a fresh storage is not empty");
    let mut buf = [7; 16];
    ensure!(storage.read_at(at(0), &mut buf).map_err(text)? == 0, "read bytes from an empty storage");
    storage.flush().map_err(text)
}

fn reads_stop_at_the_end(storage: &dyn Storage) -> Case {
    let data = pattern(1, 1000);
    write(storage, 0, &data)?;
    for (offset, wanted, expected) in
        [(0, 1000, 1000), (1, 5000, 999), (999, 1, 1), (999, 2, 1), (1000, 1, 0), (70_000, 10, 0), (0, 0, 0)]
    {
        let mut buf = vec![0; wanted];
        let count = storage.read_at(at(offset), &mut buf).map_err(text)?;
        ensure!(count == expected, "{wanted} bytes at {offset}: read {count} instead of {expected}");
        let start = (offset as usize).min(1000);
        ensure!(buf[..count] == data[start..start + count], "wrong bytes at {offset}");
    }
    let far = storage.read_at(at(u64::MAX), &mut [0; 10]).map_err(text)?;
    ensure!(far == 0, "read {far} bytes at 2^64 - 1");
    Ok(())
}

fn gaps_read_as_zeroes(storage: &dyn Storage) -> Case {
    write(storage, 3, b"abc")?;
    write(storage, 1_000_003, b"xyz")?;
    let mut expected = vec![0; 1_000_006];
    expected[3..6].copy_from_slice(b"abc");
    expected[1_000_003..].copy_from_slice(b"xyz");
    same(storage, &expected, "after two writes")
}

const MODES: [ZeroMode; 2] = [ZeroMode::KeepAllocated, ZeroMode::MayUnmap];

fn zeroes_overwrite_their_range(storage: &dyn Storage) -> Case {
    for mode in MODES {
        for (start, count) in
            [(0, 1), (511, 2), (4096, 4096), (4097, 70_000), (65_536, 131_072), (100_000, 50_001)]
        {
            let mut expected = pattern(2, 300_000);
            write(storage, 0, &expected)?;
            storage.write_zeroes(at(start), count, mode).map_err(text)?;
            expected[start as usize..][..count as usize].fill(0);
            same(storage, &expected, &format!("after zeroing {count} bytes at {start} ({mode:?})"))?;
        }
    }
    Ok(())
}

fn zeroes_grow(storage: &dyn Storage) -> Case {
    for mode in MODES {
        for (start, count) in [(50, 100), (100, 5000), (100_000, 1), (131_072, 65_536)] {
            storage.set_len(0).map_err(text)?;
            let mut expected = pattern(3, 100);
            write(storage, 0, &expected)?;
            storage.write_zeroes(at(start), count, mode).map_err(text)?;
            expected.truncate(start.min(100) as usize);
            expected.resize((start + count).max(100) as usize, 0);
            same(storage, &expected, &format!("after zeroing {count} bytes at {start} ({mode:?})"))?;
        }
    }
    Ok(())
}

fn empty_changes(storage: &dyn Storage) -> Case {
    let expected = pattern(4, 100);
    write(storage, 0, &expected)?;
    write(storage, 5000, &[])?;
    storage.write_vectored_at(at(5000), &[]).map_err(text)?;
    storage.write_vectored_at(at(5000), &[&[], &[]]).map_err(text)?;
    for mode in MODES {
        storage.write_zeroes(at(5000), 0, mode).map_err(text)?;
    }
    storage.discard(at(5000), 0).map_err(text)?;
    storage.discard(at(10), 0).map_err(text)?;
    same(storage, &expected, "after changes of no bytes")
}

fn discard_keeps_the_rest(storage: &dyn Storage) -> Case {
    for (start, count) in [(0, 1), (4096, 65_536), (65_536, 65_536), (70_001, 100_000), (190_000, 50_000)] {
        let before = pattern(5, 200_000);
        write(storage, 0, &before)?;
        storage.discard(at(start), count).map_err(text)?;
        let after = read_all(storage)?;
        ensure!(after.len() == before.len(), "discard made it {} bytes", after.len());
        for (i, (&old, &new)) in before.iter().zip(&after).enumerate() {
            let inside = (start..start + count).contains(&(i as u64));
            ensure!(new == old || (inside && new == 0), "{count} bytes at {start}: byte {i} became {new:#x}");
        }
    }
    storage.discard(at(500_000), 100).map_err(text)?;
    ensure!(len(storage)? == 200_000, "discarding past the end changed the length");
    Ok(())
}

fn cut_end_is_zero(storage: &dyn Storage) -> Case {
    for cut in [0, 1, 511, 512, 4096, 65_535, 65_536, 99_999] {
        let mut expected = pattern(6, 100_000);
        storage.set_len(100_000).map_err(text)?;
        write(storage, 0, &expected)?;
        storage.set_len(cut).map_err(text)?;
        ensure!(len(storage)? == cut, "cut at {cut}: {} bytes", len(storage)?);
        storage.set_len(200_000).map_err(text)?;
        expected[cut as usize..].fill(0);
        expected.resize(200_000, 0);
        same(storage, &expected, &format!("after cutting at {cut}"))?;
    }
    Ok(())
}

fn allocate_keeps_content(storage: &dyn Storage) -> Case {
    let mut expected = pattern(7, 10_000);
    write(storage, 0, &expected)?;
    storage.set_len(200_000).map_err(text)?;
    expected.resize(200_000, 0);
    for (start, count) in [(0, 100_000), (5000, 1), (150_000, 150_000)] {
        match storage.allocate(at(start), count) {
            Ok(()) => expected.resize((start + count).max(expected.len() as u64) as usize, 0),
            Err(error) if error.kind() == StorageErrorKind::Unsupported => {}
            Err(error) => return Err(text(error)),
        }
        same(storage, &expected, &format!("after allocating {count} bytes at {start}"))?;
    }
    Ok(())
}

fn extents_are_honest(storage: &dyn Storage) -> Case {
    write(storage, 70_000, &pattern(8, 10))?;
    write(storage, 3_000_000, &pattern(9, 200_000))?;
    storage.write_zeroes(at(3_060_000), 70_000, ZeroMode::MayUnmap).map_err(text)?;
    storage.set_len(5_000_001).map_err(text)?;
    extents_match(storage)?;
    for step in [1, 1000, 65_536] {
        let extent = storage.extent_at(at(70_000), step).map_err(text)?;
        ensure!(extent.len >= 1 && extent.len <= step, "asked for {step} bytes, extent has {}", extent.len);
        ensure!(extent.data, "data called a hole");
    }
    Ok(())
}

/// Walks all extents. They must cover the storage, each with at least one byte, and holes must read as
/// zeroes.
fn extents_match(storage: &dyn Storage) -> Case {
    let bytes = read_all(storage)?;
    let mut offset = 0;
    while offset < bytes.len() as u64 {
        let rest = bytes.len() as u64 - offset;
        let extent = storage.extent_at(at(offset), rest).map_err(text)?;
        ensure!(extent.len >= 1 && extent.len <= rest, "extent of {} bytes at {offset}", extent.len);
        let run = &bytes[offset as usize..][..extent.len as usize];
        ensure!(extent.data || run.iter().all(|&b| b == 0), "data in the hole at {offset}");
        offset += extent.len;
    }
    Ok(())
}

fn vectored_writes(storage: &dyn Storage) -> Case {
    let data = pattern(10, 60_000);
    let mut bufs: Vec<&[u8]> = data.chunks(29).collect();
    bufs.insert(5, &[]);
    bufs.insert(0, &[]);
    bufs.push(&[]);
    storage.write_vectored_at(at(777), &bufs).map_err(text)?;
    let mut expected = vec![0; 777];
    expected.extend_from_slice(&data);
    same(storage, &expected, "after a write of many buffers")
}

fn impossible_ranges(storage: &dyn Storage) -> Case {
    let offset = at(u64::MAX - 1);
    let results = [
        ("write", storage.write_at(offset, &[1; 4])),
        ("vectored write", storage.write_vectored_at(offset, &[&[1; 4]])),
        ("zero", storage.write_zeroes(offset, 4, ZeroMode::MayUnmap)),
        ("zero", storage.write_zeroes(at(1), u64::MAX, ZeroMode::KeepAllocated)),
        ("allocate", storage.allocate(offset, 4)),
        ("resize", storage.set_len(u64::MAX)),
    ];
    for (what, result) in results {
        let kind = result.map_err(|error| error.kind());
        let refused = [StorageErrorKind::OutOfRange, StorageErrorKind::NoSpace].map(Err);
        ensure!(refused.contains(&kind), "{what} past 2^64 - 1 gave {kind:?}");
    }
    ensure!(len(storage)? == 0, "a refused change made it {} bytes", len(storage)?);
    Ok(())
}

fn padded_reads(storage: &dyn Storage) -> Case {
    write(storage, 0, &[5; 10])?;
    for (offset, expected) in [(0, 10), (5, 5), (10, 0), (1000, 0)] {
        let mut buf = [9; 20];
        storage.read_padded(at(offset), &mut buf).map_err(text)?;
        ensure!(buf[..expected].iter().all(|&b| b == 5), "wrong bytes at {offset}");
        ensure!(buf[expected..].iter().all(|&b| b == 0), "no zeroes after the end at {offset}");
    }
    Ok(())
}

fn limits_are_sensible(storage: &dyn Storage) -> Case {
    let limits = storage.limits();
    ensure!(limits.alignment.is_power_of_two(), "alignment {}", limits.alignment);
    ensure!(limits.growable(), "cannot grow; the suite needs a growable storage");
    write(storage, 0, &[1; 4096])?;
    if let Some(used) = storage.used_bytes().map_err(text)? {
        ensure!(used < 1 << 40, "4096 bytes use {used}");
    }
    Ok(())
}

const THREAD_COUNT: usize = 4;

fn concurrent_neighbours(storage: &dyn Storage) -> Case {
    const PIECE: usize = 700;
    let expected = pattern(11, THREAD_COUNT * PIECE * 40);
    let worker = |thread: usize| -> Case {
        for (i, piece) in expected.chunks(PIECE).enumerate().filter(|(i, _)| i % THREAD_COUNT == thread) {
            let offset = (i * PIECE) as u64;
            write(storage, offset, piece)?;
            let mut back = vec![0; piece.len()];
            storage.read_at(at(offset), &mut back).map_err(text)?;
            ensure!(back == piece, "piece {i} was not what its writer read back");
        }
        Ok(())
    };
    run_threads(&worker)?;
    same(storage, &expected, "after all threads")
}

fn concurrent_zeroes(storage: &dyn Storage) -> Case {
    const PIECE: u64 = 5000;
    let before = pattern(12, PIECE as usize * 80);
    write(storage, 0, &before)?;
    let worker = |thread: usize| -> Case {
        for i in (thread as u64..80).step_by(THREAD_COUNT) {
            match thread % THREAD_COUNT {
                0 => storage.write_zeroes(at(i * PIECE), PIECE, ZeroMode::MayUnmap).map_err(text)?,
                1 => storage.write_zeroes(at(i * PIECE), PIECE, ZeroMode::KeepAllocated).map_err(text)?,
                2 => write(storage, i * PIECE, &[0xAA; PIECE as usize])?,
                _ => write(storage, before.len() as u64 + i * PIECE, &[0xBB; 10])?,
            }
        }
        Ok(())
    };
    run_threads(&worker)?;
    let mut expected = before;
    for (i, piece) in expected.chunks_mut(PIECE as usize).enumerate() {
        match i % THREAD_COUNT {
            0 | 1 => piece.fill(0),
            2 => piece.fill(0xAA),
            _ => {}
        }
    }
    let end = expected.len();
    for i in (3..80).step_by(THREAD_COUNT) {
        expected.resize(end + i * PIECE as usize, 0);
        expected.extend_from_slice(&[0xBB; 10]);
    }
    same(storage, &expected, "after all threads")
}

fn run_threads(worker: &(dyn Fn(usize) -> Case + Sync)) -> Case {
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREAD_COUNT).map(|thread| scope.spawn(move || worker(thread))).collect();
        threads.into_iter().try_for_each(|t| t.join().unwrap_or_else(|_| Err("a thread panicked".to_owned())))
    })
}

fn random_history(storage: &dyn Storage) -> Case {
    let mut random = Random(0x5EED);
    let mut model: Vec<u8> = Vec::new();
    for step in 0..600 {
        let offset = random.below(400_000);
        let count = random.range_len();
        let end = offset + count;
        match random.below(12) {
            0..=4 => {
                let data = pattern(step, count);
                write(storage, offset as u64, &data)?;
                model.resize(model.len().max(end), 0);
                model[offset..end].copy_from_slice(&data);
            }
            5 | 6 => {
                let mode = MODES[random.below(2)];
                storage.write_zeroes(at(offset as u64), count as u64, mode).map_err(text)?;
                model.resize(model.len().max(end), 0);
                model[offset..end].fill(0);
            }
            7 => {
                storage.discard(at(offset as u64), count as u64).map_err(text)?;
                let (start, end) = (offset.min(model.len()), end.min(model.len()));
                storage.read_at(at(start as u64), &mut model[start..end]).map_err(text)?;
            }
            8 => {
                storage.set_len(offset as u64).map_err(text)?;
                model.resize(offset, 0);
            }
            9 => extents_match(storage)?,
            _ => {
                let mut buf = vec![0; count];
                let got = storage.read_at(at(offset as u64), &mut buf).map_err(text)?;
                let expected = &model[offset.min(model.len())..end.min(model.len())];
                ensure!(
                    buf[..got] == *expected,
                    "step {step}: wrong bytes at {offset}, {count} wanted, {got} read"
                );
            }
        }
        ensure!(
            len(storage)? == model.len() as u64,
            "step {step}: length {} instead of {}",
            len(storage)?,
            model.len()
        );
    }
    same(storage, &model, "at the end")
}

/// A splitmix64 generator with a fixed seed: every run draws the same numbers.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        let mut x = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        self.0 = x;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// A length, at least 1: often short, sometimes whole blocks.
    fn range_len(&mut self) -> usize {
        match self.below(4) {
            0 => self.below(600) + 1,
            1 => (self.below(16) + 1) * 4096,
            2 => (self.below(2) + 1) * 65_536,
            _ => self.below(100_000) + 1,
        }
    }
}
