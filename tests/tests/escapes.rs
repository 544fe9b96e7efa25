//! Whatever an image, a file name or a server says is printed without control characters: it neither drives
//! the terminal nor looks like a line of the command's own.
#![allow(clippy::unwrap_used, reason = "helpers of a test")]

use qcow2_core::format::feature::FeatureWord;
use qcow2_core::format::snapshot::Snapshot;
use qcow2_core::format::{FeatureName, Header, HostOffset, IncompatibleFeatures, Version};
use qcow2_testkit::oracle::{Outcome, Tool};
use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::thread;

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-under-test");

/// Control characters of all kinds: a sequence that sets a title, one that clears the screen, C1, delete, a
/// text that runs backwards, and a line that looks like one of ours.
const HOSTILE: &str = "\x1b]0;t\x07\x1b[2J\u{9b}1m\x7f\u{202e}\r\nFORGED line\tx";
/// The same for fields of 30 bytes.
const SHORT: &str = "\x1b[2J\x07\u{9b}\x7f\r\nFORGED";

/// What is run on each image, and must not fail to be run: some end with an error, and that is the point.
const LINES: &[&str] = &[
    "info IMAGE",
    "info --backing-chain IMAGE",
    "info --output=json IMAGE",
    "info --backing-chain --output=json IMAGE",
    "check IMAGE",
    "check -r all IMAGE",
    "check --output=json IMAGE",
    "map IMAGE",
    "map --output=json IMAGE",
    "measure -O qcow2 IMAGE",
    "compare IMAGE IMAGE",
    "convert -O raw IMAGE out",
    "convert --bitmaps -O qcow2 IMAGE out",
    "dd if=IMAGE of=out count=1",
    "snapshot -l IMAGE",
    "snapshot -a 7 IMAGE",
    "snapshot -d 7 IMAGE",
    "bitmap --clear IMAGE none",
    "bitmap --merge none IMAGE other",
    "amend -o compat=v2 IMAGE",
    "amend -o lazy_refcounts=on IMAGE",
    "rebase IMAGE",
    "rebase -b other -F raw IMAGE",
    "commit IMAGE",
    "resize IMAGE 2M",
    "create -f qcow2 -b IMAGE -F qcow2 out",
];
/// What only our own name has.
const OWN_LINES: &[&str] = &["checksum IMAGE", "checksum --help"];
const IO_LINES: &[&str] = &["read 0 4k", "write 0 4k", "info", "map", "info -f"];

fn judge(outcome: &Outcome) {
    for text in [&outcome.stdout, &outcome.stderr] {
        let control = text.chars().find(|&c| c != '\n' && (c.is_control() || c == '\u{202e}'));
        assert_eq!(control, None, "{outcome:?}");
        assert!(!text.lines().any(|line| line.starts_with("FORGED")), "{outcome}");
    }
}

/// Runs every line on `image` under all three names. `source`: what its text is in.
fn check(source: &str, image: &[u8], quoted: &str) {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let mut heard = String::new();
    for (name, lines) in [("qcow2", LINES), ("qcow2", OWN_LINES), ("qemu-img", LINES)] {
        for line in lines {
            heard += &run(folder, name, &line.replace("IMAGE", "image"), image);
        }
    }
    for line in IO_LINES {
        heard += &run(folder, "qemu-io", &format!("-c '{line}' image"), image);
    }
    // The text is printed somewhere, or nothing is tested.
    assert!(heard.contains(quoted), "{source}: {heard}");
}

fn run(folder: &Path, name: &str, line: &str, image: &[u8]) -> String {
    fs::write(folder.join("image"), image).unwrap();
    fs::write(folder.join("other"), vec![0; 1 << 20]).unwrap();
    let script = format!("exec -a {name} {OURS} {line}");
    let outcome = Tool::at("bash").run_in(folder, &["-c", &script]);
    judge(&outcome);
    outcome.stdout + &outcome.stderr
}

fn header(change: impl FnOnce(&mut Header)) -> Vec<u8> {
    let mut header = Header::new(Version::V3, 16);
    (header.size, header.l1_size) = (1 << 20, 1);
    (header.l1_table_offset, header.refcount_table_offset) =
        (HostOffset::new(3 << 16), HostOffset::new(1 << 16));
    header.refcount_table_clusters = 1;
    change(&mut header);
    let mut bytes = header.encode_cluster().unwrap();
    bytes.resize(6 << 16, 0);
    // The refcount block counts the first five clusters.
    bytes[1 << 16..][..8].copy_from_slice(&(2u64 << 16).to_be_bytes());
    (0..5).for_each(|cluster| bytes[(2 << 16) + 2 * cluster + 1] = 1);
    bytes
}

#[test]
fn names_of_other_files_are_escaped() {
    let quoted = "\\x1b]0;t\\x07\\x1b[2J\\u{9b}1m\\x7f\\u{202e}\\r\\nFORGED line\\tx";
    let backing = |name: &str, format: &str| {
        header(|h| {
            h.backing_file = Some(name.as_bytes().to_vec());
            h.extensions.backing_format = Some(format.as_bytes().to_vec());
        })
    };
    check("backing file", &backing(HOSTILE, "raw"), quoted);
    check("backing file by json", &backing(&format!("json:{{\"driver\":\"{SHORT}\"}}"), "raw"), "\\x1b[2J");
    check("backing file by protocol", &backing(&format!("nbd://{SHORT}:1/x"), "raw"), "\\x1b[2J");
    check("backing format", &backing("other", "\x1b[2J\u{9b}\nF\x7f"), "\\x1b[2J\\u{9b}\\nF\\x7f");
    let data = header(|h| {
        h.features.incompatible.set(IncompatibleFeatures::DATA_FILE, true);
        h.extensions.data_file = Some(HOSTILE.as_bytes().to_vec());
    });
    check("data file", &data, quoted);
}

