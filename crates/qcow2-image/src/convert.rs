//! Converts a disk to a new image or onto another disk.

use crate::disk::Disk;
use crate::error::Result;
use crate::new::NewDisk;
use crate::newfile::NewFile;
use crate::threads::Threads;
use qcow2_ops::{ConvertOptions, CopyReport, Progress, convert, converted_size};
use std::fmt;
use std::path::Path;
use std::slice;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// A conversion, started by [`Disk::convert`]. Each method sets one option; [`to`](Self::to) or
/// [`onto`](Self::onto) runs it, with one thread per processor. Holes and zeroes are not written.
///
/// ```no_run
/// use qcow2_image::{Disk, NewDisk};
///
/// let disk = Disk::options().follow_backing_files().open("overlay.qcow2")?;
/// disk.convert().compress().to("whole.qcow2", &NewDisk::qcow2().zstd())?;
/// disk.convert().to("whole.raw", &NewDisk::raw())?;
/// # Ok::<(), qcow2_image::Error>(())
/// ```
#[must_use = "nothing is converted before `to` or `onto` is called"]
pub struct Convert<'a> {
    source: &'a Disk,
    options: ConvertOptions,
    threads: Threads,
    progress: Option<Box<dyn Fn(Work) + Sync + 'a>>,
    stop: Option<&'a AtomicBool>,
}

/// Progress of a conversion, in guest bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Work {
    /// Bytes done.
    pub done: u64,
    /// Bytes in total.
    pub total: u64,
}

impl Work {
    /// Progress in percent, 0 to 100.
    ///
    /// ```
    /// # use qcow2_image::Work;
    /// assert_eq!(Work::default().percent(), 100.0, "an empty disk is done");
    /// ```
    pub fn percent(&self) -> f64 {
        if self.total == 0 { 100.0 } else { self.done.min(self.total) as f64 * 100.0 / self.total as f64 }
    }
}

impl Disk {
    /// Copies the content of this disk to a new image or another disk.
    pub fn convert(&self) -> Convert<'_> {
        let (options, threads) = (ConvertOptions::default(), Threads::per_core());
        Convert { source: self, options, threads, progress: None, stop: None }
    }
}

impl<'a> Convert<'a> {
    /// Stores clusters compressed if that makes them smaller; only for qcow2 targets without a data file.
    pub fn compress(mut self) -> Self {
        self.options.compress = true;
        self
    }

    /// Sets the number of threads.
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = Threads::new(threads);
        self
    }

    /// Calls `show` during the conversion, from any of the threads, at most once per MiB or cluster.
    pub fn progress(mut self, show: impl Fn(Work) + Sync + 'a) -> Self {
        self.progress = Some(Box::new(show));
        self
    }

    /// Stops with [`ErrorKind::Stopped`](crate::ErrorKind::Stopped) soon after `stop` becomes true.
    pub fn stop_on(mut self, stop: &'a AtomicBool) -> Self {
        self.stop = Some(stop);
        self
    }

    /// Creates `new` at `path` and copies the disk into it; durable on return. After an error a new file is
    /// deleted, and an overwritten one is left empty. Errors: as [`NewDisk::create`]; those of reading the
    /// disk; `Unsupported` for a target that cannot be compressed; `Stopped`.
    pub fn to(self, path: impl AsRef<Path>, new: &NewDisk) -> Result<CopyReport> {
        let size = converted_size(slice::from_ref(self.source.as_guest_disk()));
        let size = size.map_err(|e| self.source.failed(CONVERTING, e))?;
        let (target, files) = new.or_size(size).make(path.as_ref(), self.source.source.id)?;
        match self.run(&target, true) {
            Ok(report) => {
                target.close()?;
                files.into_iter().for_each(NewFile::keep);
                Ok(report)
            }
            Err(error) => {
                target.abandon();
                Err(error)
            }
        }
    }

    /// Overwrites `target`, for example a block device, with the disk; durable on return. Bytes of `target`
    /// past the size of this disk are unchanged. Errors: `InvalidOption` if it is smaller; those of reading
    /// the source and writing the target; `Stopped`.
    pub fn onto(self, target: &Disk) -> Result<CopyReport> {
        let report = self.run(target, false)?;
        target.flush()?;
        Ok(report)
    }

    fn run(&self, target: &Disk, target_is_zero: bool) -> Result<CopyReport> {
        let (sources, mut options) = (slice::from_ref(self.source.as_guest_disk()), self.options);
        options.target_is_zero = target_is_zero;
        let meter = Meter { show: self.progress.as_deref(), stop: self.stop, ..Meter::default() };
        let copied = convert(sources, &**target.as_guest_disk(), &options, &self.threads, &meter);
        target.changed(copied, || format!("{CONVERTING} from '{}'", self.source.path().display()))
    }
}

impl fmt::Debug for Convert<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Convert")
            .field("source", self.source)
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

const CONVERTING: &str = "converting the disk";

/// Adds up the progress of all workers.
#[derive(Default)]
struct Meter<'a> {
    show: Option<&'a (dyn Fn(Work) + Sync + 'a)>,
    stop: Option<&'a AtomicBool>,
    done: AtomicU64,
    total: AtomicU64,
}

impl Meter<'_> {
    fn show(&self) {
        if let Some(show) = self.show {
            show(Work { done: self.done.load(Ordering::Relaxed), total: self.total.load(Ordering::Relaxed) });
        }
    }
}

impl Progress for Meter<'_> {
    fn set_total(&self, bytes: u64) {
        self.total.store(bytes, Ordering::Relaxed);
        self.show();
    }

    fn advance(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
        self.show();
    }

    fn should_stop(&self) -> bool {
        self.stop.is_some_and(|stop| stop.load(Ordering::Relaxed))
    }

    fn is_watched(&self) -> bool {
        self.show.is_some()
    }
}
