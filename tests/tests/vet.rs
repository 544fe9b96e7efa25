//! Images of unknown origin: shapes of known attacks, one limit at a time, and the judgement of OpenStack's
//! `format_inspector` on the same files.

#![allow(clippy::unwrap_used, reason = "helpers of a test")]

use qcow2_codec::{Deflate, Zstd};
use qcow2_core::{Codecs, CreateOptions, ImageFormat, Storage, create};
use qcow2_format::extension::UnknownExtension;
use qcow2_format::{AutoclearFeatures, CompatibleFeatures, Header, HostOffset, IncompatibleFeatures};
use qcow2_io::MemoryStorage;
use qcow2_ops::vet::{Verdict, VetOptions, VetReport, vet};
use qcow2_testkit::builder::{Builder, Cluster};
use qcow2_testkit::oracle::{Tool, skip};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-under-test");

fn judge(bytes: &[u8], options: &VetOptions) -> VetReport {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::from(bytes.to_vec()));
    vet(&storage, options).unwrap()
}

fn options() -> VetOptions {
    VetOptions::default().with_codecs(Codecs::new(Arc::new(Deflate::default()), Arc::new(Zstd::default())))
}

/// What is found must be these kinds, in this order, the worst of them `verdict`.
#[track_caller]
fn check_with(options: &VetOptions, bytes: &[u8], verdict: Verdict, kinds: &[&str]) -> VetReport {
    let report = judge(bytes, options);
    let seen: Vec<_> = report.findings.iter().map(|finding| finding.kind()).collect();
    assert_eq!((report.verdict(), &*seen), (verdict, kinds), "{:#?}", report.findings);
    report
}

#[track_caller]
fn check(bytes: &[u8], verdict: Verdict, kinds: &[&str]) -> VetReport {
    check_with(&options(), bytes, verdict, kinds)
}

#[track_caller]
fn check_as(format: &str, bytes: &[u8], verdict: Verdict, kinds: &[&str]) -> VetReport {
    check_with(&options().with_format(Some(ImageFormat::from_name(format))), bytes, verdict, kinds)
}

/// An empty disk of 1 MiB whose header is changed afterwards.
fn qcow2(change: impl FnOnce(&mut Header)) -> Vec<u8> {
    let storage = Arc::new(MemoryStorage::new());
    create(&(Arc::clone(&storage) as Arc<dyn Storage>), None, &CreateOptions::new(1 << 20)).unwrap();
    let mut bytes = storage.to_vec();
    let mut header = Header::parse(&bytes).unwrap();
    change(&mut header);
    let cluster = header.encode_cluster().unwrap();
    bytes[..cluster.len()].copy_from_slice(&cluster);
    bytes
}

fn set_data_file(header: &mut Header, name: &str) {
    header.features.incompatible.set(IncompatibleFeatures::DATA_FILE, true);
    header.extensions.data_file = Some(name.as_bytes().to_vec());
}

/// The bytes of numbers, little-endian, at their places in `len` bytes of zeroes.
fn little(len: usize, fields: &[(usize, &[u8])]) -> Vec<u8> {
    let mut bytes = vec![0; len];
    for (at, field) in fields {
        bytes[*at..at + field.len()].copy_from_slice(field);
    }
    bytes
}

const SPARSE: &str = "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\n\
                      createType=\"monolithicSparse\"\n\
                      RW 2048 SPARSE \"disk.vmdk\"\nddb.adapterType = \"ide\"\n";

/// A sparse extent of so many sectors around this description.
fn vmdk(sectors: u64, text: &str) -> Vec<u8> {
    let mut bytes = little(
        64 << 10,
        &[
            (0, b"KDMV\x01"),
            (12, &sectors.to_le_bytes()),
            (28, &1u64.to_le_bytes()),
            (36, &20u64.to_le_bytes()),
        ],
    );
    bytes[512..512 + text.len()].copy_from_slice(text.as_bytes());
    bytes
}

