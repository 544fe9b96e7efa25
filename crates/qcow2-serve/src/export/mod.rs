//! A disk as clients see it.

mod context;
mod errno;
mod statistics;

pub use context::Context;
pub use statistics::{Counter, Statistics};

use errno::error_code;
use qcow2_core::format::Version;
use qcow2_core::{GuestDisk, GuestOffset, GuestRange, Image, ZeroMode};
use qcow2_nbd::blocking::server::Disk;
use qcow2_nbd::proto::{ErrorCode, Extent, transmission_flag};
use qcow2_nbd::server::Facts;
use std::fmt;
use std::sync::Arc;

/// What becomes of written zeroes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DetectZeroes {
    /// They are written.
    #[default]
    Off,
    /// They become zero clusters that stay allocated.
    On,
    /// Their space may be deallocated, if discards reach the disk.
    Unmap,
}

impl DetectZeroes {
    /// Reads `off`, `on` or `unmap`.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "off" => Some(Self::Off),
            "on" => Some(Self::On),
            "unmap" => Some(Self::Unmap),
            _ => None,
        }
    }
}

/// How a disk is exported.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ExportOptions {
    /// Its name.
    pub name: String,
    /// A text for people.
    pub description: String,
    /// Byte of the disk at which it begins.
    pub start: u64,
    /// Clients cannot change it.
    pub read_only: bool,
    /// Several clients may use it at once, and are told so.
    pub shared: bool,
    /// Trims and zeroes may deallocate space. Otherwise trims succeed and do nothing.
    pub discards: bool,
    /// Each write is durable before it is reported.
    pub durable_writes: bool,
    /// What becomes of written zeroes.
    pub detect_zeroes: DetectZeroes,
    /// The context of allocation depths is offered.
    pub allocation_depth: bool,
    /// Names of bitmaps that are offered as contexts.
    pub bitmaps: Vec<String>,
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self {
            name: String::new(),
            description: String::new(),
            start: 0,
            read_only: false,
            shared: true,
            discards: true,
            durable_writes: false,
            detect_zeroes: DetectZeroes::Off,
            allocation_depth: false,
            bitmaps: Vec::new(),
        }
    }
}

/// Why a disk is not exported.
#[derive(Debug)]
#[non_exhaustive]
pub enum ExportError {
    /// It begins behind the end of the disk.
    Start {
        /// Where it would begin.
        start: u64,
        /// Bytes of the disk.
        size: u64,
    },
    /// The disk has no bitmap of this name.
    NoBitmap(String),
    /// A bitmap cannot be read.
    Bitmap(qcow2_core::Error),
}

impl fmt::Display for ExportError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Start { start, size } => {
                write!(f, "an export from byte {start} on, of a disk of {size} bytes")
            }
            Self::NoBitmap(name) => write!(f, "the disk has no bitmap '{name}'"),
            Self::Bitmap(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for ExportError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Bitmap(error) => error.source(),
            _ => None,
        }
    }
}

/// A disk that clients use.
pub struct Export {
    disk: Arc<dyn GuestDisk>,
    facts: Arc<Facts>,
    contexts: Vec<Context>,
    options: ExportOptions,
    statistics: Arc<Statistics>,
}

impl Export {
    /// An export of `disk`, which must have been opened for writing unless the export is read-only. Disk:
    /// reads the bitmaps that are offered.
    pub fn new(disk: Arc<dyn GuestDisk>, options: ExportOptions) -> Result<Self, ExportError> {
        let start = options.start;
        let left = disk.size().checked_sub(start);
        let size = left.ok_or_else(|| ExportError::Start { start, size: disk.size() })?;
        let mut contexts = vec![Context::Allocation];
        if options.allocation_depth {
            contexts.push(Context::Depth);
        }
        for name in &options.bitmaps {
            contexts.push(Context::bitmap(&*disk, name)?);
        }
        let mut facts = Facts::new(&options.name, size, flags(&*disk, &options));
        facts.description.clone_from(&options.description);
        facts.contexts = contexts.iter().map(Context::name).collect();
        let preferred = disk.cluster_size().clamp(4096, 1 << 20);
        facts.sizes.preferred = u32::try_from(preferred).unwrap_or(4096);
        let (facts, statistics) = (Arc::new(facts), Arc::default());
        Ok(Self { disk, facts, contexts, options, statistics })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.facts.name
    }

    /// What clients are told of it that connect now: the size is that of the disk at this moment.
    pub fn facts(&self) -> Arc<Facts> {
        let size = self.disk.size().saturating_sub(self.options.start);
        if size == self.facts.size {
            return Arc::clone(&self.facts);
        }
        let mut facts = Facts::clone(&self.facts);
        facts.size = size;
        Arc::new(facts)
    }

    /// What clients have done with it. Who serves its disk in other ways counts there too.
    pub fn statistics(&self) -> &Arc<Statistics> {
        &self.statistics
    }

    /// The disk.
    pub fn disk(&self) -> &Arc<dyn GuestDisk> {
        &self.disk
    }

