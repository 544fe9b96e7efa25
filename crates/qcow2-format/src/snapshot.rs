//! Snapshot table entries. Spec: "Snapshots".
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 8 | offset of the snapshot's L1 table, cluster aligned |
//! | 8 | 4 | entries in that table |
//! | 12, 14 | 2, 2 | length of the id, of the name |
//! | 16, 20 | 4, 4 | date: seconds since 1970, nanoseconds |
//! | 24 | 8 | guest run time (VM clock) in nanoseconds |
//! | 32 | 4 | VM state size in bytes, or 0 if the extra data holds it |
//! | 36 | 4 | E, the length of the extra data |
//! | 40 | E | extra data: VM state size (8), virtual size (8), instruction count (8), unknown |
//! | 40 + E | | id, name, zeroes up to a multiple of 8 |

use crate::bytes::{Reader, read_u64};
use crate::error::{FormatError, FormatErrorKind};
use crate::limit;
use crate::text::text_of;
use crate::units::HostOffset;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

/// Length of an entry before its extra data, in bytes.
const FIXED_LEN: usize = 40;
/// Where the length of the extra data is.
const EXTRA_LEN_AT: usize = 36;
/// Bytes of the extra data that this crate knows.
const KNOWN_EXTRA: usize = 24;
/// Minimum length of the extra data in version 3, in bytes: VM state size and virtual size.
pub const MIN_EXTRA_V3: u32 = 16;
/// The instruction count that means "not recorded".
const NO_ICOUNT: u64 = u64::MAX;

/// The longest entry that [`Snapshot::parse`] accepts, in bytes.
pub const MAX_ENTRY_LEN: usize = FIXED_LEN + limit::MAX_SNAPSHOT_EXTRA as usize + 2 * u16::MAX as usize + 8;

/// One internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Host offset of the snapshot's L1 table.
    pub l1_table_offset: HostOffset,
    /// Number of entries in that table.
    pub l1_size: u32,
    /// The id, a decimal number as text, unique in the table; at most 65535 bytes.
    pub id: Vec<u8>,
    /// The name: arbitrary bytes, may be empty or a duplicate; at most 65535 bytes.
    pub name: Vec<u8>,
    /// When the snapshot was taken, in seconds since 1970.
    pub date_seconds: u32,
    /// The fraction of that second, in nanoseconds.
    pub date_nanoseconds: u32,
    /// How long the guest had run (VM clock), in nanoseconds.
    pub vm_clock_nanoseconds: u64,
    /// Size of the VM state in bytes. It is stored past the end of the guest disk.
    pub vm_state_size: u64,
    /// Virtual size when the snapshot was taken, in bytes.
    pub disk_size: u64,
    /// Instructions the guest had executed, if that was recorded.
    pub icount: Option<u64>,
    /// Extra data of a later version, kept byte for byte.
    pub unknown_extra: Vec<u8>,
}

/// A parsed snapshot table entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParsedSnapshot {
    /// The snapshot.
    pub snapshot: Snapshot,
    /// Length of the entry in bytes, padding included. The next entry starts there.
    pub len: usize,
    /// Length of the extra data in bytes. Below [`MIN_EXTRA_V3`] the entry of a version 3 image is
    /// incomplete.
    pub extra_len: u32,
}

impl Snapshot {
    /// Parses the entry at the start of `bytes`. `current_size`: virtual size of the image in bytes, for an
    /// entry that does not record its own.
    ///
    /// Errors: `Truncated` if `bytes` ends inside the entry or its padding; `SnapshotExtra` for more than
    /// 1024 bytes of extra data.
    pub fn parse(bytes: &[u8], current_size: u64) -> Result<ParsedSnapshot, FormatError> {
        let parsed = Self::parse_for_repair(bytes, current_size);
        let extra_len = Reader::new(bytes, EXTRA_LEN_AT).u32().unwrap_or(0);
        if extra_len > limit::MAX_SNAPSHOT_EXTRA {
            return Err(FormatError::new(
                FormatErrorKind::SnapshotExtra(extra_len),
                format!(
                    "snapshot table entry: {extra_len} bytes of extra data, allowed are {}",
                    limit::MAX_SNAPSHOT_EXTRA
                ),
            ));
        }
        parsed
    }

