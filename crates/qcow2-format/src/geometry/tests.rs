use super::*;
use proptest::prelude::*;

fn fields(cluster_bits: u32, refcount_order: u32, extended_l2: bool) -> GeometryFields {
    GeometryFields { cluster_bits, refcount_order, extended_l2 }
}

#[test]
fn fields_outside_the_limits_are_refused() {
    let kind = |f| Geometry::new(f).unwrap_err().kind().clone();
    assert_eq!(kind(fields(8, 4, false)), FormatErrorKind::ClusterBits(8));
    assert_eq!(kind(fields(22, 4, false)), FormatErrorKind::ClusterBits(22));
    assert_eq!(kind(fields(u32::MAX, 4, false)), FormatErrorKind::ClusterBits(u32::MAX));
    assert_eq!(kind(fields(13, 4, true)), FormatErrorKind::SubclusterSize(256));
    assert_eq!(kind(fields(16, 7, false)), FormatErrorKind::RefcountOrder(7));
    assert!(Geometry::new(fields(14, 0, true)).is_ok() && Geometry::new(fields(9, 6, false)).is_ok());
}

#[test]
fn default_image() {
    let g = Geometry::new(fields(16, 4, false)).unwrap();
    assert_eq!((g.cluster_size(), g.l2_entries(), g.l2_coverage()), (65536, 8192, 512 << 20));
    assert_eq!((g.refcount_block_entries(), g.subclusters(), g.subcluster_size()), (32768, 1, 65536));
    assert_eq!((g.l1_entries_for(0), g.l1_entries_for(1), g.l1_entries_for(512 << 20)), (0, 1, 1));
    assert_eq!(g.l1_entries_for(u64::MAX), 1 << 35);
    let offset = GuestOffset::new((512 << 20) + 3 * 65536 + 5);
    assert_eq!((g.l1_index(offset).value(), g.l2_index(offset).value()), (1, 3));
    assert_eq!(g.l1_start(L1Index::new(1)), Some(GuestOffset::new(512 << 20)));
    assert_eq!(g.l1_start(L1Index::new(1 << 35)), None);
    let cluster = HostCluster::new(32768 * 2 + 7);
    assert_eq!((g.refcount_table_index(cluster), g.refcount_block_slot(cluster)), (2, 7));
}

#[test]
fn extended_l2_image() {
    let g = Geometry::new(fields(16, 4, true)).unwrap();
    assert_eq!((g.l2_entry_size(), g.l2_entries(), g.l2_coverage()), (16, 4096, 256 << 20));
    assert_eq!((g.subclusters(), g.subcluster_size()), (32, 2048));
    assert_eq!(g.subcluster_index(GuestOffset::new(65536 + 2048)), 1);
    assert_eq!(g.subcluster_index(GuestOffset::new(65535)), 31);
}

#[test]
fn conversions_near_u64_max() {
    let g = Geometry::new(fields(21, 0, false)).unwrap();
    assert_eq!(g.align_up(u64::MAX), None);
    assert_eq!(g.clusters_for(u64::MAX), 1 << 43);
    assert_eq!(g.host_offset(HostCluster::new(1 << 43)), None);
    assert_eq!(g.host_offset(HostCluster::new((1 << 43) - 1)), Some(HostOffset::new(u64::MAX << 21)));
    assert_eq!(g.refcount_block_first(u64::MAX), None);
}

proptest! {
    #[test]
    fn matches_plain_division(bits in 9..=21u32, order in 0..=6u32, extended: bool, value: u64, size: u64) {
        let bits = if extended { bits.max(14) } else { bits };
        let g = Geometry::new(fields(bits, order, extended)).unwrap();
        let cs = g.cluster_size();
        prop_assert_eq!(g.align_down(value) + g.in_cluster(value), value);
        prop_assert_eq!(g.is_aligned(value), value % cs == 0);
        prop_assert_eq!(g.clusters_for(value), value.div_ceil(cs));
        prop_assert_eq!(g.align_up(value), value.checked_next_multiple_of(cs));
        let guest = GuestOffset::new(value);
        let n = g.guest_cluster(guest).value();
        let (l1, l2) = (g.l1_index(guest).value(), g.l2_index(guest).value());
        prop_assert_eq!((l1, l2), (n / g.l2_entries(), n % g.l2_entries()));
        prop_assert!(g.l1_start(g.l1_index(guest)).unwrap() <= guest);
        prop_assert_eq!(g.guest_offset(g.guest_cluster(guest)).value(), g.align_down(value));
        prop_assert_eq!(g.l1_entries_for(size), size.div_ceil(cs * g.l2_entries()));
        prop_assert_eq!(u64::from(g.subcluster_index(guest)), value % cs / g.subcluster_size());
        let host = g.host_cluster(HostOffset::new(value));
        let per = (cs * 8) >> order;
        prop_assert_eq!(g.refcount_block_entries(), per);
        let (index, slot) = (g.refcount_table_index(host), g.refcount_block_slot(host));
        prop_assert_eq!((index, slot), (host.value() / per, host.value() % per));
        prop_assert_eq!(g.refcount_block_first(index).unwrap().value(), host.value() / per * per);
    }
}
