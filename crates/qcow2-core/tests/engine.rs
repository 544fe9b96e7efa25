//! The engine against a flat array, in memory.
#![allow(missing_docs, clippy::unwrap_used, clippy::field_reassign_with_default)]

use qcow2_core::{
    CreateOptions, GuestDisk, GuestOffset, GuestRange, Image, ImageFormat, NoResolver, OpenOptions,
    ResolvedSource, Storage, ZeroMode, create,
};
use qcow2_io::MemoryStorage;
use std::sync::Arc;

fn open(storage: &Arc<dyn Storage>) -> Arc<Image> {
    let source = ResolvedSource {
        storage: Arc::clone(storage),
        format: ImageFormat::Qcow2,
        name: "memory".into(),
        id: None,
        resolver: Arc::new(NoResolver),
    };
    let mut options = OpenOptions::default();
    options.writable = true;
    Image::open(source, &options).unwrap()
}

struct Rng(u64);
impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

fn history(options: &CreateOptions, seed: u64) {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    create(&storage, None, options).unwrap();
    let mut model = vec![0u8; options.size as usize];
    let mut rng = Rng(seed * 7919 + 1);
    let mut image = open(&storage);
    for step in 0..400 {
        let size = model.len() as u64;
        let len = (1 + rng.below(200_000)).min(size);
        let at = rng.below(size - len + 1);
        let (guest, range) = (GuestOffset::new(at), at as usize..(at + len) as usize);
        let guest_range = GuestRange::new(guest, len).unwrap();
        match rng.below(9) {
            0..=3 => {
                let fill = rng.below(255) as u8 + 1;
                model[range.clone()].fill(fill);
                image.write_at(guest, &model[range]).unwrap();
            }
            4 => {
                let mode = if rng.below(2) == 0 { ZeroMode::KeepAllocated } else { ZeroMode::MayUnmap };
                image.write_zeroes(guest_range, mode).unwrap();
                model[range].fill(0);
            }
            5 => {
                image.discard(guest_range).unwrap();
                image.read_at(guest, &mut model[range]).unwrap();
            }
            6 => image.flush().unwrap(),
            7 => {
                let size = 512 * (1 + rng.below(2 * options.size / 512));
                image.resize(size).unwrap();
                model.resize(size as usize, 0);
            }
            _ => {
                image.close().unwrap();
                drop(image);
                image = open(&storage);
            }
        }
        assert_eq!(image.size(), model.len() as u64);
        let mut seen = vec![0; model.len()];
        image.read_at(GuestOffset::new(0), &mut seen).unwrap();
        assert!(seen == model, "seed {seed} step {step}");
    }
    image.close().unwrap();
}

#[test]
fn random_histories_read_back() {
    for (cluster_size, refcount_bits, extended) in [
        (512, 16, false),
        (512, 64, false),
        (512, 1, false),
        (4096, 1, false),
        (65536, 16, false),
        (2 << 20, 8, false),
        (16384, 32, true),
        (65536, 16, true),
    ] {
        for seed in 1..4 {
            let mut options = CreateOptions::new(3 * 1024 * 1024 + 512 * 5);
            options.cluster_size = cluster_size;
            options.refcount_bits = refcount_bits;
            options.extended_l2 = extended;
            history(&options, seed);
        }
    }
}
