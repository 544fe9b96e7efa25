//! Shared by the tests: a folder for images, and checks with QEMU.
#![allow(dead_code, reason = "each test uses a part of it")]

use qcow2_testkit::oracle::Tool;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

pub(crate) struct Folder(TempDir);

impl Folder {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Checks an image with `qemu-img check` and compares it with the raw `content`. `image_opts`: how
    /// qemu-img opens the image. Prints a note and skips if qemu-img is missing.
    pub(crate) fn ask_qemu(&self, image_opts: &str, secret: Option<&str>, content: &[u8]) {
        let Some(qemu) = Tool::find("qemu-img") else { return };
        std::fs::write(self.path("expected.raw"), content).unwrap();
        let object = secret.map(|secret| format!("secret,id=key,data={secret}"));
        let object: Vec<&str> = object.iter().flat_map(|object| ["--object", object]).collect();
        let run = |verb: &str, rest: &[&str]| {
            let args = [&[verb], &object[..], rest].concat();
            qemu.run_in(self.0.path(), &args).success();
        };
        run("check", &["--image-opts", image_opts]);
        let expected = "driver=raw,file.filename=expected.raw";
        run("compare", &["--image-opts", image_opts, expected]);
    }
}

/// Bytes that differ everywhere and compress a little.
pub(crate) fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| ((i / 7) as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}

/// The whole guest content.
pub(crate) fn content(disk: &qcow2_image::Disk) -> Vec<u8> {
    let mut bytes = vec![0; disk.size() as usize];
    disk.read_at(0, &mut bytes).unwrap();
    bytes
}

#[track_caller]
pub(crate) fn assert_clean(path: &Path) {
    let report = qcow2_image::check(path).unwrap();
    let counts = (report.corruptions, report.leaks, report.check_errors, report.dirty);
    assert_eq!(counts, (0, 0, 0, false), "{:#?}", &report.findings[..report.findings.len().min(5)]);
}
