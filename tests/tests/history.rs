//! Our engine and QEMU's tools take turns on one file: they write, take, apply and delete snapshots, and
//! change bitmaps. After every step both read what a model expects, snapshots and bitmaps agree, and qemu-img
//! check finds nothing.
//!
//! `QCOW2_HISTORY_STEPS` sets the length of a history, `QCOW2_SEED` the seed.
#![allow(missing_docs, clippy::unwrap_used, clippy::field_reassign_with_default, clippy::print_stderr)]

use qcow2_codec::{Deflate, Zstd};
use qcow2_core::{Codecs, GuestOffset, GuestRange, Image, ImageFormat, NewSnapshot, OpenOptions, ZeroMode};
use qcow2_io::{OpenFile, Policy, SourceOptions, open_source};
use qcow2_ops::bitmap::{BitmapAction, change_bitmap};
use qcow2_ops::snapshot::{self, SnapshotName};
use qcow2_testkit::oracle::{Qemu, Tool};
use qcow2_testkit::pattern;
use qcow2_testkit::rng::Rng;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

const IMAGE: &str = "image.qcow2";
const SECTOR: u64 = 512;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// The expected image.
#[derive(Clone, Debug)]
struct Model {
    content: Vec<u8>,
    snapshots: Vec<(String, Vec<u8>)>,
    /// By name: granularity in bytes, enabled, the bits.
    bitmaps: BTreeMap<String, (u64, bool, Vec<bool>)>,
}

#[derive(Clone, Debug)]
enum Step {
    Write { at: u64, len: u64, byte: u8 },
    Zero { at: u64, len: u64 },
    Take(String),
    Apply(String),
    Delete(String),
    Resize(u64),
    Bitmap(String, BitmapAction),
}

impl Model {
    fn touch(&mut self, at: u64, len: u64) {
        for (granularity, records, bits) in self.bitmaps.values_mut().filter(|bitmap| bitmap.1) {
            assert!(*records);
            bits[(at / *granularity) as usize..=((at + len - 1) / *granularity) as usize].fill(true);
        }
    }

    fn make(&mut self, step: &Step) {
        match step {
            Step::Write { at, len, byte } => {
                self.touch(*at, *len);
                self.content[*at as usize..(at + len) as usize].fill(*byte);
            }
            Step::Zero { at, len } => {
                self.touch(*at, *len);
                self.content[*at as usize..(at + len) as usize].fill(0);
            }
            Step::Take(name) => self.snapshots.push((name.clone(), self.content.clone())),
            Step::Apply(name) => {
                self.content = self.snapshots.iter().find(|s| s.0 == *name).unwrap().1.clone();
            }
            Step::Delete(name) => self.snapshots.retain(|s| s.0 != *name),
            Step::Resize(size) => {
                self.content.resize(*size as usize, 0);
                for (granularity, _, bits) in self.bitmaps.values_mut() {
                    bits.resize(size.div_ceil(*granularity) as usize, false);
                }
            }
            Step::Bitmap(name, action) => self.bitmap(name, action),
        }
    }

    fn bitmap(&mut self, name: &str, action: &BitmapAction) {
        let size = self.content.len() as u64;
        match action {
            BitmapAction::Add { granularity } => {
                let granularity = granularity.unwrap();
                let bits = vec![false; size.div_ceil(granularity) as usize];
                self.bitmaps.insert(name.to_owned(), (granularity, true, bits));
            }
            BitmapAction::Remove => drop(self.bitmaps.remove(name)),
            BitmapAction::Clear => self.bitmaps.get_mut(name).unwrap().2.fill(false),
            BitmapAction::Enable => self.bitmaps.get_mut(name).unwrap().1 = true,
            BitmapAction::Disable => self.bitmaps.get_mut(name).unwrap().1 = false,
            BitmapAction::Merge { source } => {
                let (from, _, marks) = self.bitmaps[source].clone();
                let (to, _, bits) = self.bitmaps.get_mut(name).unwrap();
                for start in (0..size).step_by(SECTOR as usize).filter(|at| marks[(at / from) as usize]) {
                    bits[(start / *to) as usize] = true;
                }
            }
        }
    }

