//! Commands on the disks that are served.

use super::answer::{keeps_no_secret, text, with_remark};
use super::command::{Action, Command};
use super::metrics;
use super::pause::Pauses;
use super::record::Record;
use super::socket::Operator;
use crate::export::Export;
use qcow2_blockdev::{
    CreateHow, ImageName, Naming, NewImageFile, NewTarget, OpenOptions, Sharing, locate_backing, open_on,
};
use qcow2_core::format::text::bytes_of;
use qcow2_core::{BackingName, GuestDisk, Image, LiveDisk, NewSnapshot};
use qcow2_io::{FileResolver, Policy, path_of};
use qcow2_ops::bitmap::change_bitmap;
use qcow2_ops::live::{
    LiveSnapshotOptions, MiddleLayer, commit_middle, commit_top, external_snapshot, on_image,
};
use qcow2_ops::snapshot::{self, SnapshotName};
use qcow2_ops::{CallerError, Progress};
use serde_json::{Value, json};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// Bytes between two progress events.
const TELL: u64 = 16 << 20;

/// How a disk came to be, so that its layers can be opened again.
#[non_exhaustive]
pub struct ControlledOptions {
    /// File of the top.
    pub file: String,
    /// How layers are opened.
    pub open: OpenOptions,
    /// Where the top is recorded.
    pub record: Option<Record>,
    /// The observer of the disk.
    pub pauses: Option<Arc<Pauses>>,
}

impl ControlledOptions {
    /// The disk in `file`, opened as `open` says, with no record and nobody who measures its pauses.
    pub fn new(file: impl Into<String>, open: OpenOptions) -> Self {
        Self { file: file.into(), open, record: None, pauses: None }
    }
}

/// A disk that is served and whose layers can be changed.
struct Disk<'a> {
    export: &'a Export,
    top: Mutex<String>,
    options: ControlledOptions,
    /// Openings of layers whose locks keep other writers away from files that were opened again.
    held: Mutex<Vec<Arc<dyn GuestDisk>>>,
}

/// All disks of a server.
pub struct Controlled<'a> {
    disks: Vec<Disk<'a>>,
    stop: &'a (dyn Fn() -> bool + Sync),
}

/// A layer: file, format, size.
struct Layer {
    file: String,
    format: &'static str,
    size: u64,
}

type Answer = Result<Value, String>;

impl<'a> Controlled<'a> {
    /// The disks of `exports`, each with how it came to be. The layers of an export can be changed if its
    /// disk is a [`LiveDisk`] that was opened with exchangeable layers. `stop` ends a long command.
    pub fn new(
        exports: impl IntoIterator<Item = (&'a Export, ControlledOptions)>,
        stop: &'a (dyn Fn() -> bool + Sync),
    ) -> Self {
        let disk = |(export, options): (&'a Export, ControlledOptions)| Disk {
            export,
            top: Mutex::new(options.file.clone()),
            options,
            held: Mutex::default(),
        };
        Self { disks: exports.into_iter().map(disk).collect(), stop }
    }

    fn disk(&self, name: Option<&str>) -> Result<&Disk<'a>, String> {
        match (name, &self.disks[..]) {
            (None, [only]) => Ok(only),
            (None, _) => Err("the member 'disk' is missing: more than one disk is served".to_owned()),
            (Some(name), disks) => {
                let found = disks.iter().find(|disk| disk.export.name() == name);
                found.ok_or_else(|| format!("no disk is served as '{name}'"))
            }
        }
    }

    fn of_each(&self, tell: impl Fn(&Disk<'a>) -> Answer) -> Answer {
        let told = self.disks.iter().map(|disk| Ok((disk.export.name().to_owned(), tell(disk)?)));
        Ok(Value::Object(told.collect::<Result<_, String>>()?))
    }
}

impl Operator for Controlled<'_> {
    fn run(&self, command: &Command, tell: &(dyn Fn(Value) + Sync)) -> Answer {
        let name = command.disk.as_deref();
        match &command.action {
            Action::Query => self.of_each(Disk::query),
            Action::Statistics => self.of_each(|disk| Ok(metrics::as_json(disk.export.statistics()))),
            Action::Metrics => {
                let exports = self.disks.iter().map(|disk| disk.export);
                Ok(Value::String(metrics::as_text(exports)))
            }
            action => {
                let disk = self.disk(name)?;
                let telling = Telling { tell, stop: self.stop, done: AtomicU64::new(0), total: 0.into() };
                let held = disk.pauses();
                let mut answer = disk.change(action, &telling)?;
                if let (Value::Object(members), Some(pauses)) = (&mut answer, &disk.options.pauses)
                    && pauses.count() > held
                {
                    members.insert("pause-ns".to_owned(), pauses.last().into());
                }
                Ok(answer)
            }
        }
    }
}

