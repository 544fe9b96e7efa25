//! The committed images: valid ones read as qemu-img read them, damaged ones cause no harm.

use qcow2_core::{ErrorKind, GuestDisk, GuestOffset, Image, OpenOptions};
use qcow2_testkit::arbitrary::Operation;
use qcow2_testkit::model::chain;
use qcow2_testkit::pattern;
use qcow2_testkit::rng::Rng;
use qcow2_tests::fixtures::{self, Damaged, Reading, codecs};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

fn options() -> OpenOptions {
    let mut options = OpenOptions::default();
    options.codecs = codecs();
    options
}

fn read_all(disk: &dyn GuestDisk) -> qcow2_core::Result<Vec<u8>> {
    let mut content = pattern::unread(disk.size() as usize);
    disk.read_at(GuestOffset::new(0), &mut content)?;
    Ok(content)
}

#[test]
fn every_image_reads_as_in_qemu_img() {
    let mut seen = 0;
    for fixture in fixtures::images() {
        let Some(crc) = fixture.crc else { continue };
        let name = &fixture.name;
        let image = Image::open(fixtures::source(name), &options())
            .unwrap_or_else(|e| panic!("{name}: {}", chain(&e)));
        assert_eq!(image.size(), fixture.size, "{name}");
        let content = read_all(&*image).unwrap_or_else(|e| panic!("{name}: {}", chain(&e)));
        assert_eq!(crc32fast::hash(&content), crc, "{name}: content");
        check_pieces(name, &*image, &content);
        seen += 1;
    }
    assert!(seen >= 40, "only {seen} images");
}

/// Reads at any offset and length give the same bytes as one read of everything.
fn check_pieces(name: &str, disk: &dyn GuestDisk, content: &[u8]) {
    let mut rng = Rng::new(1);
    for _ in 0..40 {
        let start = rng.below(content.len() as u64 + 1);
        let len = rng.below((content.len() as u64 - start).min(40_000) + 1);
        let mut piece = vec![0xa5; len as usize];
        disk.read_at(GuestOffset::new(start), &mut piece).unwrap_or_else(|e| panic!("{name}: {}", chain(&e)));
        assert!(piece == content[start as usize..][..len as usize], "{name}: {len} bytes from {start}");
    }
}

#[test]
fn reading_an_image_writes_nothing() {
    for fixture in fixtures::images().into_iter().filter(|f| f.crc.is_some()) {
        let bytes = fixtures::load(&fixture.name);
        let storage = fixtures::storage(&bytes);
        let source = qcow2_core::ResolvedSource {
            storage: Arc::clone(&storage) as _,
            ..fixtures::source(&fixture.name)
        };
        let image = Image::open(source, &options()).unwrap();
        read_all(&*image).unwrap();
        image.close().unwrap();
        let mut after = pattern::unread(bytes.len());
        let pages = storage.bytes();
        pages.read(0, &mut after);
        assert!(pages.len() == bytes.len() as u64 && after == bytes, "{}: the file changed", fixture.name);
    }
}

#[test]
fn writing_to_damaged_images_never_panics() {
    let mut written = 0;
    for (seed, damaged) in fixtures::damaged().into_iter().enumerate() {
        let mut options = options();
        options.writable = true;
        let source = fixtures::lone_source(fixtures::storage(&damaged.bytes));
        let Ok(image) = Image::open(source, &options) else { continue };
        let mut rng = Rng::new(seed as u64);
        for _ in 0..60 {
            let operation = Operation::random(&mut rng, image.size(), image.geometry().cluster_size());
            let _ = operation.run(&*image);
        }
        let _ = image.close();
        written += 1;
    }
    assert!(written >= 20, "only {written} damaged images could be opened for writing");
}

#[test]
fn an_encrypted_image_is_refused_without_a_key() {
    let error = Image::open(fixtures::source("encrypted-aes.qcow2"), &options()).map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Encrypted, "{error}");
}

/// Result of reading a damaged image.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Fate {
    /// The open fails.
    Refused(ErrorKind, String),
    /// The open succeeds, reading all of it fails.
    Unreadable(ErrorKind, String),
    /// All of it reads, with this CRC-32.
    Content(u32),
}

