//! What every step of a rescue works on.

use super::counts::Counts;
use super::entry::Worth;
use super::marks::Marks;
use crate::error::{Error, ErrorKind, Result};
use crate::progress::Progress;
use qcow2_core::{HostOffset, Storage, StorageError};
use qcow2_format::l2::L2Format;
use qcow2_format::{Header, HostCluster};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;

/// The bytes of the image file.
#[derive(Clone, Copy)]
pub(super) struct Bytes<'a> {
    pub(super) storage: &'a dyn Storage,
    pub(super) len: u64,
}

impl<'a> Bytes<'a> {
    pub(super) fn new(storage: &'a dyn Storage) -> Result<Self> {
        Ok(Self { storage, len: storage.len().map_err(self::storage)? })
    }

    /// Fills `buf`. What is past the end, or what the device cannot read, is zeroes: a sector that is lost is
    /// a reason to look elsewhere, not to give up.
    pub(super) fn read(&self, at: HostOffset, buf: &mut [u8]) -> Result<()> {
        if at.value() >= self.len || self.storage.read_padded(at, buf).is_err() {
            buf.fill(0);
        }
        Ok(())
    }

    /// Calls `visit` for the runs of the file that may hold something else than zeroes, in order.
    pub(super) fn data_runs(&self, mut visit: impl FnMut(Range<u64>) -> Result<bool>) -> Result<()> {
        let mut at = 0;
        while at < self.len {
            let left = self.len - at;
            // A device that cannot tell is all data.
            let extent = self.storage.extent_at(HostOffset::new(at), left).ok();
            let (len, data) = extent.map_or((left, true), |extent| (extent.len.clamp(1, left), extent.data));
            if data && !visit(at..at + len)? {
                return Ok(());
            }
            at += len;
        }
        Ok(())
    }
}

/// What entries are judged by.
pub(super) struct Known {
    pub(super) format: L2Format,
    /// Bytes of the image file.
    pub(super) image_len: u64,
    /// Bytes of the file that holds the guest's data.
    pub(super) data_len: u64,
    /// Clusters that are known to be metadata, L2 tables included.
    pub(super) metadata: Marks,
}

impl Known {
    /// The clusters of the image file that `len` bytes from `at` on touch.
    pub(super) fn clusters(&self, at: HostOffset, len: u64) -> Range<u64> {
        let geometry = self.format.geometry;
        let first = geometry.host_cluster(at).value();
        let end = geometry.clusters_for(at.value().saturating_add(len).min(self.image_len));
        first..end.max(first)
    }
}

/// A rescue under way.
pub(super) struct Job<'a> {
    pub(super) bytes: Bytes<'a>,
    /// As found, or as derived.
    pub(super) header: Header,
    pub(super) known: Known,
    pub(super) counts: Option<Counts<'a>>,
    /// L2 tables that an L1 table leads to.
    pub(super) tables: Marks,
    /// Clusters that a table maps.
    pub(super) mapped: Marks,
    /// What clusters are worth as L2 tables, as far as they were asked for.
    pub(super) worths: RefCell<BTreeMap<u64, Worth>>,
    /// The last extent of the file that was asked for, and whether it is data.
    pub(super) extent: RefCell<(Range<u64>, bool)>,
    pub(super) progress: &'a dyn Progress,
}

/// Clusters whose worth is remembered. Origin: ours; 40 MiB.
const MAX_WORTHS: usize = 1 << 20;

impl Job<'_> {
    /// Whether a cluster is in a hole of the file, or past its end: it need not be read.
    pub(super) fn is_hole(&self, cluster: u64) -> bool {
        let at = self.known.format.geometry.bytes_of(cluster);
        if at >= self.bytes.len {
            return true;
        }
        let mut known = self.extent.borrow_mut();
        if !known.0.contains(&at) {
            // A device that cannot tell is all data.
            let extent = self.bytes.storage.extent_at(HostOffset::new(at), self.bytes.len - at).ok();
            let (len, data) = extent.map_or((1, true), |extent| (extent.len.max(1), extent.data));
            *known = (at..at.saturating_add(len), data);
        }
        let end = at.saturating_add(self.known.format.geometry.cluster_size()).min(self.bytes.len);
        !known.1 && end <= known.0.end
    }

    /// What the cluster that an L1 entry leads to is worth as an L2 table. A table is named by the active and
    /// by many older L1 tables, and by as many entries as somebody likes.
    pub(super) fn worth_at(&self, cluster: u64) -> Result<Worth> {
        if let Some(&worth) = self.worths.borrow().get(&cluster) {
            return Ok(worth);
        }
        let worth = match self.is_hole(cluster) {
            true => Worth::Empty,
            false => self.known.worth(&self.cluster(cluster)?),
        };
        let mut worths = self.worths.borrow_mut();
        if worths.len() < MAX_WORTHS {
            worths.insert(cluster, worth);
        }
        Ok(worth)
    }

    /// The bytes of cluster `cluster`.
    pub(super) fn cluster(&self, cluster: u64) -> Result<Vec<u8>> {
        let mut content = vec![0; self.known.format.geometry.cluster_size() as usize];
        match self.known.format.geometry.host_offset(HostCluster::new(cluster)) {
            Some(at) => self.bytes.read(at, &mut content)?,
            None => content.fill(0),
        }
        Ok(content)
    }

    pub(super) fn go_on(&self) -> Result<()> {
        go_on(self.progress)
    }
}

/// Errors: `Stopped` where that is asked for.
pub(super) fn go_on(progress: &dyn Progress) -> Result<()> {
    match progress.should_stop() {
        true => Err(Error::new(ErrorKind::Stopped, "rescue was stopped")),
        false => Ok(()),
    }
}

pub(super) fn storage(error: StorageError) -> Error {
    failed(qcow2_core::Error::from(error))
}

pub(super) fn failed(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::new(ErrorKind::Metadata, "looking for what is left of the image").with_source(error)
}
