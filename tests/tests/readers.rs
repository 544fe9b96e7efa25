//! Third-party readers read our images: dissect.hypervisor, libqcow, 7-Zip. Each gets only images it
//! supports, and must read the same content.
#![allow(clippy::unwrap_used, reason = "a test may stop")]

use qcow2_testkit::arbitrary::{Operation, Shape};
use qcow2_testkit::oracle::{Tool, skip};
use qcow2_testkit::rng::Rng;
use qcow2_testkit::world::{TOP, World};
use qcow2_tests::fixtures::codecs;
use qcow2_tests::side_by_side::words;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-under-test");

/// Images per reader.
const SAMPLES: usize = 24;

/// An image on disk, the path for a reader's output, and the expected content.
struct Sample {
    what: String,
    folder: PathBuf,
    content: Vec<u8>,
}

impl Sample {
    fn image(&self) -> PathBuf {
        self.folder.join(TOP)
    }

    fn output(&self) -> PathBuf {
        self.folder.join("read.raw")
    }

    fn check(&self, reader: &str, seen: &[u8]) {
        assert_eq!(seen.len(), self.content.len(), "{reader}: size of {}", self.what);
        let wrong = seen.iter().zip(&self.content).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "{reader}: first wrong byte of {}", self.what);
    }
}

/// How well a reader supports a kind of image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Knows {
    Nothing,
    PlainClusters,
    CompressedToo,
}

/// Images of random shapes that the reader supports, with random content.
fn samples(folder: &Path, knows: fn(&Shape) -> Knows) -> Vec<Sample> {
    let mut samples = Vec::new();
    let mut seed = 0;
    while samples.len() < SAMPLES {
        seed += 1;
        let mut rng = Rng::new(seed);
        let shape = Shape::random(&mut rng);
        let known = knows(&shape);
        // No reader supports the simulation's toy cipher.
        if known == Knows::Nothing || shape.encryption.is_some() {
            continue;
        }
        let mut world = World::new(shape, codecs(), seed).unwrap();
        for _ in 0..20 {
            if known == Knows::CompressedToo {
                world.compress(rng.below(shape.size.div_ceil(shape.cluster_size())), rng.below(64)).unwrap();
            }
            world.step(&Operation::random(&mut rng, shape.size, shape.cluster_size())).unwrap();
        }
        let (shelf, model) = world.finish().unwrap();
        let folder = folder.join(seed.to_string());
        fs::create_dir(&folder).unwrap();
        shelf.save(&folder).unwrap();
        samples.push(Sample { what: format!("{shape:?}"), folder, content: model.bytes().to_vec() });
    }
    samples
}

/// Some megabytes of a real file (a program, and holes) through `convert -c` with these options.
fn real_file(folder: &Path, options: &str) -> Sample {
    let folder = folder.join("real");
    fs::create_dir(&folder).unwrap();
    let mut content = fs::read(OURS).unwrap();
    content.resize(6 << 20, 0);
    content[2 << 20..3 << 20].fill(0);
    fs::write(folder.join("raw"), &content).unwrap();
    let line = format!("convert -c -O qcow2 {options} raw {TOP}");
    Tool::at(OURS).run_in(&folder, &words(&line)).success();
    Sample { what: format!("a program, {line}"), folder, content }
}

/// Runs the script with a Python that has `package`; `None` after a printed skip.
fn run_script(reader: &str, package: &str, samples: &[Sample]) -> Option<Vec<String>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let own = root.join("../target/readers/bin/python3");
    let python = if own.is_file() { Tool::at(own) } else { Tool::find("python3")? };
    let lines: Vec<_> = samples
        .iter()
        .map(|s| {
            let base = s.folder.join("base.qcow2");
            let base = if base.exists() { base.display().to_string() } else { String::new() };
            format!("{}\t{}\t{base}\n", s.image().display(), s.output().display())
        })
        .collect();
    let list = tempfile::NamedTempFile::new().unwrap();
    fs::write(list.path(), lines.concat()).unwrap();
    let output = Command::new(python.path())
        .arg(root.join("readers/read.py"))
        .arg(reader)
        .stdin(fs::File::open(list.path()).unwrap())
        .output()
        .unwrap();
    if output.status.code() == Some(3) {
        skip(&format!("{package} not found (pip install {package})"));
        return None;
    }
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect())
}

fn check_script(reader: &str, package: &str, knows: fn(&Shape) -> Knows) {
    let folder = tempfile::tempdir().unwrap();
    let mut samples = samples(folder.path(), knows);
    samples.push(real_file(folder.path(), if reader == "libqcow" { "-o compat=0.10" } else { "" }));
    let Some(verdicts) = run_script(reader, package, &samples) else { return };
    assert_eq!(verdicts.len(), samples.len(), "{reader}: {verdicts:?}");
    for (sample, verdict) in samples.iter().zip(verdicts) {
        assert_eq!(verdict, "ok", "{reader}: {}", sample.what);
        sample.check(reader, &fs::read(sample.output()).unwrap());
    }
}

/// dissect.hypervisor 3.21 computes wrong lengths with extended L2 entries, needs a backing disk at least as
/// long and data files of whole clusters, and does not find the backing format in version 2; images of QEMU
/// fail in the same way.
fn dissect_knows(shape: &Shape) -> Knows {
    let backing =
        shape.backing.is_none_or(|below| below.size >= shape.size && (shape.version3 || !below.qcow2));
    if shape.extended_l2 || shape.data_file.is_some() || !backing {
        Knows::Nothing
    } else {
        Knows::CompressedToo
    }
}

#[test]
fn dissect_reads_our_images() {
    check_script("dissect", "dissect.hypervisor", dissect_knows);
}

/// libqcow does not support extended L2 entries, zstd, data files and raw backing files. In version 3 it
/// takes the lowest bit of a compressed entry for the zero flag, so that each stream at an odd offset reads
/// as zeroes (version 2 is fine), and zero clusters show the backing file; images of QEMU fail in the same
/// way.
fn libqcow_knows(shape: &Shape) -> Knows {
    let backing =
        shape.backing.is_none_or(|below| below.qcow2 && below.size >= shape.size && !shape.version3);
    if shape.extended_l2 || shape.zstd || shape.data_file.is_some() || !backing {
        Knows::Nothing
    } else if shape.version3 {
        Knows::PlainClusters
    } else {
        Knows::CompressedToo
    }
}

#[test]
fn libqcow_reads_our_images() {
    check_script("libqcow", "libqcow-python", libqcow_knows);
}

/// 7-Zip does not support extended L2 entries, zstd, data files and backing files.
fn seven_zip_knows(shape: &Shape) -> Knows {
    let plain = !shape.extended_l2 && !shape.zstd && shape.data_file.is_none() && shape.backing.is_none();
    if plain { Knows::CompressedToo } else { Knows::Nothing }
}

#[test]
fn seven_zip_reads_our_images() {
    let Some(seven_zip) = Tool::find_any(&["7zz", "7z", "7za"]) else { return };
    let folder = tempfile::tempdir().unwrap();
    let mut samples = samples(folder.path(), seven_zip_knows);
    samples.push(real_file(folder.path(), ""));
    for sample in samples {
        let mut command = Command::new(seven_zip.path());
        let output = command.args(["x", "-so", "-tqcow"]).arg(sample.image()).output().unwrap();
        assert!(output.status.success(), "{}: {}", sample.what, String::from_utf8_lossy(&output.stderr));
        sample.check("7-Zip", &output.stdout);
    }
}