#[test]
fn names_inside_of_an_image_are_escaped() {
    let snapshot = |l1: u64| {
        let snapshot = Snapshot {
            l1_table_offset: HostOffset::new(l1),
            l1_size: 1,
            id: SHORT.as_bytes().to_vec(),
            name: HOSTILE.as_bytes().to_vec(),
            date_seconds: 0,
            date_nanoseconds: 0,
            vm_clock_nanoseconds: 0,
            vm_state_size: 0,
            disk_size: 1 << 20,
            icount: None,
            unknown_extra: Vec::new(),
        };
        let mut table = Vec::new();
        snapshot.encode(&mut table).unwrap();
        let mut image = header(|h| (h.nb_snapshots, h.snapshots_offset) = (1, HostOffset::new(4 << 16)));
        image[4 << 16..][..table.len()].copy_from_slice(&table);
        image
    };
    check("snapshot", &snapshot(5 << 16), "\\x1b[2J");
    check("snapshot without its table", &snapshot((5 << 16) + 512), "\\x1b[2J");
    let feature = header(|h| {
        h.features.incompatible = IncompatibleFeatures::from_bits(1 << 40);
        h.extensions.feature_names =
            FeatureName::new(FeatureWord::Incompatible, 40, SHORT).map(|name| vec![name]);
    });
    check("feature", &feature, "\\x1b[2J");
}

#[test]
fn names_of_bitmaps_are_escaped() {
    let folder = tempfile::tempdir().unwrap();
    let ours = Tool::at(OURS);
    let mark = "B".repeat(SHORT.len());
    ours.run_in(folder.path(), &["create", "-q", "-f", "qcow2", "image", "1M"]).success();
    ours.run_in(folder.path(), &["bitmap", "--add", "image", &mark]).success();
    let mut bytes = fs::read(folder.path().join("image")).unwrap();
    let at = bytes.windows(mark.len()).position(|bytes| bytes == mark.as_bytes()).unwrap();
    bytes[at..at + mark.len()].copy_from_slice(SHORT.as_bytes());
    check("bitmap", &bytes, "\\x1b[2J");
    // In use by somebody: bit 0 of the flags, which are in bytes 12 to 15 of the entry.
    bytes[at - 24 + 15] |= 1;
    check("bitmap in use", &bytes, "\\x1b[2J");
}

#[test]
fn names_of_ciphers_are_escaped() {
    for at in [8usize, 40, 72] {
        let mut image = vec![0; 3 << 20];
        image[..8].copy_from_slice(b"LUKS\xba\xbe\0\x01");
        for (at, text) in [(8, "aes"), (40, "xts-plain64"), (72, "sha256")] {
            image[at..at + text.len()].copy_from_slice(text.as_bytes());
        }
        image[at..at + SHORT.len()].copy_from_slice(SHORT.as_bytes());
        // Where the disk begins, in sectors, and how long its key is; then eight slots without keys.
        image[104..112].copy_from_slice(&[0, 0, 0x10, 8, 0, 0, 0, 64]);
        for slot in 0..8u32 {
            let slot_at = 208 + 48 * slot as usize;
            image[slot_at..slot_at + 4].copy_from_slice(&0xdead_u32.to_be_bytes());
            image[slot_at + 40..slot_at + 44].copy_from_slice(&(8 + 512 * slot).to_be_bytes());
            image[slot_at + 44..slot_at + 48].copy_from_slice(&4000_u32.to_be_bytes());
        }
        check("cipher", &image, "\\x1b[2J");
    }
}

/// A server that refuses every option with a text of its own.
fn refuse(listener: &TcpListener) {
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else { return };
        let mut flags = [0; 4];
        let greeted =
            stream.write_all(b"NBDMAGICIHAVEOPT\0\x01").and_then(|()| stream.read_exact(&mut flags));
        let mut option = [0; 16];
        while greeted.is_ok() && stream.read_exact(&mut option).is_ok() {
            let len = u32::from_be_bytes(*option.last_chunk().unwrap());
            let mut data = vec![0; len as usize];
            stream.read_exact(&mut data).unwrap();
            let mut reply = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
            reply.extend(&option[8..12]);
            reply.extend(0x8000_0006_u32.to_be_bytes());
            reply.extend((HOSTILE.len() as u32).to_be_bytes());
            reply.extend(HOSTILE.as_bytes());
            if stream.write_all(&reply).is_err() {
                break;
            }
        }
    }
}

#[test]
fn messages_of_a_server_are_escaped() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || refuse(&listener));
    let folder = tempfile::tempdir().unwrap();
    for name in ["qcow2", "qemu-img"] {
        let told = run(folder.path(), name, &format!("info nbd://127.0.0.1:{port}/x"), b"");
        assert!(told.contains("server reported: \\x1b]0;t\\x07"), "{told}");
    }
    let backing = header(|h| {
        h.backing_file = Some(format!("nbd://127.0.0.1:{port}/x").into_bytes());
        h.extensions.backing_format = Some(b"raw".to_vec());
    });
    check("server of a backing file", &backing, "server reported: \\x1b]0;t");
}

/// A file that is there, under such a name, and one that is given on the command line.
#[test]
fn names_of_files_are_escaped() {
    let folder = tempfile::tempdir().unwrap();
    let name = "a\x1b[31m\nFORGED";
    fs::write(folder.path().join(name), vec![0; 1 << 20]).unwrap();
    let ours = Tool::at(OURS);
    for args in [&["info", name][..], &["map", name], &["check", name], &["info", "\x1b[31m\nFORGED"]] {
        judge(&ours.run_in(folder.path(), args));
    }
}
