//! Repairs of damaged tables under power cuts, faults and stops: what could be read reads the same, and a
//! repair settles. `campaign.rs` judges repairs by the reference.
#![allow(clippy::unwrap_used, reason = "a test may stop")]

use qcow2_codec::{Deflate, Zstd};
use qcow2_core::{
    Codecs, CreateOptions, GuestDisk, GuestOffset, HostOffset, Image, ImageFormat, Layers, NewSnapshot,
    NoResolver, OpenOptions, ResolvedSource, Storage, create,
};
use qcow2_ops::repair::{Outcome, RepairMode, check_and_repair, rehearse};
use qcow2_ops::{CallerError, CheckOptions, CheckReport, Error, Inline, Progress, Silent, check};
use qcow2_testkit::crash::{CrashWorld, Event};
use qcow2_testkit::fault::{CHANGING_CALLS, Fault, FaultPlan, FaultStorage};
use qcow2_testkit::pages::PageBytes;
use qcow2_testkit::pattern;
use qcow2_testkit::rng::Rng;
use qcow2_testkit::semantic;
use qcow2_testkit::storage::PageStorage;
use qcow2_tests::stop::StopsAfter;
use std::sync::{Arc, Mutex};

/// Number of damaged images; `QCOW2_MEND_SEEDS` raises it.
fn seeds(few: u64) -> u64 {
    std::env::var("QCOW2_MEND_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(few)
}

fn open(storage: Arc<dyn Storage>, change: impl Fn(&mut OpenOptions)) -> qcow2_core::Result<Arc<Image>> {
    let mut options = OpenOptions::default();
    options.codecs = Codecs::new(Arc::new(Deflate::default()), Arc::new(Zstd::default()));
    change(&mut options);
    let (format, resolver) = (ImageFormat::Qcow2, Arc::new(NoResolver));
    Image::open(ResolvedSource { storage, format, name: "image".to_owned(), id: None, resolver }, &options)
}

/// The guest's clusters; `None` for one that cannot be read, and none at all if the image does not open.
fn clusters(bytes: &PageBytes) -> Vec<Option<Vec<u8>>> {
    let Ok(image) = open(Arc::new(PageStorage::new(bytes.clone())), |_| ()) else { return Vec::new() };
    let (size, cluster) = (image.size(), image.cluster_size());
    let read = |index: u64| {
        let start = index * cluster;
        let mut bytes = pattern::unread(cluster.min(size - start) as usize);
        image.read_at(GuestOffset::new(start), &mut bytes).ok().map(|()| bytes)
    };
    // A damaged size may be anything; the tables of these images map no more.
    (0..size.div_ceil(cluster).min(2048)).map(read).collect()
}

/// A whole image with snapshots, compressed clusters and bitmaps.
fn whole(rng: &mut Rng) -> PageBytes {
    let file = Arc::new(PageStorage::default());
    let storage = Arc::clone(&file) as Arc<dyn Storage>;
    let mut options = CreateOptions::new(0);
    options.cluster_size = rng.pick(&[512, 1024, 4096, 65_536]);
    options.size = options.cluster_size * rng.between(20, 100);
    options.extended_l2 = options.cluster_size == 65_536 && rng.one_in(2);
    options.refcount_bits = rng.pick(&[8, 16, 16, 16, 32, 64]);
    create(&storage, None, &options).unwrap();
    let image = open(Arc::clone(&storage), |options| options.writable = true).unwrap();
    for step in 0..rng.between(3, 8) {
        let cluster = options.cluster_size;
        let start = rng.below(options.size / cluster) * cluster;
        let len = (cluster * rng.between(1, 4)).min(options.size - start);
        let bytes = pattern::bytes(step + 1, start, len as usize);
        match rng.below(6) {
            0 => {
                drop(image.write_compressed(GuestOffset::new(start), &vec![step as u8 + 1; cluster as usize]))
            }
            _ => image.write_at(GuestOffset::new(start), &bytes).unwrap(),
        }
        if rng.one_in(4) {
            let mut new = NewSnapshot::default();
            new.name = format!("s{step}").into();
            image.create_snapshot(&new).unwrap();
        }
    }
    if rng.one_in(4) {
        image.add_bitmap(b"b0", 16).unwrap();
    }
    image.close().unwrap();
    file.bytes()
}

/// A whole image and the same with damage.
struct Damaged {
    kind: &'static str,
    whole: Vec<Option<Vec<u8>>>,
    bytes: PageBytes,
    before: Vec<Option<Vec<u8>>>,
}

impl Damaged {
    fn draw(rng: &mut Rng) -> Self {
        loop {
            let whole = whole(rng);
            let mut bytes = whole.to_vec();
            let Some(kind) = semantic::damage(&mut bytes, rng) else { continue };
            let bytes = PageBytes::from_bytes(&bytes);
            let (whole, before) = (clusters(&whole), clusters(&bytes));
            return Self { kind, whole, bytes, before };
        }
    }

    /// Every cluster that the damage did not reach reads the same. One that read something else, a table that
    /// its entry pointed to, say, may read anything.
    fn judge(&self, image: &PageBytes) -> Result<(), String> {
        let now = clusters(image);
        for (index, before) in self.before.iter().enumerate() {
            let whole = self.whole.get(index).and_then(Option::as_ref);
            if before.is_none() || before.as_ref() != whole {
                continue;
            }
            if now.get(index).and_then(Option::as_ref) != whole {
                return Err(format!("{}: guest cluster {index} was right, and is another now", self.kind));
            }
        }
        Ok(())
    }

    /// [`judge`](Self::judge), and another repair changes nothing of it and settles.
    fn judge_to_the_end(&self, image: &PageBytes) -> Result<(), String> {
        self.judge(image)?;
        let file = Arc::new(PageStorage::new(image.clone()));
        let storage = Arc::clone(&file) as Arc<dyn Storage>;
        run(&storage, &Silent).map_err(|error| error.to_string())?;
        self.judge(&file.bytes())?;
        let first = bad(&look(&storage)?);
        run(&storage, &Silent).map_err(|error| error.to_string())?;
        match bad(&look(&storage)?) == first {
            true => Ok(()),
            false => Err(format!("{}: a second repair finds something else", self.kind)),
        }
    }
}

fn look(storage: &Arc<dyn Storage>) -> Result<CheckReport, String> {
    check(&**storage, &CheckOptions::default(), &Inline, &Silent).map_err(|error| error.to_string())
}

fn bad(report: &CheckReport) -> u64 {
    report.corruptions + report.check_errors
}

fn open_for_repair(storage: Arc<dyn Storage>) -> qcow2_core::Result<Arc<Image>> {
    open(storage, |options| {
        (options.writable, options.for_repair, options.layers) = (true, true, Layers::TopOnly);
    })
}

/// Checks and repairs everything, as the command does.
fn run(storage: &Arc<dyn Storage>, progress: &dyn Progress) -> Result<Outcome, Error> {
    let reopen = || -> Result<Arc<dyn GuestDisk>, CallerError> { Ok(open_for_repair(Arc::clone(storage))?) };
    check_and_repair(&**storage, Some(RepairMode::All), &reopen, &Inline, progress)
        .map(|checked| checked.repair)
}

/// Whether the image can be looked at: a header that no check accepts is beyond this repair.
fn can_be_checked(bytes: &PageBytes) -> bool {
    look(&(Arc::new(PageStorage::new(bytes.clone())) as Arc<dyn Storage>)).is_ok()
}

#[test]
fn a_repair_keeps_what_can_be_read_and_settles() {
    let mut repaired = 0;
    for seed in 0..seeds(400) {
        let start = Damaged::draw(&mut Rng::new(seed));
        if !can_be_checked(&start.bytes) {
            continue;
        }
        let storage = Arc::new(PageStorage::new(start.bytes.clone())) as Arc<dyn Storage>;
        let before = look(&storage).unwrap();
        start.judge_to_the_end(&start.bytes).unwrap_or_else(|what| panic!("seed {seed}: {what}"));
        run(&storage, &Silent).unwrap();
        repaired += u64::from(bad(&before) > 0 && bad(&look(&storage).unwrap()) == 0);
    }
    assert!(repaired > seeds(400) / 3, "{repaired} images were damaged and are repaired");
}

#[test]
fn a_power_cut_during_a_repair_of_tables_does_no_harm() {
    for seed in 0..seeds(60) {
        let mut rng = Rng::new(seed);
        let start = Arc::new(Damaged::draw(&mut rng));
        if !can_be_checked(&start.bytes) {
            continue;
        }
        let world = CrashWorld::new();
        let file = world.add(start.bytes.clone());
        let state = Arc::new(Mutex::new((rng, Vec::new())));
        let (seen, judge) = (Arc::clone(&state), Arc::clone(&start));
        world.set_hook(Some(Arc::new(move |event, cut| {
            let (rng, wrong) = &mut *seen.lock().unwrap();
            for _ in 0..if event == Event::BeforeFlush { 3 } else { 1 } {
                let image = &cut.sample(rng).disks[0];
                let found = if rng.one_in(4) { judge.judge_to_the_end(image) } else { judge.judge(image) };
                wrong.extend(found.err().map(|what| format!("{event:?}, change {}: {what}", cut.change())));
            }
        })));
        run(&(file as Arc<dyn Storage>), &Silent).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        world.set_hook(None);
        let wrong = std::mem::take(&mut state.lock().unwrap().1);
        assert_eq!(wrong, Vec::<String>::new(), "seed {seed}");
    }
}

#[test]
fn a_storage_error_during_a_repair_of_tables_does_no_harm() {
    for seed in 0..seeds(60) / 4 {
        let start = Damaged::draw(&mut Rng::new(seed));
        if !can_be_checked(&start.bytes) {
            continue;
        }
        for nth in 0..40 {
            let world = CrashWorld::new();
            let file = Arc::new(FaultStorage::new(world.add(start.bytes.clone())));
            let fault = [Fault::Io, Fault::Short { bytes: 512 }, Fault::LateIo][(nth % 3) as usize];
            file.set_plan(Some(FaultPlan { calls: CHANGING_CALLS.to_vec(), nth, sticky: true, fault }));
            let done = run(&(Arc::clone(&file) as Arc<dyn Storage>), &Silent);
            let fired = file.fired() > 0;
            assert!(!fired || done.is_err(), "seed {seed}, call {nth}: {done:?}");
            for image in world.cut(|cut| [cut.everything(), cut.nothing()]) {
                let judged = start.judge_to_the_end(&image.disks[0]);
                judged.unwrap_or_else(|what| panic!("seed {seed}, call {nth}: {what}"));
            }
            if !fired {
                break;
            }
        }
    }
}

#[test]
fn a_cancelled_repair_of_tables_does_no_harm() {
    for seed in 0..seeds(60) / 4 {
        let start = Damaged::draw(&mut Rng::new(seed));
        if !can_be_checked(&start.bytes) {
            continue;
        }
        for left in 0..60 {
            let file = Arc::new(PageStorage::new(start.bytes.clone()));
            let done = run(&(Arc::clone(&file) as Arc<dyn Storage>), &StopsAfter::new(left));
            let judged = start.judge_to_the_end(&file.bytes());
            judged.unwrap_or_else(|what| panic!("seed {seed}, after {left}: {what}"));
            if done.is_ok() {
                break;
            }
        }
    }
}

/// A dry run finds what the repair does, for both modes, and writes nothing.
#[test]
fn a_rehearsal_tells_what_a_repair_does() {
    let mut changed = 0;
    for seed in 0..seeds(120) {
        let start = Damaged::draw(&mut Rng::new(seed + 2_000_000));
        if !can_be_checked(&start.bytes) {
            continue;
        }
        for mode in [RepairMode::Leaks, RepairMode::All] {
            let file = || Arc::new(PageStorage::new(start.bytes.clone()));
            let (rehearsed, repaired) = (file(), file());
            let open = |storage| -> Result<Arc<dyn GuestDisk>, CallerError> { Ok(open_for_repair(storage)?) };
            let told = rehearse(Arc::clone(&rehearsed) as Arc<dyn Storage>, mode, &open, &Inline, &Silent);
            let storage = Arc::clone(&repaired) as Arc<dyn Storage>;
            let reopen = || open(Arc::clone(&storage));
            let done = check_and_repair(&*storage, Some(mode), &reopen, &Inline, &Silent);
            assert!(rehearsed.bytes().to_vec() == start.bytes.to_vec(), "seed {seed}: a dry run wrote");
            match (told, done) {
                (Ok(told), Ok(done)) => assert_eq!(told, done, "seed {seed}, {mode:?}"),
                (told, done) => assert!(told.is_err() && done.is_err(), "seed {seed}: {told:?}, {done:?}"),
            }
            changed += u64::from(repaired.bytes().to_vec() != start.bytes.to_vec());
        }
    }
    assert!(changed > seeds(120) / 2, "{changed} repairs changed something");
}

#[test]
fn a_plan_tells_its_changes_and_writes_nothing() {
    let mut bytes = whole(&mut Rng::new(3)).to_vec();
    let l1 = u64::from_be_bytes(*bytes[40..].first_chunk().unwrap()) as usize;
    // A reserved bit.
    bytes[l1] |= 0x40;
    let file = Arc::new(PageStorage::new(PageBytes::from_bytes(&bytes)));
    let storage = Arc::clone(&file) as Arc<dyn Storage>;
    let report = look(&storage).unwrap();
    let plan = qcow2_ops::mend::plan(&*storage, &report, &Inline, &Silent).unwrap().unwrap();
    let told: Vec<String> = plan.fixes().0.iter().map(ToString::to_string).collect();
    assert!(told[0].starts_with(&format!("l1 entry at {:#x}: ", l1)), "{told:?}");
    assert!(file.bytes().to_vec() == bytes);
    assert_eq!(bad(&plan.apply().unwrap()), 0);
    let mut word = [0; 8];
    storage.read_padded(HostOffset::new(l1 as u64), &mut word).unwrap();
    assert_eq!(word[0], 0x80);
}

/// The mark that keeps writers out during a repair is gone afterwards, also where nothing else in the header
/// changed.
#[test]
fn the_mark_of_the_repair_does_not_stay() {
    let mut bytes = whole(&mut Rng::new(3)).to_vec();
    let l1 = u64::from_be_bytes(*bytes[40..].first_chunk().unwrap()) as usize;
    bytes[l1] |= 0x04;
    let storage = Arc::new(PageStorage::new(PageBytes::from_bytes(&bytes))) as Arc<dyn Storage>;
    run(&storage, &Silent).unwrap();
    let report = look(&storage).unwrap();
    assert!(bad(&report) == 0 && !report.corrupt && !report.dirty, "{report:?}");
}

/// An image of one L2 table and one snapshot: its bytes, and its file.
fn with_snapshot(guest_cluster: u64, content: &[u8]) -> (Vec<u8>, Arc<PageStorage>) {
    with_snapshot_of(8, guest_cluster, content)
}

/// The same with a disk of so many clusters.
fn with_snapshot_of(size: u64, guest_cluster: u64, content: &[u8]) -> (Vec<u8>, Arc<PageStorage>) {
    let file = Arc::new(PageStorage::default());
    let storage = Arc::clone(&file) as Arc<dyn Storage>;
    let mut options = CreateOptions::new(512 * size);
    options.cluster_size = 512;
    create(&storage, None, &options).unwrap();
    let image = open(Arc::clone(&storage), |options| options.writable = true).unwrap();
    image.write_at(GuestOffset::new(guest_cluster * 512), content).unwrap();
    image.create_snapshot(&NewSnapshot::default()).unwrap();
    image.close().unwrap();
    (file.bytes().to_vec(), file)
}

fn word(bytes: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(*bytes[at as usize..].first_chunk().unwrap())
}

/// A damaged snapshot takes a guest's bytes for its L1 table: they have another owner, and stay.
#[test]
fn a_guests_bytes_taken_for_an_l1_table_stay() {
    // Taken for an entry, the first word has reserved bits and leads past the end of the file.
    let content = [&0x4dbe_e2b6_6e8e_3845_u64.to_be_bytes()[..], &[7; 504]].concat();
    let (bytes, file) = with_snapshot(0, &content);
    let host = bytes.chunks(512).position(|cluster| cluster == content).unwrap() as u64 * 512;
    let storage = file.clone() as Arc<dyn Storage>;
    storage.write_at(HostOffset::new(word(&bytes, 64)), &host.to_be_bytes()).unwrap();
    run(&storage, &Silent).unwrap();
    assert!(clusters(&file.bytes())[0].as_ref() == Some(&content));
}

/// A snapshot table that a repair has replaced begins with an offset, as an L1 table does, but is none.
#[test]
fn a_replaced_snapshot_table_is_no_l1_table() {
    let content = [&[0; 8][..], &[7; 504]].concat();
    let (bytes, file) = with_snapshot(3, &content);
    let host = bytes.chunks(512).position(|cluster| cluster == content).unwrap() as u64 * 512;
    let storage = file.clone() as Arc<dyn Storage>;
    storage.write_at(HostOffset::new(word(&bytes, 40)), &host.to_be_bytes()).unwrap();
    storage.write_at(HostOffset::new(word(&bytes, 64) + 36), &3072_u32.to_be_bytes()).unwrap();
    run(&storage, &Silent).unwrap();
    assert!(clusters(&file.bytes())[0].as_ref().is_some_and(|cluster| cluster.iter().all(|&byte| byte == 0)));
}

/// With one bad entry in its L2 table the active L1 table is still what it was, even where another, which a
/// damaged snapshot does not lead to any more, has none.
#[test]
fn a_bad_entry_does_not_make_another_l1_table_the_active_one() {
    let (_, file) = with_snapshot(0, &[7; 512]);
    let storage = file.clone() as Arc<dyn Storage>;
    let image = open(Arc::clone(&storage), |options| options.writable = true).unwrap();
    image.write_at(GuestOffset::new(512), &[8; 1024]).unwrap();
    image.close().unwrap();
    drop(image);
    let bytes = file.bytes().to_vec();
    let (l1, snapshots) = (word(&bytes, 40), word(&bytes, 64));
    let l2 = word(&bytes, l1) & 0x00ff_ffff_ffff_fe00;
    storage.write_at(HostOffset::new(l2), &0x40_0000_0200_u64.to_be_bytes()).unwrap();
    let misaligned = word(&bytes, snapshots) | 0x80;
    storage.write_at(HostOffset::new(snapshots), &misaligned.to_be_bytes()).unwrap();
    run(&storage, &Silent).unwrap();
    assert!(clusters(&file.bytes())[1].as_ref().is_some_and(|cluster| cluster == &[8; 512]));
}

/// The L1 table of a snapshot that lost it leads to a table that others have too: it is no L2 table itself,
/// whatever lost one.
#[test]
fn an_l1_table_does_not_become_an_l2_table() {
    // Two L2 tables. The second maps two clusters and has a damaged entry behind them.
    let (_, file) = with_snapshot_of(100, 11, &[7; 3 * 512]);
    let storage = file.clone() as Arc<dyn Storage>;
    let image = open(Arc::clone(&storage), |options| options.writable = true).unwrap();
    image.create_snapshot(&NewSnapshot::default()).unwrap();
    image.write_at(GuestOffset::new(69 * 512), &[8; 1024]).unwrap();
    image.close().unwrap();
    drop(image);
    let bytes = file.bytes().to_vec();
    let second = word(&bytes, word(&bytes, 40) + 8) & 0x00ff_ffff_ffff_fe00;
    let unreadable = 0x99ec_5f36_cb75_f2b4_u64.to_be_bytes();
    storage.write_at(HostOffset::new(second + 62 * 8), &unreadable).unwrap();
    // The first snapshot is said to have its L1 table there.
    storage.write_at(HostOffset::new(word(&bytes, 64)), &second.to_be_bytes()).unwrap();
    let before = clusters(&file.bytes());
    let _ = run(&storage, &Silent);
    assert!(clusters(&file.bytes()) == before);
}

/// A bitmap whose table is said to be where the directory is. With refcounts of one bit nothing but another
/// table helps: the directory cannot be counted twice.
#[test]
fn a_bitmap_whose_table_is_the_directory_gets_another_one() {
    let storage = Arc::new(PageStorage::default()) as Arc<dyn Storage>;
    let mut options = CreateOptions::new(1 << 20);
    (options.cluster_size, options.refcount_bits) = (1024, 1);
    create(&storage, None, &options).unwrap();
    let image = open(Arc::clone(&storage), |options| options.writable = true).unwrap();
    image.add_bitmap(b"b0", 16).unwrap();
    image.close().unwrap();
    let directory = image.header().extensions.bitmaps.unwrap().directory_offset;
    drop(image);
    storage.write_at(directory, &directory.value().to_be_bytes()).unwrap();
    assert!(bad(&look(&storage).unwrap()) > 0);
    run(&storage, &Silent).unwrap();
    let after = look(&storage).unwrap();
    assert_eq!((bad(&after), after.leaks), (0, 0));
    let image = open(Arc::clone(&storage), |_| ()).unwrap();
    let bits = image.bitmap_bits(b"b0").unwrap();
    assert_eq!(bits.marked_runs().collect::<Vec<_>>(), [(0, 1 << 20)], "too much, not too little");
}

/// Clusters that a damaged entry may have meant stay in use only as long as something is damaged.
#[test]
fn nothing_is_kept_for_damaged_entries_once_nothing_is_damaged() {
    let mut clean = 0;
    for seed in 0..seeds(400) {
        let start = Damaged::draw(&mut Rng::new(seed + 3_000_000));
        if !can_be_checked(&start.bytes) {
            continue;
        }
        let storage = Arc::new(PageStorage::new(start.bytes.clone())) as Arc<dyn Storage>;
        if run(&storage, &Silent).is_err() {
            continue;
        }
        let after = look(&storage).unwrap();
        if bad(&after) == 0 {
            clean += 1;
            assert_eq!(after.leaks, 0, "seed {seed}, {}", start.kind);
        }
    }
    assert!(clean > seeds(400) / 2, "{clean} images are clean");
}

/// A damaged entry of the refcount table makes a block of an L2 table. Both entries cannot be right, and what
/// is there tells which one is.
#[test]
fn an_l2_table_that_is_also_a_refcount_block_stays_one() {
    let file = Arc::new(PageStorage::default());
    let storage = Arc::clone(&file) as Arc<dyn Storage>;
    let mut options = CreateOptions::new(512 * 200);
    options.cluster_size = 512;
    create(&storage, None, &options).unwrap();
    let image = open(Arc::clone(&storage), |options| options.writable = true).unwrap();
    for (range, byte) in [(0, 5), (1, 6), (2, 7)] {
        image.write_at(GuestOffset::new(range * 64 * 512), &[byte; 512]).unwrap();
    }
    image.close().unwrap();
    drop(image);
    let bytes = file.bytes().to_vec();
    let (l1, refcounts) = (word(&bytes, 40), word(&bytes, 48));
    // The third range loses its table, which the second could be given.
    storage.write_at(HostOffset::new(l1 + 16), &[0; 8]).unwrap();
    let second = word(&bytes, l1 + 8) & 0x00ff_ffff_ffff_fe00;
    storage.write_at(HostOffset::new(refcounts + 8), &second.to_be_bytes()).unwrap();
    run(&storage, &Silent).unwrap();
    assert!(clusters(&file.bytes())[64].as_ref().is_some_and(|cluster| cluster == &[6; 512]));
}

/// Two clusters may be the L2 table that an L1 entry lost, so none is taken, and both are kept at first. The
/// entry leads to the L1 table of a snapshot, which can be read as an L2 table: in the end nothing is
/// damaged.
#[test]
fn candidates_for_a_lost_table_are_freed_once_nothing_is_damaged() {
    let (_, file) = with_snapshot(0, &[7; 512]);
    let storage = file.clone() as Arc<dyn Storage>;
    let image = open(Arc::clone(&storage), |options| options.writable = true).unwrap();
    image.write_at(GuestOffset::new(512), &[8; 512]).unwrap();
    image.close().unwrap();
    drop(image);
    let bytes = file.bytes().to_vec();
    let (l1, block) = (word(&bytes, 40), word(&bytes, word(&bytes, 48)));
    let table = word(&bytes, l1) & 0x00ff_ffff_ffff_fe00;
    let end = bytes.len() as u64 / 512;
    storage.write_at(HostOffset::new(end * 512), &bytes[table as usize..][..512]).unwrap();
    storage.write_at(HostOffset::new(block + end * 2), &[0, 1]).unwrap();
    let other = word(&bytes, word(&bytes, 64));
    storage.write_at(HostOffset::new(l1), &other.to_be_bytes()).unwrap();
    assert!(bad(&look(&storage).unwrap()) > 0);
    run(&storage, &Silent).unwrap();
    let after = look(&storage).unwrap();
    assert_eq!((bad(&after), after.leaks), (0, 0));
}

/// An L1 entry that leads to the snapshot table makes the disk's size there an entry, which leads past the
/// end of the file. The guest reads zeroes then, and no new table.
#[test]
fn a_new_table_is_not_put_where_an_entry_leads() {
    let (bytes, file) = with_snapshot_of(10, 2, &[7; 512]);
    let storage = file.clone() as Arc<dyn Storage>;
    let (l1, snapshots) = (word(&bytes, 40), word(&bytes, 64));
    assert!(word(&bytes, snapshots + 48) == 5120 && bytes.len() == 4096);
    storage.write_at(HostOffset::new(l1), &snapshots.to_be_bytes()).unwrap();
    let before = clusters(&file.bytes());
    assert!(before[6].as_ref().is_some_and(|cluster| cluster.iter().all(|&byte| byte == 0)));
    let _ = run(&storage, &Silent);
    assert!(clusters(&file.bytes())[6] == before[6]);
}
