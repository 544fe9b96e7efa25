//! Reads what is left of damaged images.

use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::options::{DiskOptions, codecs};
use qcow2_core::format::HostOffset;
use qcow2_core::{GuestDisk, ImageFormat};
use qcow2_ops::rescue::{RescueFiles, RescueOptions, RescueReport};
use qcow2_ops::{Progress, rescue};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A rescue, started by [`Disk::rescue`]: reads what is left of a qcow2 image that nothing opens any more.
/// Its header, L1 table, L2 tables or the end of the file may be gone. The image is never written, and no
/// file that it names is opened. Each method sets one option; [`open`](Self::open) opens what is left as a
/// disk.
///
/// ```
/// use qcow2_image::{Disk, NewDisk};
///
/// # let folder = tempfile::tempdir()?;
/// # let path = |name: &str| folder.path().join(name);
/// # let disk = Disk::create(path("disk.qcow2"), 1 << 20)?;
/// # disk.write_at(0, b"precious")?;
/// # disk.close()?;
/// # let mut bytes = std::fs::read(path("disk.qcow2"))?;
/// # bytes[..512].fill(0);
/// # std::fs::write(path("disk.qcow2"), bytes)?;
/// assert!(Disk::open(path("disk.qcow2")).is_err());
/// let rescued = Disk::rescue().size(1 << 20).open(path("disk.qcow2"))?;
/// rescued.disk().convert().to(path("rescued.qcow2"), &NewDisk::qcow2())?;
/// println!("{}", rescued.report());
/// # let mut bytes = [0; 8];
/// # Disk::open(path("rescued.qcow2"))?.read_at(0, &mut bytes)?;
/// # assert_eq!(&bytes, b"precious");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
#[must_use = "nothing is read before `open` is called"]
pub struct Rescue<'a> {
    how: DiskOptions,
    options: RescueOptions,
    data: Option<PathBuf>,
    backing: Option<Arc<dyn GuestDisk>>,
    stop: Option<&'a AtomicBool>,
}

impl Disk {
    /// Reads what is left of a damaged image.
    pub fn rescue<'a>() -> Rescue<'a> {
        let (how, options) = (Self::options(), RescueOptions::default());
        Rescue { how, options, data: None, backing: None, stop: None }
    }
}

impl<'a> Rescue<'a> {
    /// Size of the disk in bytes. Without a header nothing in the file tells it, and the disk is as large as
    /// what was found.
    pub fn size(mut self, size: u64) -> Self {
        self.options.size = Some(size);
        self
    }

    /// Cluster size in bytes: a header with another one is not believed. Without a header it is found by what
    /// the file holds, if that is enough.
    pub fn cluster_size(mut self, cluster_size: u64) -> Self {
        self.options.cluster_size = Some(cluster_size);
        self
    }

    /// Where in the file the L1 table is, if not where the header says: that of a snapshot, for example,
    /// which [`RescueReport::other_l1`] lists.
    pub fn l1_table(mut self, offset: u64) -> Self {
        self.options.l1_table = Some(HostOffset::new(offset));
        self
    }

    /// The external data file of the image. Without it everything that is in it is lost.
    pub fn data_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.data = Some(path.into());
        self
    }

    /// The disk below the image. Without it everything that is in it is lost.
    pub fn backing(mut self, disk: &Disk) -> Self {
        self.backing = Some(Arc::clone(disk.as_guest_disk()));
        self
    }

    /// Sets how the files are opened and where passwords come from. The format, the policy for names and the
    /// layers of `options` do not apply, and nothing is opened for writing.
    pub fn options(mut self, options: &DiskOptions) -> Self {
        self.how = options.clone();
        self
    }

    /// Stops with [`ErrorKind::Stopped`](crate::ErrorKind::Stopped) soon after `stop` becomes true.
    pub fn stop_on(mut self, stop: &'a AtomicBool) -> Self {
        self.stop = Some(stop);
        self
    }

    /// Finds what is left of the image at `path`. Disk: reads all tables, and looks at every cluster if
    /// tables are missing. Damage is no error: it is in the [report](Rescued::report).
    ///
    /// Errors: `NotFound`, `PermissionDenied`, `InUse`; `Corrupt` if nothing in the file tells its cluster
    /// size; `InvalidOption`; `Password`; `Stopped`; `Io`.
    pub fn open(&self, path: impl AsRef<Path>) -> Result<Rescued> {
        let path = path.as_ref();
        let how = self.how.for_rescue();
        let source = how.clone().format(ImageFormat::Qcow2).open_file(path)?;
        let mut files = RescueFiles::new(Arc::clone(&source.storage), codecs());
        if let Some(data) = &self.data {
            files.data = Some(how.clone().format(ImageFormat::Raw).open_file(data)?.storage);
        }
        files.backing.clone_from(&self.backing);
        let keys = how.passwords().keyring();
        files.keys = keys.as_deref().map(|keys| (keys, source.name.as_str()));
        let found = rescue(&files, &self.options, &Stop(self.stop));
        let found = found.map_err(|e| Error::from_cause(path, "rescuing the image", e))?;
        drop(files);
        let disk = Disk::new(path, found.disk(), source, how.engine());
        Ok(Rescued { disk, found })
    }
}

impl fmt::Debug for Rescue<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rescue")
            .field("how", &self.how)
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

/// What is left of a damaged image, made by [`Rescue::open`].
pub struct Rescued {
    disk: Disk,
    found: qcow2_ops::Rescue,
}

impl Rescued {
    /// The disk, read-only. What is lost reads as zeroes.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// What was found, lost and guessed. Streams that do not expand and sectors that the device cannot read
    /// are in it once they were read: ask for it again after a copy.
    pub fn report(&self) -> RescueReport {
        self.found.report()
    }
}

impl fmt::Debug for Rescued {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rescued").field("disk", &self.disk).finish_non_exhaustive()
    }
}

struct Stop<'a>(Option<&'a AtomicBool>);

impl Progress for Stop<'_> {
    fn set_total(&self, _bytes: u64) {}

    fn advance(&self, _bytes: u64) {}

    fn should_stop(&self) -> bool {
        self.0.is_some_and(|stop| stop.load(Ordering::Relaxed))
    }
}
