//! Images that are rescued, and images that are judged. The first byte decides whether all bytes are taken as
//! an image, as those of the seeds are, or the rest as decisions.

use super::shaped::shaped;
use super::{CODECS, READ_SIZE, extents, open, report, storage};
use qcow2_core::{ExtentState, GuestDisk, GuestOffset, ImageFormat, RawDisk, Storage};
use qcow2_io::MemoryStorage;
use qcow2_ops::rescue::Rescue;
use qcow2_ops::vet::{MAX_FINDINGS, Verdict, VetOptions, VetReport};
use qcow2_ops::{RescueFiles, RescueOptions, Silent};
use qcow2_testkit::pattern;
use qcow2_testkit::rng::Rng;
use qcow2_testkit::shaped::Shaped;
use qcow2_testkit::world::{DATA, TOP, keys};
use std::collections::BTreeSet;
use std::sync::Arc;

/// Bytes of the smallest cluster; what a file holds is compared in these.
const SECTOR: usize = 512;

/// What follows the first byte, if that says that it is decisions. Images begin with another one.
fn decisions(data: &[u8]) -> Option<&[u8]> {
    data.split_first().filter(|(first, _)| **first % 2 == 0).map(|(_, rest)| rest)
}

/// Rescues an image. Any bytes: the disk can be read, and nothing is written. Decisions: the rescue of a
/// valid image is complete and reads as the image does; of a damaged one nothing is read that is not in its
/// files.
pub fn rescue(data: &[u8]) {
    match decisions(data) {
        Some(decisions) => rescue_shaped(decisions),
        None => rescue_bytes(data),
    }
}

/// As the image is, and by a cluster size that the last byte chooses.
fn rescue_bytes(data: &[u8]) {
    let storage = storage(data);
    let files = RescueFiles::new(Arc::clone(&storage) as _, CODECS.clone());
    let chosen = data.last().map(|byte| 512 << (byte % 13));
    for cluster_size in [None, chosen] {
        let mut options = RescueOptions::default();
        options.cluster_size = cluster_size;
        let Ok(rescued) = qcow2_ops::rescue(&files, &options, &Silent) else { continue };
        read_rescued(&rescued);
    }
    assert_eq!(storage.to_vec(), data, "a rescue never writes");
}

/// The disk can be read, and what that finds to be lost is added to the report.
fn read_rescued(rescued: &Rescue) {
    let (disk, before) = (rescued.disk(), rescued.report());
    let mut buf = Vec::new();
    let read = extents(&*disk, 0, |range| {
        buf.resize(range.len().min(READ_SIZE) as usize, 0);
        disk.read_at(range.start(), &mut buf).expect("a rescued disk can be read");
    });
    assert_eq!(read, Ok(()));
    let after = rescued.report();
    assert!(after.lost.bytes >= before.lost.bytes, "a loss is not forgotten");
    assert_eq!((after.size, disk.size()), (before.size, before.size));
    assert!(!format!("{after}").is_empty());
}

fn rescue_shaped(decisions: &[u8]) {
    let mut rng = Rng::from_bytes(decisions);
    let shaped = shaped(&mut rng);
    let below = below(&shaped);
    let whole = rescued(&shaped, below.clone(), &RescueOptions::default());
    let whole = whole.unwrap_or_else(|error| panic!("{:?}: {error}", shaped.shape));
    let (disk, content) = (whole.disk(), shaped.model.bytes());
    assert_eq!(disk.size(), content.len() as u64);
    let mut bytes = pattern::unread(content.len());
    disk.read_at(GuestOffset::new(0), &mut bytes).expect("a rescued disk can be read");
    assert!(bytes == content, "{:?}: a whole image reads as it does", shaped.shape);
    assert!(whole.report().is_complete(), "{:?}: {}", shaped.shape, whole.report());
    let what = ruin(&shaped, &mut rng);
    let mut options = RescueOptions::default();
    options.cluster_size = rng.one_in(3).then(|| shaped.shape.cluster_size());
    options.size = rng.one_in(3).then_some(shaped.shape.size);
    let ruined = shaped.bytes().to_vec();
    let Ok(rescued) = rescued(&shaped, below.clone(), &options) else { return };
    read_rescued(&rescued);
    if shaped.shape.encryption.is_none() {
        check_held(&shaped, &*rescued.disk(), below.as_deref(), &what);
    }
    assert!(shaped.bytes().to_vec() == ruined, "a rescue never writes");
}

