//! Encrypted images and LUKS containers: both directions with QEMU's tools and with cryptsetup, and refusals.
//!
//! QEMU takes seconds to make one image, so few combinations are tested by default; `QCOW2_CRYPT_MATRIX=1`
//! tests all.
#![allow(clippy::unwrap_used, reason = "helpers of a test")]

#[path = "crypt/amend.rs"]
mod amend;
#[path = "crypt/both.rs"]
mod both;
#[path = "crypt/measure.rs"]
mod measure;
#[path = "crypt/refusals.rs"]
mod refusals;
#[path = "crypt/verbs.rs"]
mod verbs;

use qcow2_testkit::oracle::{Outcome, Qemu, Tool};
use qcow2_testkit::pattern;
use std::fs;
use std::path::Path;
use tempfile::TempDir;

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-under-test");
const SECRETS: [&str; 4] = ["--object", "secret,id=s,data=xyzzy", "--object", "secret,id=w,data=plugh"];
/// The shortest key derivation, in milliseconds.
const FAST: &str = "iter-time=1";

/// A folder with a disk `d.raw` of data, holes and a partial last cluster.
fn world() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut disk = pattern::bytes(7, 0, 300_032);
    disk[70_000..200_000].fill(0);
    fs::write(folder.path().join("d.raw"), disk).unwrap();
    folder
}

fn ours(folder: &Path, line: &str) -> Outcome {
    run(&Tool::at(OURS), folder, line)
}

/// Runs `line`, with the secrets inserted after the verb.
fn run(tool: &Tool, folder: &Path, line: &str) -> Outcome {
    let (verb, rest) = line.split_once(' ').unwrap();
    let words: Vec<&str> = [verb].into_iter().chain(SECRETS).chain(rest.split(' ')).collect();
    tool.run_in(folder, &words)
}

/// Combinations of cipher, mode, IV generator and its hash, as options.
fn specs() -> Vec<(String, bool)> {
    let mut specs = Vec::new();
    for alg in ["aes", "serpent", "twofish"]
        .iter()
        .flat_map(|family| ["128", "192", "256"].map(|bits| format!("{family}-{bits}")))
    {
        for mode in ["xts", "cbc", "ctr", "ecb"] {
            for ivgen in ["plain", "plain64", "essiv"] {
                // QEMU aborts on key material that does not fill its last sector.
                let qemu_can = mode == "xts" || !alg.ends_with("192");
                specs.push((format!("cipher-alg={alg},cipher-mode={mode},ivgen-alg={ivgen}"), qemu_can));
            }
        }
    }
    for mode in ["cbc", "ctr", "ecb"] {
        for ivgen in ["plain", "plain64"] {
            specs.push((format!("cipher-alg=cast5-128,cipher-mode={mode},ivgen-alg={ivgen}"), true));
        }
    }
    for hash in ["md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160", "sm3"] {
        specs.push((format!("hash-alg={hash}"), true));
    }
    for hash in ["md5", "sm3"] {
        specs.push((format!("ivgen-alg=essiv,ivgen-hash-alg={hash}"), true));
    }
    specs
}

/// True if all combinations are tested.
fn all() -> bool {
    std::env::var_os("QCOW2_CRYPT_MATRIX").is_some()
}

/// Prefixes `options` as those of a qcow2 image.
fn in_qcow2(options: &str) -> String {
    let inner: Vec<_> = options.split(',').map(|option| format!("encrypt.{option}")).collect();
    format!("encrypt.format=luks,{}", inner.join(","))
}

fn image(secret: &str, file: &str) -> String {
    format!("driver=qcow2,encrypt.key-secret={secret},file.filename={file}")
}

fn container(secret: &str, file: &str) -> String {
    format!("driver=luks,key-secret={secret},file.filename={file}")
}

const RAW: &str = "driver=raw,file.filename=d.raw";

#[test]
fn qemu_opens_our_encrypted_images() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = world();
    let folder = folder.path();
    let one_in = if all() { 1 } else { 5 };
    for (spec, qemu_can) in specs().into_iter().step_by(one_in) {
        let options = format!("key-secret=s,{FAST},{spec}");
        ours(folder, &format!("convert -O qcow2 -o {} d.raw a.qcow2", in_qcow2(&options))).expect_code(0);
        ours(folder, &format!("convert -O luks -o {options} d.raw a.luks")).expect_code(0);
        for name in [image("s", "a.qcow2"), container("s", "a.luks")] {
            ours(folder, &format!("compare --image-opts {name} {RAW}")).expect_code(0);
            if qemu_can {
                run(&qemu.img, folder, &format!("compare --image-opts {name} {RAW}")).expect_code(0);
            }
        }
        if qemu_can {
            run(&qemu.img, folder, &format!("check --image-opts {}", image("s", "a.qcow2"))).expect_code(0);
        }
    }
}

