//! Runs compare and qemu-img on every pair of a set of small disks and compares the results.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "these are tests"
)]

use qcow2_codec::{Deflate, Zstd};
use qcow2_core::{Codecs, GuestDisk, OpenOptions, open_disk};
use qcow2_io::{OpenFile, Policy, SourceOptions, open_source};
use qcow2_ops::{CompareOptions, Comparison, Inline, Silent, compare};
use qcow2_testkit::oracle::Tool;
use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;

fn open(path: &Path) -> Arc<dyn GuestDisk> {
    let mut options = OpenOptions::default();
    options.codecs = Codecs::new(Arc::new(Deflate::default()), Arc::new(Zstd::default()));
    let source = SourceOptions::new(OpenFile::read_only()).with_policy(Policy::Allow);
    open_disk(open_source(path, &source).unwrap(), &options).unwrap()
}

/// The output of `qemu-img compare` for a report, and its exit code.
fn text(a: &Arc<dyn GuestDisk>, b: &Arc<dyn GuestDisk>, strict: bool) -> (String, i32) {
    let mut options = CompareOptions::default();
    options.strict = strict;
    let report = compare([a, b], &options, &Inline, &Silent).unwrap();
    let warning = if report.sizes_differ { "Warning: Image size mismatch!\n" } else { "" };
    let (line, code) = match report.result {
        Comparison::Identical => ("Images are identical.".into(), 0),
        Comparison::Content { offset } => (format!("Content mismatch at offset {offset}!"), 1),
        Comparison::Size => ("Strict mode: Image size mismatch!".into(), 1),
        Comparison::State { offset } => (format!("Strict mode: Offset {offset} block status mismatch!"), 1),
        other => panic!("{other:?}"),
    };
    (format!("{warning}{line}\n"), code)
}

fn make_disks(folder: &Path, img: &Tool) -> Vec<String> {
    let write = |name: &str, bytes: &[u8], size: u64| {
        fs::write(folder.join(name), bytes).unwrap();
        File::options().write(true).open(folder.join(name)).unwrap().set_len(size).unwrap();
    };
    let (full, mut changed) = (vec![b'x'; 131_072], vec![b'x'; 131_072]);
    changed[70_000] = b'y';
    write("full.raw", &full, 131_072);
    write("changed.raw", &changed, 131_072);
    write("hole.raw", &full[..65_536], 131_072);
    write("zeroes.raw", &[&full[..65_536], &[0; 65_536]].concat(), 131_072);
    write("empty.raw", &[], 131_072);
    write("odd.raw", &full[..66_000], 66_000);
    write("longer.raw", &full[..66_000], 300_000);
    let runs: &[&[&str]] = &[
        &["convert", "-O", "qcow2", "full.raw", "full.qcow2"],
        &["convert", "-O", "qcow2", "-o", "cluster_size=4k", "full.raw", "small.qcow2"],
        &["convert", "-O", "qcow2", "-c", "full.raw", "packed.qcow2"],
        &["convert", "-O", "qcow2", "hole.raw", "hole.qcow2"],
        &["convert", "-O", "qcow2", "-S", "0", "hole.raw", "stored.qcow2"],
        &["convert", "-O", "qcow2", "odd.raw", "odd.qcow2"],
        &["create", "-f", "qcow2", "empty.qcow2", "131072"],
        &["create", "-f", "qcow2", "-b", "full.raw", "-F", "raw", "overlay.qcow2"],
    ];
    for args in runs {
        img.run_in(folder, args).success();
    }
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn results_match_qemu_img() {
    let Some(img) = Tool::find("qemu-img") else { return };
    let folder = tempfile::tempdir().unwrap();
    let names = make_disks(folder.path(), &img);
    assert_eq!(names.len(), 15);
    for a in &names {
        for b in &names {
            let disks = [a, b].map(|name| open(&folder.path().join(name)));
            for strict in [false, true] {
                let mut args = vec!["compare", "-U", a, b];
                if strict {
                    args.push("-s");
                }
                let expected = img.run_in(folder.path(), &args);
                let (stdout, code) = text(&disks[0], &disks[1], strict);
                assert_eq!((expected.stdout.as_str(), expected.code), (&*stdout, Some(code)), "{expected}");
            }
        }
    }
}
