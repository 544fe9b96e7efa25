use super::*;
use crate::geometry::GeometryFields;
use proptest::prelude::*;

fn format(cluster_bits: u32, extended_l2: bool) -> L2Format {
    let geometry = Geometry::new(GeometryFields { cluster_bits, refcount_order: 4, extended_l2 }).unwrap();
    L2Format { geometry, zero_flag: true, external_data: false }
}

fn standard(entry: Result<L2Entry, FormatError>) -> ClusterEntry {
    match entry.unwrap() {
        L2Entry::Standard(entry) => entry,
        L2Entry::Compressed(stream) => panic!("compressed: {stream:?}"),
    }
}

fn kind(entry: Result<L2Entry, FormatError>) -> FormatErrorKind {
    entry.unwrap_err().kind().clone()
}

#[test]
fn decodes_every_state_without_subclusters() {
    let format = format(16, false);
    let host = Some(HostOffset::new(0x50000));
    let decode = |raw| standard(format.decode(raw, 0));
    assert_eq!(decode(0), ClusterEntry::UNALLOCATED);
    assert_eq!(decode(COPIED), ClusterEntry::UNALLOCATED, "the copied flag is ignored without a host offset");
    let data = ClusterEntry { host, copied: true, allocated: 1, zero: 0 };
    assert_eq!(decode(0x8000_0000_0005_0000), data);
    assert_eq!(data.state(0), SubclusterState::Data);
    let plain = ClusterEntry { host: None, copied: false, allocated: 0, zero: 1 };
    assert_eq!(decode(1), plain);
    assert_eq!(plain.state(0), SubclusterState::Zero);
    assert_eq!(decode(0x8000_0000_0005_0001), ClusterEntry { host, copied: true, allocated: 0, zero: 1 });
    assert_eq!(decode(0x0100_0000_0005_0000).host, host, "reserved bits are ignored");
    assert_eq!(format.reserved_bits(0x3f00_0000_0005_01fe), 0x3f00_0000_0000_01fe);
}

#[test]
fn host_offset_0_is_valid_in_a_data_file() {
    let format = L2Format { external_data: true, ..format(16, false) };
    let host = Some(HostOffset::new(0));
    assert_eq!(
        standard(format.decode(COPIED, 0)),
        ClusterEntry { host, copied: true, allocated: 1, zero: 0 }
    );
    assert_eq!(standard(format.decode(0, 0)), ClusterEntry::UNALLOCATED);
    assert_eq!(standard(format.decode(COPIED | ZERO, 0)).host, None, "as qemu-img map shows it");
    let extended = L2Format { external_data: true, ..self::format(16, true) };
    let entry = standard(extended.decode(COPIED, 0x2_0000_0001));
    assert_eq!(entry, ClusterEntry { host, copied: true, allocated: 1, zero: 2 });
}

#[test]
fn version_2_has_no_zero_flag() {
    let format = L2Format { zero_flag: false, ..format(16, false) };
    assert_eq!(kind(format.decode(0x50001, 0)), FormatErrorKind::ZeroFlagInVersion2);
    assert_eq!(kind(format.decode(1, 0)), FormatErrorKind::ZeroFlagInVersion2);
    assert_eq!(standard(format.decode(0x50000, 0)).allocated, 1);
}

#[test]
fn unaligned_clusters_are_refused() {
    assert_eq!(kind(format(16, false).decode(0x50200, 0)), FormatErrorKind::Misaligned(0x50200));
    assert_eq!(standard(format(9, false).decode(0x50200, 0)).host, Some(HostOffset::new(0x50200)));
}

/// Bitmaps that qemu-io left in images with extended L2 entries.
#[test]
fn decodes_subcluster_bitmaps_written_by_qemu() {
    let format = format(16, true);
    let entry = standard(format.decode(0x8000_0000_0005_0000, 0x0000_0300_0000_0004));
    assert_eq!((entry.allocated, entry.zero), (1 << 2, 0x300));
    assert_eq!(entry.state(2), SubclusterState::Data);
    assert_eq!(entry.state(8), SubclusterState::Zero);
    assert_eq!(entry.state(0), SubclusterState::Unallocated);
    assert_eq!(standard(format.decode(0x50000, 0xffff_ffff)).allocated, u32::MAX);
    let zero = standard(format.decode(0, 0xffff_ffff_0000_0000));
    assert_eq!((zero.host, zero.zero), (None, u32::MAX));
    let reserved = standard(format.decode(0x50000 | ZERO, 0));
    assert_eq!((reserved.allocated, reserved.zero), (0, 0), "no zero flag with extended L2 entries");
}

#[test]
fn contradictory_subcluster_bitmaps_are_refused() {
    let format = format(16, true);
    let both = 0x1_0000_0001;
    assert_eq!(kind(format.decode(0x50000, both)), FormatErrorKind::SubclusterBitmap(both));
    assert_eq!(kind(format.decode(0, 1)), FormatErrorKind::SubclusterBitmap(1));
    assert_eq!(format.decode(COMPRESSED, 1), format.decode(COMPRESSED, 0));
}