/// A growing VHD of 1 MiB of this type, with a locator that leads to `locator`.
fn vhd(kind: u32, locator: Option<&str>) -> Vec<u8> {
    let footer = little(
        512,
        &[
            (0, b"conectix"),
            (16, &512u64.to_be_bytes()),
            (48, &(1u64 << 20).to_be_bytes()),
            (60, &kind.to_be_bytes()),
        ],
    );
    let mut header = little(1024, &[(0, b"cxsparse")]);
    let wide: Vec<u8> = locator.unwrap_or_default().encode_utf16().flat_map(u16::to_le_bytes).collect();
    if locator.is_some() {
        header[576..580].copy_from_slice(b"W2ku");
        header[584..588].copy_from_slice(&(wide.len() as u32).to_be_bytes());
        header[592..600].copy_from_slice(&2048u64.to_be_bytes());
    }
    let mut names = vec![0; 1024];
    names[..wide.len()].copy_from_slice(&wide);
    [&footer[..], &header, &[0; 512], &names, &footer].concat()
}

/// A VHDX of 1 MiB, with a parent locator of one key that leads to `parent`.
fn vhdx(parent: Option<&str>) -> Vec<u8> {
    const METADATA: [u8; 16] = *b"\x06\xa2\x7c\x8b\x90\x47\x9a\x4b\xb8\xfe\x57\x5f\x05\x0f\x88\x6e";
    const SIZE: [u8; 16] = *b"\x24\x42\xa5\x2f\x1b\xcd\x76\x48\xb2\x11\x5d\xbe\xd8\x3b\xf4\xb8";
    const LOCATOR: [u8; 16] = *b"\x2d\x5f\xd3\xa8\x0b\xb3\x4d\x45\xab\xf7\xd3\xd8\x48\x34\xab\x0c";
    let value: Vec<u8> = parent.unwrap_or_default().encode_utf16().flat_map(u16::to_le_bytes).collect();
    let count = 1 + u16::from(parent.is_some());
    let region = 2 << 20;
    little(
        3 << 20,
        &[
            (0, b"vhdxfile"),
            (192 << 10, b"regi\0\0\0\0\x01\0\0\0"),
            ((192 << 10) + 16, &METADATA),
            ((192 << 10) + 32, &(region as u64).to_le_bytes()),
            (region, b"metadata"),
            (region + 10, &count.to_le_bytes()),
            (region + 32, &SIZE),
            (region + 48, &0x10000u32.to_le_bytes()),
            (region + 52, &8u32.to_le_bytes()),
            (region + 0x10000, &(1u64 << 20).to_le_bytes()),
            (region + 64, if parent.is_some() { &LOCATOR } else { &[0; 16] }),
            (region + 80, &0x11000u32.to_le_bytes()),
            (region + 84, &(32 + value.len() as u32).to_le_bytes()),
            (region + 0x11000 + 18, &1u16.to_le_bytes()),
            (region + 0x11000 + 24, &32u32.to_le_bytes()),
            (region + 0x11000 + 30, &(value.len() as u16).to_le_bytes()),
            (region + 0x11000 + 32, &value),
        ],
    )
}

fn vdi(kind: u32, parent: u8) -> Vec<u8> {
    let size = (1u64 << 20).to_le_bytes();
    little(
        1024,
        &[(64, b"\x7f\x10\xda\xbe"), (0x4c, &kind.to_le_bytes()), (0x170, &size), (0x1a8, &[parent])],
    )
}

/// A disk with an MBR of these entries: boot flag, CHS of the start, type, LBA of the start.
fn mbr(entries: &[(u8, [u8; 3], u8, u32)]) -> Vec<u8> {
    let mut bytes = little(8192, &[(510, &[0x55, 0xaa])]);
    for (index, (boot, chs, kind, lba)) in entries.iter().enumerate() {
        let at = 446 + 16 * index;
        bytes[at] = *boot;
        bytes[at + 1..at + 4].copy_from_slice(chs);
        bytes[at + 4] = *kind;
        bytes[at + 8..at + 12].copy_from_slice(&lba.to_le_bytes());
    }
    bytes
}

const GPT: (u8, [u8; 3], u8, u32) = (0, [0, 2, 0], 0xee, 1);

