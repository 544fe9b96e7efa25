//! Replaces the header: for changes of names, formats, versions or features that span sectors.
//!
//! Order on disk, if more than the first sector changes: the backing file's name in unused bytes of the first
//! cluster; barrier; a first sector that points to it and has every extension but the feature names; barrier;
//! everything behind the first sector; barrier; the new header's first sector; barrier. At every moment the
//! first sector alone decides which header is valid.

use super::HeaderStore;
use crate::error::{Error, ErrorKind, Result};
use crate::invariant;
use crate::meta::page::SECTOR_SIZE;
use crate::sync::lock;
use ::alloc::vec;
use ::alloc::vec::Vec;
use qcow2_format::{FormatError, Header, HostOffset};

impl HeaderStore {
    /// Replaces the header on disk by `new`; durable when it returns. Errors: `Format` if it does not fit
    /// into the first cluster; `Storage`. After a failed write the old header is written back, and only if
    /// that fails too the image is poisoned; a failed barrier poisons it.
    pub(crate) fn switch_to(&self, new: Header) -> Result<()> {
        let old = self.current();
        let plan = self.plan(&new)?;
        let Err(failed) = self.take(&plan) else {
            self.adopt(&plan, new);
            return Ok(());
        };
        let FailedStep { error, at_barrier } = failed;
        // Whatever part of the step has arrived: the header on disk is the old one or the new one.
        let back = if at_barrier { None } else { self.plan(&old).ok() };
        match back.filter(|back| self.take(back).is_ok()) {
            Some(back) => self.adopt(&back, old),
            None => self.file.poison(),
        }
        Err(error)
    }

    /// The steps from the header on disk to `new`.
    fn plan(&self, new: &Header) -> Result<Vec<Step>> {
        let mut old = vec![0; self.file.geometry().cluster_size() as usize];
        self.file.storage().read_padded(HostOffset::new(0), &mut old)?;
        let plan = plan_switch(&old, new)
            .map_err(|e| Error::new(ErrorKind::Format, "the new header cannot be written").with_source(e))?;
        assert!(plan.iter().any(|step| step.offset == 0), "the header is switched without its first sector");
        Ok(plan)
    }

    /// Writes the steps, each with its barrier.
    fn take(&self, plan: &[Step]) -> Result<(), FailedStep> {
        for step in plan {
            invariant::may_write(self.file.is_writable());
            if step.offset == 0 {
                invariant::is_header(&step.bytes);
            }
            let written = self.file.storage().write_at(HostOffset::new(step.offset), &step.bytes);
            written.map_err(|error| FailedStep { error: error.into(), at_barrier: false })?;
            self.file.flush().map_err(|error| FailedStep { error, at_barrier: true })?;
        }
        Ok(())
    }

    /// The steps have made `header` the one on disk.
    fn adopt(&self, plan: &[Step], header: Header) {
        let mut state = lock(&self.state);
        if let Some(last) = plan.iter().rev().find(|step| step.offset == 0) {
            state.sector.copy_from_slice(&last.bytes[..SECTOR_SIZE as usize]);
        }
        state.header = header;
    }
}

struct FailedStep {
    error: Error,
    /// True if the step's bytes were written, and it was their barrier that failed.
    at_barrier: bool,
}

/// One write, followed by a barrier.
#[derive(Debug, PartialEq, Eq)]
struct Step {
    offset: u64,
    bytes: Vec<u8>,
}

