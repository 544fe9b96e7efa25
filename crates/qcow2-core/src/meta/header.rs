//! The header as it stands on disk, changed field by field in its first sector.
//!
//! Invariant: one sector write switches the image from one state to the next; whatever this engine does not know in
//! the header stays as it is, byte for byte (I6).

use super::Meta;
use super::page::SECTOR_SIZE;
use crate::error::Result;
use crate::rules::OrderingRule;
use crate::sync::lock;
use ::alloc::vec::Vec;
use qcow2_format::feature::{AutoclearFeatures, IncompatibleFeatures};
use qcow2_format::{Header, HostOffset};

/// The parsed header and the sector it came from.
pub(crate) struct HeaderState {
    pub(crate) header: Header,
    pub(crate) sector: Vec<u8>,
}

/// Header fields with their places. Spec: "Header".
#[derive(Clone, Copy)]
pub(crate) enum Field {
    Size(u64),
    L1 { entries: u32, offset: HostOffset },
    RefcountTable { offset: HostOffset, clusters: u32 },
    Snapshots { count: u32, offset: HostOffset },
    Incompatible(u64),
    Autoclear(u64),
}

impl HeaderState {
    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.sector[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn apply(&mut self, field: Field) {
        match field {
            Field::Size(size) => {
                self.header.size = size;
                self.put(24, &size.to_be_bytes());
            }
            Field::L1 { entries, offset } => {
                self.header.l1_size = entries;
                self.header.l1_table_offset = offset;
                self.put(36, &entries.to_be_bytes());
                self.put(40, &offset.value().to_be_bytes());
            }
            Field::RefcountTable { offset, clusters } => {
                self.header.refcount_table_offset = offset;
                self.header.refcount_table_clusters = clusters;
                self.put(48, &offset.value().to_be_bytes());
                self.put(56, &clusters.to_be_bytes());
            }
            Field::Snapshots { count, offset } => {
                self.header.nb_snapshots = count;
                self.header.snapshots_offset = offset;
                self.put(60, &count.to_be_bytes());
                self.put(64, &offset.value().to_be_bytes());
            }
            Field::Incompatible(bits) => {
                self.header.incompatible_features = IncompatibleFeatures::from_bits(bits);
                self.put(72, &bits.to_be_bytes());
            }
            Field::Autoclear(bits) => {
                self.header.autoclear_features = AutoclearFeatures::from_bits(bits);
                self.put(88, &bits.to_be_bytes());
            }
        }
    }
}

impl Meta {
    /// A copy of the header as it is now.
    pub(crate) fn header(&self) -> Header {
        lock(&self.header).header.clone()
    }

    /// Changes header fields with one sector write and waits until it is durable. The feature words exist in version
    /// 3 only: the caller asks for them there only.
    pub(crate) fn update_header(&self, fields: &[Field]) -> Result<()> {
        self.write_header(fields, true)
    }

    /// Puts a warning on disk before the change it warns of.
    pub(crate) fn warn_in_header(&self, field: Field) -> Result<()> {
        self.write_header(&[field], self.rules.keep(OrderingRule::WarningBeforeChange))
    }

    fn write_header(&self, fields: &[Field], durable: bool) -> Result<()> {
        let mut state = lock(&self.header);
        for &field in fields {
            state.apply(field);
        }
        debug_assert_eq!(state.sector.len() as u64, SECTOR_SIZE);
        let written = self.storage.write_at(HostOffset::new(0), &state.sector);
        self.poison_on_error(
            written.and_then(|()| if durable { self.storage.flush() } else { Ok(()) }).map_err(Into::into),
        )
    }
}