fn iso() -> Vec<u8> {
    little(128 << 10, &[(0x8000, b"\x01CD001\x01")])
}

fn luks(version: u8) -> Vec<u8> {
    let mut bytes = little(
        4 << 20,
        &[
            (0, &[b'L', b'U', b'K', b'S', 0xba, 0xbe, 0, version]),
            (8, b"aes"),
            (40, b"xts-plain64"),
            (72, b"sha256"),
            (104, &4096u32.to_be_bytes()),
            (108, &64u32.to_be_bytes()),
            (164, &1000u32.to_be_bytes()),
        ],
    );
    for slot in 0..8 {
        bytes[208 + 48 * slot..212 + 48 * slot].copy_from_slice(&0xdeadu32.to_be_bytes());
    }
    bytes
}

/// The name that a report shows, by its kind of reason.
#[track_caller]
fn check_named(report: &VetReport, name: &str, kind: &str) {
    let named: Vec<_> = report.findings.iter().filter_map(|finding| finding.named()).collect();
    assert!(named.iter().any(|(seen, of)| *seen == name && of.name() == kind), "{named:?}");
}

#[test]
fn cve_2024_32498_qcow2_data_file() {
    let named = qcow2(|header| set_data_file(header, "/etc/passwd"));
    check_named(&check(&named, Verdict::Unsafe, &["data-file"]), "/etc/passwd", "path");
    // The bit without a name, the name without the bit, and a name behind a table that is damaged on purpose.
    let bit = qcow2(|header| {
        header.features.incompatible.set(IncompatibleFeatures::DATA_FILE, true);
    });
    check(&bit, Verdict::Unsafe, &["data-file"]);
    check(
        &qcow2(|header| header.extensions.data_file = Some(b"x".to_vec())),
        Verdict::Unsafe,
        &["data-file"],
    );
    let damaged = qcow2(|header| {
        set_data_file(header, "/etc/passwd");
        header.l1_size = u32::MAX;
    });
    check(&damaged, Verdict::Unsafe, &["malformed", "data-file"]);
}

#[test]
fn cve_2024_4467_json_data_file() {
    let name = r#"json:{"driver":"qcow2","file":{"driver":"host_device","filename":"/dev/sda"}}"#;
    let report = check(&qcow2(|header| set_data_file(header, name)), Verdict::Unsafe, &["data-file"]);
    check_named(&report, name, "json");
}

#[test]
fn cve_2024_44082_image_in_another_format_than_stated() {
    let image = qcow2(|_| {});
    check_as("qcow2", &image, Verdict::Safe, &[]);
    check_as("raw", &image, Verdict::Unsafe, &["not-raw"]);
    check_as("vmdk", &image, Verdict::Unsafe, &["other-format"]);
    check_as("qcow2", &vmdk(2048, SPARSE), Verdict::Unsafe, &["other-format"]);
    check_as("qcow2", b"no image", Verdict::Unsafe, &["other-format"]);
    // qemu-img knows no ISO images and takes this one for qcow2.
    let mut both = iso();
    both[..512].copy_from_slice(&image[..512]);
    let report = judge(&both, &options());
    assert!(report.verdict() == Verdict::Unsafe && report.findings[0].kind() == "polyglot", "{report:?}");
}