impl Disk<'_> {
    fn live(&self) -> Result<&LiveDisk, String> {
        self.export.disk().as_live().ok_or_else(|| "this disk is served for reading only".to_owned())
    }

    /// How often requests were held back so far.
    fn pauses(&self) -> u64 {
        self.options.pauses.as_ref().map_or(0, |pauses| pauses.count())
    }

    fn top(&self) -> MutexGuard<'_, String> {
        self.top.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, action: &Action, progress: &Telling<'_>) -> Answer {
        let live = self.live()?;
        match action {
            Action::Snapshot { file } => self.snapshot(live, file),
            Action::Commit { depth: 0 } => self.commit(live, progress),
            Action::Commit { depth } => self.commit_below(live, *depth, progress),
            Action::Backup(backup) => backup.run(live, &self.options.open, progress),
            Action::SnapshotSave { name } => {
                let new = new_snapshot(name);
                let taken = on_image(live, |image| snapshot::create(image, &new)).map_err(text)?;
                Ok(json!({"id": String::from_utf8_lossy(&taken.id)}))
            }
            Action::SnapshotDelete { name } => {
                let name = SnapshotName::Any(name.clone());
                on_image(live, |image| snapshot::delete(image, &name)).map_err(text)?;
                Ok(json!({}))
            }
            Action::SnapshotList => with_image(live, snapshots),
            Action::Bitmap { bitmap, action } => {
                on_image(live, |image| change_bitmap(image, bitmap, action, None)).map_err(text)?;
                Ok(json!({}))
            }
            Action::BitmapList => with_image(live, bitmaps),
            Action::Resize { size } if *size < live.size() => {
                Err(format!("the disk has {} bytes: what is behind {size} would be lost", live.size()))
            }
            Action::Resize { size } => {
                live.resize(*size).map_err(text)?;
                Ok(json!({"size": live.size()}))
            }
            Action::Query | Action::Statistics | Action::Metrics => Err("not about one disk".to_owned()),
        }
    }

    fn query(&self) -> Answer {
        let layers = self.layers()?;
        let told = layers.into_iter().map(
            |Layer { file, format, size }| json!({"file": file, "format": format, "virtual-size": size}),
        );
        Ok(json!({"layers": told.collect::<Vec<_>>(), "read-only": self.export.is_read_only()}))
    }

    /// The layers from the top down.
    fn layers(&self) -> Result<Vec<Layer>, String> {
        let mut file = self.top().clone();
        let mut disk = match self.export.disk().as_live() {
            Some(live) => live.layer(),
            None => Arc::clone(self.export.disk()),
        };
        let mut layers = Vec::new();
        loop {
            let image = disk.as_image();
            let format = if image.is_some() { "qcow2" } else { "raw" };
            layers.push(Layer { file: file.clone(), format, size: disk.size() });
            let recorded = image.and_then(|image| image.header().backing_file_name());
            let (Some(recorded), Some(below)) = (recorded, disk.backing()) else { return Ok(layers) };
            file = locate_backing(&file, &recorded);
            disk = below.as_live().map_or_else(|| Arc::clone(below), LiveDisk::layer);
        }
    }

    fn snapshot(&self, live: &LiveDisk, file: &str) -> Answer {
        let target = NewTarget::parse(file).map_err(|kind| text(&kind))?;
        let NewTarget::File(path) = &target else {
            return Err(format!("{file}: the new overlay must be a file"));
        };
        if path_of(path).exists() {
            return Err(format!("{file}: the file exists already"));
        }
        keeps_no_secret(&*live.layer(), "its overlay")?;
        let old = self.top().clone();
        let format = if live.layer().as_image().is_some() { "qcow2" } else { "raw" };
        let backing = FileResolver::new(path_of(path), Policy::Deny).name_for(&path_of(&old));
        let backing = backing.map_err(|error| format!("cannot say where '{old}' is: {error}"))?;
        let mut how = CreateHow::new();
        if let Some(files) = &self.options.open.open_files {
            how = how.among(files);
        }
        let new = NewImageFile::new(path, &how);
        let mut engine = qcow2_core::OpenOptions::writable();
        engine.codecs = self.options.open.codecs();
        engine.exchangeable = true;
        engine.discard_freed = true;
        let options = LiveSnapshotOptions::new(backing, format).with_open(engine);
        let record = || self.record("qcow2", path);
        let taken = external_snapshot(live, &new, &record, &options).map_err(text)?;
        *self.top() = path.clone();
        Ok(with_remark(json!({"top": path, "below": old}), taken.unclean))
    }

    fn commit(&self, live: &LiveDisk, progress: &Telling<'_>) -> Answer {
        if self.options.record.is_none() {
            return Err("committing the top changes which file is to be opened after a crash: \
                        the server needs a record of it (--record FILE)"
                .to_owned());
        }
        let layers = self.layers()?;
        let [top, base, ..] = &layers[..] else { return Err("there is no layer below".to_owned()) };
        // Before it is exchanged, and whatever becomes of the commit: its locks keep other writers away.
        self.hold(self.below(live, 1)?);
        let open = |below: Option<&Arc<dyn GuestDisk>>| self.open(base, below);
        let record = || self.record(base.format, &base.file);
        let report = commit_top(live, &open, &record, progress).map_err(text)?;
        *self.top() = base.file.clone();
        let answer = json!({"top": base.file, "retired": top.file});
        Ok(with_remark(answer, report.unclean))
    }

    fn commit_below(&self, live: &LiveDisk, depth: usize, progress: &Telling<'_>) -> Answer {
        let layers = self.layers()?;
        let (Some(above), Some(middle), Some(base)) =
            (layers.get(depth.wrapping_sub(1)), layers.get(depth), layers.get(depth.saturating_add(1)))
        else {
            return Err(format!("the chain has {} layers: there is none below layer {depth}", layers.len()));
        };
        let name = FileResolver::new(path_of(&above.file), Policy::Deny).name_for(&path_of(&base.file));
        let name = name.map_err(|error| format!("cannot say where '{}' is: {error}", base.file))?;
        for exchanged in [depth + 1, depth.max(2) - 1] {
            self.hold(self.below(live, exchanged)?);
        }
        let open_base = |below: Option<&Arc<dyn GuestDisk>>| self.open(base, below);
        let open_overlay = |below: Option<&Arc<dyn GuestDisk>>| self.open(above, below);
        let layer = MiddleLayer {
            depth,
            link: BackingName { name, format: Some(base.format.to_owned()) },
            base: &open_base,
            overlay: &open_overlay,
        };
        let report = commit_middle(live, &layer, progress).map_err(text)?;
        Ok(with_remark(json!({"retired": middle.file, "into": base.file}), report.unclean))
    }

    /// Opens a layer for writing in the place where it is open for reading, which has its locks.
    fn open(
        &self,
        layer: &Layer,
        below: Option<&Arc<dyn GuestDisk>>,
    ) -> Result<Arc<dyn GuestDisk>, CallerError> {
        let naming = Naming::default().with_format(Some(layer.format.to_owned()));
        let name = ImageName::parse(&layer.file, &naming)?;
        let mut how = self.options.open.clone().writable().with_sharing(Sharing::Held);
        // That it is open elsewhere is known, and wanted.
        how.open_files = None;
        Ok(open_on(&name, &how, below)?)
    }

    /// The opening of the layer that has `depth` others above it.
    fn below(&self, live: &LiveDisk, depth: usize) -> Result<Arc<dyn GuestDisk>, String> {
        let mut disk = live.layer();
        for _ in 0..depth {
            let below = disk.backing().ok_or("there is no layer below")?;
            disk = below.as_live().map_or_else(|| Arc::clone(below), LiveDisk::layer);
        }
        Ok(disk)
    }

    fn hold(&self, disk: Arc<dyn GuestDisk>) {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).push(disk);
    }

    fn record(&self, format: &str, file: &str) -> Result<(), CallerError> {
        match &self.options.record {
            Some(record) => Ok(record.write(format, file)?),
            None => Ok(()),
        }
    }
}

