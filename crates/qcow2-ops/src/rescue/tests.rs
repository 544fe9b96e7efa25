//! Rescues of small images, each damaged in one way; and of what no writer ever made.

use super::*;
use crate::progress::Silent;
use qcow2_codec::{Deflate, Zstd};
use qcow2_core::{
    CreateOptions, GuestOffset, GuestRange, Image, ImageFormat, OpenOptions, ResolvedSource, create,
};
use qcow2_testkit::builder::{Builder, Built, Cluster};
use qcow2_testkit::pages::PageBytes;
use qcow2_testkit::pattern;
use qcow2_testkit::storage::PageStorage;

const CLUSTER: u64 = 4096;
/// Guest bytes that an L2 table maps.
const COVERAGE: u64 = 512 * CLUSTER;

fn codecs() -> Codecs {
    Codecs::new(Arc::new(Deflate::default()), Arc::new(Zstd::default()))
}

fn data(seed: u64) -> Cluster {
    Cluster::Data(pattern::bytes(seed, 0, CLUSTER as usize))
}

/// Four L2 tables, the first with more clusters.
fn built() -> Built {
    let clusters = [0, 1, 2, 3, 7, 512, 513, 1024, 1030, 1536, 1540].into_iter().chain(20..40);
    let builder = Builder::new(12, 4 * COVERAGE);
    clusters.fold(builder, |builder, index| builder.cluster(index, data(index + 1))).build()
}