#[test]
fn cve_2026_24708_raw_disk_that_begins_like_qcow2() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let mut disk = vec![7; 1 << 20];
    let header = qcow2(|header| {
        set_data_file(header, "victim");
        header.features.autoclear.set(AutoclearFeatures::RAW_DATA_FILE, true);
    });
    disk[..header.len()].copy_from_slice(&header);
    let report = judge(&disk, &options().with_format(Some(ImageFormat::Raw)));
    assert_eq!((report.verdict(), report.findings[0].kind()), (Verdict::Unsafe, "not-raw"));
    // A resize without a format takes the disk for qcow2, and changes the file that it names.
    let victim = vec![1; 1 << 20];
    let reset = || {
        std::fs::write(folder.join("disk"), &disk).unwrap();
        std::fs::write(folder.join("victim"), &victim).unwrap();
    };
    let link = folder.join("qemu-img");
    std::os::unix::fs::symlink(OURS, &link).unwrap();
    let resize = |args: &[&str], policy: Option<&str>| {
        reset();
        let mut command = std::process::Command::new(&link);
        command.current_dir(folder).arg("resize").args(args).args(["disk", "2M"]);
        let output =
            policy.into_iter().fold(&mut command, |command, p| command.env("QCOW2_POLICY", p)).output();
        let output = output.unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let is_whole = || std::fs::read(folder.join("victim")).unwrap() == victim;
    assert!(resize(&[], None).0 && !is_whole(), "the attack works where nothing stands against it");
    for policy in ["untrusted", "follow=none", "refuse=data-file"] {
        let (done, said) = resize(&[], Some(policy));
        assert!(!done && is_whole() && said.contains("disk"), "{policy}: {said}");
    }
    assert!(resize(&["-f", "raw"], Some("untrusted")).0 && is_whole());
    assert_eq!(std::fs::metadata(folder.join("disk")).unwrap().len(), 2 << 20);
}

#[test]
fn vmdk_extents_that_name_files() {
    check(&vmdk(2048, SPARSE), Verdict::Safe, &[]);
    // Without a size of its own the extent is a description of others.
    check_named(&check(&vmdk(0, SPARSE), Verdict::Unsafe, &["extent"]), "disk.vmdk", "path");
    for (extent, kinds) in [
        ("RW 2048 SPARSE \"/etc/Hosts\"", &["extent", "extent"][..]),
        ("RW 2048 SPARSE \"other.vmdk\"", &["extent", "extent"]),
        ("wronly 2048 SPARSE \"x\"", &["malformed"]),
        ("parentFileNameHint=\"/etc/Passwd\"", &["parent"]),
        ("parentCID=12345678", &["parent"]),
    ] {
        check(&vmdk(2048, &format!("{SPARSE}{extent}\n")), Verdict::Unsafe, kinds);
    }
    let report = judge(&vmdk(2048, &format!("{SPARSE}RW 1 FLAT \"/etc/Hosts\"\n")), &options());
    check_named(&report, "/etc/Hosts", "path");
    let flat = SPARSE.replace("monolithicSparse", "monolithicFlat").replace("disk.vmdk", "/etc/Shadow");
    check_named(&check(flat.as_bytes(), Verdict::Unsafe, &["malformed", "extent"]), "/etc/Shadow", "path");
    // Not every program wants the first line.
    let bare = flat.split_once('\n').unwrap().1;
    check(bare.as_bytes(), Verdict::Unsafe, &["malformed", "extent"]);
    // QEMU wants nothing but a version, and reads no further than the first zero.
    for text in
        ["# \u{e9}\nversion=1\nRW 2 FLAT \"/etc/Shadow\" 0\n", "version=1\nrw 2 FLAT \"/etc/Shadow\" 0\n"]
    {
        let padded = [text.as_bytes(), &[0; 700]].concat();
        let report = judge(&padded, &options());
        assert_eq!((report.verdict(), report.format_name()), (Verdict::Unsafe, "vmdk"), "{report}");
        check_named(&report, "/etc/Shadow", "path");
        assert_eq!(judge(&padded, &options().with_format(Some(ImageFormat::Raw))).verdict(), Verdict::Unsafe);
    }
    let none = SPARSE.replace("RW 2048 SPARSE \"disk.vmdk\"\n", "");
    check(&vmdk(2048, &none), Verdict::Unsafe, &["malformed"]);
}

#[test]
fn vmdk_footers_that_say_something_else() {
    let marker = little(512, &[(12, &[3])]);
    let with_footer = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut image = vmdk(2048, SPARSE);
        image[56..64].fill(0xff);
        let mut tail = [&marker[..], &image[..512], &[0; 512]].concat();
        tail[512 + 56..512 + 64].fill(1);
        change(&mut tail);
        [image, tail].concat()
    };
    check(&with_footer(&|_| {}), Verdict::Safe, &[]);
    for at in [8, 12, 16, 511, 512, 516, 524, 540, 548, 1024, 1032, 1036, 1535] {
        check(&with_footer(&|tail| tail[at] ^= 1), Verdict::Unsafe, &["malformed"]);
    }
    check(&with_footer(&|tail| tail[568..576].fill(0xff)), Verdict::Unsafe, &["malformed"]);
}

