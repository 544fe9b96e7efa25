//! Small valid images of every shape, and the same with single fields damaged, as a generator decides. Where
//! a fuzzer's bytes decide, it changes an image by what it means, not by its bytes.

use crate::arbitrary::{BackingShape, DataFileShape, ENCRYPTIONS, Operation, Shape};
use crate::model::Model;
use crate::pages::PageBytes;
use crate::rng::Rng;
use crate::semantic;
use crate::world::{Shelf, TOP, World};
use qcow2_core::{Codecs, NewSnapshot};

/// A closed image with the files beside it.
#[derive(Clone, Debug)]
pub struct Shaped {
    /// How it was created.
    pub shape: Shape,
    /// Its files; the image itself is [`TOP`].
    pub shelf: Shelf,
    /// The content of its disk.
    pub model: Model,
}

/// A shape of few and small clusters: an image is made thousands of times a second.
pub fn tiny_shape(rng: &mut Rng) -> Shape {
    let extended_l2 = rng.one_in(8);
    let cluster_bits = if extended_l2 { 14 } else { rng.pick(&[9, 9, 9, 9, 9, 10, 12]) };
    let clusters = rng.between(1, if extended_l2 { 6 } else { 80 });
    let size = (clusters << cluster_bits) - 512 * rng.pick(&[0, 0, 0, 1]);
    let backing_size = if rng.one_in(2) { size } else { (size / 2).next_multiple_of(512) };
    let shape = Shape {
        version3: !rng.one_in(6),
        cluster_bits,
        refcount_order: rng.pick(&[4, 4, 4, 0, 1, 2, 3, 5, 6]),
        extended_l2,
        lazy_refcounts: rng.one_in(8),
        zstd: rng.one_in(4),
        data_file: rng.one_in(8).then(|| DataFileShape { raw: rng.one_in(2) }),
        backing: rng.one_in(5).then(|| BackingShape { size: backing_size, qcow2: rng.one_in(2) }),
        encryption: rng.pick(ENCRYPTIONS),
        size,
    };
    shape.legalized()
}

/// Draws a shape and what was done to its image: writes, plain and compressed, zeroes, discards, snapshots,
/// bitmaps. Errors: the engine did something else than the model.
pub fn draw(rng: &mut Rng, codecs: &Codecs) -> Result<Shaped, String> {
    let shape = tiny_shape(rng);
    let mut world = World::new(shape, codecs.clone(), 1)?;
    for step in 0..rng.below(9) {
        act(&mut world, rng, step)?;
    }
    let (shelf, model) = world.finish()?;
    Ok(Shaped { shape, shelf, model })
}

/// One operation on `world`, checked against its model.
pub fn act(world: &mut World, rng: &mut Rng, step: u64) -> Result<(), String> {
    let (size, cluster) = (world.image().size(), world.image().cluster_size());
    match rng.below(12) {
        0 => {
            let mut new = NewSnapshot::default();
            new.name = format!("s{step}").into();
            // A refcount of one bit has no room for a snapshot.
            drop(world.image().create_snapshot(&new));
            Ok(())
        }
        1 => {
            // Version 2 has no bitmaps.
            drop(world.image().add_bitmap(format!("b{step}").as_bytes(), rng.pick(&[9, 10, 16])));
            Ok(())
        }
        2 => {
            let snapshots = world.image().snapshots().map_err(|error| error.to_string())?;
            match snapshots.first() {
                Some(first) => world.image().delete_snapshot(first).map_err(|error| error.to_string()),
                None => Ok(()),
            }
        }
        3 | 4 => world.compress(rng.below(size.div_ceil(cluster)), step),
        _ => world.step(&Operation::random(rng, size, cluster)),
    }
}

impl Shaped {
    /// Damages up to `most` fields of the image. Returns what kinds of fields they were.
    pub fn damage(&self, rng: &mut Rng, most: u64) -> Vec<&'static str> {
        self.damage_in_steps(rng, most).into_iter().map(|(kind, _)| kind).collect()
    }

    /// The same; each kind with the bytes of the file from then on.
    pub fn damage_in_steps(&self, rng: &mut Rng, most: u64) -> Vec<(&'static str, Vec<u8>)> {
        let mut bytes = self.bytes().to_vec();
        let mut steps = Vec::new();
        for _ in 0..rng.between(1, most) {
            if let Some(kind) = semantic::damage(&mut bytes, rng) {
                steps.push((kind, bytes.clone()));
            }
        }
        self.shelf.put(TOP, &bytes);
        steps
    }

    /// The bytes of the image file.
    pub fn bytes(&self) -> PageBytes {
        self.shelf.file(TOP).bytes()
    }
}
