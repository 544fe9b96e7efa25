//! Images through pipes: qemu-img checks and reads what our program writes to standard output, and our
//! program reads images of qemu-img from standard input. And checksums, which depend on the guest content
//! only.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a test may stop")]

use qcow2_testkit::oracle::{Outcome, Tool};
use qcow2_testkit::rng::Rng;
use qcow2_tests::side_by_side::words;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-under-test");
const MIB: usize = 1 << 20;

struct World {
    root: tempfile::TempDir,
    qemu_img: Tool,
    program: PathBuf,
    content: Vec<u8>,
}

impl World {
    /// A folder with the disk `raw`: holes, zeroes, text that compresses and noise that does not.
    fn new() -> Option<Self> {
        let qemu_img = Tool::find("qemu-img")?;
        let root = tempfile::tempdir().unwrap();
        let program = root.path().join("qcow2");
        std::os::unix::fs::symlink(OURS, &program).unwrap();
        let mut content = vec![0; 9 * MIB + 1536];
        Rng::new(5).fill(&mut content[MIB..2 * MIB]);
        content[3 * MIB + 700..5 * MIB].iter_mut().enumerate().for_each(|(i, byte)| *byte = (i / 100) as u8);
        Rng::new(6).fill(&mut content[9 * MIB + 100..]);
        fs::write(root.path().join("raw"), &content).unwrap();
        Some(Self { root, qemu_img, program, content })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn qemu_img(&self, line: &str) -> Outcome {
        self.qemu_img.run_in(self.root.path(), &words(line))
    }

    /// Runs our program with these files as its standard streams. Returns whether it succeeded, and standard
    /// error.
    fn pipe(&self, line: &str, input: Option<&Path>, output: Option<&Path>) -> (bool, String) {
        let mut command = Command::new(&self.program);
        command.args(words(line)).current_dir(self.root.path()).stderr(Stdio::piped());
        // Real pipes: a file could be read out of order.
        let mut cat = input.map(|path| Command::new("cat").arg(path).stdout(Stdio::piped()).spawn().unwrap());
        match &mut cat {
            Some(cat) => command.stdin(cat.stdout.take().unwrap()),
            None => command.stdin(Stdio::null()),
        };
        match output {
            Some(path) => command.stdout(File::create(path).unwrap()),
            None => command.stdout(Stdio::piped()),
        };
        let child = command.spawn().unwrap();
        // It holds the other end of the pipe, which must be closed for `cat` to end.
        drop(command);
        let done = child.wait_with_output().unwrap();
        if let Some(mut cat) = cat {
            cat.wait().unwrap();
        }
        (done.status.success(), String::from_utf8_lossy(&done.stderr).into_owned())
    }
}

#[test]
fn qemu_reads_the_streams_we_write() {
    let Some(world) = World::new() else { return };
    world.qemu_img("convert -c -O qcow2 raw packed.qcow2").success();
    world.qemu_img("create -q -f qcow2 -b packed.qcow2 -F qcow2 overlay.qcow2").success();
    for source in ["raw", "packed.qcow2", "overlay.qcow2", "raw raw"] {
        for (index, options) in ["", "-o cluster_size=512", "-o cluster_size=2M"].iter().enumerate() {
            let out = world.path(&format!("out-{index}.qcow2"));
            let (done, said) =
                world.pipe(&format!("convert -O qcow2 {options} {source} -"), None, Some(&out));
            assert!(done, "{source} {options}: {said}");
            let name = out.display();
            world.qemu_img(&format!("check {name}")).success();
            world.qemu_img(&format!("convert -O raw {source} expected")).success();
            world.qemu_img(&format!("compare -F raw {name} expected")).success();
        }
    }
    let out = world.path("out.raw");
    assert!(world.pipe("convert -O raw overlay.qcow2 -", None, Some(&out)).0);
    assert!(fs::read(&out).unwrap() == world.content);
}

#[test]
fn we_read_images_of_qemu_from_a_pipe() {
    let Some(world) = World::new() else { return };
    for (index, options) in [
        "",
        "-c",
        "-c -o compression_type=zstd,cluster_size=4k",
        "-o cluster_size=512",
        "-o cluster_size=2M",
        "-o extended_l2=on",
        "-o compat=0.10",
        "-o preallocation=metadata",
        "-c -o cluster_size=512",
    ]
    .iter()
    .enumerate()
    {
        let image = format!("in-{index}.qcow2");
        world.qemu_img(&format!("convert -O qcow2 {options} raw {image}")).success();
        for format in ["raw", "qcow2"] {
            let (done, said) =
                world.pipe(&format!("convert -O {format} - out"), Some(&world.path(&image)), None);
            assert!(done, "{options} to {format}: {said}");
            world.qemu_img(&format!("compare -f raw -F {format} raw out")).success();
            if format == "qcow2" {
                world.qemu_img("check out").success();
            }
        }
    }
    for format in ["raw", "qcow2"] {
        let (done, said) = world.pipe(&format!("convert -O {format} - out"), Some(&world.path("raw")), None);
        assert!(done, "{said}");
        world.qemu_img(&format!("compare -f raw -F {format} raw out")).success();
    }
}

/// As raw its bytes would not be the disk in it: nothing of the kind is made without being asked for.
#[test]
fn containers_of_other_formats_are_never_wrapped_as_raw() {
    let Some(world) = World::new() else { return };
    for format in ["vmdk", "vdi", "vhdx", "vpc", "qcow", "qed", "parallels"] {
        world.qemu_img(&format!("convert -f raw -O {format} raw other")).success();
        let other = world.path("other");
        let (done, text) = world.pipe("convert -O qcow2 - out", Some(&other), None);
        assert!(!done && text.contains(&format!("format '{format}'")), "{format}: {text}");
        assert!(!world.path("out").exists(), "{format} left something behind");
        let (done, text) = world.pipe("convert -f raw -O raw - out", Some(&other), None);
        assert!(done, "{format} as raw: {text}");
        fs::remove_file(world.path("out")).unwrap();
    }
}

/// `/dev/stdout` and `/dev/stdin` are streams where a pipe is there.
#[cfg(target_os = "linux")]
#[test]
fn pipes_by_the_names_of_the_system_are_streams() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("raw"), [7; 204_800]).unwrap();
    let shell = |line: &str| {
        let mut shell = Command::new("sh");
        let run = shell.args(["-c", line]).env("OURS", OURS).current_dir(folder.path()).output().unwrap();
        assert!(run.status.success(), "{line}: {run:?}");
        String::from_utf8_lossy(&run.stderr).into_owned()
    };
    let told = shell(
        r#""$OURS" convert -f raw -O qcow2 raw /dev/stdout | cat > image
        cat image | "$OURS" convert -O raw /dev/stdin back && cmp raw back"#,
    );
    assert_eq!(told, "");
    // Compressed too, by way of a temporary file of which nothing stays.
    let told = shell(
        r#"mkdir tmp; TMPDIR=$PWD/tmp "$OURS" convert -c -f raw -O qcow2 raw /dev/stdout | cat > small
        cat small | "$OURS" convert -O raw /dev/stdin back2 && cmp raw back2; rmdir tmp
        test $(wc -c < small) -lt $(wc -c < image)"#,
    );
    assert_eq!(told, "");
}

