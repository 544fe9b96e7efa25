//! Judges crash images: sound by an independent audit, readable, only allowed guest content, and usable for
//! further work.

use super::guest::Guest;
use super::snapshots::{Taken, read_all};
use super::start::Start;
use super::work::{Work, draw_work};
use super::{SimOptions, codecs};
use crate::audit::{Audit, Problem, ProblemKind, audit};
use crate::crash::SECTOR;
use crate::cut::CrashImage;
use crate::model::chain;
use crate::pages::PageBytes;
use crate::pattern;
use crate::rng::Rng;
use crate::storage::PageStorage;
use crate::world::keys;
use qcow2_core::{GuestOffset, Image, OpenOptions, Storage};
use std::sync::{Arc, Mutex};

/// Operations made when work continues on a crash image.
const RECOVERY_STEPS: usize = 12;
/// The content of snapshots is read in one of this many images.
const SNAPSHOTS_ONE_IN: u64 = 6;

/// Judges the images of one simulation.
pub(super) struct Judge {
    start: Arc<Start>,
    options: SimOptions,
    buf: Vec<u8>,
    /// Whether a raw data file is judged too. After a failed write the guest may read old data where the raw
    /// file already holds new data.
    pub(super) raw: bool,
    /// How many crash images were worked on further.
    pub(super) continued: u64,
}

/// The files of one image as storages of their own.
struct Files {
    image: Arc<PageStorage>,
    data: Option<Arc<PageStorage>>,
}

impl Files {
    fn of(image: &CrashImage) -> Self {
        Self { image: image.storage(0), data: (image.disks.len() > 1).then(|| image.storage(1)) }
    }

    fn audit(&self) -> Audit {
        let data_len = self.data.as_ref().map(|data| data.bytes().len());
        audit(&self.image.bytes(), data_len)
    }

    fn snapshots(&self, start: &Start, disk: &Image) -> Result<Vec<Taken>, String> {
        let mut options = OpenOptions::default();
        options.codecs = codecs();
        options.keys = keys(&start.shape);
        read_all(start, disk, &(Arc::clone(&self.image) as Arc<dyn Storage>), &options)
    }

    fn open(&self, start: &Start, options: &OpenOptions) -> Result<Arc<Image>, String> {
        let data = self.data.clone().map(|data| data as Arc<dyn Storage>);
        let source = start.source(Arc::clone(&self.image) as Arc<dyn Storage>, data);
        Image::open(source, options).map_err(|error| format!("image does not open: {}", chain(&error)))
    }
}

impl Judge {
    pub(super) fn new(start: Arc<Start>, options: SimOptions) -> Self {
        Self { start, options, buf: Vec::new(), raw: true, continued: 0 }
    }

    /// Judges `image`: every sector must hold a content that `guest` allows.
    pub(super) fn judge(&mut self, image: &CrashImage, guest: &Guest, rng: &mut Rng) -> Result<(), String> {
        let files = Files::of(image);
        let audit = files.audit();
        let careful = guest.seen_snapshots().careful;
        sound(&audit, careful)?;
        if audit.corrupt {
            return Err("corrupt bit".to_owned());
        }
        if audit.dirty && !self.start.shape.lazy_refcounts {
            return Err("dirty bit without lazy refcounts".to_owned());
        }
        let mut options = OpenOptions::default();
        options.codecs = codecs();
        options.keys = keys(&self.start.shape);
        let disk = files.open(&self.start, &options)?;
        let mut seen = std::mem::take(&mut self.buf);
        seen.clear();
        seen.resize(disk.size() as usize, pattern::UNREAD);
        let read = disk.read_at(GuestOffset::new(0), &mut seen);
        read.map_err(|error| format!("image does not read: {}", chain(&error)))?;
        guest.judge(&seen)?;
        self.judge_snapshots(&files, &disk, guest, rng)?;
        if audit.bitmaps {
            self.judge_bitmaps(&disk, guest, &seen)?;
        }
        self.judge_raw_data(image, guest, disk.size())?;
        if let Some(check) = &self.options.check
            && rng.one_in(self.options.check_one_in)
        {
            check(&(Arc::clone(&files.image) as Arc<dyn Storage>))?;
        }
        if rng.one_in(self.options.continue_one_in) {
            self.continued += 1;
            self.go_on(&files, &seen, careful, rng)
                .map_err(|what| format!("continuing after the crash: {what}"))?;
        }
        self.buf = seen;
        Ok(())
    }

