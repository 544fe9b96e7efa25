//! Bodies of the fuzz targets: they take any bytes and panic on a bug. `fuzz/` runs them with generated
//! bytes, the tests with the committed seeds.

use qcow2_format::bitmap::{Bitmap, BitmapTableEntry};
use qcow2_format::bytes;
use qcow2_format::crypt::LuksHeader;
use qcow2_format::l1::{self, L1Entry};
use qcow2_format::l2::{L2Entry, L2Format};
use qcow2_format::refcount;
use qcow2_format::snapshot::{MAX_ENTRY_LEN, Snapshot};
use qcow2_format::{Extensions, Geometry, GeometryFields, Header};

/// One fuzz target.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Name of its binary.
    pub name: &'static str,
    /// Folder of its seeds.
    pub seeds: &'static str,
    /// Runs the target on one input.
    pub body: fn(&[u8]),
}

/// All targets of this file.
pub const TARGETS: &[Target] = &[
    Target { name: "parse_header", seeds: "parse_header", body: parse_header },
    Target { name: "parse_tables", seeds: "parse_tables", body: parse_tables },
];

/// Parses the bytes as a header. An accepted header can be encoded again, and parses to the same value.
pub fn parse_header(data: &[u8]) {
    if let Ok(wanted) = Header::probe_len(data) {
        assert!((512..=2 << 20).contains(&wanted) && wanted.is_power_of_two(), "wants {wanted} bytes");
    }
    let _ = Extensions::parse(data);
    let Ok(header) = Header::parse(data) else {
        let _ = Header::parse_for_check(data);
        return;
    };
    assert_eq!(Header::parse_for_check(data).as_ref(), Ok(&header), "parse_for_check agrees with parse");
    let geometry = header.geometry().expect("an accepted header has a geometry");
    assert!(header.l2_format().is_ok());
    assert!(u64::from(header.l1_size) >= geometry.l1_entries_for(header.disk_size()));
    assert!(header.extensions.unknown.len() as u64 <= geometry.cluster_size() / 8);
    let Ok(written) = header.encode() else { return };
    assert!(written.len() as u64 <= geometry.cluster_size());
    let again = Header::parse(&written).expect("an encoded header parses");
    let mut expected = header;
    let padded = expected.unknown_fields.len().next_multiple_of(8);
    expected.unknown_fields.resize(padded, 0);
    assert_eq!(again, expected);
}

/// Parses the bytes as every kind of table. The first two bytes choose the geometry, the rest is the table.
pub fn parse_tables(data: &[u8]) {
    let Some((&[shape, flags], table)) = data.split_first_chunk::<2>() else { return };
    let fields = GeometryFields {
        cluster_bits: 9 + u32::from(shape % 13),
        refcount_order: u32::from(flags >> 5),
        extended_l2: flags & 1 != 0,
    };
    let Ok(geometry) = Geometry::new(fields) else { return };
    let format = L2Format { geometry, zero_flag: flags & 2 == 0, external_data: flags & 4 != 0 };
    for (index, raw) in bytes::words(table).enumerate() {
        mapping_entries(raw, &geometry);
        l2_entry(&format, raw, bytes::read_u64(table, index * 8 + 8).unwrap_or(0));
        refcounts(&geometry, raw);
    }
    records(&geometry, table);
}

fn mapping_entries(raw: u64, geometry: &Geometry) {
    if let Ok(entry) = L1Entry::decode(raw, geometry) {
        assert_eq!(entry.encode() & !raw, 0, "l1 entry {raw:#x} gained bits");
        let copied = 1 << 63;
        assert_eq!(raw & !l1::reserved_bits(raw) & !copied, entry.encode() & !copied);
    }
    if let Ok(block) = refcount::decode_table_entry(raw, geometry) {
        assert_eq!(refcount::encode_table_entry(block), raw & !refcount::reserved_bits(raw));
    }
    if let Ok(entry) = BitmapTableEntry::decode(raw, geometry) {
        assert_eq!(entry.encode(), raw);
    }
}

fn l2_entry(format: &L2Format, raw: u64, bitmap: u64) {
    let Ok(entry) = format.decode(raw, bitmap) else { return };
    match entry {
        L2Entry::Standard(cluster) => {
            assert_eq!(cluster.allocated & cluster.zero, 0);
            assert!(cluster.allocated == 0 || cluster.host.is_some());
            assert_eq!((cluster.allocated | cluster.zero) & !format.all_subclusters(), 0);
        }
        L2Entry::Compressed(stream) => {
            assert!((1..=2 * format.geometry.cluster_size()).contains(&stream.len), "{} bytes", stream.len);
            assert_eq!((stream.host.value() + stream.len) % 512, 0);
        }
    }
    let (word, second) = format.encode(&entry).expect("what was read can be written");
    assert_eq!(format.decode(word, second), Ok(entry));
}

fn refcounts(geometry: &Geometry, word: u64) {
    let width = geometry.refcount_width();
    for slot in 0..64 >> width.order() {
        let count = width.extract(word, slot);
        assert!(count <= width.max());
        assert_eq!(width.insert(word, slot, count), word);
        assert_eq!(width.extract(width.insert(word, slot, width.max()), slot), width.max());
    }
}

fn records(geometry: &Geometry, table: &[u8]) {
    let mut rest = table;
    while let Ok(parsed) = Snapshot::parse(rest, 0) {
        assert!((40..=rest.len().min(MAX_ENTRY_LEN)).contains(&parsed.len));
        let mut written = Vec::new();
        if parsed.snapshot.encode(&mut written).is_ok() {
            let again = Snapshot::parse(&written, 1).expect("an encoded table parses");
            assert_eq!(again.snapshot, parsed.snapshot);
        }
        rest = &rest[parsed.len..];
    }
    let mut rest = table;
    let mut count = 0;
    while let Ok((bitmap, len)) = Bitmap::parse(rest) {
        let _ = bitmap.validate(geometry, u64::MAX);
        let mut written = Vec::new();
        bitmap.encode(&mut written).expect("what was read can be written");
        assert_eq!(Bitmap::parse(&written), Ok((bitmap, len)));
        rest = &rest[len..];
        count += 1;
    }
    assert_eq!(Bitmap::parse_directory(table, count).is_ok(), rest.is_empty());
    if let Ok(luks) = LuksHeader::parse(table) {
        let written = luks.encode().expect("what was read can be written");
        assert_eq!(LuksHeader::parse(&written), Ok(luks));
    }
}