fn rescued(built: &Built, change: impl Fn(&mut RescueOptions, &mut RescueFiles<'_>)) -> Result<Rescue> {
    let mut files = RescueFiles::new(Arc::new(built.storage()), codecs());
    let mut options = RescueOptions::default();
    change(&mut options, &mut files);
    rescue(&files, &options, &Silent)
}

fn read(rescue: &Rescue, cluster: u64) -> Vec<u8> {
    let mut buf = pattern::unread(CLUSTER as usize);
    rescue.disk().read_at(GuestOffset::new(cluster * CLUSTER), &mut buf).unwrap();
    buf
}

/// The rescue of `built` has lost exactly these runs: clusters and reason. All other clusters read as before.
#[track_caller]
fn check_lost(built: &Built, lost: &[(u64, u64, Reason)]) {
    let rescue = rescued(built, |_, _| ()).unwrap();
    for &cluster in built.hosts.keys() {
        let is_lost = lost.iter().any(|&(start, count, _)| (start..start + count).contains(&cluster));
        let zeroes = vec![0; CLUSTER as usize];
        let expected = if is_lost { zeroes } else { pattern::bytes(cluster + 1, 0, CLUSTER as usize) };
        assert!(read(&rescue, cluster) == expected, "cluster {cluster}");
    }
    let found: Vec<_> = rescue.report().lost.listed.into_iter().map(|r| (r.start, r.len, r.what)).collect();
    let expected: Vec<_> =
        lost.iter().map(|&(at, count, why)| (at * CLUSTER, count * CLUSTER, why)).collect();
    assert_eq!(found, expected);
    assert_eq!(rescue.report().is_complete(), lost.is_empty());
}

#[test]
fn a_whole_image_is_complete() {
    check_lost(&built(), &[]);
}

/// What the bits of a bitmap look like, an L2 table among others, says nothing: they are the bitmap's.
#[test]
fn the_bits_of_a_bitmap_are_no_lost_table() {
    let file = Arc::new(PageStorage::default());
    let storage = Arc::clone(&file) as Arc<dyn Storage>;
    let mut options = CreateOptions::new(1 << 20);
    (options.cluster_size, options.extended_l2) = (16 << 10, true);
    create(&storage, None, &options).unwrap();
    let source = ResolvedSource::new(Arc::clone(&storage), ImageFormat::Qcow2, "image");
    let image = Image::open(source, &OpenOptions::writable()).unwrap();
    image.add_bitmap(b"b", 16).unwrap();
    let first = GuestRange::new(GuestOffset::new(0), 1 << 16).unwrap();
    image.discard(first).unwrap();
    image.close().unwrap();
    assert!(image.bitmap_bits(b"b").unwrap().marked_runs().next().is_some(), "a bit is set");
    let files = RescueFiles::new(Arc::clone(&storage), codecs());
    let rescue = rescue(&files, &RescueOptions::default(), &Silent).unwrap();
    assert!(rescue.report().is_complete() && rescue.report().other_l1.is_empty(), "{}", rescue.report());
}

#[test]
fn entries_that_lead_to_nothing_are_reported() {
    let copied = 1 << 63;
    let mut image = built();
    for (cluster, entry) in [
        (0, copied | 0x3200),               // misaligned
        (1, copied | (1 << 40)),            // past the end
        (2, copied | image.l1),             // metadata
        (3, copied | image.l2[&1]),         // an L2 table
        (7, copied | image.refcount_table), // metadata
    ] {
        image.patch_u64(image.l2_entry(cluster), entry);
    }
    let metadata = Reason::Metadata;
    let lost = [(0, 1, Reason::EntryDamaged), (1, 1, Reason::PastEnd), (2, 2, metadata), (7, 1, metadata)];
    check_lost(&image, &lost);
}

#[test]
fn tables_that_are_gone_are_reported() {
    let mut image = built();
    image.patch(image.l2[&1], &pattern::bytes(99, 0, CLUSTER as usize));
    image.patch(image.l2[&2], &vec![0; CLUSTER as usize]);
    check_lost(&image, &[(512, 512, Reason::TableDamaged), (1024, 512, Reason::TableEmpty)]);
    let mut image = built();
    image.bytes.truncate(image.l2[&3] as usize);
    let lost = [(0, 4, Reason::PastEnd), (7, 1, Reason::PastEnd), (20, 20, Reason::PastEnd)];
    let lost = lost.into_iter().chain([512, 1024].map(|at| (at, 2, Reason::PastEnd)));
    let report = rescued(&image, |_, _| ()).unwrap().report();
    let found: Vec<_> =
        report.lost.listed.iter().map(|r| (r.start / CLUSTER, r.len / CLUSTER, r.what)).collect();
    assert!(lost.take(4).all(|wanted| found.contains(&wanted)), "{found:?}");
    assert_eq!(found.last(), Some(&(1536, 512, Reason::TablePastEnd)));
}

#[test]
fn no_other_table_takes_the_place_of_one_that_was_cut_off() {
    let mut image = built();
    let end = image.bytes.len() as u64 + CLUSTER;
    image.patch_u64(image.l1 + 16, 1 << 63 | end);
    check_lost(&image, &[(1024, 512, Reason::TablePastEnd)]);
    // No file was cut as far as that.
    image.patch_u64(image.l1 + 16, 1 << 63 | end.next_power_of_two() << 8);
    let report = rescued(&image, |_, _| ()).unwrap().report();
    assert_eq!((report.lost.bytes, report.placed.bytes), (0, COVERAGE), "{report}");
}

#[test]
fn a_table_maps_one_range() {
    let mut image = built();
    let first = image.read_u64(image.l1);
    image.patch_u64(image.l1 + 24, first);
    let report = rescued(&image, |_, _| ()).unwrap().report();
    // The table that the entry led to is found by its shape.
    let table = HostOffset::new(image.l2[&3]);
    let expected = Range { start: 3 * COVERAGE, len: COVERAGE, what: (Evidence::Order, table) };
    assert_eq!((report.placed.listed, report.lost.bytes), (vec![expected], 0));
    image.set_refcount(image.l2[&3] / CLUSTER, 0);
    check_lost(&image, &[(1536, 512, Reason::TableShared)]);
}

#[test]
fn a_lost_l1_entry_is_filled_by_the_table_that_nothing_leads_to() {
    let mut image = built();
    image.patch_u64(image.l1 + 16, 0x123);
    let rescue = rescued(&image, |_, _| ()).unwrap();
    let report = rescue.report();
    assert_eq!(report.lost.bytes, 0, "{report}");
    let expected =
        Range { start: 2 * COVERAGE, len: COVERAGE, what: (Evidence::Order, HostOffset::new(image.l2[&2])) };
    assert_eq!(report.placed.listed, [expected]);
    assert!(!report.is_complete(), "a guess is not complete");
    assert!(read(&rescue, 1030) == pattern::bytes(1031, 0, CLUSTER as usize));
}

/// The clusters on both sides of two borders were written in one go.
#[test]
fn data_goes_on_over_the_border_of_two_ranges() {
    let clusters = [3, 511, 512, 5 * 512 - 1, 5 * 512].into_iter().chain((6..9).map(|range| range * 512 + 9));
    let builder = Builder::new(12, 9 * COVERAGE);
    let mut image = clusters.fold(builder, |builder, index| builder.cluster(index, data(index + 1))).build();
    for index in 1..5 {
        image.patch_u64(image.l1 + 8 * index, 0x123);
    }
    let rescue = rescued(&image, |_, _| ()).unwrap();
    let report = rescue.report();
    let range = |index: u64| {
        let what = (Evidence::Border, HostOffset::new(image.l2[&index]));
        Range { start: index * COVERAGE, len: COVERAGE, what }
    };
    assert_eq!(report.placed.listed, [range(1), range(4)], "{report}");
    assert!(!report.is_complete(), "a guess is not complete");
    for cluster in [512, 5 * 512 - 1] {
        assert!(read(&rescue, cluster) == pattern::bytes(cluster + 1, 0, CLUSTER as usize));
    }
}

#[test]
fn a_table_with_refcount_0_is_an_old_one() {
    let mut image = built();
    image.patch_u64(image.l1 + 16, 0x123);
    image.set_refcount(image.l2[&2] / CLUSTER, 0);
    let report = rescued(&image, |_, _| ()).unwrap().report();
    assert_eq!((report.placed.bytes, report.lost.bytes), (0, COVERAGE), "{report}");
    assert_eq!(report.lost.listed[0].what, Reason::NoTable);
}

#[test]
fn without_header_and_l1_the_order_is_a_guess() {
    for options in [None, Some(4 * COVERAGE)] {
        let mut image = built();
        let l1 = image.l1;
        image.patch(0, &vec![0; CLUSTER as usize]).patch(l1, &[0; 32]);
        let rescue = rescued(&image, |given, _| given.size = options).unwrap();
        let report = rescue.report();
        assert_eq!((report.header, report.l1), (HeaderSource::Derived, L1Source::None));
        assert_eq!((report.size, report.size_known), (4 * COVERAGE, options.is_some()));
        let guessed = report.placed.listed.iter().all(|range| range.what.0.is_guess());
        assert!(guessed && report.placed.listed.len() == 4 && report.refcounts, "{report}");
        for &cluster in image.hosts.keys() {
            assert!(read(&rescue, cluster) == pattern::bytes(cluster + 1, 0, CLUSTER as usize));
        }
    }
}

#[test]
fn tables_of_an_image_inside_the_guest_are_not_used() {
    // The outer image has the inner one as its data, cluster by cluster, at another place.
    let inner = built();
    let mut outer = Builder::new(12, 4 * COVERAGE);
    let parts = inner.bytes.chunks(CLUSTER as usize);
    for (index, part) in (0..).zip(parts) {
        outer = outer.cluster(520 + index, Cluster::Data(part.to_vec()));
    }
    let mut outer = outer.cluster(3, data(4)).build();
    let expected = inner.bytes.clone();
    let l1 = outer.l1;
    outer.patch(0, &vec![0; CLUSTER as usize]).patch(l1, &[0; 32]);
    let rescue = rescued(&outer, |_, _| ()).unwrap();
    let report = rescue.report();
    let used: Vec<u64> = report.placed.listed.iter().map(|range| range.what.1.value()).collect();
    assert_eq!(used, [outer.l2[&0], outer.l2[&1]], "{report}");
    let mut buf = vec![0; expected.len()];
    rescue.disk().read_at(GuestOffset::new(520 * CLUSTER), &mut buf).unwrap();
    assert!(buf == expected);
}

#[test]
fn streams_that_do_not_expand_are_found_when_they_are_read() {
    let image =
        Builder::new(12, COVERAGE).cluster(5, Cluster::Compressed(vec![0xff; 100])).cluster(6, data(7));
    let rescue = rescued(&image.build(), |_, _| ()).unwrap();
    assert!(rescue.report().is_complete(), "not read yet");
    assert_eq!(read(&rescue, 5), vec![0; CLUSTER as usize]);
    let expected = Range { start: 5 * CLUSTER, len: CLUSTER, what: Reason::StreamDamaged };
    assert_eq!(rescue.report().lost.listed, [expected]);
    assert!(read(&rescue, 6) == pattern::bytes(7, 0, CLUSTER as usize));
}

#[test]
fn what_was_not_given_is_lost() {
    let mut image = Builder::new(12, COVERAGE).cluster(6, data(7));
    image.header_mut().backing_file = Some(b"base.raw".to_vec());
    let image = image.build();
    let rescue = rescued(&image, |_, _| ()).unwrap();
    let reasons: Vec<_> = rescue.report().lost.listed.iter().map(|range| range.what).collect();
    assert_eq!(reasons, [Reason::Backing, Reason::Backing]);
    assert!(read(&rescue, 6) == pattern::bytes(7, 0, CLUSTER as usize));
}

#[test]
fn options_win_over_the_header() {
    let image = built();
    let wrong =
        rescued(&image, |options, _| options.cluster_size = Some(1000)).err().map(|error| error.kind());
    assert_eq!(wrong, Some(ErrorKind::InvalidOption));
    let report = rescued(&image, |options, _| options.size = Some(COVERAGE)).unwrap().report();
    assert_eq!((report.size, report.size_known), (COVERAGE, true));
    let nothing = Arc::new(PageStorage::new(PageBytes::from_bytes(&pattern::bytes(3, 0, 100_000))));
    let error =
        rescue(&RescueFiles::new(nothing, codecs()), &RescueOptions::default(), &Silent).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Metadata);
}