fn rescued(
    shaped: &Shaped,
    backing: Option<Arc<dyn GuestDisk>>,
    options: &RescueOptions,
) -> qcow2_ops::Result<Rescue> {
    let keys = keys(&shaped.shape);
    let mut files = RescueFiles::new(shaped.shelf.file(TOP), CODECS.clone());
    files.data = shaped.shape.data_file.map(|_| shaped.shelf.file(DATA) as Arc<dyn Storage>);
    files.backing = backing;
    files.keys = keys.as_deref().map(|keys| (keys, TOP));
    qcow2_ops::rescue(&files, options, &Silent)
}

/// The disk of the backing file.
fn below(shaped: &Shaped) -> Option<Arc<dyn GuestDisk>> {
    Some(match shaped.shape.backing?.qcow2 {
        true => open(shaped.shelf.file("base.qcow2"), false).expect("the backing file opens"),
        false => Arc::new(RawDisk::new(shaped.shelf.file("base.raw"), false).expect("memory has a length")),
    })
}

/// Damages fields, or destroys the header, the L1 table or the end of the file. Returns what.
fn ruin(shaped: &Shaped, rng: &mut Rng) -> Vec<&'static str> {
    let mut done = Vec::new();
    let way = rng.below(8);
    if way < 4 {
        done = shaped.damage(rng, 3);
    }
    let mut bytes = shaped.bytes().to_vec();
    let word =
        |at: usize| bytes.get(at..at + 8).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_be_bytes(*b));
    let (l1, entries) = (word(40), word(36) >> 32);
    let mut destroy = |start: u64, len: u64, what| {
        let len = len.min(1 << 20);
        let end = bytes.len().min(start.saturating_add(len) as usize);
        let Some(part) = bytes.get_mut(start as usize..end) else { return };
        match rng.one_in(2) {
            true => part.fill(0),
            false => rng.fill(part),
        }
        done.push(what);
    };
    if matches!(way, 3..=5 | 7) {
        destroy(0, shaped.shape.cluster_size(), "whole header");
    }
    if matches!(way, 2 | 5 | 6) {
        destroy(l1, entries * 8, "whole l1");
    }
    if way == 7 {
        bytes.truncate(rng.below(bytes.len() as u64) as usize);
        done.push("end");
    }
    shaped.shelf.put(TOP, &bytes);
    done
}

/// What `disk` reads is zeroes where it says so, the backing file's where it says that, and otherwise in the
/// file that holds the data. What a stream holds is not compared.
fn check_held(shaped: &Shaped, disk: &dyn GuestDisk, below: Option<&dyn GuestDisk>, what: &[&str]) {
    let name = if shaped.shape.data_file.is_some() { DATA } else { TOP };
    let mut file = shaped.shelf.file(name).bytes().to_vec();
    file.resize(file.len().next_multiple_of(SECTOR), 0);
    let mut held: BTreeSet<&[u8]> = file.chunks(SECTOR).collect();
    held.insert(&[0; SECTOR]);
    let mut buf = Vec::new();
    let read = extents(disk, 0, |range| {
        let len = range.len().min(READ_SIZE) as usize;
        buf.clear();
        buf.resize(len, pattern::UNREAD);
        disk.read_at(range.start(), &mut buf).expect("a rescued disk can be read");
        match disk.extent_at(range).expect("the same as before").state {
            ExtentState::Zero { .. } => assert!(buf.iter().all(|&byte| byte == 0), "{what:?}: {range:?}"),
            ExtentState::Unallocated => {
                let mut expected = vec![0; len];
                let inside = below.map_or(0, |below| below.size().saturating_sub(range.start().value()));
                let inside = inside.min(len as u64) as usize;
                if let Some(below) = below.filter(|_| inside > 0) {
                    below.read_at(range.start(), &mut expected[..inside]).expect("the backing file reads");
                }
                assert!(buf == expected, "{what:?}: {range:?} is not the backing file's");
            }
            ExtentState::Data { .. } => {
                let start = range.start().value().next_multiple_of(SECTOR as u64) - range.start().value();
                let sectors = buf.get(start as usize..).unwrap_or_default().chunks_exact(SECTOR);
                for sector in sectors {
                    assert!(held.contains(sector), "{what:?}: {range:?} is in no file");
                }
            }
            ExtentState::Compressed => {}
        }
    });
    assert_eq!(read, Ok(()));
}