#[test]
fn we_open_encrypted_images_of_qemu() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = world();
    let folder = folder.path();
    let few = ["cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv"];
    for (spec, _) in specs().iter().filter(|(spec, can)| *can && (all() || few.contains(&&**spec))) {
        let options = format!("key-secret=s,{FAST},{spec}");
        let line = format!("convert -O qcow2 -o {} d.raw a.qcow2", in_qcow2(&options));
        run(&qemu.img, folder, &line).expect_code(0);
        let line = format!("convert -O luks -o {options} d.raw a.luks");
        run(&qemu.img, folder, &line).expect_code(0);
        for name in [image("s", "a.qcow2"), container("s", "a.luks")] {
            ours(folder, &format!("compare --image-opts {name} {RAW}")).expect_code(0);
        }
        // QEMU reads what we write into it.
        let commands = ["-c", "write -P 90 1000 70001", "-c", "write -z 200k 7k"];
        let io = |tool: &Tool, verb: &[&str], commands: &[&str]| {
            let name = image("s", "a.qcow2");
            let words = [verb, &SECRETS[..], &["--image-opts", &name], commands].concat();
            tool.run_in(folder, &words).expect_code(0);
        };
        io(&Tool::at(OURS), &["io"], &commands);
        io(&qemu.io, &[], &["-c", "read -P 90 1000 70001", "-c", "read -P 0 200k 7k"]);
        run(&qemu.img, folder, &format!("check --image-opts {}", image("s", "a.qcow2"))).expect_code(0);
    }
}

#[test]
fn the_old_aes_method_works_both_ways() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = world();
    let folder = folder.path();
    let make = "convert -O qcow2 -o encrypt.format=aes,encrypt.key-secret=s d.raw";
    ours(folder, &format!("{make} ours.qcow2")).expect_code(0);
    run(&qemu.img, folder, &format!("{make} theirs.qcow2")).expect_code(0);
    for file in ["ours.qcow2", "theirs.qcow2"] {
        let line = format!("compare --image-opts {} {RAW}", image("s", file));
        ours(folder, &line).expect_code(0);
        run(&qemu.img, folder, &line).expect_code(0);
        // Any password opens such an image; a wrong one gives other content.
        let wrong = format!("compare --image-opts {} {RAW}", image("w", file));
        ours(folder, &wrong).expect_code(1);
    }
}

#[test]
fn each_layer_has_its_own_secret() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = world();
    let folder = folder.path();
    let make = |secret: &str| in_qcow2(&format!("key-secret={secret},{FAST}"));
    ours(folder, &format!("convert -O qcow2 -o {} d.raw base.qcow2", make("s"))).expect_code(0);
    let top = format!("create -q -f qcow2 -o {} -b base.qcow2 -F qcow2 -u top.qcow2 300032", make("w"));
    ours(folder, &top).expect_code(0);
    let name = format!("{},backing.encrypt.key-secret=s", image("w", "top.qcow2"));
    for tool in [Tool::at(OURS), qemu.img.clone()] {
        run(&tool, folder, &format!("compare --image-opts {name} {RAW}")).expect_code(0);
        let missing = format!("compare --image-opts {} {RAW}", image("w", "top.qcow2"));
        let outcome = run(&tool, folder, &missing).expect_code(2);
        assert!(outcome.stderr.contains("encrypt.key-secret' is required"), "{outcome}");
    }
}

/// One line, exit code 1, and an unchanged file.
#[track_caller]
fn check_refused(folder: &Path, name: &str, file: &str, text: &str) {
    let before = fs::read(folder.join(file)).unwrap();
    let words =
        ["io", SECRETS[0], SECRETS[1], SECRETS[2], SECRETS[3], "--image-opts", name, "-c", "write 0 4k"];
    for outcome in [
        ours(folder, &format!("convert --image-opts {name} -O raw out.raw")),
        Tool::at(OURS).run_in(folder, &words),
    ] {
        let outcome = outcome.expect_code(1);
        assert_eq!(outcome.stderr.lines().count(), 1, "{outcome}");
        assert!(outcome.stderr.contains(text), "{outcome}");
        assert!(
            !outcome.stderr.contains("xyzzy") && !outcome.stderr.contains("plugh"),
            "a secret is shown: {outcome}"
        );
    }
    assert!(!folder.join("out.raw").exists(), "{name}: something was written");
    assert!(before == fs::read(folder.join(file)).unwrap(), "{name}: the image has changed");
}

