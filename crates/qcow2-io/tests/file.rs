//! `FileStorage`: length on disk, holes, full file systems, block devices, flushes, copy offload.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use qcow2_core::{HostOffset, Length, Storage, StorageErrorKind, ZeroMode};
use qcow2_io::{CacheMode, Create, OpenFile};
use qcow2_testkit::oracle::Tool;
use std::path::{Path, PathBuf};

fn at(offset: u64) -> HostOffset {
    HostOffset::new(offset)
}

/// A directory on a real disk, not in memory.
fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn create(path: &Path, mode: CacheMode) -> qcow2_io::FileStorage {
    OpenFile::writable().with_create(Create::Truncate).with_cache(mode).open_file(path).unwrap()
}

#[test]
fn reported_length_is_the_length_on_disk() {
    for mode in [CacheMode::Writeback, CacheMode::None] {
        let dir = scratch();
        let path = dir.path().join("disk");
        let storage = create(&path, mode);
        let told = |expected: u64| {
            assert_eq!(storage.len().unwrap(), expected);
            assert_eq!(std::fs::metadata(&path).unwrap().len(), expected, "{mode:?}");
        };
        storage.write_at(at(0), &[1; 1000]).unwrap();
        told(1000);
        storage.write_at(at(5000), &[2; 3]).unwrap();
        told(5003);
        storage.write_vectored_at(at(5003), &[&[3; 10], &[4; 100]]).unwrap();
        told(5113);
        storage.write_zeroes(at(5000), 1001, ZeroMode::KeepAllocated).unwrap();
        told(6001);
        storage.write_zeroes(at(9000), 1, ZeroMode::MayUnmap).unwrap();
        told(9001);
        storage.write_at(at(10), &[9; 1]).unwrap();
        told(9001);
        storage.set_len(77).unwrap();
        told(77);
    }
}

#[test]
fn a_direct_file_reports_its_alignment() {
    let dir = scratch();
    let storage = create(&dir.path().join("disk"), CacheMode::None);
    let alignment = storage.limits().alignment;
    assert!((512..=65_536).contains(&alignment), "{alignment}");
    assert_eq!(create(&dir.path().join("other"), CacheMode::Writeback).limits().alignment, 1);
}

/// The kernel copies between two files that both use the page cache, also through wrappers. Any other pair is
/// refused without writing anything.
#[cfg(target_os = "linux")]
#[test]
fn copy_offload_works_between_cached_files_only() {
    use std::sync::Arc;
    let dir = scratch();
    let source = create(&dir.path().join("source"), CacheMode::Writeback);
    source.write_at(at(1000), &[7; 5000]).unwrap();
    let target = create(&dir.path().join("target"), CacheMode::Writeback);
    target.copy_from(&source, at(500), at(10_003), 5500).unwrap();
    assert_eq!(target.len().unwrap(), 15_503);
    let mut seen = vec![1; 15_503];
    target.read_at(at(0), &mut seen).unwrap();
    assert!(seen[..10_503].iter().all(|byte| *byte == 0) && seen[10_503..].iter().all(|byte| *byte == 7));

    let wrapped: Arc<dyn Storage> = Arc::new(create(&dir.path().join("wrapped"), CacheMode::Writeback));
    for mode in [CacheMode::Unsafe, CacheMode::Writethrough] {
        let wrapped = mode.wrap(Arc::clone(&wrapped));
        wrapped.copy_from(&*wrapped, at(0), at(0), 0).unwrap();
        wrapped.copy_from(&source, at(1000), at(0), 5000).unwrap();
        let mut seen = vec![0; 5000];
        wrapped.read_at(at(0), &mut seen).unwrap();
        assert!(seen.iter().all(|byte| *byte == 7), "{mode:?}");
    }

    let refused = |target: &dyn Storage, source: &dyn Storage, from, len| {
        target.copy_from(source, at(from), at(0), len).unwrap_err().kind()
    };
    let direct = create(&dir.path().join("direct"), CacheMode::None);
    let memory = qcow2_io::MemoryStorage::new();
    assert_eq!(refused(&direct, &source, 0, 4096), StorageErrorKind::Unsupported);
    assert_eq!(refused(&target, &direct, 0, 4096), StorageErrorKind::Unsupported);
    assert_eq!(refused(&target, &memory, 0, 1), StorageErrorKind::Unsupported);
    assert_eq!(refused(&memory, &target, 0, 1), StorageErrorKind::Unsupported);
    // Past the end of the source, and from a file to itself.
    assert_eq!(refused(&target, &source, 5999, 2), StorageErrorKind::Unsupported);
    assert_eq!(refused(&target, &target, 1, 4096), StorageErrorKind::Unsupported);
    drop(target);
    let reader = OpenFile::read_only().open_file(&dir.path().join("target")).unwrap();
    assert_eq!(refused(&reader, &source, 0, 1), StorageErrorKind::ReadOnly);
}

