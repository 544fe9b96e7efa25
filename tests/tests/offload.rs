//! Copy offload: the same content and holes as reading and writing, with any layers above or below, and no
//! loss if a storage refuses, at once or part-way.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test may stop")]

use qcow2_core::{
    CreateOptions, GuestDisk, GuestOffset, HostOffset, Image, Layers, Limits, OpenOptions, RawDisk, Storage,
    StorageError, StorageErrorKind, StorageExtent, ZeroMode, create,
};
use qcow2_io::{Create, OpenFile};
use qcow2_ops::{CheckOptions, ConvertOptions, CopyReport, ErrorKind, Inline, Silent, check, convert};
use qcow2_testkit::fault::{Call, Fault, FaultPlan, FaultStorage};
use qcow2_testkit::oracle::Tool;
use qcow2_testkit::rng::Rng;
use qcow2_tests::fixtures::{codecs, lone_source};
use qcow2_tests::side_by_side::words;
use std::any::Any;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-under-test");
const MIB: usize = 1 << 20;

/// A storage that offloads `allowed` copies and then fails after half of the bytes.
struct Copier {
    inner: Arc<dyn Storage>,
    allowed: u64,
    error: StorageErrorKind,
    asked: AtomicU64,
}

impl Copier {
    fn new(inner: Arc<dyn Storage>, allowed: u64, error: StorageErrorKind) -> Arc<Self> {
        Arc::new(Self { inner, allowed, error, asked: AtomicU64::new(0) })
    }

    fn asked(&self) -> u64 {
        self.asked.load(Ordering::Relaxed)
    }
}

impl Storage for Copier {
    fn len(&self) -> Result<u64, StorageError> {
        self.inner.len()
    }

    fn read_at(&self, offset: HostOffset, buf: &mut [u8]) -> Result<usize, StorageError> {
        self.inner.read_at(offset, buf)
    }

    fn write_at(&self, offset: HostOffset, buf: &[u8]) -> Result<(), StorageError> {
        self.inner.write_at(offset, buf)
    }

    fn write_zeroes(&self, offset: HostOffset, len: u64, mode: ZeroMode) -> Result<(), StorageError> {
        self.inner.write_zeroes(offset, len, mode)
    }

    fn discard(&self, offset: HostOffset, len: u64) -> Result<(), StorageError> {
        self.inner.discard(offset, len)
    }

    fn allocate(&self, offset: HostOffset, len: u64) -> Result<(), StorageError> {
        self.inner.allocate(offset, len)
    }

    fn set_len(&self, len: u64) -> Result<(), StorageError> {
        self.inner.set_len(len)
    }

    fn flush(&self) -> Result<(), StorageError> {
        self.inner.flush()
    }

    fn extent_at(&self, offset: HostOffset, len: u64) -> Result<StorageExtent, StorageError> {
        self.inner.extent_at(offset, len)
    }

    fn limits(&self) -> Limits {
        self.inner.limits()
    }

    fn copy_from(
        &self,
        source: &dyn Storage,
        from: HostOffset,
        offset: HostOffset,
        len: u64,
    ) -> Result<(), StorageError> {
        if self.asked.fetch_add(1, Ordering::Relaxed) < self.allowed {
            return self.inner.copy_from(source, from, offset, len);
        }
        self.inner.copy_from(source, from, offset, len / 2)?;
        Err(StorageError::new(self.error, "no more copies"))
    }

    fn copy_source(&self) -> Option<&dyn Any> {
        self.inner.copy_source()
    }
}

/// Data with holes of whole chunks and of pages, zeroes stored as data, and a partial end.
fn content() -> Vec<u8> {
    let mut bytes = vec![0; 12 * MIB + 1000];
    Rng::new(1).fill(&mut bytes[300..2 * MIB + 5000]);
    Rng::new(2).fill(&mut bytes[5 * MIB + 4096..5 * MIB + 90_000]);
    Rng::new(3).fill(&mut bytes[6 * MIB..6 * MIB + 70_000]);
    Rng::new(4).fill(&mut bytes[9 * MIB + 33..]);
    bytes
}

fn file(path: &Path) -> Arc<dyn Storage> {
    OpenFile::writable().with_create(Create::IfMissing).open(path).unwrap()
}

fn raw(storage: Arc<dyn Storage>) -> Arc<dyn GuestDisk> {
    Arc::new(RawDisk::new(storage, true).unwrap())
}

fn image(storage: Arc<dyn Storage>) -> Arc<dyn GuestDisk> {
    let mut options = OpenOptions::default();
    options.writable = true;
    options.layers = Layers::TopOnly;
    options.codecs = codecs();
    Image::open(lone_source(storage), &options).unwrap()
}