    /// A random step that is valid now. Version 2 has no bitmaps and no resize with snapshots.
    fn draw(&self, rng: &mut Rng, version3: bool, number: usize) -> Step {
        let size = self.content.len() as u64;
        let at = rng.below(size / SECTOR) * SECTOR;
        let longest = if rng.one_in(4) { size } else { 64 << 10 };
        let len = (rng.between(1, longest / SECTOR) * SECTOR).min(size - at);
        let snapshot = |rng: &mut Rng| {
            let index = rng.below(self.snapshots.len().max(1) as u64) as usize;
            self.snapshots.get(index).map(|s| s.0.clone())
        };
        match rng.below(12) {
            0 | 1 => Step::Take(format!("take {number}")),
            2 if self.bitmaps.is_empty() => snapshot(rng).map_or(Step::Zero { at, len }, Step::Apply),
            3 => snapshot(rng).map_or(Step::Zero { at, len }, Step::Delete),
            4 if version3 => {
                Step::Resize((size + rng.below(size)).clamp(size / 2, 4 << 20) / SECTOR * SECTOR)
            }
            4 | 5 => Step::Zero { at, len },
            6 | 7 if version3 => self.draw_bitmap(rng, number),
            _ => Step::Write { at, len, byte: rng.between(1, 255) as u8 },
        }
    }

    fn draw_bitmap(&self, rng: &mut Rng, number: usize) -> Step {
        let names: Vec<&String> = self.bitmaps.keys().collect();
        let pick = |rng: &mut Rng| names[rng.below(names.len() as u64) as usize].clone();
        if names.is_empty() || (names.len() < 4 && rng.one_in(3)) {
            let granularity = Some(rng.pick(&[512, 4096, 65_536, 1 << 20]));
            return Step::Bitmap(format!("bitmap {number}"), BitmapAction::Add { granularity });
        }
        let action = match rng.below(8) {
            0 | 1 => BitmapAction::Remove,
            2 => BitmapAction::Clear,
            3 => BitmapAction::Enable,
            4 => BitmapAction::Disable,
            _ => BitmapAction::Merge { source: pick(rng) },
        };
        Step::Bitmap(pick(rng), action)
    }
}

fn open(folder: &Path, writable: bool) -> Arc<Image> {
    let file = if writable { OpenFile::writable() } else { OpenFile::read_only() };
    let options = SourceOptions::new(file).with_format(ImageFormat::Qcow2).with_policy(Policy::Allow);
    let source = open_source(&folder.join(IMAGE), &options).unwrap();
    Image::open(source, &open_options(writable)).unwrap()
}

fn open_options(writable: bool) -> OpenOptions {
    let mut open = OpenOptions::default();
    open.writable = writable;
    open.codecs = Codecs::new(Arc::new(Deflate::default()), Arc::new(Zstd::default()));
    open
}

/// Makes the step with our engine.
fn we_make(folder: &Path, step: &Step) {
    let image = open(folder, true);
    let range = |at: &u64, len: &u64| GuestRange::new(GuestOffset::new(*at), *len).unwrap();
    let named = |name: &String| SnapshotName::Exact { id: None, name: Some(name.clone()) };
    match step {
        Step::Write { at, len, byte } => {
            image.write_at(GuestOffset::new(*at), &vec![*byte; *len as usize]).unwrap();
        }
        Step::Zero { at, len } => image.write_zeroes(range(at, len), ZeroMode::MayUnmap).unwrap(),
        Step::Take(name) => {
            let mut new = NewSnapshot::default();
            new.name = name.clone().into_bytes();
            drop(snapshot::create(&image, &new).unwrap());
        }
        Step::Apply(name) => snapshot::apply(&image, &named(name)).unwrap(),
        Step::Delete(name) => snapshot::delete(&image, &named(name)).unwrap(),
        Step::Resize(size) => image.resize(*size).unwrap(),
        Step::Bitmap(name, action) => change_bitmap(&image, name, action, None).unwrap(),
    }
    image.close().unwrap();
}

/// Makes the step with QEMU's tools.
fn qemu_makes(qemu: &Qemu, folder: &Path, step: &Step) {
    let io = |command: String| {
        let done = qemu.io.run_in(folder, &["-f", "qcow2", "-c", &command, IMAGE]).success();
        assert!(!done.stdout.contains("failed"), "{done}");
    };
    let img = |args: &[&str]| drop(qemu.img.run_in(folder, args).success());
    match step {
        Step::Write { at, len, byte } => io(format!("write -P {byte} {at} {len}")),
        Step::Zero { at, len } => io(format!("write -z -u {at} {len}")),
        Step::Take(name) => img(&["snapshot", "-c", name, IMAGE]),
        Step::Apply(name) => img(&["snapshot", "-a", name, IMAGE]),
        Step::Delete(name) => img(&["snapshot", "-d", name, IMAGE]),
        Step::Resize(size) => img(&["resize", "-q", "--shrink", IMAGE, &size.to_string()]),
        Step::Bitmap(name, action) => {
            let granularity;
            let words: &[&str] = match action {
                BitmapAction::Add { granularity: bytes } => {
                    granularity = bytes.unwrap().to_string();
                    &["--add", "-g", &granularity]
                }
                BitmapAction::Remove => &["--remove"],
                BitmapAction::Clear => &["--clear"],
                BitmapAction::Enable => &["--enable"],
                BitmapAction::Disable => &["--disable"],
                BitmapAction::Merge { source } => &["--merge", source],
            };
            img(&[&["bitmap"], words, &[IMAGE, name]].concat());
        }
    }
}