#[cfg(target_os = "linux")]
#[test]
fn holes_use_no_space_and_allocated_zeroes_do() {
    const MIB: u64 = 1 << 20;
    let dir = scratch();
    let storage = create(&dir.path().join("disk"), CacheMode::Writeback);
    storage.set_len(64 * MIB).unwrap();
    let used = || {
        storage.flush().unwrap();
        storage.used_bytes().unwrap().unwrap()
    };
    assert!(used() < MIB);
    storage.write_zeroes(at(0), 8 * MIB, ZeroMode::MayUnmap).unwrap();
    assert!(used() < MIB);
    storage.write_zeroes(at(0), 8 * MIB, ZeroMode::KeepAllocated).unwrap();
    assert!((8 * MIB..9 * MIB).contains(&used()));
    storage.allocate(at(8 * MIB), 8 * MIB).unwrap();
    assert!((16 * MIB..17 * MIB).contains(&used()));
    storage.discard(at(0), 16 * MIB).unwrap();
    assert!(used() < MIB);

    storage.write_at(at(4 * MIB), &[1; 4096]).unwrap();
    let first = storage.extent_at(at(0), 64 * MIB).unwrap();
    assert_eq!((first.len, first.data), (4 * MIB, false));
    let second = storage.extent_at(at(4 * MIB), 60 * MIB).unwrap();
    assert!(second.data && second.len < MIB);
    let last = storage.extent_at(at(32 * MIB), 32 * MIB).unwrap();
    assert_eq!((last.len, last.data), (32 * MIB, false));
}

#[test]
fn a_read_only_file_refuses_changes() {
    let dir = scratch();
    let path = dir.path().join("disk");
    std::fs::write(&path, [1; 100]).unwrap();
    let storage = OpenFile::read_only().open(&path).unwrap();
    let results = [
        storage.write_at(at(0), &[1]),
        storage.write_vectored_at(at(0), &[&[1]]),
        storage.write_zeroes(at(0), 1, ZeroMode::MayUnmap),
        storage.discard(at(0), 1),
        storage.allocate(at(0), 1),
        storage.set_len(5),
    ];
    for result in results {
        assert_eq!(result.unwrap_err().kind(), StorageErrorKind::ReadOnly);
    }
    storage.flush().unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), [1; 100]);
}

/// Runs a program that needs administrator rights and returns its output. `None`, a skip, where the rights
/// are missing, or the program is (a failure where tools are required).
fn run(program: &str, args: &[&str]) -> Option<String> {
    let outcome = Tool::find(program)?.run_in(Path::new("/"), args);
    if outcome.code == Some(0) {
        return Some(outcome.stdout);
    }
    let said = outcome.stderr.to_lowercase();
    let refusals = ["permission denied", "not permitted", "superuser", "cannot find an unused loop device"];
    assert!(refusals.iter().any(|refusal| said.contains(refusal)), "{outcome}");
    println!("skipped: {program} is not allowed here: {}", said.trim());
    None
}