#[test]
fn vhd_parent_locators() {
    check(&vhd(3, None), Verdict::Safe, &[]);
    let name = "C:\\Windows\\System32\\config\\SAM";
    let report = check(&vhd(4, Some(name)), Verdict::Unsafe, &["parent", "parent"]);
    check_named(&report, name, "path");
    // The type alone does not decide what other programs follow.
    check(&vhd(3, Some("/etc/passwd")), Verdict::Unsafe, &["parent"]);
    check(&vhd(4, None), Verdict::Unsafe, &["parent"]);
    check(&vhd(9, None), Verdict::Unsafe, &["malformed"]);
    // A fixed disk has a footer only: whoever takes it for raw sees it as content.
    let fixed = [vec![1; 4096], vhd(2, None)[..512].to_vec()].concat();
    check(&fixed, Verdict::Safe, &[]);
    check_as("raw", &fixed, Verdict::Unsafe, &["not-raw"]);
    let mut two = vhd(3, None);
    two[55] = 1;
    check(&two, Verdict::Unsafe, &["malformed"]);
}

#[test]
fn vhdx_parent_locators() {
    let report = check(&vhdx(None), Verdict::Safe, &[]);
    assert_eq!(report.virtual_size, Some(1 << 20));
    let report = check(&vhdx(Some("..\\..\\secret.vhdx")), Verdict::Unsafe, &["parent", "parent"]);
    check_named(&report, "..\\..\\secret.vhdx", "path");
    check(b"vhdxfile", Verdict::Unsafe, &["malformed"]);
    // Tables full of the same entry cost no more than one of them.
    let mut image = vhdx(Some("x"));
    image[(2 << 20) + 84..(2 << 20) + 88].copy_from_slice(&0x10000u32.to_le_bytes());
    for (table, at, entry) in [(192 << 10, 8, 16), (2 << 20, 10, 64)] {
        image[table + at..table + at + 2].copy_from_slice(&1900u16.to_le_bytes());
        let entry = image[table + entry..table + entry + 32].to_vec();
        let first = table + if table == 2 << 20 { 32 } else { 16 };
        (0..1900).for_each(|n| image[first + 32 * n..first + 32 * n + 32].copy_from_slice(&entry));
    }
    let started = std::time::Instant::now();
    let report = judge(&image, &options());
    assert!(report.verdict() == Verdict::Unsafe && started.elapsed().as_secs() < 4, "{report}");
}

#[test]
fn every_other_container() {
    check(&vdi(1, 0), Verdict::Safe, &[]);
    check(&vdi(4, 7), Verdict::Unsafe, &["malformed", "parent"]);
    check(&iso(), Verdict::Safe, &[]);
    check(&luks(1), Verdict::Unknown, &["encrypted"]);
    check(&luks(2), Verdict::Unsafe, &["malformed"]);
    for bytes in [
        &b"QFI\xFB\x00\x00\x00\x01"[..],
        b"QED\x00",
        b"WithoutFreeSpace",
        b"Bochs Virtual HD Image",
        b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop",
    ] {
        check(bytes, Verdict::Unsafe, &["format"]);
    }
    let dmg = [vec![0; 4096], little(512, &[(0, b"koly")])].concat();
    check(&dmg, Verdict::Unsafe, &["format"]);
    check_as("raw", &dmg, Verdict::Unsafe, &["not-raw", "format"]);
    for raw in [&b""[..], b"x", &[0; 4096]] {
        check(raw, Verdict::Safe, &[]);
        check_as("raw", raw, Verdict::Safe, &[]);
    }
}