    /// Whether clients cannot change it.
    pub fn is_read_only(&self) -> bool {
        self.options.read_only
    }

    /// Makes durable what clients have written.
    pub fn flush(&self) -> qcow2_core::Result<()> {
        if self.options.read_only { Ok(()) } else { self.disk.flush() }
    }

    fn zero(&self, offset: u64, len: u64, may_unmap: bool) -> Result<(), ErrorCode> {
        let mode = match may_unmap && self.options.discards {
            true => ZeroMode::MayUnmap,
            false => ZeroMode::KeepAllocated,
        };
        done(self.disk.write_zeroes(self.range(offset, len), mode))?;
        self.after_write()
    }

    fn at(&self, offset: u64) -> GuestOffset {
        GuestOffset::new(self.options.start + offset)
    }

    fn range(&self, offset: u64, len: u64) -> GuestRange {
        GuestRange::between(self.at(offset), self.at(offset + len))
    }

    fn after_write(&self) -> Result<(), ErrorCode> {
        if self.options.durable_writes { done(self.disk.flush()) } else { Ok(()) }
    }
}

impl Disk for Export {
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), ErrorCode> {
        let len = buf.len() as u64;
        self.statistics.reads.time(len, || done(self.disk.read_at(self.at(offset), buf)))
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), ErrorCode> {
        self.statistics.writes.time(data.len() as u64, || {
            let detects = self.options.detect_zeroes;
            if detects != DetectZeroes::Off && data.iter().all(|byte| *byte == 0) {
                return self.zero(offset, data.len() as u64, detects == DetectZeroes::Unmap);
            }
            done(self.disk.write_at(self.at(offset), data))?;
            self.after_write()
        })
    }

    fn flush(&self) -> Result<(), ErrorCode> {
        self.statistics.flushes.time(0, || done(Self::flush(self)))
    }

    fn trim(&self, offset: u64, len: u64) -> Result<(), ErrorCode> {
        self.statistics.trims.time(len, || match self.options.discards {
            true => done(self.disk.discard(self.range(offset, len))).and_then(|()| self.after_write()),
            false => Ok(()),
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, no_hole: bool, fast: bool) -> Result<(), ErrorCode> {
        let unit = self.disk.zero_granularity().max(1);
        // Parts of a unit are written as bytes, but for the end of the disk, which no byte follows.
        let (start, end) = (self.options.start + offset, self.options.start + offset + len);
        let is_whole = start.is_multiple_of(unit) && (end.is_multiple_of(unit) || end == self.disk.size());
        if fast && !is_whole {
            return Err(ErrorCode::NOT_SUPPORTED);
        }
        self.statistics.zeroes.time(len, || self.zero(offset, len, !no_hole))
    }

    fn cache(&self, offset: u64, len: u64) -> Result<(), ErrorCode> {
        // The tables are what a later read would wait for twice.
        done(self.disk.extent_at(self.range(offset, len)).map(drop))
    }

    fn status(
        &self,
        context: u32,
        (offset, len): (u64, u64),
        most: usize,
        extents: &mut Vec<Extent>,
    ) -> Result<(), ErrorCode> {
        let range = (self.options.start + offset, len);
        let context = self.contexts.get(context as usize).ok_or(ErrorCode::INVALID)?;
        done(context.extents(&*self.disk, range, most, extents))
    }

    fn zero_run(&self, offset: u64, len: u64) -> Result<(u64, bool), ErrorCode> {
        done(context::zero_run(&*self.disk, self.options.start + offset, len))
    }
}

/// The transmission flags of an export.
fn flags(disk: &dyn GuestDisk, options: &ExportOptions) -> u16 {
    let mut flags =
        transmission_flag::SEND_FLUSH | transmission_flag::SEND_FUA | transmission_flag::SEND_CACHE;
    if options.shared {
        // One disk is behind all connections: a flush covers every write that was reported on any of them.
        flags |= transmission_flag::CAN_MULTI_CONN;
    }
    if options.read_only {
        return flags | transmission_flag::READ_ONLY;
    }
    flags |= transmission_flag::SEND_TRIM | transmission_flag::SEND_WRITE_ZEROES;
    // Elsewhere nobody knows whether a range is zeroed by writing it.
    if with_image(disk, has_zero_clusters) == Some(true) {
        flags |= transmission_flag::SEND_FAST_ZERO;
    }
    flags
}

/// What `look` sees in the image that is the disk, or the top layer of it.
fn with_image<T>(disk: &dyn GuestDisk, look: impl FnOnce(&Image) -> T) -> Option<T> {
    match disk.as_live() {
        Some(live) => live.request().disk().as_image().map(look),
        None => disk.as_image().map(look),
    }
}

fn has_zero_clusters(image: &Image) -> bool {
    image.header().version >= Version::V3
}

fn done<T>(result: qcow2_core::Result<T>) -> Result<T, ErrorCode> {
    result.map_err(|error| error_code(&error))
}