/// A small tmpfs, unmounted when dropped.
struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    fn new(size: &str) -> Option<Self> {
        let dir = scratch();
        let place = dir.path().to_str().unwrap().to_owned();
        let options = format!("size={size}");
        run("mount", &["-t", "tmpfs", "-o", &options, "none", &place]).map(|_| Self(dir))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        run("umount", &[self.0.path().to_str().unwrap()]);
    }
}

#[test]
fn a_full_file_system_gives_no_space_and_not_io() {
    let Some(tmpfs) = Tmpfs::new("1m") else { return };
    let storage = create(&tmpfs.0.path().join("disk"), CacheMode::Writeback);
    let error = storage.write_at(at(0), &vec![1; 2 << 20]).unwrap_err();
    assert_eq!((error.kind(), error.os_code()), (StorageErrorKind::NoSpace, Some(28)));
    storage.discard(at(0), 2 << 20).unwrap();
    let error = storage.allocate(at(0), 2 << 20).unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::NoSpace);
    let error = storage.write_zeroes(at(0), 2 << 20, ZeroMode::KeepAllocated).unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::NoSpace);
    storage.write_zeroes(at(0), 2 << 20, ZeroMode::MayUnmap).unwrap();
    storage.write_at(at(0), &[1; 4096]).unwrap();
}

/// A loop device over a file, detached when dropped.
struct LoopDevice {
    path: PathBuf,
    _dir: tempfile::TempDir,
}

impl LoopDevice {
    fn new(len: u64) -> Option<Self> {
        let dir = scratch();
        let file = dir.path().join("backing");
        std::fs::write(&file, vec![0xAA; len as usize]).unwrap();
        let shown = run("losetup", &["--find", "--show", file.to_str().unwrap()])?;
        Some(Self { path: PathBuf::from(shown.trim()), _dir: dir })
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        run("losetup", &["-d", self.path.to_str().unwrap()]);
    }
}

#[test]
fn a_block_device_has_a_fixed_size() {
    const LEN: u64 = 4 << 20;
    let Some(device) = LoopDevice::new(LEN) else { return };
    for mode in [CacheMode::Writeback, CacheMode::None] {
        let storage = OpenFile::writable().with_cache(mode).open_file(&device.path).unwrap();
        assert!(!storage.is_regular() && !storage.limits().growable());
        assert_eq!(storage.len().unwrap(), LEN);
        for (start, count) in [(0, 4096), (513, 1), (LEN - 100, 100), (65_536, 1 << 20), (1000, 100_000)] {
            storage.write_at(at(0), &vec![7; LEN as usize]).unwrap();
            for zero in [ZeroMode::KeepAllocated, ZeroMode::MayUnmap] {
                storage.write_zeroes(at(start), count, zero).unwrap();
                let mut back = vec![1; LEN as usize];
                storage.read_at(at(0), &mut back).unwrap();
                let wrong = back.iter().enumerate().find(|(i, byte)| {
                    let inside = (start..start + count).contains(&(*i as u64));
                    **byte != if inside { 0 } else { 7 }
                });
                assert_eq!(wrong, None, "{count} bytes at {start}, {zero:?}, {mode:?}");
            }
        }
        let error = storage.write_at(at(LEN - 1), &[1, 2]).unwrap_err();
        assert_eq!((error.kind(), error.os_code()), (StorageErrorKind::NoSpace, Some(28)));
        let error = storage.set_len(LEN / 2).unwrap_err();
        assert_eq!(error.kind(), StorageErrorKind::FixedLength(Length::Device));
        storage.set_len(LEN).unwrap();
        storage.allocate(at(0), LEN).unwrap();
        storage.discard(at(0), LEN * 2).unwrap();
        storage.flush().unwrap();
        let extent = storage.extent_at(at(0), LEN).unwrap();
        assert_eq!(extent.len, LEN);
    }
}

