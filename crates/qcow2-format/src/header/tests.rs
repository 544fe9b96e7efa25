use super::*;
use crate::error::Table;
use crate::extension::{BitmapsExtension, LuksPointer, UnknownExtension};
use crate::feature::{CompatibleFeatures, FeatureName, FeatureWord};
use proptest::prelude::*;

/// Cluster 0 of `qemu-img create -f qcow2 -b base.raw -F raw o.qcow2 1M`, without the trailing zeroes.
fn overlay_of_qemu() -> Header {
    let mut header = Header::new(Version::V3, 16);
    header.backing_file = Some(b"base.raw".to_vec());
    header.size = 1 << 20;
    header.l1_size = 1;
    header.l1_table_offset = HostOffset::new(0x30000);
    header.refcount_table_offset = HostOffset::new(0x10000);
    header.refcount_table_clusters = 1;
    header.extensions.backing_format = Some(b"raw".to_vec());
    header.extensions.feature_names = Some(FeatureName::standard());
    header
}

fn bytes() -> Vec<u8> {
    let mut header = overlay_of_qemu();
    header.backing_file = None;
    header.extensions = Extensions::default();
    header.encode_cluster().unwrap()
}

/// The result of parsing a valid header after `change`.
fn check(change: impl FnOnce(&mut Vec<u8>)) -> Result<Header, FormatErrorKind> {
    let mut bytes = bytes();
    change(&mut bytes);
    Header::parse(&bytes).map_err(|e| e.kind().clone())
}

fn set32(at: usize, value: u32) -> impl FnOnce(&mut Vec<u8>) {
    move |bytes| bytes[at..at + 4].copy_from_slice(&value.to_be_bytes())
}

fn set64(at: usize, value: u64) -> impl FnOnce(&mut Vec<u8>) {
    move |bytes| bytes[at..at + 8].copy_from_slice(&value.to_be_bytes())
}

fn extension(kind: u32, len: u32, data: &[u8]) -> impl FnOnce(&mut Vec<u8>) {
    move |bytes| {
        set32(112, kind)(bytes);
        set32(116, len)(bytes);
        bytes[120..120 + data.len()].copy_from_slice(data);
    }
}