    /// As [`parse`](Self::parse), but an entry with more extra data than is allowed passes and keeps as much
    /// of it as is: a repair writes it back so. Errors: `Truncated`.
    pub fn parse_for_repair(bytes: &[u8], current_size: u64) -> Result<ParsedSnapshot, FormatError> {
        let mut reader = Reader::new(bytes, 0);
        let fixed = Fixed::read(&mut reader).ok_or_else(truncated)?;
        let mut take = |len: usize| reader.take(len).ok_or_else(truncated);
        let extra = take(fixed.extra_len as usize)?;
        let kept = &extra[..extra.len().min(limit::MAX_SNAPSHOT_EXTRA as usize)];
        let id = take(fixed.id_len.into())?.to_vec();
        let name = take(fixed.name_len.into())?.to_vec();
        let len = reader.position().next_multiple_of(8);
        if len > bytes.len() {
            return Err(truncated());
        }
        let snapshot = Self {
            l1_table_offset: HostOffset::new(fixed.l1_table_offset),
            l1_size: fixed.l1_size,
            id,
            name,
            date_seconds: fixed.date_seconds,
            date_nanoseconds: fixed.date_nanoseconds,
            vm_clock_nanoseconds: fixed.vm_clock_nanoseconds,
            vm_state_size: read_u64(extra, 0).unwrap_or(fixed.vm_state_size.into()),
            disk_size: read_u64(extra, 8).unwrap_or(current_size),
            icount: read_u64(extra, 16).filter(|&n| n != NO_ICOUNT),
            unknown_extra: kept.get(KNOWN_EXTRA..).unwrap_or_default().to_vec(),
        };
        Ok(ParsedSnapshot { snapshot, len, extra_len: fixed.extra_len })
    }

    /// Appends the entry and its padding to `out`. Entries must start at multiples of 8 within the table.
    /// Like QEMU, writes all known extra data in both versions, then the unknown rest.
    ///
    /// Errors: `TooLong` for an id or name above 65535 bytes; `SnapshotExtra` for unknown extra data above
    /// 1000 bytes.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), FormatError> {
        let (id_len, name_len) = (text_len("id", &self.id)?, text_len("name", &self.name)?);
        let extra_len = u32::try_from(KNOWN_EXTRA + self.unknown_extra.len()).unwrap_or(u32::MAX);
        if extra_len > limit::MAX_SNAPSHOT_EXTRA {
            return Err(FormatError::new(
                FormatErrorKind::SnapshotExtra(extra_len),
                format!(
                    "snapshot: {extra_len} bytes of extra data, allowed are {}",
                    limit::MAX_SNAPSHOT_EXTRA
                ),
            ));
        }
        let start = out.len();
        out.extend_from_slice(&self.l1_table_offset.value().to_be_bytes());
        out.extend_from_slice(&self.l1_size.to_be_bytes());
        out.extend_from_slice(&id_len.to_be_bytes());
        out.extend_from_slice(&name_len.to_be_bytes());
        out.extend_from_slice(&self.date_seconds.to_be_bytes());
        out.extend_from_slice(&self.date_nanoseconds.to_be_bytes());
        out.extend_from_slice(&self.vm_clock_nanoseconds.to_be_bytes());
        out.extend_from_slice(&u32::try_from(self.vm_state_size).unwrap_or(0).to_be_bytes());
        out.extend_from_slice(&extra_len.to_be_bytes());
        out.extend_from_slice(&self.vm_state_size.to_be_bytes());
        out.extend_from_slice(&self.disk_size.to_be_bytes());
        out.extend_from_slice(&self.icount.unwrap_or(NO_ICOUNT).to_be_bytes());
        out.extend_from_slice(&self.unknown_extra);
        out.extend_from_slice(&self.id);
        out.extend_from_slice(&self.name);
        let len = out.len() - start;
        out.resize(start + len.next_multiple_of(8), 0);
        Ok(())
    }

    /// The id as [text](crate::text).
    pub fn id_text(&self) -> String {
        text_of(&self.id)
    }

    /// The name as [text](crate::text). May contain control characters: escape it before
    /// printing.
    pub fn name_text(&self) -> String {
        text_of(&self.name)
    }
}

