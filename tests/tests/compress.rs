//! `convert -c` with both methods and every cluster size: QEMU finds the image clean and reads the same
//! bytes, and the file does not depend on the number of threads.
#![allow(clippy::unwrap_used, reason = "a test may stop")]

use qcow2_testkit::oracle::{Outcome, Qemu, Tool};
use qcow2_testkit::pattern;
use std::fs;
use std::path::Path;

/// The tools and the folder of a run, with `disk.raw` in it.
struct Bench {
    ours: Tool,
    qemu: Qemu,
    folder: tempfile::TempDir,
}

impl Bench {
    fn find() -> Option<Self> {
        let ours = Tool::at(env!("CARGO_BIN_EXE_qcow2-under-test"));
        let bench = Self { ours, qemu: Qemu::find()?, folder: tempfile::tempdir().unwrap() };
        fs::write(bench.folder.path().join("disk.raw"), disk()).unwrap();
        Some(bench)
    }

    fn run(&self, tool: &Tool, line: &str) -> Outcome {
        tool.run_in(self.folder.path(), &line.split(' ').collect::<Vec<_>>()).success()
    }

    fn ours(&self, line: &str) -> Outcome {
        self.run(&self.ours, line)
    }

    fn qemu_img(&self, line: &str) -> Outcome {
        self.run(&self.qemu.img, line)
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        fs::read(self.folder.path().join(name)).unwrap()
    }

    /// QEMU and we find `name` clean, and its content equals `disk.raw`.
    fn check(&self, name: &str) {
        for tool in [&self.qemu.img, &self.ours] {
            self.run(tool, &format!("check -q -f qcow2 {name}"));
            self.run(tool, &format!("compare -q -f raw -F qcow2 disk.raw {name}"));
        }
        self.ours(&format!("convert -f qcow2 -O raw {name} back.raw"));
        assert!(self.bytes("back.raw") == self.bytes("disk.raw"), "{name}");
    }
}

/// Text, incompressible noise, zeroes, and a mix of them within one cluster; the last cluster is partial.
fn disk() -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut source = |path: &Path| bytes.extend(fs::read(path).unwrap());
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for folder in ["tests", "../crates/qcow2-core/src", "../crates/qcow2-format/src"] {
        let mut files: Vec<_> = fs::read_dir(root.join(folder)).unwrap().map(|e| e.unwrap().path()).collect();
        files.sort();
        files.iter().filter(|path| path.is_file()).for_each(|path| source(path));
    }
    bytes.truncate(600_000);
    let text = bytes.clone();
    bytes.resize(3 << 20, 0);
    bytes.extend(pattern::bytes(1, 0, 900_000));
    bytes.extend(&text[..300_000]);
    bytes.resize(bytes.len() + 150_000, 0);
    for piece in text.chunks(5000) {
        bytes.extend(piece);
        bytes.extend(pattern::bytes(3, bytes.len() as u64, 2000));
        bytes.resize(bytes.len() + 1200, 0);
    }
    bytes.resize(bytes.len().next_multiple_of(512), 9);
    bytes
}

#[test]
fn compressed_images_do_not_depend_on_the_number_of_threads() {
    let Some(bench) = Bench::find() else { return };
    for method in ["zlib", "zstd"] {
        for cluster_size in (9..=21).map(|bits| 1 << bits) {
            let options = format!("-o compression_type={method},cluster_size={cluster_size}");
            let convert = format!("convert -f raw -O qcow2 -c {options} disk.raw");
            bench.ours(&format!("{convert} one.qcow2 -m 1"));
            for threads in [2, 7] {
                bench.ours(&format!("{convert} more.qcow2 -m {threads}"));
                assert!(
                    bench.bytes("one.qcow2") == bench.bytes("more.qcow2"),
                    "{options}, {threads} threads"
                );
            }
            bench.check("one.qcow2");
            bench.ours(&format!("{convert} any.qcow2 -m 3 -W"));
            bench.check("any.qcow2");
        }
    }
}

#[test]
fn a_compressed_overlay_stores_only_the_differences() {
    let Some(bench) = Bench::find() else { return };
    let mut below = bench.bytes("disk.raw");
    let len = below.len();
    below[len / 2..len / 2 + 200_000].fill(0x33);
    below[..70_000].fill(0);
    fs::write(bench.folder.path().join("below.raw"), &below).unwrap();
    bench.qemu_img("create -q -f qcow2 -b below.raw -F raw over.qcow2");
    let text = bench.bytes("disk.raw");
    // Writes the differing clusters into the overlay, from a file that holds them.
    for (start, end) in [(0, 131_072), ((len / 2) & !0xffff, (len / 2 + 200_000).next_multiple_of(65_536))] {
        let end = end.min(len);
        fs::write(bench.folder.path().join("part"), &text[start..end]).unwrap();
        let write = format!("write -q -s part {start} {}", end - start);
        bench.qemu.io.run_in(bench.folder.path(), &["-f", "qcow2", "-c", &write, "over.qcow2"]).success();
    }
    for method in ["zlib", "zstd"] {
        bench.ours(&format!(
            "convert -c -f qcow2 -O qcow2 -o compression_type={method} -B below.raw -F raw over.qcow2 small.qcow2"
        ));
        bench.check("small.qcow2");
        let size = bench.bytes("small.qcow2").len();
        assert!(size < 700_000, "{method}: {size} bytes");
    }
}

#[test]
fn level_and_window_options_change_the_size() {
    let Some(bench) = Bench::find() else { return };
    let size = |options: &str| {
        bench.ours(&format!("convert -c -f raw -O qcow2 -o {options} disk.raw level.qcow2"));
        bench.check("level.qcow2");
        bench.bytes("level.qcow2").len()
    };
    assert!(size("compression_level=9") < size("compression_level=1"));
    assert!(
        size("compression_type=zstd,compression_level=19")
            < size("compression_type=zstd,compression_level=1")
    );
    let usual = size("compression_type=zlib");
    let wide = size("compression_window_bits=15");
    assert!(wide < usual, "{wide} and {usual} bytes");
}

#[test]
fn overwriting_compressed_clusters_leaks_nothing() {
    let Some(bench) = Bench::find() else { return };
    for method in ["zlib", "zstd"] {
        bench.ours(&format!("convert -c -f raw -O qcow2 -o compression_type={method} disk.raw over.qcow2"));
        // One byte inside streams that share clusters, whole clusters, and zeroes.
        let commands =
            ["write -P 5 100 1", "write -P 6 64k 64k", "write -P 7 200000 300000", "write -z 400k 128k"];
        let len = bench.bytes("disk.raw").len();
        fs::copy(bench.folder.path().join("disk.raw"), bench.folder.path().join("plain.raw")).unwrap();
        for (tool, format, name) in
            [(&bench.ours, "qcow2", "over.qcow2"), (&bench.qemu.io, "raw", "plain.raw")]
        {
            let mut args = if format == "raw" { vec!["-f", "raw"] } else { vec!["io", "-f", "qcow2"] };
            commands.iter().for_each(|command| args.extend(["-c", command]));
            args.push(name);
            tool.run_in(bench.folder.path(), &args).success();
        }
        assert_eq!(bench.bytes("plain.raw").len(), len);
        bench.qemu_img("check -q -f qcow2 over.qcow2");
        bench.qemu_img("compare -q -f raw -F qcow2 plain.raw over.qcow2");
    }
}
