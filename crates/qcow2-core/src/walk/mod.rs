//! Reads an image without opening it: its header ([`read_header`]) and every reference in it ([`Walk`]): the
//! tables, what they point to, and what is wrong with them. For checks, repairs and programs that only
//! describe an image.
//!
//! A walk changes nothing and trusts nothing: offsets may point anywhere, tables may overlap, and four
//! million entries may refer to the same table. Memory stays below the named limits, and each table is read
//! once, however many references it has ([`overlay()`]).
//!
//! A walk reads the storage directly. If the image is open for writing, flush it first.

mod end;
mod overlay;
mod records;
mod reference;
mod tables;

pub use overlay::{Segment, TablePlace, overlay};
pub use records::{BitmapFault, SnapshotFault, SnapshotTable};
pub use reference::{Owner, Reference};
pub use tables::{Holes, Pieces};

use crate::error::{Error, ErrorKind, Result};
use crate::port::storage::Storage;
use ::alloc::vec;
use qcow2_format::l2::L2Format;
use qcow2_format::{Geometry, Header, HostOffset};

/// Bytes of a table read at a time.
pub const PIECE_SIZE: u64 = 1 << 20;

/// Reads the header of an image for a check, which accepts more than an open does; see
/// [`Header::parse_for_check`]. Errors: `Format`, `Storage`.
pub fn read_header(storage: &dyn Storage) -> Result<Header> {
    let bad = |e| Error::new(ErrorKind::Format, "not a usable qcow2 image").with_source(e);
    let mut start = [0; Header::PROBE_LEN];
    let n = storage.read_at(HostOffset::new(0), &mut start)?;
    let wanted = Header::probe_len(start.get(..n).unwrap_or_default()).map_err(bad)?;
    let mut cluster = vec![0; wanted];
    storage.read_padded(HostOffset::new(0), &mut cluster)?;
    Header::parse_for_check(&cluster).map_err(bad)
}

/// Reads the references of one image.
pub struct Walk<'a> {
    storage: &'a dyn Storage,
    header: &'a Header,
    format: L2Format,
    file_len: u64,
}

impl<'a> Walk<'a> {
    /// `header`: the header in `storage`, from [`read_header`] or an open. Errors: `Format` for an impossible
    /// geometry, `Storage`.
    pub fn new(storage: &'a dyn Storage, header: &'a Header) -> Result<Self> {
        let bad = |e| Error::new(ErrorKind::Format, "not a usable qcow2 image").with_source(e);
        let format = header.l2_format().map_err(bad)?;
        Ok(Self { storage, header, format, file_len: storage.len()? })
    }

    /// The header.
    pub fn header(&self) -> &'a Header {
        self.header
    }

    /// The image's geometry.
    pub fn geometry(&self) -> &Geometry {
        &self.format.geometry
    }

    /// The format of the L2 entries.
    pub fn l2_format(&self) -> &L2Format {
        &self.format
    }

    /// Bytes of the image file.
    pub fn file_len(&self) -> u64 {
        self.file_len
    }

    /// The references in the header: its own cluster, the active L1 table, the refcount table, the LUKS area
    /// and the bitmap directory. Empty tables are left out.
    pub fn header_references(&self) -> impl Iterator<Item = Reference> + use<> {
        let header = self.header;
        let size = self.geometry().cluster_size();
        let luks = header.extensions.luks;
        let directory = header.trusted_bitmaps();
        let all = [
            (Owner::Header, HostOffset::new(0), size),
            (Owner::ActiveL1, header.l1_table_offset, u64::from(header.l1_size) * 8),
            (
                Owner::RefcountTable,
                header.refcount_table_offset,
                u64::from(header.refcount_table_clusters) * size,
            ),
            (Owner::Luks, luks.map_or(HostOffset::new(0), |l| l.offset), luks.map_or(0, |l| l.len)),
            (
                Owner::BitmapDirectory,
                directory.map_or(HostOffset::new(0), |d| d.directory_offset),
                directory.map_or(0, |d| d.directory_size),
            ),
        ];
        let used = all.into_iter().filter(|&(_, _, len)| len > 0);
        used.map(|(owner, offset, len)| Reference { owner, offset, len, times: 1 })
    }

    /// Offset and length of the active L1 table.
    pub fn active_l1(&self) -> TablePlace {
        TablePlace { offset: self.header.l1_table_offset, entries: self.header.l1_size.into() }
    }

    /// The refcount table's entries, at most 8 MiB of them. Bytes past the end of the file count as zeroes.
    pub fn refcount_table(&self) -> Result<::alloc::vec::Vec<u64>> {
        let len = u64::from(self.header.refcount_table_clusters) * self.geometry().cluster_size();
        let mut bytes = vec![0; len as usize];
        self.storage.read_padded(self.header.refcount_table_offset, &mut bytes)?;
        Ok(qcow2_format::bytes::words(&bytes).collect())
    }

    /// Fills `buf` from `offset` on; bytes past the end of the file are zeroes.
    pub fn read(&self, offset: HostOffset, buf: &mut [u8]) -> Result<()> {
        if offset.value() >= self.file_len {
            buf.fill(0);
            return Ok(());
        }
        Ok(self.storage.read_padded(offset, buf)?)
    }
}