/// Judges an image, each time the same. Any bytes: nothing is written, and what is printed is harmless.
/// Decisions: a valid image is safe exactly if it names no file, is not encrypted, and is followed by
/// nothing; and a damaged field hides no name.
pub fn vet(data: &[u8]) {
    match decisions(data) {
        Some(decisions) => vet_shaped(decisions),
        None => vet_bytes(data),
    }
}

fn judge(storage: &Arc<dyn Storage>, options: &VetOptions) -> VetReport {
    let report = qcow2_ops::vet::vet(storage, options).expect("memory can be read");
    let again = qcow2_ops::vet::vet(storage, options).expect("memory can be read");
    assert_eq!(report, again);
    assert!(report.findings.len() <= MAX_FINDINGS);
    assert!(!report.to_string().contains(|c: char| c.is_control()), "{report}");
    report
}

fn options() -> VetOptions {
    VetOptions::default().with_codecs(CODECS.clone())
}

/// Also as those of a raw disk, and with what follows a header of another format.
fn vet_bytes(data: &[u8]) {
    let storage = storage(data);
    let shared: Arc<dyn Storage> = Arc::clone(&storage) as _;
    for options in [options(), options().with_format(Some(ImageFormat::Raw))] {
        judge(&shared, &options);
    }
    assert_eq!(storage.to_vec(), data, "judging never writes");
    for head in
        [&b"KDMV\x01"[..], b"conectix", b"vhdxfile", b"LUKS\xBA\xBE\x00\x01", b"# Disk DescriptorFile\n"]
    {
        let mut other = data.to_vec();
        let len = head.len().min(other.len());
        other[..len].copy_from_slice(&head[..len]);
        let other: Arc<dyn Storage> = Arc::new(MemoryStorage::from(other));
        judge(&other, &options());
    }
}

fn vet_shaped(decisions: &[u8]) {
    let mut rng = Rng::from_bytes(decisions);
    let shaped = shaped(&mut rng);
    let mut options = options();
    options.max_snapshots = u32::MAX;
    let vet = || judge(&(shaped.shelf.file(TOP) as Arc<dyn Storage>), &options);
    let (shape, report) = (&shaped.shape, vet());
    let names = shape.backing.is_some() || shape.data_file.is_some();
    let safe = !names && shape.encryption.is_none() && !leftovers(&shaped, &report);
    assert_eq!(report.verdict() == Verdict::Safe, safe, "{shape:?}: {report}");
    assert_eq!(report.virtual_size, Some(shaped.model.bytes().len() as u64));
    let kinds = shaped.damage(&mut rng, 3);
    let bytes = shaped.bytes().to_vec();
    let report = vet();
    assert!(!names || kinds.len() > 1 || report.verdict() != Verdict::Safe, "{kinds:?}: {report}");
    assert!(shaped.bytes().to_vec() == bytes, "judging never writes");
}

/// Whether something follows the last cluster that a check counts as in use: what the image freed there
/// stays. The report says the same, and where it begins.
fn leftovers(shaped: &Shaped, judged: &VetReport) -> bool {
    let (storage, bytes) = (shaped.shelf.file(TOP), shaped.bytes().to_vec());
    let end = report(&*storage, u64::MAX).expect("a valid image").image_end_offset;
    let behind = bytes.get(end as usize..).unwrap_or_default();
    let first = behind.iter().position(|&byte| byte != 0).map(|at| end + at as u64);
    let said = judged.findings.iter().find(|finding| finding.kind() == "trailing-content");
    assert_eq!(said.map(|finding| finding.offset()), first.map(Some), "{:?}: {judged}", shaped.shape);
    first.is_some()
}
