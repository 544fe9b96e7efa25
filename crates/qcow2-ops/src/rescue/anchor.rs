//! Places L2 tables by landmarks in the guest's data that they map.

use super::entry::Leads;
use super::job::Job;
use super::landmarks::{Landmark, WINDOW, is_start, of_file_system, partitions};
use super::place::Slot;
use super::report::{Evidence, Reason};
use super::tables::Candidate;
use crate::error::Result;
use qcow2_core::HostOffset;
use qcow2_format::l2::L2Entry;
use qcow2_format::limit::MAX_L1_ENTRIES;
use qcow2_format::{GuestOffset, bytes};
use std::collections::BTreeMap;

/// Places in the guest's data that are looked at. Origin: ours; each is two small reads.
const MAX_LOOKS: u64 = 1 << 20;
/// Bytes of a disk's or a partition's start.
const START: usize = 40 * WINDOW;

impl Job<'_> {
    /// Gives those of `orphans` a slot that map a landmark, if only one of them does and the slot lost its
    /// table. `grows`: how many ranges the disk has is not known. Disk: reads of each table and of guest data
    /// where landmarks would be.
    pub(super) fn by_landmarks(
        &mut self,
        slots: &mut Vec<Slot>,
        orphans: &mut BTreeMap<u64, Candidate>,
        grows: bool,
    ) -> Result<()> {
        let mut looks = 0;
        let mut start = vec![0; START];
        let mut first = None;
        for &cluster in orphans.keys() {
            if self.guest(cluster, 0, &mut start, &mut looks)? && is_start(&start) {
                first = Some(cluster);
                break;
            }
        }
        let known = slots.first().and_then(|slot| slot.table());
        let known = known.map(|table| self.known.format.geometry.host_cluster(table).value());
        let Some(first) = known.or(first) else { return Ok(()) };
        if known.is_none() {
            self.settle(slots, orphans, (0, first), grows, Evidence::Content);
        }
        if !self.guest(first, 0, &mut start, &mut looks)? {
            return Ok(());
        }
        let (starts, second) = partitions(&start);
        let mut landmarks = Vec::from_iter(second);
        for offset in starts {
            let mut partition = vec![0; START];
            let holder = self.holder(offset, first, orphans, &mut partition, &mut looks)?;
            if holder {
                landmarks.extend(of_file_system(offset, &partition));
            }
        }
        for landmark in landmarks {
            self.anchor(&landmark, slots, orphans, &mut looks, grows)?;
        }
        Ok(())
    }

    /// Reads the start of a partition, through the table of the first range if it is in that.
    fn holder(
        &self,
        offset: u64,
        first: u64,
        orphans: &BTreeMap<u64, Candidate>,
        partition: &mut [u8],
        looks: &mut u64,
    ) -> Result<bool> {
        if offset < self.known.format.geometry.l2_coverage() {
            return self.guest(first, offset, partition, looks);
        }
        for &cluster in orphans.keys() {
            let read = *looks <= MAX_LOOKS && self.guest(cluster, offset, partition, looks)?;
            if read && !of_file_system(offset, partition).is_empty() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn anchor(
        &self,
        landmark: &Landmark,
        slots: &mut Vec<Slot>,
        orphans: &mut BTreeMap<u64, Candidate>,
        looks: &mut u64,
        grows: bool,
    ) -> Result<()> {
        let geometry = self.known.format.geometry;
        let index = geometry.l1_index(GuestOffset::new(landmark.offset)).value();
        let lost = Slot::is_open;
        let free = usize::try_from(index).ok().and_then(|index| slots.get(index)).map_or(grows, lost);
        if !free || index >= MAX_L1_ENTRIES {
            return Ok(());
        }
        let mut found = Vec::new();
        let mut window = vec![0; WINDOW];
        for &cluster in orphans.keys() {
            self.go_on()?;
            if *looks > MAX_LOOKS {
                return Ok(());
            }
            if self.guest(cluster, landmark.offset, &mut window, looks)? && landmark.is_in(&window) {
                found.push(cluster);
            }
        }
        if let [only] = found[..] {
            self.settle(slots, orphans, (index as usize, only), grows, Evidence::Content);
        }
        Ok(())
    }

    /// Reads what the table in `cluster` maps at guest offset `offset` of its range. False if it maps nothing
    /// there, or it is compressed, or enough was looked at.
    fn guest(&self, cluster: u64, offset: u64, buf: &mut [u8], looks: &mut u64) -> Result<bool> {
        let geometry = self.known.format.geometry;
        buf.fill(0);
        *looks += 1;
        if *looks > MAX_LOOKS || self.known.format.external_data {
            return Ok(false);
        }
        let (mut done, mut any) = (0, false);
        while done < buf.len() {
            let at = GuestOffset::new(offset.saturating_add(done as u64));
            let inside = geometry.in_cluster(at.value());
            let len = (geometry.cluster_size() - inside).min((buf.len() - done) as u64) as usize;
            let entry_at =
                geometry.bytes_of(cluster) + geometry.l2_index(at).value() * geometry.l2_entry_size();
            let mut words = [0; 16];
            self.bytes.read(HostOffset::new(entry_at), &mut words[..geometry.l2_entry_size() as usize])?;
            let word = |at| bytes::read_u64(&words, at).unwrap_or(0);
            if let Leads::To(L2Entry::Standard(entry)) = self.known.judge(word(0), word(8))
                && let Some(host) = entry.host.filter(|_| entry.allocated != 0)
            {
                let place = HostOffset::new(host.value().saturating_add(inside));
                self.bytes.read(place, &mut buf[done..done + len])?;
                any = true;
            }
            done += len;
        }
        Ok(any)
    }

    /// Gives `slots[index]` the table in cluster `cluster`, unless it has one or cannot have it. `grows`:
    /// there may be more slots.
    pub(super) fn settle(
        &self,
        slots: &mut Vec<Slot>,
        orphans: &mut BTreeMap<u64, Candidate>,
        (index, cluster): (usize, u64),
        grows: bool,
        evidence: Evidence,
    ) {
        if grows && slots.len() <= index {
            slots.resize(index + 1, Slot::Lost(Reason::NoTable));
        }
        if let Some(slot) = slots.get_mut(index).filter(|slot| slot.is_open()) {
            *slot = Slot::Table(HostOffset::new(self.known.format.geometry.bytes_of(cluster)), evidence);
            orphans.remove(&cluster);
        }
    }
}