/// Compares what our engine reads with the model.
fn we_agree(folder: &Path, model: &Model) {
    let image = open(folder, false);
    let mut seen = pattern::unread(image.size() as usize);
    image.read_at(GuestOffset::new(0), &mut seen).unwrap();
    assert!(seen == model.content, "our content differs from the model");
    let names =
        |image: &Image| -> Vec<_> { image.snapshots().unwrap().iter().map(|s| s.name_text()).collect() };
    assert_eq!(names(&image), model.snapshots.iter().map(|s| s.0.clone()).collect::<Vec<_>>());
    for (index, (name, content)) in model.snapshots.iter().enumerate() {
        let options = SourceOptions::new(OpenFile::read_only()).with_format(ImageFormat::Qcow2);
        let source = open_source(&folder.join(IMAGE), &options.with_policy(Policy::Allow)).unwrap();
        let disk = Image::open_snapshot(source, &open_options(false), |_| Some(index)).unwrap();
        let mut seen = pattern::unread(disk.size() as usize);
        disk.read_at(GuestOffset::new(0), &mut seen).unwrap();
        assert!(seen == *content, "our content of snapshot {name} differs from the model");
    }
    let mut bitmaps = BTreeMap::new();
    for bitmap in image.bitmaps().unwrap() {
        assert!(!bitmap.in_use);
        let bits = image.bitmap_bits(&bitmap.name).unwrap();
        let granularity = bits.granularity();
        let marks = (0..image.size().div_ceil(granularity)).map(|bit| bits.is_marked(bit * granularity));
        bitmaps.insert(bitmap.name_text(), (granularity, bitmap.auto, marks.collect()));
    }
    assert_eq!(bitmaps, model.bitmaps);
}

/// Compares what qemu-img reads with the model.
fn qemu_agrees(qemu: &Qemu, folder: &Path, model: &Model) {
    fs::write(folder.join("model.raw"), &model.content).unwrap();
    qemu.img.run_in(folder, &["check", IMAGE]).success();
    qemu.img.run_in(folder, &["compare", "-f", "qcow2", "-F", "raw", IMAGE, "model.raw"]).success();
    let info = qemu.img.run_in(folder, &["info", "--output=json", IMAGE]).success().stdout;
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    let list = |value: &serde_json::Value| value.as_array().cloned().unwrap_or_default();
    let names: Vec<_> =
        list(&info["snapshots"]).iter().map(|s| s["name"].as_str().unwrap().to_owned()).collect();
    assert_eq!(names, model.snapshots.iter().map(|s| s.0.clone()).collect::<Vec<_>>());
    let mut bitmaps = BTreeMap::new();
    for bitmap in list(&info["format-specific"]["data"]["bitmaps"]) {
        let flags: Vec<_> = list(&bitmap["flags"]).iter().map(|f| f.as_str().unwrap().to_owned()).collect();
        assert!(!flags.contains(&"in-use".to_owned()));
        bitmaps.insert(
            bitmap["name"].as_str().unwrap().to_owned(),
            (bitmap["granularity"].as_u64().unwrap(), flags.contains(&"auto".to_owned())),
        );
    }
    let wanted: BTreeMap<_, _> = model.bitmaps.iter().map(|(name, b)| (name.clone(), (b.0, b.1))).collect();
    assert_eq!(bitmaps, wanted);
}

/// qemu-img also reads each snapshot, but only up to the disk's current size; we read the snapshot's own
/// size.
fn qemu_reads_snapshots(qemu: &Qemu, folder: &Path, model: &Model) {
    for (name, content) in &model.snapshots {
        let option = format!("snapshot.name={name}");
        qemu.img.run_in(folder, &["convert", "-l", &option, "-O", "raw", IMAGE, "seen.raw"]).success();
        let seen = fs::read(folder.join("seen.raw")).unwrap();
        let both = seen.len().min(content.len());
        assert!(
            seen[..both] == content[..both],
            "qemu-img's content of snapshot {name} differs from the model"
        );
    }
}

