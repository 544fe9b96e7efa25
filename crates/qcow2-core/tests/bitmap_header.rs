//! Adding and removing the header's bitmaps extension keeps everything else in the header.
#![allow(missing_docs, clippy::unwrap_used, clippy::field_reassign_with_default)]

use qcow2_core::{GuestOffset, Image, ImageFormat, Layers, NoResolver, OpenOptions, ResolvedSource, Storage};
use qcow2_format::extension::UnknownExtension;
use qcow2_format::feature::FeatureName;
use qcow2_format::header::{Header, Version};
use qcow2_testkit::audit::audit;
use qcow2_testkit::builder::Builder;
use qcow2_testkit::crash::CrashWorld;
use qcow2_testkit::cut::Cut;
use qcow2_testkit::pages::PageBytes;
use qcow2_testkit::storage::PageStorage;
use std::sync::Arc;

fn open<S: Storage + 'static>(storage: &Arc<S>, writable: bool) -> Arc<Image> {
    let mut options = OpenOptions::default();
    options.writable = writable;
    options.layers = Layers::NoBacking;
    let source = ResolvedSource {
        storage: Arc::clone(storage) as Arc<dyn Storage>,
        format: ImageFormat::Qcow2,
        name: "image".to_owned(),
        id: None,
        resolver: Arc::new(NoResolver),
    };
    Image::open(source, &options).unwrap()
}

/// Adds, changes and removes bitmaps in an image with this header. Everything else in the header must stay
/// the same, also after a power cut at any step.
fn check(header: Header) {
    let built = Builder::with_header(header).build();
    let world = CrashWorld::new();
    let storage = world.add(PageBytes::from_bytes(&built.bytes));
    let before = open(&storage, false).header();
    let wanted = before.clone();
    // At every storage call: what a power cut there could leave.
    world.set_hook(Some(Arc::new(move |_, cut: &Cut<'_>| {
        for number in 0..cut.combinations().min(8) {
            let mut start = vec![0; 4096];
            cut.image(number).disks[0].read(0, &mut start);
            start.resize(1 << wanted.cluster_bits, 0);
            let header = Header::parse(&start).unwrap();
            assert_eq!(header.backing_file, wanted.backing_file);
            assert_eq!(header.extensions.unknown, wanted.extensions.unknown);
        }
    })));
    let same = |image: &Image| {
        let header = image.header();
        assert_eq!(header.backing_file, before.backing_file);
        assert_eq!(header.extensions.backing_format, before.extensions.backing_format);
        assert_eq!(header.extensions.feature_names, before.extensions.feature_names);
        assert_eq!(header.extensions.unknown, before.extensions.unknown);
        assert!(audit(&storage.live(), None).is_sound());
    };
    for round in 0..3 {
        let image = open(&storage, true);
        image.add_bitmap(b"one", 16).unwrap();
        image.write_at(GuestOffset::new(65_536), &[1; 65_536]).unwrap();
        image.close().unwrap();
        let image = open(&storage, true);
        same(&image);
        assert_eq!(image.bitmaps().unwrap().len(), 1);
        assert!(image.bitmap_bits(b"one").unwrap().is_marked(70_000));
        image.add_bitmap(b"two", 9).unwrap();
        image.close().unwrap();
        let image = open(&storage, true);
        same(&image);
        assert_eq!(image.bitmaps().unwrap().len(), 2, "round {round}");
        image.remove_bitmap(b"one").unwrap();
        image.remove_bitmap(b"two").unwrap();
        image.close().unwrap();
        let image = open(&storage, false);
        same(&image);
        assert_eq!((image.bitmaps().unwrap().len(), image.header().extensions.bitmaps), (0, None));
        assert_eq!(audit(&storage.live(), None).leaks, 0);
    }
}

fn header(cluster_bits: u32) -> Header {
    let mut header = Header::new(Version::V3, cluster_bits);
    header.size = 200_192;
    header
}

#[test]
fn bitmaps_extension_keeps_a_backing_file_name_of_any_length() {
    for cluster_bits in [12, 16] {
        for len in [1, 7, 8, 100, 400, 480, 1000, 1023] {
            for names in [false, true] {
                let mut header = header(cluster_bits);
                header.backing_file = Some(vec![b'b'; len]);
                header.extensions.backing_format = Some(b"qcow2".to_vec());
                header.extensions.feature_names = names.then(FeatureName::standard);
                check(header);
            }
        }
    }
}

#[test]
fn bitmaps_extension_keeps_unknown_extensions() {
    for len in [0, 8, 300, 368, 376, 384, 392, 400, 900] {
        let mut header = header(16);
        header.extensions.unknown = vec![
            UnknownExtension { kind: 0x1234_5678, data: vec![7; len] },
            UnknownExtension { kind: 0x1234_5679, data: vec![8; 13] },
        ];
        check(header);
    }
}

#[test]
fn a_full_header_refuses_bitmaps_and_stays_intact() {
    let mut header = header(9);
    header.backing_file = Some(vec![b'b'; 380]);
    let built = Builder::with_header(header).build();
    let storage = Arc::new(PageStorage::new(PageBytes::from_bytes(&built.bytes)));
    let image = open(&storage, true);
    image.add_bitmap(b"one", 16).unwrap();
    assert!(image.close().is_err());
    let image = open(&storage, false);
    assert_eq!(image.header().backing_file, Some(vec![b'b'; 380]));
    assert!(image.bitmaps().unwrap().is_empty());
    assert!(audit(&storage.bytes(), None).is_sound());
}
