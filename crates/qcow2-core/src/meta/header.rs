//! The header as it stands on disk, changed field by field in its first sector.
//!
//! Invariant: one sector write switches the image from one state to the next; whatever this engine does not
//! know in the header stays as it is, byte for byte (I6).

use super::Meta;
use crate::error::Result;
use crate::invariant;
use crate::rules::OrderingRule;
use crate::sync::lock;
use qcow2_format::header::SECTOR_LEN;
use qcow2_format::{Header, HeaderField, HostOffset};

/// The parsed header and the sector it came from.
pub(crate) struct HeaderState {
    pub(crate) header: Header,
    pub(crate) sector: [u8; SECTOR_LEN],
}

impl Meta {
    /// A copy of the header as it is now.
    pub(crate) fn header(&self) -> Header {
        lock(&self.header).header.clone()
    }

    /// Changes header fields with one sector write and waits until it is durable. The feature words exist in
    /// version 3 only: the caller asks for them there only.
    pub(crate) fn update_header(&self, fields: &[HeaderField]) -> Result<()> {
        self.write_header(fields, true)
    }

    /// Puts a warning on disk before the change it warns of.
    pub(crate) fn warn_in_header(&self, field: HeaderField) -> Result<()> {
        self.write_header(&[field], self.rules.keep(OrderingRule::WarningBeforeChange))
    }

    fn write_header(&self, fields: &[HeaderField], durable: bool) -> Result<()> {
        let mut state = lock(&self.header);
        let HeaderState { header, sector } = &mut *state;
        invariant::may_write(self.writable);
        fields.iter().for_each(|field| field.apply(header, sector));
        invariant::is_header(sector);
        let written = self.storage.write_at(HostOffset::new(0), &state.sector);
        self.poison_on_error(
            written.and_then(|()| if durable { self.storage.flush() } else { Ok(()) }).map_err(Into::into),
        )
    }
}