#[test]
fn partition_tables() {
    check(&mbr(&[GPT]), Verdict::Safe, &[]);
    check(&mbr(&[(0x80, [1, 1, 0], 0x83, 2048), (0, [9, 9, 9], 0x82, 9)]), Verdict::Safe, &[]);
    check_as("raw", &mbr(&[GPT]), Verdict::Safe, &[]);
    for entries in [
        &[(0x0a, [0, 2, 0], 0xee, 1)][..],
        &[],
        &[GPT, GPT],
        &[(0, [0, 1, 0], 0xee, 1)],
        &[(0, [0, 2, 0], 0xee, 2)],
    ] {
        check(&mbr(entries), Verdict::Unknown, &["partitions"]);
    }
    // An ISO image that boots from a stick has both, and nothing else that anybody would open.
    let mut hybrid = iso();
    hybrid[..512].copy_from_slice(&mbr(&[(0x80, [0, 0, 0], 0x17, 0)])[..512]);
    check(&hybrid, Verdict::Unknown, &["polyglot"]);
}

#[test]
fn qcow2_features_and_sizes() {
    check(&qcow2(|_| {}), Verdict::Safe, &[]);
    check(&qcow2(|h| h.backing_file = Some(b"../base".to_vec())), Verdict::Unsafe, &["backing-file"]);
    let server = qcow2(|h| h.backing_file = Some(b"nbd://host/x\x1b[2J".to_vec()));
    let report = check(&server, Verdict::Unsafe, &["backing-file"]);
    let line = report.findings[0].to_string();
    assert!(line.contains(r"'nbd://host/x\u{1b}[2J' at 0x") && line.contains("protocol nbd"), "{line}");
    let bits = |word: u64| qcow2(|h| h.features.incompatible = IncompatibleFeatures::from_bits(word));
    check(&bits(1 << 56), Verdict::Unsafe, &["unknown-bits"]);
    check(&bits(1 << 56 | 4), Verdict::Unsafe, &["unknown-bits", "data-file"]);
    let compatible = CompatibleFeatures::from_bits(1 << 9);
    check(&qcow2(|h| h.features.compatible = compatible), Verdict::Unknown, &["unknown-bits"]);
    let unknown = UnknownExtension { kind: 0x1234_5678, data: vec![1] };
    check(&qcow2(|h| h.extensions.unknown.push(unknown)), Verdict::Unknown, &["unknown-extension"]);
    check(&bits(IncompatibleFeatures::CORRUPT.bits()), Verdict::Unknown, &["corrupt"]);
    check(&bits(IncompatibleFeatures::DIRTY.bits()), Verdict::Safe, &[]);
    check(&qcow2(|h| h.nb_snapshots = 1), Verdict::Unsafe, &["snapshots"]);
    for version in [4, 9] {
        let mut image = qcow2(|_| {});
        image[7] = version;
        check(&image, Verdict::Unsafe, &["malformed"]);
    }
    let small = options().with_max_virtual_size(1 << 19);
    check_with(&small, &qcow2(|_| {}), Verdict::Unsafe, &["virtual-size"]);
    check_with(&small, &[0; 1 << 20], Verdict::Unsafe, &["virtual-size"]);
    let tables = options().with_max_table_size(1000);
    check_with(&tables, &qcow2(|_| {}), Verdict::Unsafe, &["tables"]);
}

#[test]
fn content_that_does_not_belong() {
    let image = qcow2(|_| {});
    let padded = [&image[..], &[0; 1 << 16]].concat();
    check(&padded, Verdict::Safe, &[]);
    let report = check(&[&padded[..], b"hidden"].concat(), Verdict::Unknown, &["trailing-content"]);
    assert!(report.findings[0].offset().is_some_and(|at| at >= padded.len() as u64), "{report:?}");
    let footer = little(512, &[(0, b"conectix"), (60, &2u32.to_be_bytes())]);
    let report = judge(&[&padded[..], &footer].concat(), &options());
    assert!(report.verdict() == Verdict::Unsafe && report.findings[0].kind() == "polyglot", "{report:?}");
}