/// The steps from the first cluster with the bytes `old` to the header `new`.
fn plan_switch(old: &[u8], new: &Header) -> Result<Vec<Step>, FormatError> {
    let sector = SECTOR_SIZE as usize;
    let target = new.encode_cluster()?;
    let step = |from: usize, to: usize| Step { offset: from as u64, bytes: target[from..to].to_vec() };
    if target[sector..] == old[sector..] {
        return Ok(vec![step(0, sector)]);
    }
    let end = used(old).max(used(&target)).next_multiple_of(sector);
    let name = new.backing_file.as_deref().unwrap_or_default();
    let mut short = new.clone();
    short.extensions.feature_names = None;
    let mut first = short.encode_with_name_at(end as u64)?;
    let room = end + name.len() <= target.len();
    if first.len() > sector || !room {
        // The extensions do not fit into the first sector, or the cluster has no unused bytes for the name:
        // there is no safe order, so one write.
        return Ok(vec![step(0, end)]);
    }
    first.resize(sector, 0);
    let apart = |bytes: &[u8]| {
        let mut bytes = bytes.to_vec();
        bytes.resize(name.len().next_multiple_of(sector).min(target.len() - end), 0);
        Step { offset: end as u64, bytes }
    };
    let mut steps = Vec::new();
    if !name.is_empty() {
        steps.push(apart(name));
    }
    steps.push(Step { offset: 0, bytes: first });
    steps.push(step(sector, end));
    steps.push(step(0, sector));
    if !name.is_empty() {
        steps.push(apart(&[]));
    }
    debug_assert!(
        steps.iter().all(|step| step.offset as usize + step.bytes.len() <= target.len()),
        "a step leaves the header's cluster"
    );
    debug_assert!(
        steps.iter().rfind(|step| step.offset == 0).is_some_and(|last| last.bytes == target[..sector]),
        "the last first sector is not the new header's"
    );
    Ok(steps)
}

/// Length up to the last nonzero byte.
fn used(cluster: &[u8]) -> usize {
    cluster.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use qcow2_format::Version;
    use qcow2_format::feature::FeatureName;

    fn header(name: Option<&str>, format: Option<&str>, names: bool) -> Header {
        let mut header = Header::new(Version::V3, 12);
        (header.size, header.l1_size) = (1 << 20, 1);
        header.l1_table_offset = HostOffset::new(0x3000);
        header.refcount_table_offset = HostOffset::new(0x1000);
        header.refcount_table_clusters = 1;
        header.backing_file = name.map(|name| name.as_bytes().to_vec());
        header.extensions.backing_format = format.map(|format| format.as_bytes().to_vec());
        header.extensions.feature_names = names.then(FeatureName::standard);
        header
    }

    /// After every step, and after any single sector of it, the cluster parses as the old or the new header.
    #[track_caller]
    fn check(old: &Header, new: &Header) {
        let mut disk = old.encode_cluster().unwrap();
        let steps = plan_switch(&disk, new).unwrap();
        let seen = |disk: &[u8]| {
            let header = Header::parse(disk).unwrap();
            (header.backing_file, header.extensions.backing_format, header.version)
        };
        let allowed = [old, new].map(|h| seen(&h.encode_cluster().unwrap()));
        for step in &steps {
            for (index, part) in step.bytes.chunks(512).enumerate() {
                let mut cut = disk.clone();
                let at = step.offset as usize + index * 512;
                cut[at..at + part.len()].copy_from_slice(part);
                assert!(allowed.contains(&seen(&cut)), "sector {index} of the step at {}", step.offset);
            }
            let at = step.offset as usize;
            disk[at..at + step.bytes.len()].copy_from_slice(&step.bytes);
        }
        assert_eq!(disk, new.encode_cluster().unwrap());
    }

    #[test]
    fn a_crash_leaves_the_old_name_or_the_new_one() {
        let long = "x".repeat(1000);
        let names = [None, Some("a"), Some("some/longer/name.qcow2"), Some(&*long)];
        for from in names {
            for to in names {
                for formats in [("raw", "qcow2"), ("qcow2", "raw")] {
                    let format = |name: Option<&str>, format| name.and(Some(format));
                    let old = header(from, format(from, formats.0), true);
                    check(&old, &header(to, format(to, formats.1), true));
                    check(&old, &header(to, format(to, formats.1), false));
                }
            }
        }
    }

    #[test]
    fn a_change_within_the_first_sector_is_one_write() {
        let old = header(None, None, true);
        let new = Header { size: 2 << 20, ..old.clone() };
        assert_eq!(plan_switch(&old.encode_cluster().unwrap(), &new).unwrap().len(), 1);
    }
}