/// Two streams that qemu-img packed into one cluster.
#[test]
fn decodes_compressed_descriptors_written_by_qemu() {
    let stream = |offset, len| L2Entry::Compressed(CompressedCluster { host: HostOffset::new(offset), len });
    let format = format(16, false);
    assert_eq!(format.decode(0x4000_0000_0005_0000, 0), Ok(stream(0x50000, 512)));
    assert_eq!(format.decode(0x4000_0000_0005_004f, 0), Ok(stream(0x5004f, 512 - 0x4f)));
    assert_eq!(format.decode(0x4040_0000_0005_0000, 0), Ok(stream(0x50000, 1024)), "sectors start at bit 54");
}

#[test]
fn descriptor_fields_split_by_cluster_size() {
    for (bits, offset_bits, sector_bits) in [(9, 61, 1), (12, 58, 4), (14, 56, 6), (16, 54, 8), (21, 49, 13)]
    {
        let format = format(bits, false);
        let all_sectors = ((1u64 << sector_bits) - 1) << offset_bits;
        let entry = format.decode(COMPRESSED | all_sectors | 0x10, 0).unwrap();
        let len = 512 * (1 << sector_bits) - 0x10;
        assert_eq!(
            entry,
            L2Entry::Compressed(CompressedCluster { host: HostOffset::new(0x10), len }),
            "2^{bits}"
        );
        let last = 1u64 << (offset_bits - 1);
        let far = format.decode(COMPRESSED | last, 0);
        if last > MAX_HOST_OFFSET {
            assert_eq!(kind(far), FormatErrorKind::CompressedOffset(last));
        } else {
            assert!(far.is_ok());
        }
    }
}

#[test]
fn stream_outside_the_descriptor_fields_is_not_encoded() {
    let format = format(16, false);
    let encode = |offset, len| {
        format.encode(&L2Entry::Compressed(CompressedCluster { host: HostOffset::new(offset), len }))
    };
    assert_eq!(encode(0x50000, 0x4f), Some((0x4000_0000_0005_0000, 0)));
    assert_eq!(encode(0x501ff, 2), Some((0x4040_0000_0005_01ff, 0)), "two bytes in two sectors");
    assert_eq!(encode(1 << 54, 1), None);
    assert_eq!(encode(0, 0), None);
    assert_eq!(encode(0, 256 * 512), Some((0x7fc0_0000_0000_0000, 0)));
    assert_eq!(encode(0, 256 * 512 + 1), None);
    assert_eq!(encode(u64::MAX, 2), None);
}

fn any_format() -> impl Strategy<Value = L2Format> {
    (9..=21u32, any::<bool>(), any::<bool>(), any::<bool>()).prop_map(
        |(bits, extended, zero_flag, external_data)| {
            let bits = if extended { bits.max(14) } else { bits };
            L2Format { zero_flag, external_data, ..format(bits, extended) }
        },
    )
}

proptest! {
    #[test]
    fn valid_entries_round_trip(format in any_format(), raw: u64, bitmap: u64, sparse: bool) {
        let bitmap = if sparse { bitmap & 0xffff_0000_0000_ffff } else { bitmap };
        let Ok(entry) = format.decode(raw, bitmap) else { return Ok(()) };
        let (word, second) = format.encode(&entry).unwrap();
        prop_assert_eq!(format.decode(word, second), Ok(entry));
        if let L2Entry::Standard(entry) = entry {
            prop_assert_eq!(entry.allocated & entry.zero, 0);
            prop_assert!(entry.allocated == 0 || entry.host.is_some());
            let mut kept = raw & !format.reserved_bits(raw);
            kept &= if entry.host.is_none() { !COPIED } else { u64::MAX };
            kept &= if format.geometry.extended_l2() { !ZERO } else { u64::MAX };
            prop_assert_eq!(word, kept);
        } else {
            prop_assert_eq!(word, raw & !COPIED);
        }
    }

    #[test]
    fn streams_round_up_to_a_sector(format in any_format(), offset in 0..1u64 << 49, len in 1..1u64 << 21) {
        let len = len.min(format.geometry.cluster_size() - 1).max(1);
        let stream = CompressedCluster { host: HostOffset::new(offset), len };
        let (raw, bitmap) = format.encode(&L2Entry::Compressed(stream)).unwrap();
        let Ok(L2Entry::Compressed(read)) = format.decode(raw, bitmap) else { panic!("{raw:#x}") };
        prop_assert_eq!(read.host, stream.host);
        prop_assert!(read.len >= len && read.len < len + 512);
        prop_assert_eq!((offset + read.len) % 512, 0);
    }
}