/// A raw file with the content, with zero pages as holes, or a qcow2 image of it.
fn make_source(path: &Path, qcow2: bool) -> Arc<dyn GuestDisk> {
    let (storage, bytes) = (file(path), content());
    let disk = if qcow2 {
        let size = (bytes.len() as u64).next_multiple_of(512);
        create(&storage, None, &CreateOptions::new(size)).unwrap();
        image(storage)
    } else {
        storage.set_len(bytes.len() as u64).unwrap();
        raw(storage)
    };
    for (number, page) in (0..).zip(bytes.chunks(4096)) {
        if page.iter().any(|byte| *byte != 0) {
            disk.write_at(GuestOffset::new(number * 4096), page).unwrap();
        }
    }
    disk
}

/// An empty target on this storage.
fn make_target(storage: Arc<dyn Storage>, qcow2: bool) -> Arc<dyn GuestDisk> {
    let size = (content().len() as u64).next_multiple_of(512);
    if qcow2 {
        create(&storage, None, &CreateOptions::new(size)).unwrap();
        return image(storage);
    }
    storage.set_len(size).unwrap();
    raw(storage)
}

fn options() -> ConvertOptions {
    let mut options = ConvertOptions::default();
    options.target_is_zero = true;
    options.offload = true;
    options
}

fn run(source: &Arc<dyn GuestDisk>, target: &dyn GuestDisk) -> qcow2_ops::Result<CopyReport> {
    convert(std::slice::from_ref(source), target, &options(), &Inline, &Silent)
}

fn assert_content(disk: &dyn GuestDisk, what: &str) {
    let mut expected = content();
    expected.resize(expected.len().next_multiple_of(512), 0);
    let mut seen = vec![1; expected.len()];
    disk.read_at(GuestOffset::new(0), &mut seen).unwrap();
    let wrong = seen.iter().zip(&expected).position(|(a, b)| a != b);
    assert_eq!(wrong, None, "{what}");
}

const KINDS: [(bool, bool); 4] = [(false, false), (false, true), (true, false), (true, true)];

#[test]
fn files_are_copied_by_offload() {
    for (from, to) in KINDS {
        let folder = tempfile::tempdir().unwrap();
        let source = make_source(&folder.path().join("source"), from);
        let target = make_target(file(&folder.path().join("target")), to);
        let report = run(&source, &*target).unwrap();
        assert!(report.data_bytes > 5 * MIB as u64 && report.zeroed_bytes == 0, "{report:?}");
        assert_eq!(report.offloaded_bytes, report.data_bytes, "{from} {to}");
        assert_content(&*target, &format!("qcow2 {from} to qcow2 {to}"));
        // Holes are kept: the target uses only whole clusters of data.
        let used = fs::metadata(folder.path().join("target")).unwrap().blocks() * 512;
        assert!(used < 7 * MIB as u64, "{used} bytes used");
    }
}

#[test]
fn a_refused_offload_falls_back_to_read_and_write() {
    for (from, to) in KINDS {
        for error in [StorageErrorKind::Unsupported, StorageErrorKind::Io, StorageErrorKind::NoSpace] {
            for allowed in [0, 1, 4] {
                let what = format!("qcow2 {from} to qcow2 {to}, {error:?} after {allowed}");
                let folder = tempfile::tempdir().unwrap();
                let source = make_source(&folder.path().join("source"), from);
                let copier = Copier::new(file(&folder.path().join("target")), allowed, error);
                let target = make_target(Arc::clone(&copier) as _, to);
                let report = run(&source, &*target).unwrap();
                assert_eq!(copier.asked(), allowed + 1, "{what}: offload is not tried again");
                assert!(report.offloaded_bytes < report.data_bytes, "{what}: {report:?}");
                assert_content(&*target, &what);
                target.flush().unwrap();
                if to {
                    let found = check(&*copier.inner, &CheckOptions::default(), &Inline, &Silent).unwrap();
                    assert_eq!((found.corruptions, found.leaks, found.check_errors), (0, 0, 0), "{what}");
                }
            }
        }
    }
}

/// A real failure shows up again in the fallback read or write, which reports it as usual.
#[test]
fn a_device_error_is_reported_by_the_fallback() {
    for (from, to) in KINDS {
        for call in [Call::Read, Call::Write] {
            let folder = tempfile::tempdir().unwrap();
            let source = make_source(&folder.path().join("source"), from);
            source.flush().unwrap();
            drop(source);
            let storage = FaultStorage::new(file(&folder.path().join("source")));
            let readable = Arc::new(storage);
            let source =
                if from { image(Arc::clone(&readable) as _) } else { raw(Arc::clone(&readable) as _) };
            let written = Arc::new(FaultStorage::new(file(&folder.path().join("target"))));
            let target = make_target(Arc::clone(&written) as _, to);
            let plan = FaultPlan { calls: vec![call], nth: 3, sticky: true, fault: Fault::Io };
            (if call == Call::Read { &readable } else { &written }).set_plan(Some(plan));
            let failed = run(&source, &*target).map(|_| ()).map_err(|error| error.kind());
            // If the source is an image, its tables are read too.
            let expected = match call {
                Call::Read => [ErrorKind::Read, ErrorKind::Extents],
                _ => [ErrorKind::Write; 2],
            };
            assert!(failed.is_err_and(|kind| expected.contains(&kind)), "{from} {to} {call:?}: {failed:?}");
        }
    }
}

