//! Several threads on a live disk, and procedures one after the other that exchange its layers.

use qcow2_core::{
    BackingName, CreateOptions, GuestDisk, GuestOffset, GuestRange, HostOffset, Image, ImageFormat, LiveDisk,
    NewSnapshot, OpenOptions, Piece, ResolvedSource, Storage, StorageError, ZeroMode, create,
    forward_storage,
};
use qcow2_ops::live::{
    LiveSnapshotOptions, MiddleLayer, commit_middle, commit_top, external_snapshot, on_image,
};
use qcow2_ops::snapshot::{self, SnapshotName};
use qcow2_ops::{CallerError, NewStorage, Silent};
use qcow2_testkit::audit::audit;
use qcow2_testkit::history::{History, ZEROES, fill};
use qcow2_testkit::model::chain;
use qcow2_testkit::pattern;
use qcow2_testkit::rng::Rng;
use qcow2_testkit::world::Shelf;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const SECTOR: u64 = 512;
const SECTORS: u64 = 4000;
const THREADS: u64 = 6;

struct Bench {
    shelf: Shelf,
    live: LiveDisk,
    history: History,
    next_content: AtomicU64,
    done: AtomicBool,
}

/// A storage that yields to other threads now and then.
struct Yielding {
    inner: Arc<dyn Storage>,
    calls: AtomicU64,
}

impl Yielding {
    fn turn(&self) {
        if self.calls.fetch_add(1, Ordering::Relaxed).is_multiple_of(3) {
            std::thread::yield_now();
        }
    }
}

impl Storage for Yielding {
    forward_storage!(inner: len write_zeroes discard allocate set_len flush extent_at limits used_bytes);

    fn read_at(&self, offset: HostOffset, buf: &mut [u8]) -> Result<usize, StorageError> {
        self.turn();
        let read = self.inner.read_at(offset, buf);
        self.turn();
        read
    }

    fn write_at(&self, offset: HostOffset, buf: &[u8]) -> Result<(), StorageError> {
        self.turn();
        let written = self.inner.write_at(offset, buf);
        self.turn();
        written
    }
}

fn source(shelf: &Shelf, name: &str) -> ResolvedSource {
    let source = shelf.source(name, ImageFormat::Qcow2);
    ResolvedSource {
        storage: Arc::new(Yielding { inner: source.storage, calls: AtomicU64::new(0) }),
        ..source
    }
}

struct NewFile<'a>(&'a Shelf, &'a str);

impl NewStorage for NewFile<'_> {
    fn make(&self) -> Result<Arc<dyn Storage>, CallerError> {
        Ok(source(self.0, self.1).storage)
    }

    fn discard(&self) {}
}

impl Bench {
    fn new() -> Self {
        let shelf = Shelf::default();
        let storage: Arc<dyn Storage> = shelf.file("0");
        create(&storage, None, &CreateOptions::new(SECTORS * SECTOR).with_cluster_size(4096)).unwrap();
        let options = OpenOptions::writable().with_exchangeable(true);
        let image = Image::open(source(&shelf, "0"), &options).unwrap();
        let history = History::new(SECTORS, |_| ZEROES);
        let (next_content, done) = (AtomicU64::new(1), AtomicBool::new(false));
        Self { shelf, live: LiveDisk::new(image), history, next_content, done }
    }

    fn open(
        &self,
        name: &str,
        below: Option<&Arc<dyn GuestDisk>>,
    ) -> Result<Arc<dyn GuestDisk>, CallerError> {
        let options = OpenOptions::writable();
        Ok(match below {
            Some(below) => Image::open_on(&source(&self.shelf, name), &options, Arc::clone(below))?,
            None => Image::open(source(&self.shelf, name), &options)?,
        })
    }

    /// `new` becomes the top, an overlay of `old`.
    fn snapshot(&self, old: &str, new: &str) {
        let mut options = LiveSnapshotOptions::new(old, "qcow2");
        options.overlay.cluster_size = 8192;
        let taken = external_snapshot(&self.live, &NewFile(&self.shelf, new), &|| Ok(()), &options);
        assert!(taken.unwrap().unclean.is_none());
    }

    fn commit_top(&self, base: &str) {
        let base = |below: Option<&_>| self.open(base, below);
        let report = commit_top(&self.live, &base, &|| Ok(()), &Silent).unwrap();
        assert!(report.unclean.is_none() && report.held_regions <= 8);
    }

    fn commit_middle(&self, depth: usize, base: &str, overlay: &str) {
        let layer = MiddleLayer {
            depth,
            link: BackingName { name: base.to_owned(), format: Some("qcow2".to_owned()) },
            base: &|below: Option<&_>| self.open(base, below),
            overlay: &|below: Option<&_>| self.open(overlay, below),
        };
        assert!(commit_middle(&self.live, &layer, &Silent).unwrap().unclean.is_none());
    }