fn history(qemu: &Qemu, create: &str, backed: bool, seed: u64, steps: u64) {
    let (mut rng, folder) = (Rng::new(seed), tempfile::tempdir().unwrap());
    let folder = folder.path();
    let size = 1_500_000 / SECTOR * SECTOR;
    let mut content = vec![0; size as usize];
    let mut args = vec!["create", "-q", "-f", "qcow2", "-o", create];
    if backed {
        content[..700_416].fill(7);
        fs::write(folder.join("base.raw"), &content[..700_416]).unwrap();
        args.extend(["-b", "base.raw", "-F", "raw"]);
    }
    let size = size.to_string();
    args.extend([IMAGE, &size]);
    qemu.img.run_in(folder, &args).success();
    let mut model = Model { content, snapshots: Vec::new(), bitmaps: BTreeMap::new() };
    let version3 = !create.contains("compat=0.10");
    let mut story = Vec::new();
    for number in 0..steps as usize {
        let step = model.draw(&mut rng, version3, number);
        let ours = rng.one_in(2);
        story.push((ours, step.clone()));
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            if ours {
                we_make(folder, &step)
            } else {
                qemu_makes(qemu, folder, &step)
            }
            model.make(&step);
            we_agree(folder, &model);
            qemu_agrees(qemu, folder, &model);
        }));
        if let Err(panic) = outcome {
            eprintln!("{create}, backed {backed}, seed {seed}; (ours?, step):");
            story.iter().for_each(|step| eprintln!("  {step:?}"));
            std::panic::resume_unwind(panic);
        }
    }
    qemu_reads_snapshots(qemu, folder, &model);
}

#[test]
fn our_engine_and_qemu_take_turns_on_one_image() {
    let Some(qemu) = Qemu::find() else { return };
    let (steps, first) = (number("QCOW2_HISTORY_STEPS", 14), number("QCOW2_SEED", 1));
    let creates = [
        "cluster_size=512,refcount_bits=8",
        "cluster_size=4096,refcount_bits=64",
        "cluster_size=65536",
        "cluster_size=65536,extended_l2=on,refcount_bits=32",
        "cluster_size=16384,extended_l2=on",
        "cluster_size=2097152,refcount_bits=4",
        "cluster_size=4096,compat=0.10",
        "cluster_size=65536,lazy_refcounts=on",
    ];
    let mut seed = first;
    for create in creates {
        for backed in [false, true] {
            history(&qemu, create, backed, seed, steps);
            seed += 1;
        }
    }
}

/// The bits as qemu-nbd exports them: a range of the bitmap that is not data is marked.
#[test]
fn qemu_nbd_exports_our_bitmap_bits() {
    let (Some(qemu), Some(_)) = (Qemu::find(), Tool::find("qemu-nbd")) else { return };
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    qemu.img.run_in(folder, &["create", "-q", "-f", "qcow2", IMAGE, "20M"]).success();
    we_make(folder, &Step::Bitmap("marks".to_owned(), BitmapAction::Add { granularity: Some(65_536) }));
    we_make(folder, &Step::Write { at: 3 << 20, len: 1 << 20, byte: 1 });
    we_make(folder, &Step::Write { at: (20 << 20) - 512, len: 512, byte: 2 });
    let socket = folder.join("socket");
    let mut server = std::process::Command::new("qemu-nbd");
    server.args(["-f", "qcow2", "-r", "-B", "marks", "-x", "x", "-k"]).arg(&socket).arg(folder.join(IMAGE));
    let mut server = server.spawn().unwrap();
    let started = std::time::Instant::now();
    while !socket.exists() && started.elapsed().as_secs() < 20 {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let options = format!(
        "driver=nbd,export=x,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:marks",
        socket.display()
    );
    let mapped = qemu.img.run_in(folder, &["map", "--output=json", "--image-opts", &options]);
    let _ = server.kill();
    let _ = server.wait();
    let map: serde_json::Value = serde_json::from_str(&mapped.success().stdout).unwrap();
    let marked: Vec<(u64, u64)> = map
        .as_array()
        .unwrap()
        .iter()
        .filter(|extent| !extent["data"].as_bool().unwrap())
        .map(|extent| (extent["start"].as_u64().unwrap(), extent["length"].as_u64().unwrap()))
        .collect();
    assert_eq!(marked, [(3 << 20, 1 << 20), ((20 << 20) - 65_536, 65_536)]);
}