/// `convert -C` over chains and formats of every kind: same content as qemu-img's, and clean images.
#[test]
fn convert_with_offload_gives_the_same_content() {
    let Some(qemu_img) = Tool::find("qemu-img") else { return };
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    fs::write(folder.join("raw"), content()).unwrap();
    let ours = Tool::at(OURS);
    let secret = "--object secret,id=s,data=word";
    for line in [
        "convert -O qcow2 raw plain.qcow2",
        "convert -O qcow2 -c raw packed.qcow2",
        "create -q -f qcow2 -b packed.qcow2 -F qcow2 -o extended_l2=on,cluster_size=32k over.qcow2",
        "create -q -f qcow2 -b raw -F raw -o cluster_size=512 small.qcow2 15M",
        "create -q -f qcow2 -o data_file=data.raw external.qcow2 12M",
    ] {
        qemu_img.run_in(folder, &words(line)).success();
    }
    for line in [
        "io -f qcow2 -c 'write -P 7 1111111 300000' over.qcow2",
        "io -f qcow2 -c 'write -z 3M 2M' over.qcow2",
        "io -f qcow2 -c 'write -P 9 700 99000' small.qcow2",
        "io -f qcow2 -c 'write -P 3 1M 5M' external.qcow2",
    ] {
        ours.run_in(folder, &words(line)).success();
    }
    let sources = [
        "raw",
        "plain.qcow2",
        "packed.qcow2",
        "over.qcow2",
        "small.qcow2",
        "external.qcow2",
        "raw plain.qcow2",
    ];
    let targets = [
        "-O raw",
        "-O qcow2",
        "-O qcow2 -o extended_l2=on",
        "-O qcow2 -o cluster_size=2M",
        "-O qcow2 -o data_file=out.data",
        "-W -m 4 -O qcow2 -t none",
        "-O qcow2 -o preallocation=metadata",
    ];
    for source in sources {
        qemu_img.run_in(folder, &words(&format!("convert -O raw {source} expected"))).success();
        for target in targets {
            let what = format!("convert -C {target} {source}");
            ours.run_in(folder, &words(&format!("{what} out"))).success();
            let format = if target == "-O raw" { "raw" } else { "qcow2" };
            if format == "qcow2" {
                qemu_img.run_in(folder, &words("check -q -f qcow2 out")).success();
            }
            let same = qemu_img.run_in(folder, &words(&format!("compare -f {format} -F raw out expected")));
            assert_eq!(same.code, Some(0), "{what}: {same:?}");
        }
    }
    // Encrypted data is never copied by offload.
    let create = "create -q -f qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 locked.qcow2 13M";
    qemu_img.run_in(folder, &words(&format!("{create} {secret}"))).success();
    let locked = "--target-image-opts driver=qcow2,file.filename=locked.qcow2,encrypt.key-secret=s";
    ours.run_in(folder, &words(&format!("convert -C -n {secret} raw {locked}"))).success();
    let locked = "--image-opts driver=qcow2,file.filename=locked.qcow2,encrypt.key-secret=s";
    ours.run_in(folder, &words(&format!("convert -C {secret} -O raw {locked} out"))).success();
    assert!(fs::read(folder.join("out")).unwrap().starts_with(&content()));
}

/// Into a target that is not empty, and onto a backing file: zeroes of the source must hide old data.
#[test]
fn zeroes_of_the_source_hide_old_data_in_the_target() {
    let Some(qemu_img) = Tool::find("qemu-img") else { return };
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    // Close it first: it is open for writing, and the command would refuse to read it.
    drop(make_source(&folder.join("raw"), false));
    let ours = Tool::at(OURS);
    fs::write(folder.join("used.raw"), vec![0x5a; 13 * MIB]).unwrap();
    let at_end = content().len().next_multiple_of(512);
    qemu_img.run_in(folder, &words("convert -O qcow2 used.raw used.qcow2")).success();
    qemu_img.run_in(folder, &words("create -q -f qcow2 -b used.raw -F raw over.qcow2")).success();
    for (format, name) in [("qcow2", "used.qcow2"), ("qcow2", "over.qcow2"), ("raw", "used.raw")] {
        ours.run_in(folder, &words(&format!("convert -C -n -O {format} raw {name}"))).success();
        qemu_img.run_in(folder, &words(&format!("convert -f {format} -O raw {name} out"))).success();
        let out = fs::read(folder.join("out")).unwrap();
        assert!(out[..content().len()] == content(), "{name}");
        assert!(out[at_end..].iter().all(|byte| *byte == 0x5a), "{name}");
        if format == "qcow2" {
            qemu_img.run_in(folder, &words(&format!("check -q {name}"))).success();
        }
    }
}