    /// Requests of one thread until all procedures are done, and at least 100.
    fn requests(&self, thread: u64) -> Result<(), String> {
        let mut rng = Rng::new(thread);
        for number in 0.. {
            if number >= 100 && self.done.load(Ordering::SeqCst) {
                return Ok(());
            }
            // Near enough to each other that requests meet.
            let start = if rng.one_in(3) { rng.below(SECTORS) } else { 1000 + rng.below(60) };
            let sectors = start..SECTORS.min(start + rng.pick(&[1, 2, 7, 16, 60]));
            let made = match rng.below(10) {
                0..3 => self.read(sectors.clone()),
                3..8 => self.change(sectors.clone(), rng.below(8)),
                8 => self.live.flush().map_err(|e| chain(&e)),
                _ => self.by_ticket(sectors.clone()),
            };
            made.map_err(|e| format!("thread {thread}, request {number} on {sectors:?}: {e}"))?;
        }
        Ok(())
    }

    fn read(&self, sectors: Range<u64>) -> Result<(), String> {
        let begun = self.history.now();
        let mut seen = pattern::unread(((sectors.end - sectors.start) * SECTOR) as usize);
        self.live.read_at(GuestOffset::new(sectors.start * SECTOR), &mut seen).map_err(|e| chain(&e))?;
        self.history.check(sectors.start, &seen, begun)
    }

    fn change(&self, sectors: Range<u64>, kind: u64) -> Result<(), String> {
        let range = GuestRange::between(
            GuestOffset::new(sectors.start * SECTOR),
            GuestOffset::new(sectors.end * SECTOR),
        );
        let id = if kind < 2 { ZEROES } else { self.next_content.fetch_add(1, Ordering::SeqCst) };
        let begun = self.history.begin(sectors.clone(), id, kind == 0);
        let made = match kind {
            0 => self.live.discard(range),
            1 => self.live.write_zeroes(range, ZeroMode::MayUnmap),
            _ => {
                let mut bytes = vec![0; range.len() as usize];
                fill(id, sectors.start, &mut bytes);
                self.live.write_at(range.start(), &bytes)
            }
        };
        self.history.end(begun);
        made.map_err(|e| chain(&e))
    }

    /// Writes with tickets, several at a time, where the disk in use allows that.
    fn by_ticket(&self, sectors: Range<u64>) -> Result<(), String> {
        let request = self.live.request();
        let Some(image) = request.disk().as_image() else { return Ok(()) };
        let id = self.next_content.fetch_add(1, Ordering::SeqCst);
        let begun = self.history.begin(sectors.clone(), id, false);
        let (mut at, end) = (sectors.start * SECTOR, sectors.end * SECTOR);
        let mut tickets = Vec::new();
        while at < end {
            let range = GuestRange::between(GuestOffset::new(at), GuestOffset::new(end));
            let ticket = image.prepare_write(range).map_err(|e| chain(&e))?;
            at = ticket.range().end().value();
            tickets.push(ticket);
        }
        let data = image.data_storage().unwrap();
        for ticket in tickets {
            let mut bytes = vec![0; ticket.range().len() as usize];
            fill(id, ticket.range().start().value() / SECTOR, &mut bytes);
            for piece in ticket.pieces() {
                match piece {
                    Piece::Guest { host } => data.write_at(host, &bytes).unwrap(),
                    Piece::Bytes { host, bytes } => data.write_at(host, bytes).unwrap(),
                    Piece::Zeroes { host, len } => {
                        data.write_zeroes(host, len, ZeroMode::KeepAllocated).unwrap();
                    }
                    _ => panic!("another kind of piece"),
                }
            }
            ticket.commit().map_err(|e| chain(&e))?;
        }
        self.history.end(begun);
        Ok(())
    }

    /// All procedures, one after the other. Returns the name of the top.
    fn procedures(&self) -> &'static str {
        self.snapshot("0", "1");
        self.snapshot("1", "2");
        self.commit_middle(1, "0", "none");
        self.snapshot("2", "3");
        self.snapshot("3", "4");
        self.commit_middle(2, "0", "3");
        let kept = on_image(&self.live, |image| snapshot::create(image, &NewSnapshot::default())).unwrap();
        let name = SnapshotName::Any(kept.id_text());
        on_image(&self.live, |image| snapshot::delete(image, &name)).unwrap();
        self.commit_top("3");
        self.commit_top("0");
        self.snapshot("0", "5");
        "5"
    }
}

#[test]
fn threads_see_one_disk_whatever_its_layers_are() {
    for _ in 0..2 {
        let bench = Bench::new();
        let top = std::thread::scope(|scope| {
            let threads: Vec<_> = (1..=THREADS)
                .map(|thread| {
                    scope.spawn({
                        let bench = &bench;
                        move || bench.requests(thread)
                    })
                })
                .collect();
            let top = bench.procedures();
            bench.done.store(true, Ordering::SeqCst);
            threads.into_iter().for_each(|thread| thread.join().unwrap().unwrap());
            top
        });
        let mut seen = pattern::unread((SECTORS * SECTOR) as usize);
        bench.live.read_at(GuestOffset::new(0), &mut seen).unwrap();
        bench.history.settle(&seen).unwrap();
        bench.live.hold().disk().as_image().unwrap().close().unwrap();
        for name in ["0", top] {
            let found = audit(&bench.shelf.file(name).bytes(), None);
            assert!(found.is_sound() && found.leaks == 0, "{name}: {found:?}");
        }
        let disk = Image::open(source(&bench.shelf, top), &OpenOptions::read_only()).unwrap();
        let mut again = pattern::unread(seen.len());
        disk.read_at(GuestOffset::new(0), &mut again).unwrap();
        assert!(again == seen, "the chain of the links differs from what was served");
    }
}