/// Reports to the client, at times.
struct Telling<'a> {
    tell: &'a (dyn Fn(Value) + Sync),
    stop: &'a (dyn Fn() -> bool + Sync),
    done: AtomicU64,
    total: AtomicU64,
}

impl Progress for Telling<'_> {
    fn set_total(&self, bytes: u64) {
        self.total.store(bytes, Ordering::Relaxed);
    }

    fn advance(&self, bytes: u64) {
        let before = self.done.fetch_add(bytes, Ordering::Relaxed);
        if before / TELL != (before + bytes) / TELL {
            let total = self.total.load(Ordering::Relaxed);
            (self.tell)(json!({"event": "progress", "done": before + bytes, "total": total}));
        }
    }

    fn should_stop(&self) -> bool {
        (self.stop)()
    }
}

fn with_image(live: &LiveDisk, tell: impl Fn(&Image) -> qcow2_core::Result<Value>) -> Answer {
    let layer = live.layer();
    let image = layer.as_image().ok_or("the top layer is no qcow2 image")?;
    tell(image).map_err(text)
}

fn snapshots(image: &Image) -> qcow2_core::Result<Value> {
    let told = image.snapshots()?.into_iter().map(|snapshot| {
        json!({
            "id": String::from_utf8_lossy(&snapshot.id),
            "name": String::from_utf8_lossy(&snapshot.name),
            "date-sec": snapshot.date_seconds,
        })
    });
    Ok(Value::Array(told.collect()))
}

fn bitmaps(image: &Image) -> qcow2_core::Result<Value> {
    let told = image.bitmaps()?.into_iter().map(|bitmap| {
        json!({
            "name": bitmap.name_text(),
            "granularity": 1_u64 << bitmap.granularity_bits,
            "recording": bitmap.auto,
            "inconsistent": bitmap.in_use,
        })
    });
    Ok(Value::Array(told.collect()))
}

/// Now, by the system's clock.
fn new_snapshot(name: &str) -> NewSnapshot {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut new = NewSnapshot::default();
    new.name = bytes_of(name).into_owned();
    new.date_seconds = now.as_secs() as u32;
    new.date_nanoseconds = now.subsec_nanos();
    new
}