/// Damage that gives an error: its kind, and part of the message. All other damage reads as in qemu-img.
const REFUSED: &[(&str, ErrorKind, &str)] = &[
    ("empty-file", ErrorKind::Format, "magic is 0x00000000"),
    ("three-bytes", ErrorKind::Format, "magic is 0x51464900"),
    ("short-header-v3", ErrorKind::Format, "header_length is 0, allowed are 104 to 512"),
    ("bad-magic", ErrorKind::Format, "magic is 0x51464900, allowed is 0x514649fb"),
    ("version-1", ErrorKind::Format, "version is 1, allowed are 2 and 3"),
    ("version-4", ErrorKind::Format, "version is 4, allowed are 2 and 3"),
    ("cluster-bits-8", ErrorKind::Format, "cluster_bits is 8, allowed are 9 to 21"),
    ("cluster-bits-22", ErrorKind::Format, "cluster_bits is 22"),
    ("cluster-bits-huge", ErrorKind::Format, "cluster_bits is 4294967295"),
    ("crypt-method-3", ErrorKind::Format, "encryption method is 3"),
    ("refcount-order-7", ErrorKind::Format, "refcount_order is 7, allowed are 0 to 6"),
    ("header-length-8", ErrorKind::Format, "header_length is 8"),
    ("header-length-huge", ErrorKind::Format, "header_length is 2147483640"),
    ("extension-too-long", ErrorKind::Format, "extension 0x12345678 of 4096 bytes"),
    ("extension-past-backing", ErrorKind::Format, "extension 0x12345678 of 256 bytes"),
    ("backing-outside", ErrorKind::Format, "backing file name at 0x1000"),
    ("backing-name-long", ErrorKind::Format, "backing file name of 1024 bytes"),
    ("unknown-incompatible", ErrorKind::Format, "0x8000000000000000"),
    ("compression-unknown", ErrorKind::Format, "compression type is 7"),
    ("compression-mismatch", ErrorKind::Format, "compression type"),
    ("extended-small-clusters", ErrorKind::Format, "subclusters of 16 bytes"),
    ("raw-without-data-file", ErrorKind::Format, "raw external data file"),
    ("data-file-unnamed", ErrorKind::Resolve, "its header has no name"),
    ("luks-without-header", ErrorKind::Format, "luks"),
    ("size-huge", ErrorKind::Format, "virtual size 9223372036854775296"),
    ("l1-too-small", ErrorKind::Format, "l1 table has 1 entries, the virtual size needs 3"),
    ("l1-gigabytes", ErrorKind::Format, "l1 table has 2147483647 entries, allowed are 4194304"),
    ("l1-misaligned", ErrorKind::Format, "l1 table at 0x608"),
    ("refcount-table-gigabytes", ErrorKind::Format, "allowed are 1048576"),
    ("refcount-table-missing", ErrorKind::Format, "refcount table has 0 clusters"),
    ("refcount-table-misaligned", ErrorKind::Format, "refcount table at 0x208"),
    ("snapshots-too-many", ErrorKind::Format, "2147483647 entries, allowed are 65536"),
    ("bitmaps-claimed", ErrorKind::Format, "2147483647 bitmaps, allowed are 1 to 65535"),
    ("bitmap-directory-huge", ErrorKind::Format, "bitmap directory of 2147483647 bytes"),
    ("compressed-garbage", ErrorKind::Corrupt, "guest offset 0x0 at host offset 0xa00 does not expand"),
    ("compressed-copied", ErrorKind::Corrupt, "does not expand"),
    ("compressed-past-end", ErrorKind::Corrupt, "host offset 0x40000000 does not expand"),
    ("l1-entry-misaligned", ErrorKind::Corrupt, "l1 entry 0"),
    ("l2-entry-misaligned", ErrorKind::Corrupt, "guest offset 0x0"),
    ("l2-zero-misaligned", ErrorKind::Corrupt, "guest offset 0x0"),
    ("zero-flag-in-v2", ErrorKind::Corrupt, "zero cluster entry 0x1 in a version 2 image"),
    ("subclusters-both", ErrorKind::Corrupt, "subcluster bitmap 0x00000001ffffffff"),
    ("subclusters-nowhere", ErrorKind::Corrupt, "subcluster bitmap 0x00000000ffffffff"),
    // The bitmap is not looked at; what the entry leads to is no stream.
    ("compressed-with-bitmap", ErrorKind::Corrupt, "does not expand"),
];

/// Damage that qemu-img refuses or loops on and we read: the active state does not need the damaged part.
const READ_ALL_THE_SAME: &[(&str, &str)] = &[
    ("snapshots-claimed", "v3-512.qcow2"),
    ("snapshot-extra-huge", "snapshots.qcow2"),
    ("bitmap-table-huge", "bitmaps.qcow2"),
    ("bitmap-granularity", "bitmaps.qcow2"),
];

#[test]
fn every_damaged_image_gives_its_listed_result() {
    let mut names = BTreeSet::new();
    for damaged in fixtures::damaged() {
        let started = Instant::now();
        let fate = suffer(&damaged.bytes);
        assert!(started.elapsed() < Duration::from_secs(1), "{}: {:?}", damaged.name, started.elapsed());
        check_fate(&damaged, &fate);
        names.insert(damaged.name);
    }
    let tables = REFUSED.iter().map(|row| row.0).chain(READ_ALL_THE_SAME.iter().map(|row| row.0));
    let unknown: Vec<_> = tables.filter(|name| !names.contains(*name)).collect();
    assert!(unknown.is_empty() && names.len() >= 75, "{} kinds of damage, unknown: {unknown:?}", names.len());
}

fn check_fate(damaged: &Damaged, fate: &Fate) {
    let name = damaged.name.as_str();
    if let Some((_, kind, words)) = REFUSED.iter().find(|row| row.0 == name) {
        let (Fate::Refused(seen, message) | Fate::Unreadable(seen, message)) = fate else {
            panic!("{name}: expected an error with '{words}', got {fate:?}");
        };
        assert!(seen == kind && message.contains(words), "{name}: expected '{words}', got {fate:?}");
        assert_eq!(*seen == ErrorKind::Corrupt, matches!(fate, Fate::Unreadable(..)), "{name}: {fate:?}");
        assert_eq!(damaged.reading, Reading::Fails, "{name}: the reference reads what we refuse");
    } else if let Some((_, base)) = READ_ALL_THE_SAME.iter().find(|row| row.0 == name) {
        assert_eq!(*fate, suffer(&fixtures::load(base)), "{name}");
    } else {
        let Reading::Content(crc) = damaged.reading else {
            panic!("{name}: the reference refuses what we read: {fate:?}")
        };
        assert_eq!(*fate, Fate::Content(crc), "{name}");
    }
}

fn suffer(bytes: &[u8]) -> Fate {
    let image = match Image::open(fixtures::lone_source(fixtures::storage(bytes)), &options()) {
        Err(error) => return Fate::Refused(error.kind(), chain(&error)),
        Ok(image) => image,
    };
    match read_all(&*image) {
        Err(error) => Fate::Unreadable(error.kind(), chain(&error)),
        Ok(content) => Fate::Content(crc32fast::hash(&content)),
    }
}