#[test]
fn a_disk_inside_that_begins_like_an_image() {
    let with = |content: &[u8]| {
        let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
        create(&storage, None, &CreateOptions::new(1 << 20)).unwrap();
        let source = qcow2_core::ResolvedSource::new(Arc::clone(&storage), ImageFormat::Qcow2, "x");
        let image = qcow2_core::Image::open(source, &qcow2_core::OpenOptions::writable()).unwrap();
        image.write_at(qcow2_core::GuestOffset::new(0), content).unwrap();
        image.flush().unwrap();
        image.close().unwrap();
        let mut bytes = vec![0; storage.len().unwrap() as usize];
        storage.read_at(HostOffset::new(0), &mut bytes).unwrap();
        bytes
    };
    check(&with(&mbr(&[GPT])), Verdict::Safe, &[]);
    check(&with(&qcow2(|_| {})), Verdict::Unsafe, &["nested"]);
    check(&with(&luks(1)[..4096]), Verdict::Unknown, &["nested"]);
}

/// Every guest cluster is found in the same compressed one.
#[test]
fn a_file_that_expands_without_measure() {
    let mut built = Builder::new(16, 4 << 30);
    built = built.cluster(0, Cluster::Compressed(vec![1; 1 << 16]));
    let mut built = built.build();
    let entry = built.l2_entry(0);
    let l1 = built.read_u64(40);
    let l2 = built.read_u64(l1) & 0x00ff_ffff_ffff_fe00;
    for index in 0..8192 {
        built.patch_u64(l2 + 8 * index, entry);
    }
    let copied = built.read_u64(l1);
    for index in 1..8 {
        built.patch_u64(l1 + 8 * index, copied);
    }
    let storage = built.storage();
    let mut bytes = vec![0; storage.len().unwrap() as usize];
    storage.read_at(HostOffset::new(0), &mut bytes).unwrap();
    let report = judge(&bytes, &options());
    let kinds: Vec<_> = report.findings.iter().map(|finding| finding.kind()).collect();
    assert!(kinds.contains(&"ratio"), "{report:?}");
}

#[test]
fn a_line_and_an_exit_code_for_every_verdict() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for (name, bytes) in [
        ("good", qcow2(|_| {})),
        ("odd", luks(1)),
        ("bad\n", qcow2(|h| h.backing_file = Some(b"/etc/passwd".to_vec()))),
    ] {
        std::fs::write(folder.join(name), bytes).unwrap();
    }
    let tool = Tool::at(OURS);
    let good = tool.run_in(folder, &["vet", "good"]).success();
    assert_eq!(good.stdout, "good: safe (qcow2)\n");
    let odd = tool.run_in(folder, &["vet", "good", "odd"]).expect_code(1);
    assert_eq!(odd.stdout.lines().count(), 2, "{odd}");
    let bad = tool.run_in(folder, &["vet", "odd", "bad\n", "good"]).expect_code(2);
    assert!(
        bad.stdout.lines().count() == 3 && bad.stdout.contains(": unsafe (qcow2): backing file"),
        "{bad}"
    );
    tool.run_in(folder, &["vet", "-f", "raw", "good"]).expect_code(2);
    tool.run_in(folder, &["vet", "none"]).expect_code(1);
    tool.run_in(folder, &["vet", "--policy", "virtual-size=64k", "good"]).expect_code(2);
    let json = tool.run_in(folder, &["vet", "--output=json", "good", "bad\n"]).expect_code(2).stdout;
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let (good, bad) = (&json[0], &json[1]);
    assert_eq!((&good["verdict"], &good["findings"]), (&"safe".into(), &serde_json::json!([])));
    let finding = &bad["findings"][0];
    assert_eq!((&finding["kind"], &finding["name-kind"]), (&"backing-file".into(), &"path".into()));
    assert_eq!(&finding["name"], "/etc/passwd");
    // qemu-img has no such verb.
    std::os::unix::fs::symlink(OURS, folder.join("qemu-img")).unwrap();
    Tool::at(folder.join("qemu-img")).run_in(folder, &["vet", "good"]).expect_code(1);
}