/// A file system either applies an attribute or refuses it; the content stays the same either way.
#[test]
fn allocation_hints_do_not_change_content() {
    let dir = scratch();
    let path = dir.path().join("disk");
    let storage = create(&path, CacheMode::Writeback);
    for bytes in [1 << 20, 5, u32::MAX, 0] {
        println!("{bytes}: {:?}", storage.set_extent_size_hint(bytes));
    }
    println!("in place: {:?}", storage.set_no_cow());
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);
    storage.write_at(at(3), &[7; 10]).unwrap();
    println!("not empty any more: {:?} {:?}", storage.set_extent_size_hint(1 << 21), storage.set_no_cow());
    assert_eq!(std::fs::read(&path).unwrap(), [&[0; 3][..], &[7; 10]].concat());
}

/// A cached data extent must not hide holes that this storage made later.
#[cfg(target_os = "linux")]
#[test]
fn cached_extents_show_new_holes() {
    const MIB: u64 = 1 << 20;
    let dir = scratch();
    let changes: [fn(&qcow2_io::FileStorage); 4] = [
        |storage| storage.discard(at(MIB), MIB).unwrap(),
        |storage| storage.write_zeroes(at(MIB), MIB, ZeroMode::MayUnmap).unwrap(),
        |storage| {
            storage.set_len(MIB).unwrap();
            storage.set_len(4 * MIB).unwrap();
        },
        |storage| storage.write_zeroes(at(MIB), MIB, ZeroMode::KeepAllocated).unwrap(),
    ];
    for (index, change) in changes.iter().enumerate() {
        let storage = create(&dir.path().join(index.to_string()), CacheMode::Writeback);
        let run = |offset: u64| storage.extent_at(at(offset), storage.len().unwrap() - offset).unwrap();
        storage.set_len(4 * MIB).unwrap();
        // A file system that reports no holes has nothing to test here.
        if run(0).data {
            println!("no holes here");
            return;
        }
        storage.write_at(at(0), &vec![7; 4 << 20]).unwrap();
        // End of the data at `offset`, which may be reported in several extents.
        let data_end = |mut offset: u64| {
            while offset < 4 * MIB && run(offset).data {
                offset += run(offset).len;
            }
            offset
        };
        // Queried from the start, so that the whole file is cached as data.
        assert_eq!((data_end(0), data_end(MIB + 4096)), (4 * MIB, 4 * MIB), "{index}");
        change(&storage);
        // Allocated zeroes are data on some file systems and holes on others.
        if index < 3 {
            assert_eq!((run(MIB).data, data_end(0)), (false, MIB), "{index}");
        }
    }
}

/// Writeback of a growing file starts before it is flushed, in steps of some MiB: nothing of that is seen in
/// its content or length, also where the file is cut and grows again meanwhile.
#[test]
fn a_file_that_grows_far_between_two_flushes_has_its_content() {
    let dir = scratch();
    let path = dir.path().join("disk");
    let storage = create(&path, CacheMode::Writeback);
    let piece = |number: usize| vec![number as u8 | 1; 256 << 10];
    let offset = |number: usize| at((number as u64) << 18);
    let grow = |numbers: std::ops::Range<usize>| {
        std::thread::scope(|scope| {
            for thread in 0..2 {
                let (storage, numbers) = (&storage, numbers.clone());
                scope.spawn(move || {
                    for number in numbers.filter(|number| number % 2 == thread) {
                        let (first, second) = (&piece(number)[..1000], &piece(number)[1000..]);
                        storage.write_vectored_at(offset(number), &[first, second]).unwrap();
                    }
                });
            }
        });
    };
    grow(0..160);
    storage.set_len(10 << 20).unwrap();
    grow(40..130);
    storage.flush().unwrap();
    drop(storage);
    let read = std::fs::read(&path).unwrap();
    assert_eq!(read.len(), 130 << 18);
    assert!(read.chunks(256 << 10).enumerate().all(|(number, bytes)| bytes == piece(number)));
}
