//! Readers of a chain that is read by one index, while layers are exchanged: none uses a layer after its
//! exchange, and a base that is written and closed is seen as it is.

use super::{CLUSTER, schedules};
use qcow2_core::{
    CreateOptions, GuestDisk, GuestOffset, HostOffset, Image, ImageFormat, LiveDisk, OpenOptions,
    ResolvedSource, Storage, StorageError, create, forward_storage,
};
use qcow2_io::MemoryStorage;
use shuttle::rand::Rng;
use std::sync::Arc;

const CLUSTERS: u64 = 9;
const READS: usize = 25;

/// A storage that yields before and after every read.
struct Yielding {
    inner: Arc<MemoryStorage>,
}

impl Storage for Yielding {
    forward_storage!(inner: len write_at write_zeroes discard allocate set_len flush extent_at limits);

    fn read_at(&self, offset: HostOffset, buf: &mut [u8]) -> Result<usize, StorageError> {
        shuttle::thread::yield_now();
        let read = self.inner.read_at(offset, buf);
        shuttle::thread::yield_now();
        read
    }
}

type File = Arc<MemoryStorage>;

/// A layer with every third cluster, from `layer` on, full of `layer + 1`.
fn layer(layer: u64) -> File {
    let file = Arc::new(MemoryStorage::new());
    let storage: Arc<dyn Storage> = file.clone();
    create(&storage, None, &CreateOptions::new(CLUSTERS * CLUSTER).with_cluster_size(CLUSTER)).unwrap();
    let image = Image::open(source(&file), &OpenOptions::writable()).unwrap();
    for cluster in (layer..CLUSTERS).step_by(3) {
        image.write_at(at(cluster), &[layer as u8 + 1; CLUSTER as usize]).unwrap();
    }
    image.close().unwrap();
    file
}

fn at(cluster: u64) -> GuestOffset {
    GuestOffset::new(cluster * CLUSTER)
}

fn source(file: &File) -> ResolvedSource {
    ResolvedSource::new(Arc::new(Yielding { inner: Arc::clone(file) }), ImageFormat::Qcow2, "memory")
}

fn copy(file: &File) -> File {
    let mut bytes = vec![0; file.len().unwrap() as usize];
    file.read_at(HostOffset::new(0), &mut bytes).unwrap();
    let copy = Arc::new(MemoryStorage::new());
    copy.write_at(HostOffset::new(0), &bytes).unwrap();
    copy
}

/// Nobody reads it any more.
fn destroy(file: &File) {
    file.write_at(HostOffset::new(0), &vec![0xdd; file.len().unwrap() as usize]).unwrap();
}

fn open_on(file: &File, below: Option<&Arc<dyn GuestDisk>>, options: &OpenOptions) -> Arc<dyn GuestDisk> {
    match below {
        Some(below) => Image::open_on(&source(file), options, Arc::clone(below)).unwrap(),
        None => Image::open(source(file), options).unwrap(),
    }
}

fn read(disk: &dyn GuestDisk, cluster: u64) {
    let mut seen = [0xee; CLUSTER as usize];
    disk.read_at(at(cluster), &mut seen).unwrap();
    let own = cluster as u8 % 3 + 1;
    assert!(seen.iter().all(|byte| *byte == own), "cluster {cluster} reads as {:#x}", seen[0]);
}

fn scenario() {
    let (read_only, writable) = (OpenOptions::read_only(), OpenOptions::writable());
    let mut files = [layer(0), layer(1)];
    let frozen = |disk| Arc::new(LiveDisk::frozen(disk)) as Arc<dyn GuestDisk>;
    let base = frozen(open_on(&files[0], None, &read_only));
    let middle = frozen(open_on(&files[1], Some(&base), &read_only));
    let top = open_on(&layer(2), Some(&middle), &read_only);
    let readers: Vec<_> = (0..2)
        .map(|_| {
            let top = Arc::clone(&top);
            shuttle::thread::spawn(move || {
                let mut rng = shuttle::rand::thread_rng();
                (0..READS).for_each(|_| read(&*top, rng.gen_range(0..CLUSTERS)));
            })
        })
        .collect();
    let mut rng = shuttle::rand::thread_rng();
    for _ in 0..4 {
        let which = rng.gen_range(0..2);
        let (node, below) = if which == 0 { (&base, None) } else { (&middle, Some(&base)) };
        let fresh = copy(&files[which]);
        let written = rng.gen_bool(0.5);
        let disk = open_on(&fresh, below, if written { &writable } else { &read_only });
        drop(node.as_live().unwrap().hold().exchange(&disk));
        destroy(&std::mem::replace(&mut files[which], fresh));
        if written {
            // What the top hides.
            for cluster in (2..CLUSTERS).step_by(3) {
                disk.write_at(at(cluster), &[0xcc; CLUSTER as usize]).unwrap();
            }
            disk.as_image().unwrap().close().unwrap();
        }
    }
    readers.into_iter().for_each(|reader| reader.join().unwrap());
}

#[test]
fn random_schedules_use_no_layer_after_its_exchange() {
    shuttle::check_random(scenario, schedules());
}

#[test]
fn schedules_with_rare_preemptions_use_no_layer_after_its_exchange() {
    shuttle::check_pct(scenario, schedules(), 3);
}