/// Files for both, and whether we see more in them.
fn inspected() -> Vec<(&'static str, Vec<u8>, bool)> {
    let mut both = iso();
    both[..512].copy_from_slice(&qcow2(|_| {})[..512]);
    let header = |change: &dyn Fn(&mut Header)| qcow2(|header| change(header));
    let version = |version| little(512, &[(0, b"QFI\xfb"), (7, &[version])]);
    let flat = SPARSE.replace("monolithicSparse", "monolithicFlat");
    let extent = |line: &str| vmdk(2048, &format!("{SPARSE}{line}\n"));
    vec![
        ("qcow2", qcow2(|_| {}), false),
        ("qcow2-backing", header(&|h| h.backing_file = Some(b"x".to_vec())), false),
        ("qcow2-data", header(&|h| set_data_file(h, "x")), false),
        ("qcow2-json", header(&|h| set_data_file(h, "json:{}")), false),
        (
            "qcow2-bits",
            header(&|h| h.features.incompatible = IncompatibleFeatures::from_bits(1 << 63)),
            false,
        ),
        ("qcow2-dirty", header(&|h| h.features.incompatible = IncompatibleFeatures::DIRTY), false),
        ("qcow2-v1", version(1), false),
        ("qcow2-v4", version(4), false),
        ("qcow2-snapshot", header(&|h| h.nb_snapshots = 1), true),
        ("iso", iso(), false),
        ("iso-qcow2", both, false),
        ("vmdk", vmdk(2048, SPARSE), false),
        ("vmdk-flat", flat.clone().into_bytes(), false),
        ("vmdk-flat-inside", vmdk(2048, &flat), false),
        ("vmdk-path", extent("RW 2048 SPARSE \"/etc/hosts\""), false),
        ("vmdk-line", extent("wronly 2048 SPARSE \"x\""), false),
        ("vmdk-others", vmdk(0, SPARSE), true),
        ("vhd", vhd(3, None), false),
        ("vhd-parent", vhd(4, Some("/etc/passwd")), true),
        ("vhdx", vhdx(None), false),
        ("vhdx-parent", vhdx(Some("/etc/passwd")), true),
        ("vdi", vdi(1, 0), false),
        ("vdi-parent", vdi(4, 1), true),
        ("qed", little(1024, &[(0, b"QED\x00")]), false),
        ("gpt", mbr(&[GPT]), false),
        ("gpt-boot", mbr(&[(0x0a, [0, 2, 0], 0xee, 1)]), false),
        ("gpt-two", mbr(&[GPT, GPT]), false),
        ("gpt-none", mbr(&[]), false),
        ("luks", luks(1), true),
        ("luks2", luks(2), false),
        ("raw", vec![7; 65536], false),
    ]
}

/// OpenStack's inspector calls nothing unsafe that we call safe, and we call nothing unsafe or unknown that
/// it calls safe, but for what it does not look at.
#[test]
fn format_inspector_agrees() {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    let own = tests.join("../target/readers/bin/python3");
    let Some(python) = (if own.is_file() { Some(Tool::at(own)) } else { Tool::find("python3") }) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let imported = python.run_in(folder.path(), &["-c", "import oslo_utils.imageutils.format_inspector"]);
    if imported.code != Some(0) {
        return skip("oslo.utils with its format_inspector not found");
    }
    let files = inspected();
    for (name, bytes, _) in &files {
        std::fs::write(folder.path().join(name), bytes).unwrap();
    }
    let script = tests.join("clients/vet.py");
    let names = files.iter().map(|(name, ..)| *name);
    let args: Vec<&str> = [script.to_str().unwrap()].into_iter().chain(names).collect();
    let told = python.run_in(folder.path(), &args).success().stdout;
    let theirs: BTreeMap<&str, bool> = told
        .lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(name, rest)| (name, rest.starts_with("safe")))
        .collect();
    assert_eq!(theirs.len(), files.len(), "{told}");
    for (name, bytes, more) in &files {
        let report = judge(bytes, &options());
        let (ours, theirs) = (report.verdict() == Verdict::Safe, theirs[name]);
        let agreed = if *more { !ours && theirs } else { ours == theirs };
        assert!(agreed, "{name}: safe for us: {ours}, for them: {theirs}\n{told}\n{:?}", report.findings);
    }
}