    /// A consistent bitmap has a bit set for every changed sector, or no bits at all if it is disabled.
    /// Sectors past the smallest size are left out.
    fn judge_bitmaps(&self, disk: &Image, guest: &Guest, seen: &[u8]) -> Result<(), String> {
        let failed = |error| format!("bitmaps do not read: {}", chain(&error));
        for bitmap in disk.bitmaps().map_err(failed)?.iter().filter(|bitmap| !bitmap.in_use) {
            let bits = disk.bitmap_bits(&bitmap.name).map_err(failed)?;
            if bits.size() != disk.size() {
                return Err(format!("a bitmap of {} bytes on a disk of {}", bits.size(), disk.size()));
            }
            if !bitmap.auto {
                match bits.marked_runs().next() {
                    Some(run) => return Err(format!("a disabled bitmap marks {run:?}")),
                    None => continue,
                }
            }
            let kept = guest.smallest_size() as usize;
            let sectors = seen[..kept].chunks(SECTOR as usize).zip(self.start.guest.chunks(SECTOR as usize));
            for (index, (now, before)) in (0u64..).zip(sectors) {
                if now != before && !bits.is_marked(index * SECTOR) {
                    return Err(format!("a bitmap has no bit for sector {index}, which has changed"));
                }
            }
        }
        Ok(())
    }

    /// The snapshot list must be an allowed one. Contents are read while a snapshot change is in flight, and
    /// sometimes otherwise.
    fn judge_snapshots(
        &self,
        files: &Files,
        disk: &Image,
        guest: &Guest,
        rng: &mut Rng,
    ) -> Result<(), String> {
        let snapshots = guest.seen_snapshots();
        if snapshots.careful || rng.one_in(SNAPSHOTS_ONE_IN) {
            return snapshots.judge(&files.snapshots(&self.start, disk)?);
        }
        let found = disk.snapshots().map_err(|error| format!("snapshots do not read: {}", chain(&error)))?;
        let same = found.iter().map(|snapshot| &snapshot.name).eq(snapshots.now().iter().map(|s| &s.name));
        if same { Ok(()) } else { Err(format!("snapshots {found:?}")) }
    }

    /// A raw data file equals the guest disk, byte for byte, at every moment.
    fn judge_raw_data(&self, image: &CrashImage, guest: &Guest, size: u64) -> Result<(), String> {
        if !self.raw || !self.start.shape.data_file.is_some_and(|file| file.raw) {
            return Ok(());
        }
        let mut bytes: PageBytes = image.disks[1].clone();
        bytes.set_len(size);
        guest.judge(&bytes.to_vec()).map_err(|what| format!("raw data file: {what}"))
    }

    /// Opens the image for writing, makes some operations, and closes it: it must then be as sound as without
    /// a crash, except for leaks.
    fn go_on(&self, files: &Files, seen: &[u8], careful: bool, rng: &mut Rng) -> Result<(), String> {
        let open = Box::new(|options: &OpenOptions| files.open(&self.start, options));
        let mut options = OpenOptions::default();
        options.codecs = codecs();
        options.keys = keys(&self.start.shape);
        let disk = files.open(&self.start, &options)?;
        let mut guest = Guest::new(seen);
        guest.snapshots().finish(files.snapshots(&self.start, &disk)?);
        let guest = Arc::new(Mutex::new(guest));
        let mut work = Work::start(&self.start, guest, open, &self.options.configure)?;
        for step in draw_work(rng, &self.start.shape, RECOVERY_STEPS) {
            work.step(&step)?;
        }
        work.close()?;
        let audit = files.audit();
        sound(&audit, careful)?;
        if audit.dirty {
            return Err("dirty bit after close".to_owned());
        }
        Ok(())
    }
}

/// `careful`: a copied flag may differ from the refcount where that is harmless.
fn sound(audit: &Audit, careful: bool) -> Result<(), String> {
    let harmless = |problem: &&Problem| careful && problem.kind == ProblemKind::CopiedMismatch;
    let problems: Vec<_> = audit.problems.iter().filter(|problem| !harmless(problem)).take(5).collect();
    if problems.is_empty() { Ok(()) } else { Err(format!("problems: {problems:?}")) }
}