#[test]
fn unusable_keys_and_headers_are_refused() {
    let folder = world();
    let folder = folder.path();
    let options = format!("key-secret=s,{FAST}");
    ours(folder, &format!("convert -O qcow2 -o {} d.raw a.qcow2", in_qcow2(&options))).expect_code(0);
    ours(folder, &format!("convert -O luks -o {options} d.raw a.luks")).expect_code(0);
    check_refused(folder, &image("w", "a.qcow2"), "a.qcow2", "Invalid password, cannot unlock any keyslot");
    check_refused(folder, &container("w", "a.luks"), "a.luks", "Invalid password, cannot unlock any keyslot");
    check_refused(folder, &image("x", "a.qcow2"), "a.qcow2", "No secret with id 'x'");
    let without = "driver=qcow2,file.filename=a.qcow2";
    check_refused(folder, without, "a.qcow2", "Parameter 'encrypt.key-secret' is required for cipher");
    let without = "driver=luks,file.filename=a.luks";
    check_refused(folder, without, "a.luks", "Parameter 'key-secret' is required for cipher");
    let sound = fs::read(folder.join("a.luks")).unwrap();
    for (at, bytes, text) in [
        (0, &b"XXXX"[..], "not in LUKS format"),
        (7, &[2][..], "LUKS version 2 is not supported"),
        (8, b"rot13\0", "'rot13' with a key of 64 bytes"),
        (72, b"crc\0", "'crc' is not known"),
        (108, &[0, 0, 1, 0], "LUKS key has 256 bytes"),
        (208, &[1, 2, 3, 4], "LUKS header is damaged"),
        (212, &[0xff; 4], "rounds of key derivation, the limit is"),
        (248, &[0xff; 4], "LUKS key slot 0 lies at sectors"),
        (4096, &[0; 64], "Invalid password"),
    ] {
        let mut damaged = sound.clone();
        damaged[at..at + bytes.len()].copy_from_slice(bytes);
        fs::write(folder.join("d.luks"), damaged).unwrap();
        check_refused(folder, &container("s", "d.luks"), "d.luks", text);
    }
    // The limit on iterations can be raised or lowered.
    let low = format!("{},encrypt.max-iterations=10", image("s", "a.qcow2"));
    check_refused(folder, &low, "a.qcow2", "the limit is 10");
    let both = ours(folder, &format!("convert -c -O qcow2 -o {} d.raw c.qcow2", in_qcow2(&options)));
    let both = both.expect_code(1);
    assert_eq!(both.stderr, "qcow2: Compression and encryption not supported at the same time\n");
    assert!(!folder.join("c.qcow2").exists());
}

#[test]
fn grown_space_reads_as_zeroes() {
    let folder = world();
    let folder = folder.path();
    for options in ["preallocation=metadata", "preallocation=full", "data_file=x.raw", "extended_l2=on"] {
        let options = format!("{},{options}", in_qcow2(&format!("key-secret=s,{FAST}")));
        ours(folder, &format!("create -q -f qcow2 -o {options} a.qcow2 1M")).expect_code(0);
        let name = image("s", "a.qcow2");
        let io = |commands: &[&str]| {
            let words = [&["io"], &SECRETS[..], &["--image-opts", &name], commands].concat();
            let outcome = Tool::at(OURS).run_in(folder, &words).expect_code(0);
            assert!(!outcome.stdout.contains("verification failed"), "{options}: {outcome}");
        };
        io(&["-c", "read -P 0 0 1M", "-c", "write -P 1 700 90000"]);
        io(&["-c", "read -P 0 0 700", "-c", "read -P 1 700 90000", "-c", "read -P 0 90700 900k"]);
        io(&["-c", "discard 0 64k", "-c", "read -P 0 0 64k", "-c", "read -P 1 64k 25000"]);
    }
}

#[test]
fn cryptsetup_opens_our_containers() {
    let Some(cryptsetup) = Tool::find_any(&["cryptsetup", "/usr/sbin/cryptsetup"]) else { return };
    let folder = world();
    let folder = folder.path();
    fs::write(folder.join("word"), "xyzzy").unwrap();
    fs::write(folder.join("wrong"), "plugh").unwrap();
    for spec in
        ["", ",hash-alg=sha512", ",cipher-alg=aes-192,cipher-mode=cbc,ivgen-alg=essiv", ",cipher-alg=aes-128"]
    {
        ours(folder, &format!("convert -O luks -o key-secret=s,{FAST}{spec} d.raw a.luks")).expect_code(0);
        let dump = cryptsetup.run_in(folder, &["luksDump", "a.luks"]).expect_code(0);
        assert!(dump.stdout.contains("Key Slot 0: ENABLED"), "{dump}");
        let open = |key: &str| {
            let words = ["open", "--type", "luks1", "--test-passphrase", "--key-file", key, "a.luks"];
            cryptsetup.run_in(folder, &words)
        };
        open("word").expect_code(0);
        open("wrong").expect_code(2);
    }
}