/// The image is what the same conversion to a file makes, and a failure sends nothing.
#[test]
fn a_compressed_image_goes_through_a_pipe_when_it_is_whole() {
    let Some(world) = World::new() else { return };
    for options in ["-c", "-c -o compression_type=zstd"] {
        let (done, text) =
            world.pipe(&format!("convert {options} -O qcow2 raw -"), None, Some(&world.path("sent")));
        assert!(done, "{text}");
        world.qemu_img("check sent").success();
        world.qemu_img("compare -f raw -F qcow2 raw sent").success();
        assert!(fs::metadata(world.path("sent")).unwrap().len() < world.content.len() as u64 / 2);
    }
    let (done, text) = world.pipe("convert -c -O raw raw -", None, Some(&world.path("none")));
    assert!(!done && text.contains("not supported"), "{text}");
    assert_eq!(fs::metadata(world.path("none")).unwrap().len(), 0);
}

/// What streams do not support is refused, and no file is left behind.
#[test]
fn unsupported_streams_are_refused() {
    let Some(world) = World::new() else { return };
    world.qemu_img("convert -O qcow2 raw whole.qcow2").success();
    world.qemu_img("create -q -f qcow2 -b raw -F raw overlay.qcow2").success();
    let whole = fs::read(world.path("whole.qcow2")).unwrap();
    fs::write(world.path("short.qcow2"), &whole[..whole.len() / 2]).unwrap();
    let mut damaged = whole.clone();
    damaged[0x40000..0x40008].copy_from_slice(&[0x80, 0, 0, 0, 0, 0, 2, 0]);
    fs::write(world.path("damaged.qcow2"), damaged).unwrap();
    for (line, input, said) in [
        ("convert -O raw - out", "short.qcow2", "ends too early"),
        ("convert -O raw - out", "overlay.qcow2", "a backing file cannot be read from a stream"),
        ("convert -O raw - out", "damaged.qcow2", "damaged"),
        ("convert -f qcow2 -O raw - out", "raw", "not a usable qcow2 image"),
        ("convert -f vmdk -O raw - out", "raw", "cannot be read from a stream"),
        ("convert -O raw - out", "/dev/null", "the stream is empty"),
        ("convert -f raw -O qcow2 - out", "/dev/null", "the stream is empty"),
        ("convert -O raw - -", "raw", "one of them must be a file"),
        ("convert -c -f raw -O qcow2 - out", "raw", "not compressed on its way"),
        ("convert -O qcow2 -o lazy_refcounts=on raw -", "raw", "not possible when streaming"),
    ] {
        let (done, text) = world.pipe(line, Some(&world.path(input)), None);
        assert!(!done && text.contains(said), "{line} < {input}: {text}");
        assert!(!world.path("out").exists(), "{line} < {input} left something behind");
    }
}

#[test]
fn checksums_depend_on_the_guest_content_only() {
    let Some(world) = World::new() else { return };
    world.qemu_img("convert -O qcow2 raw plain.qcow2").success();
    world.qemu_img("convert -c -O qcow2 -o cluster_size=4k raw packed.qcow2").success();
    let ours = Tool::at(&world.program);
    let digest = |line: &str| {
        let said = ours.run_in(world.root.path(), &words(line)).success().stdout;
        said.split_whitespace().next().unwrap().to_owned()
    };
    let raw = digest("checksum raw");
    assert_eq!([digest("checksum plain.qcow2"), digest("checksum packed.qcow2")], [raw.clone(), raw.clone()]);
    // An independent CRC-32 of the raw bytes.
    if let Some(python) = Tool::find("python3") {
        let script = "import sys,zlib;print('%08x'%zlib.crc32(open('raw','rb').read()))";
        let theirs = python.run_in(world.root.path(), &["-c", script]).success().stdout;
        assert_eq!(theirs.trim(), raw);
    }
    let blake3 = digest("checksum --blake3 raw");
    assert_eq!((blake3.len(), digest("checksum --blake3 packed.qcow2")), (64, blake3));
}
