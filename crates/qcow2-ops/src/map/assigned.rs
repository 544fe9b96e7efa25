//! Finds the host clusters of guest clusters in which no subcluster is allocated.

use qcow2_core::format::Header;
use qcow2_core::format::l1::L1Entry;
use qcow2_core::format::l2::{L2Entry, L2Format};
use qcow2_core::{GuestOffset, HostOffset, Image, Result, Storage};
use std::sync::Arc;

/// Reads the L2 tables of an image with extended L2 entries. They must not change meanwhile. Spec: "Extended
/// L2 Entries".
pub(super) struct AssignedPlaces {
    storage: Arc<dyn Storage>,
    header: Header,
    format: L2Format,
    /// The last L2 table used: its L1 index and its host offset, `None` if there is no table.
    table: Option<(u64, Option<HostOffset>)>,
}

impl AssignedPlaces {
    /// `None` for an image without extended L2 entries.
    pub(super) fn new(image: &Image) -> Option<Self> {
        let header = image.header();
        let format = header.l2_format().ok().filter(|format| format.geometry.extended_l2())?;
        Some(Self { storage: Arc::clone(image.storage()), header, format, table: None })
    }

    /// The host offset for guest offset `offset`, if its cluster has one, and the number of bytes, at most
    /// `len`, for which this holds. `len`: at least 1; the whole range must be unallocated. Disk: reads one
    /// L1 and one L2 entry per cluster.
    pub(super) fn at(&mut self, offset: GuestOffset, len: u64) -> Result<(u64, Option<HostOffset>)> {
        let geometry = self.format.geometry;
        let mut covered = 0;
        while covered < len {
            let Some(at) = offset.checked_add(covered) else { break };
            let left = geometry.cluster_size() - geometry.in_cluster(at.value());
            match self.cluster_place(at)? {
                Some(place) if covered == 0 => {
                    let host = place.checked_add(geometry.in_cluster(at.value()));
                    return Ok((len.min(left), host));
                }
                Some(_) => break,
                None if matches!(self.table, Some((_, None))) => {
                    covered += geometry.l2_coverage() - at.value() % geometry.l2_coverage();
                }
                None => covered += left,
            }
        }
        Ok((len.min(covered), None))
    }

    fn cluster_place(&mut self, at: GuestOffset) -> Result<Option<HostOffset>> {
        let geometry = self.format.geometry;
        let index = geometry.l1_index(at).value();
        let table = match self.table {
            Some((known, table)) if known == index => table,
            _ => self.read_l1_entry(index)?,
        };
        self.table = Some((index, table));
        let entry = geometry.l2_index(at).value() * geometry.l2_entry_size();
        let Some(place) = table.and_then(|table| table.checked_add(entry)) else { return Ok(None) };
        let (raw, bitmap) = (self.read_word(place)?, self.read_word(HostOffset::new(place.value() + 8))?);
        match self.format.decode(raw, bitmap) {
            Ok(L2Entry::Standard(entry)) => Ok(entry.host),
            _ => Ok(None),
        }
    }

    fn read_l1_entry(&self, index: u64) -> Result<Option<HostOffset>> {
        let entry = self.header.l1_table_offset.checked_add(index * 8);
        let Some(entry) = entry.filter(|_| index < u64::from(self.header.l1_size)) else { return Ok(None) };
        let decoded = L1Entry::decode(self.read_word(entry)?, &self.format.geometry);
        Ok(decoded.ok().and_then(|entry| entry.l2_table))
    }

    fn read_word(&self, at: HostOffset) -> Result<u64> {
        let mut word = [0; 8];
        self.storage.read_padded(at, &mut word)?;
        Ok(u64::from_be_bytes(word))
    }
}