#[test]
fn encoded_header_matches_qemu() {
    let bytes = overlay_of_qemu().encode().unwrap();
    assert_eq!(&bytes[..8], b"QFI\xfb\0\0\0\x03");
    assert_eq!(&bytes[8..20], &[0, 0, 0, 0, 0, 0, 2, 0x10, 0, 0, 0, 8], "name of 8 bytes at 528");
    assert_eq!(&bytes[100..112], &[0, 0, 0, 112, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(&bytes[112..128], b"\xe2\x79\x2a\xca\0\0\0\x03raw\0\0\0\0\0");
    assert_eq!(&bytes[128..138], b"\x68\x03\xf8\x57\0\0\x01\x80\0\0");
    assert_eq!(&bytes[520..536], b"\0\0\0\0\0\0\0\0base.raw");
    assert_eq!(bytes.len(), 536);
    assert_eq!(Header::parse(&bytes).unwrap(), overlay_of_qemu());
}

#[test]
fn version_2_is_72_bytes() {
    let mut header = Header { version: Version::V2, ..overlay_of_qemu() };
    header.extensions.feature_names = None;
    let bytes = header.encode().unwrap();
    assert_eq!((&bytes[72..76], &bytes[96..]), (&b"\xe2\x79\x2a\xca"[..], &b"base.raw"[..]));
    assert_eq!(Header::parse(&bytes).unwrap(), header);
    header.refcount_order = 3;
    assert_eq!(header.encode().unwrap_err().kind(), &FormatErrorKind::NeedsVersion3);
}

#[test]
fn probe_len_needs_24_bytes() {
    assert_eq!(Header::probe_len(&bytes()[..Header::PROBE_LEN]), Ok(65536));
    let kind = |b: &[u8]| Header::probe_len(b).unwrap_err().kind().clone();
    assert_eq!(kind(b""), FormatErrorKind::NotQcow2);
    assert_eq!(kind(b"QFI"), FormatErrorKind::NotQcow2);
    assert_eq!(kind(b"QFI\xfb"), FormatErrorKind::Version(0));
    assert_eq!(kind(b"QFI\xfb\0\0\0\x01"), FormatErrorKind::Version(1));
    assert_eq!(kind(b"QFI\xfb\0\0\0\x03"), FormatErrorKind::ClusterBits(0));
}

#[test]
fn short_file_reads_as_padded_with_zeroes() {
    let bytes = bytes();
    for len in [104, 105, 111, 112, 200] {
        assert!(Header::parse(&bytes[..len]).is_ok(), "{len} bytes");
    }
    for len in [24, 50, 103] {
        assert_eq!(
            Header::parse(&bytes[..len]).unwrap_err().kind(),
            &FormatErrorKind::HeaderTooShort(0),
            "{len}"
        );
    }
}

#[test]
fn invalid_fixed_fields_are_refused() {
    use FormatErrorKind as K;
    assert_eq!(check(set32(0, 1)), Err(K::NotQcow2));
    assert_eq!(check(set32(4, 4)), Err(K::Version(4)));
    assert_eq!(check(set32(20, 22)), Err(K::ClusterBits(22)));
    assert_eq!(check(set32(100, 103)), Err(K::HeaderTooShort(103)));
    assert!(check(set32(100, 65536)).is_ok());
    assert_eq!(check(set32(100, 65537)), Err(K::HeaderExceedsCluster(65537)));
    assert_eq!(check(set64(8, 65537)), Err(K::BackingOffset(65537)));
    assert_eq!(check(set64(8, u64::MAX)), Err(K::BackingOffset(u64::MAX)));
    assert_eq!(check(set32(96, 7)), Err(K::RefcountOrder(7)));
    assert_eq!(check(set32(32, 3)), Err(K::CryptMethod(3)));
    assert_eq!(check(set32(32, 2)), Err(K::MissingCryptoHeader(2)));
    assert_eq!(check(set32(32, 1)).unwrap().crypt_method, CryptMethod::Aes);
    assert_eq!(check(|b| b[104] = 2), Err(K::CompressionType(2)));
    assert_eq!(check(|b| b[104] = 1), Err(K::CompressionBitMissing));
    assert_eq!(check(set64(72, 8)), Err(K::CompressionBitSet));
    let short = check(|b| {
        b[104] = 1;
        set32(100, 104)(b);
    });
    assert_eq!(
        short.unwrap().compression_type,
        CompressionType::Deflate,
        "the byte is not part of the header"
    );
}

#[test]
fn invalid_table_fields_are_refused() {
    use FormatErrorKind as K;
    assert_eq!(check(set32(56, 0)), Err(K::NoRefcountTable));
    assert!(check(set32(56, 128)).is_ok());
    assert_eq!(check(set32(56, 129)), Err(K::TableTooLarge(Table::Refcount)));
    assert_eq!(check(set64(48, 512)), Err(K::TableOffset(Table::Refcount)));
    assert_eq!(check(set64(48, (1 << 63) - 65536)), Err(K::TableOffset(Table::Refcount)));
    assert!(check(set64(48, (1 << 63) - 2 * 65536)).is_ok());
    assert_eq!(check(set32(60, 65537)), Err(K::TableTooLarge(Table::Snapshots)));
    assert_eq!(check(set64(64, 1)), Err(K::TableOffset(Table::Snapshots)), "even without snapshots");
    assert_eq!(check(set32(36, (4 << 20) + 1)), Err(K::TableTooLarge(Table::ActiveL1)));
    assert_eq!(check(set64(40, 1 << 63)), Err(K::TableOffset(Table::ActiveL1)));
    assert_eq!(check(set32(36, 0)), Err(K::L1TooSmall { entries: 0, needed: 1 }));
    assert_eq!(check(set64(24, 1 << 62)), Err(K::ImageTooBig(1 << 62)));
}

#[test]
fn parse_for_check_accepts_missing_refcount_and_bad_snapshot_tables() {
    let bytes = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = bytes();
        change(&mut bytes);
        bytes
    };
    assert!(Header::parse_for_check(&bytes(&|b| set32(56, 0)(b))).is_ok());
    assert!(Header::parse_for_check(&bytes(&|b| set64(64, 1)(b))).is_ok());
    assert!(Header::parse_for_check(&bytes(&|b| set32(60, 65537)(b))).is_ok());
    assert!(Header::parse_for_check(&bytes(&|b| set32(56, 129)(b))).is_err());
}

#[test]
fn unknown_incompatible_features_get_names_from_the_table() {
    let names = |names: &[FeatureName]| {
        let table = FeatureName::encode_table(names);
        check(|b| {
            extension(0x6803_f857, table.len() as u32, &table)(b);
            set64(72, 1 << 63 | 1 << 6 | 1 << 5)(b);
        })
    };
    let name = |word, bit, text| FeatureName::new(word, bit, text).unwrap();
    let table = [
        name(FeatureWord::Incompatible, 6, "six"),
        name(FeatureWord::Compatible, 5, "not this word"),
        name(FeatureWord::Incompatible, 200, "no such bit"),
        name(FeatureWord::Incompatible, 6, "six again"),
    ];
    let expected =
        FormatErrorKind::UnknownIncompatible { names: vec!["six".into()], unnamed: 1 << 63 | 1 << 5 };
    assert_eq!(names(&table), Err(expected));
}

#[test]
fn backing_name_must_end_inside_the_first_cluster() {
    use FormatErrorKind as K;
    let name = |offset: u64, len: u32| {
        check(|b| {
            set64(8, offset)(b);
            set32(16, len)(b);
        })
        .map(|header| header.backing_file.map(|name| name.len()))
    };
    assert_eq!(name(1024, 1023), Ok(Some(1023)));
    assert_eq!(name(1024, 1024), Err(K::BackingNameTooLong(1024)));
    assert_eq!(name(65530, 6), Ok(Some(6)));
    assert_eq!(name(65530, 7), Err(K::BackingNameTooLong(7)));
    assert_eq!(name(65536, 1), Err(K::BackingNameTooLong(1)));
    assert_eq!(name(1024, u32::MAX), Err(K::BackingNameTooLong(u32::MAX)));
    assert_eq!(name(1024, 0), Ok(None));
    assert_eq!(name(0, 2000), Ok(None), "the length is ignored without an offset");
    assert_eq!(name(100, 5), Ok(Some(5)), "like QEMU, accepted even inside the header");
    assert!(matches!(name(116, 1), Err(K::ExtensionTooLarge { .. })), "no room for an end marker");
}

#[test]
fn invalid_extensions_are_refused() {
    use FormatErrorKind as K;
    let too_large = |kind, len| Err(K::ExtensionTooLarge { kind, len });
    assert!(check(extension(0x1234, 65536 - 120, &[])).is_ok());
    assert_eq!(check(extension(0x1234, 65536 - 119, &[])), too_large(0x1234, 65536 - 119));
    assert_eq!(check(extension(0x1234, u32::MAX, &[])), too_large(0x1234, u32::MAX));
    assert_eq!(check(extension(0, 70000, &[])), too_large(0, 70000));
    assert!(check(extension(0xe279_2aca, 15, b"fifteen letters")).is_ok());
    assert_eq!(check(extension(0xe279_2aca, 16, &[])), Err(K::BackingFormatTooLong(16)));
    assert_eq!(check(extension(0x2385_2875, 23, &[])), Err(K::BitmapsExtensionLength(23)));
    assert!(check(extension(0x2385_2875, 24, &[])).is_ok(), "not checked without the autoclear bit");
    assert_eq!(check(extension(0x0537_be77, 15, &[])), Err(K::CryptoExtensionLength(15)));
    assert_eq!(check(extension(0x0537_be77, 16, &[])), Err(K::CryptoExtensionWithoutLuks));
    let luks = |offset: u8, len: u8| {
        check(|b| {
            extension(0x0537_be77, 16, &[0, 0, 0, 0, 0, 0, 0, offset, 0, 0, 0, 0, 0, 0, 0, len])(b);
            set32(32, 2)(b);
        })
    };
    assert_eq!(luks(5, 1), Err(K::CryptoOffset { offset: 5, cluster_size: 65536 }));
    assert_eq!(luks(0, 0), Err(K::MissingCryptoHeader(2)));
    assert!(luks(0, 1).is_ok());
}

#[test]
fn bitmaps_extension_is_checked_with_the_autoclear_bit() {
    use FormatErrorKind as K;
    let bitmaps = |count: u32, reserved: u32, directory_size: u64, offset: u64| {
        let mut header = overlay_of_qemu();
        let directory_offset = HostOffset::new(offset);
        header.extensions.bitmaps =
            Some(BitmapsExtension { count, reserved, directory_size, directory_offset });
        header.features.autoclear.set(AutoclearFeatures::BITMAPS, true);
        Header::parse(&header.encode().unwrap()).map(|_| ()).map_err(|e| e.kind().clone())
    };
    assert_eq!(bitmaps(65535, 0, 67_107_840, 0x10000), Ok(()));
    assert_eq!(bitmaps(0, 0, 32, 0x10000), Err(K::BitmapsCount(0)));
    assert_eq!(bitmaps(65536, 0, 32, 0x10000), Err(K::BitmapsCount(65536)));
    assert_eq!(bitmaps(1, 1, 32, 0x10000), Err(K::BitmapsReserved(1)));
    assert_eq!(bitmaps(1, 0, 0, 0x10000), Err(K::BitmapDirectorySize(0)));
    assert_eq!(bitmaps(1, 0, 67_107_841, 0x10000), Err(K::BitmapDirectorySize(67_107_841)));
    assert_eq!(bitmaps(1, 0, 32, 5), Err(K::BitmapDirectoryOffset(5)));
}

#[test]
fn header_larger_than_a_cluster_is_refused() {
    let mut header = Header { cluster_bits: 9, ..overlay_of_qemu() };
    assert_eq!(
        header.encode().unwrap_err().kind(),
        &FormatErrorKind::HeaderFull { needed: 536, cluster_size: 512 }
    );
    header.extensions.feature_names = None;
    assert_eq!(header.encode_cluster().unwrap().len(), 512);
    header.backing_file = Some(vec![b'n'; 1024]);
    assert_eq!(header.encode().unwrap_err().kind(), &FormatErrorKind::BackingNameTooLong(1024));
}

#[test]
fn disk_size_rounds_down_to_512() {
    let header = Header { size: 1_000_001, ..overlay_of_qemu() };
    assert_eq!(header.disk_size(), 999_936);
}

fn any_extensions() -> impl Strategy<Value = Extensions> {
    let data = |max| proptest::collection::vec(any::<u8>(), 0..max);
    let unknown =
        (any::<u32>(), data(40)).prop_map(|(kind, data)| UnknownExtension { kind: kind | 1 << 31, data });
    let names = (any::<u8>(), "[a-z]{0,46}")
        .prop_map(|(bit, name)| FeatureName::new(FeatureWord::Other(bit | 4), bit, &name).unwrap());
    (
        proptest::option::of(data(16)),
        proptest::option::of(data(60)),
        proptest::option::of(proptest::collection::vec(names, 0..5)),
        proptest::option::of(any::<(u32, u32, u64, u64)>()),
        proptest::collection::vec(unknown, 0..4),
    )
        .prop_map(|(backing_format, data_file, feature_names, bitmaps, unknown)| Extensions {
            backing_format,
            data_file,
            luks: None,
            feature_names,
            bitmaps: bitmaps.map(|(count, reserved, directory_size, offset)| BitmapsExtension {
                count,
                reserved,
                directory_size,
                directory_offset: HostOffset::new(offset),
            }),
            unknown: unknown.into_iter().filter(|u| u.kind != 0xe279_2aca).collect(),
        })
}

proptest! {
    #[test]
    fn headers_round_trip(
        extensions in any_extensions(),
        words in any::<(u64, u64, u8)>(),
        size in 0..1u64 << 40,
        unknown in proptest::collection::vec(any::<u8>(), 0..5),
        name in proptest::option::of(proptest::collection::vec(any::<u8>(), 1..200)),
        luks: bool,
    ) {
        let mut header = Header { size, extensions, backing_file: name, ..overlay_of_qemu() };
        header.l1_size = 1 << 12;
        header.features.incompatible = IncompatibleFeatures::from_bits(words.0 & 0b10111);
        header.features.compatible = CompatibleFeatures::from_bits(words.1);
        header.features.autoclear = AutoclearFeatures::from_bits(words.1 & !1);
        header.refcount_order = u32::from(words.2 % 7);
        header.unknown_fields = unknown.iter().flat_map(|&b| [b, 1, 2, 3, 4, 5, 6, 7]).collect();
        if luks {
            header.crypt_method = CryptMethod::Luks;
            header.extensions.luks = Some(LuksPointer { offset: HostOffset::new(0x10000), len: words.0 | 1 });
        }
        let bytes = header.encode().unwrap();
        prop_assert_eq!(Header::parse(&bytes).unwrap(), header);
    }

    #[test]
    fn arbitrary_edits_do_not_panic(
        edits in proptest::collection::vec((0..600usize, any::<u8>()), 0..12),
        len in 0..600usize,
    ) {
        let mut bytes = overlay_of_qemu().encode().unwrap();
        for (at, value) in edits {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
        }
        bytes.truncate(len);
        let _ = Header::parse_for_check(&bytes);
        if let Ok(header) = Header::parse(&bytes) {
            header.geometry().unwrap();
            if let Ok(again) = header.encode() {
                prop_assert_eq!(Header::parse(&again).unwrap().extensions, header.extensions);
            }
        }
    }

    #[test]
    fn extension_areas_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), small: bool) {
        let mut bytes = bytes;
        if small {
            bytes.chunks_mut(4).for_each(|chunk| chunk[0] = 0);
            bytes.chunks_mut(8).for_each(|chunk| chunk.iter_mut().skip(4).take(3).for_each(|b| *b = 0));
        }
        let _ = Extensions::parse(&bytes);
        let _ = Extensions::feature_names(&bytes);
    }
}