/// The fixed-size fields of an entry.
struct Fixed {
    l1_table_offset: u64,
    l1_size: u32,
    id_len: u16,
    name_len: u16,
    date_seconds: u32,
    date_nanoseconds: u32,
    vm_clock_nanoseconds: u64,
    vm_state_size: u32,
    extra_len: u32,
}

impl Fixed {
    fn read(reader: &mut Reader<'_>) -> Option<Self> {
        Some(Self {
            l1_table_offset: reader.u64()?,
            l1_size: reader.u32()?,
            id_len: reader.u16()?,
            name_len: reader.u16()?,
            date_seconds: reader.u32()?,
            date_nanoseconds: reader.u32()?,
            vm_clock_nanoseconds: reader.u64()?,
            vm_state_size: reader.u32()?,
            extra_len: reader.u32()?,
        })
    }
}

fn text_len(what: &str, text: &[u8]) -> Result<u16, FormatError> {
    u16::try_from(text.len()).map_err(|_| {
        let len = text.len();
        FormatError::new(
            FormatErrorKind::TooLong(len as u64),
            format!("snapshot: {what} of {len} bytes, allowed are {}", u16::MAX),
        )
    })
}

fn truncated() -> FormatError {
    FormatError::new(FormatErrorKind::Truncated, "snapshot table ends inside an entry")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The two entries that `qemu-img snapshot -c s0`, `-c s1` wrote into an image of 1 MiB.
    fn real_table() -> Vec<u8> {
        let hex = "0000000000060000 00000001 0001 0002 6b035734 0fb64ef0 0000000000000000 00000000 00000018 \
                   0000000000000000 0000000000100000 0000000000000000 3173300000000000 \
                   0000000000080000 00000001 0001 0002 6b035734 10b1aa98 0000000000000000 00000000 00000018 \
                   0000000000000000 0000000000100000 0000000000000000 3273310000000000";
        let digits: Vec<u8> = hex.bytes().filter(u8::is_ascii_hexdigit).collect();
        digits.chunks(2).map(|d| u8::from_str_radix(core::str::from_utf8(d).unwrap(), 16).unwrap()).collect()
    }

    #[test]
    fn table_written_by_qemu_round_trips() {
        let table = real_table();
        let first = Snapshot::parse(&table, 0).unwrap();
        assert_eq!((first.len, first.extra_len), (72, 24));
        assert_eq!(first.snapshot.l1_table_offset, HostOffset::new(0x60000));
        assert_eq!((first.snapshot.id_text(), first.snapshot.name_text()), ("1".into(), "s0".into()));
        assert_eq!((first.snapshot.disk_size, first.snapshot.icount), (1 << 20, Some(0)));
        let second = Snapshot::parse(&table[first.len..], 0).unwrap();
        assert_eq!(second.snapshot.l1_table_offset, HostOffset::new(0x80000));

        let mut written = Vec::new();
        first.snapshot.encode(&mut written).unwrap();
        second.snapshot.encode(&mut written).unwrap();
        assert_eq!(written, table);
    }

    #[test]
    fn short_extra_data_falls_back_to_the_fixed_fields() {
        let mut entry = [0u8; 56];
        entry[32..36].copy_from_slice(&77u32.to_be_bytes());
        let parsed = Snapshot::parse(&entry, 4096).unwrap();
        let snapshot = &parsed.snapshot;
        assert_eq!((snapshot.vm_state_size, snapshot.disk_size, snapshot.icount), (77, 4096, None));
        assert_eq!((parsed.len, parsed.extra_len), (40, 0));

        entry[39] = 8;
        entry[47] = 5;
        let snapshot = Snapshot::parse(&entry, 4096).unwrap().snapshot;
        assert_eq!((snapshot.vm_state_size, snapshot.disk_size), (5, 4096), "the 64-bit field wins");
        entry[39] = 15;
        assert_eq!(
            Snapshot::parse(&entry, 4096).unwrap().snapshot.disk_size,
            4096,
            "a partial field is ignored"
        );
    }

    #[test]
    fn limits_and_truncation_are_reported() {
        let mut entry = [0u8; 4096];
        entry[36..40].copy_from_slice(&1025u32.to_be_bytes());
        assert_eq!(Snapshot::parse(&entry, 0).unwrap_err().kind(), &FormatErrorKind::SnapshotExtra(1025));
        entry[36..40].copy_from_slice(&1024u32.to_be_bytes());
        assert_eq!(Snapshot::parse(&entry, 0).unwrap().len, 40 + 1024);
        entry[12] = 0xff;
        assert_eq!(Snapshot::parse(&entry, 0).unwrap_err().kind(), &FormatErrorKind::Truncated);
        assert_eq!(Snapshot::parse(&entry[..39], 0).unwrap_err().kind(), &FormatErrorKind::Truncated);

        let mut snapshot = Snapshot::parse(&[0; 40], 0).unwrap().snapshot;
        snapshot.name = vec![b'n'; 65536];
        assert_eq!(snapshot.encode(&mut Vec::new()).unwrap_err().kind(), &FormatErrorKind::TooLong(65536));
    }

    #[test]
    fn vm_state_above_4_gib_is_stored_in_the_extra_data_only() {
        let mut snapshot = Snapshot::parse(&[0; 40], 0).unwrap().snapshot;
        snapshot.vm_state_size = 1 << 32;
        let mut out = Vec::new();
        snapshot.encode(&mut out).unwrap();
        assert_eq!(out[32..36], [0; 4]);
        assert_eq!(Snapshot::parse(&out, 0).unwrap().snapshot, snapshot);
    }

    fn any_snapshot() -> impl Strategy<Value = Snapshot> {
        let bytes = |max| proptest::collection::vec(any::<u8>(), 0..max);
        let numbers = (any::<u64>(), any::<u32>(), any::<u32>(), any::<u32>(), any::<u64>());
        let extra = (any::<u64>(), any::<u64>(), proptest::option::of(0..u64::MAX), bytes(1000));
        (numbers, extra, bytes(300), bytes(300)).prop_map(|(n, e, id, name)| Snapshot {
            l1_table_offset: HostOffset::new(n.0),
            l1_size: n.1,
            id,
            name,
            date_seconds: n.2,
            date_nanoseconds: n.3,
            vm_clock_nanoseconds: n.4,
            vm_state_size: e.0,
            disk_size: e.1,
            icount: e.2,
            unknown_extra: e.3,
        })
    }

    proptest! {
        #[test]
        fn entries_round_trip(snapshot in any_snapshot()) {
            let mut out = Vec::new();
            snapshot.encode(&mut out).unwrap();
            let parsed = Snapshot::parse(&out, 1).unwrap();
            prop_assert_eq!(parsed.len, out.len());
            prop_assert!(parsed.len <= MAX_ENTRY_LEN);
            prop_assert_eq!(parsed.snapshot, snapshot);
        }

        #[test]
        fn arbitrary_bytes_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            if let Ok(parsed) = Snapshot::parse(&bytes, 0) {
                prop_assert!(parsed.len <= bytes.len());
            }
        }
    }
}
