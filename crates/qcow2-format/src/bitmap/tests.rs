use super::*;
use crate::geometry::GeometryFields;
use proptest::prelude::*;

fn geometry(cluster_bits: u32) -> Geometry {
    Geometry::new(GeometryFields { cluster_bits, refcount_order: 4, extended_l2: false }).unwrap()
}

fn good() -> Bitmap {
    let mut bitmap = Bitmap::new("b", 16);
    bitmap.table_offset = HostOffset::new(0x10000);
    bitmap.table_entries = 1;
    bitmap
}

#[test]
fn each_constraint_is_checked_alone() {
    let geometry = geometry(16);
    let size = (65536 * 8) << 16;
    assert_eq!(good().validate(&geometry, size), Ok(()));
    let broken = |change: fn(&mut Bitmap)| {
        let mut bitmap = good();
        change(&mut bitmap);
        bitmap.validate(&geometry, size).map_err(|e| e.kind().clone())
    };
    let constraints = Err(FormatErrorKind::BitmapConstraints("b".into()));
    assert_eq!(broken(|b| b.table_offset = HostOffset::new(0)), constraints);
    assert_eq!(broken(|b| b.table_offset = HostOffset::new(512)), constraints);
    assert_eq!(broken(|b| b.table_entries = 0), constraints);
    assert_eq!(broken(|b| b.table_entries = 8193), constraints, "above 512 MiB of bits");
    assert_eq!(broken(|b| b.table_entries = 8192), Ok(()));
    assert_eq!(broken(|b| b.granularity_bits = 8), constraints);
    assert_eq!(broken(|b| b.granularity_bits = 32), constraints);
    assert_eq!(broken(|b| b.granularity_bits = 15), constraints, "does not cover the disk");
    assert_eq!(broken(|b| b.reserved_flags = 4), constraints);
    assert_eq!(broken(|b| b.kind = 7), constraints);
    assert_eq!(broken(|b| b.extra = vec![0]), Err(FormatErrorKind::BitmapExtra(1)));
    let unnamed = Bitmap { name: Vec::new(), ..good() };
    assert!(unnamed.validate(&geometry, size).is_err());
    let in_use = Bitmap { in_use: true, granularity_bits: 9, ..good() };
    assert_eq!(in_use.validate(&geometry, size), Ok(()), "an inconsistent bitmap need not cover the disk");
}

#[test]
fn directory_entry_count_must_match_the_header() {
    let mut bytes = Vec::new();
    good().encode(&mut bytes).unwrap();
    assert_eq!(bytes.len(), 32);
    Bitmap { name: b"second".to_vec(), auto: true, ..good() }.encode(&mut bytes).unwrap();
    let found = Bitmap::parse_directory(&bytes, 2).unwrap();
    assert_eq!((found[0].name_text(), found[1].name_text()), ("b".into(), "second".into()));
    let kind =
        |directory: &[u8], count| Bitmap::parse_directory(directory, count).unwrap_err().kind().clone();
    assert_eq!(kind(&bytes, 1), FormatErrorKind::BitmapDirectoryCount { found: 2, expected: 1 });
    assert_eq!(kind(&bytes, 3), FormatErrorKind::BitmapDirectoryCount { found: 2, expected: 3 });
    assert_eq!(kind(&bytes[..40], 2), FormatErrorKind::BitmapDirectoryBroken);
    assert_eq!(
        kind(&bytes[..63], 2),
        FormatErrorKind::BitmapDirectoryBroken,
        "the padding is part of the entry"
    );
}

#[test]
fn table_entries_decode() {
    let geometry = geometry(16);
    let decode = |raw| BitmapTableEntry::decode(raw, &geometry).map_err(|e| e.kind().clone());
    assert_eq!(decode(0), Ok(BitmapTableEntry::Zeroes));
    assert_eq!(decode(1), Ok(BitmapTableEntry::Ones));
    assert_eq!(decode(0x70000), Ok(BitmapTableEntry::Data(HostOffset::new(0x70000))));
    for raw in [2, 1 << 63, 1 << 56, 0x70001, 0x70200] {
        assert_eq!(decode(raw), Err(FormatErrorKind::BitmapTableEntry(raw)));
    }
}

#[test]
fn table_entries_for_a_disk() {
    let geometry = geometry(16);
    assert_eq!(Bitmap::table_entries_for(&geometry, 0, 16), Some(0));
    assert_eq!(Bitmap::table_entries_for(&geometry, (65536 * 8) << 16, 16), Some(1));
    assert_eq!(Bitmap::table_entries_for(&geometry, ((65536 * 8) << 16) + 1, 16), Some(2));
    assert_eq!(Bitmap::table_entries_for(&geometry, 1, 64), None);
}

proptest! {
    #[test]
    fn entries_round_trip(
        numbers in any::<(u64, u32, bool, bool, u8, u8)>(),
        flags in any::<u32>(),
        extra in proptest::collection::vec(any::<u8>(), 0..40),
        name in proptest::collection::vec(any::<u8>(), 0..40),
    ) {
        let bitmap = Bitmap {
            table_offset: HostOffset::new(numbers.0),
            table_entries: numbers.1,
            in_use: numbers.2,
            auto: numbers.3,
            reserved_flags: flags & !3,
            kind: numbers.4,
            granularity_bits: numbers.5,
            extra,
            name,
        };
        let mut bytes = Vec::new();
        bitmap.encode(&mut bytes).unwrap();
        prop_assert_eq!(Bitmap::parse(&bytes).unwrap(), (bitmap, bytes.len()));
    }

    #[test]
    fn arbitrary_bytes_do_not_panic(
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
        count in any::<u32>(),
        disk_size in any::<u64>(),
    ) {
        let _ = Bitmap::parse_directory(&bytes, count);
        if let Ok((bitmap, len)) = Bitmap::parse(&bytes) {
            prop_assert!(len <= bytes.len());
            let _ = bitmap.validate(&geometry(21), disk_size);
        }
    }

    #[test]
    fn valid_table_entries_round_trip(raw in any::<u64>(), cluster_bits in 9..=21u32) {
        if let Ok(entry) = BitmapTableEntry::decode(raw, &geometry(cluster_bits)) {
            prop_assert_eq!(entry.encode(), raw);
        }
    }
}
