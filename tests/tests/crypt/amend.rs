//! Changing key slots of images and containers with `amend`.

use super::both::Both;
use super::{container, image, ours};
use qcow2_testkit::oracle::Tool;
use std::fs;

const QCOW2: &str =
    "create -q -f qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=1 a.qcow2 1M";
const LUKS: &str = "create -q -f luks -o key-secret=s,iter-time=1 a.luks 1M";

/// Runs `amend` with the image's options and each line; `@` stands for the prefix of key slot options.
fn lines(both: &Both, name: &str, prefix: &str, lines: &[&str]) {
    for line in lines {
        both.line(&format!("amend --image-opts {name} {}", line.replace('@', prefix)));
    }
}

fn slots(both: &Both, file: &str) -> String {
    both.told(file, "active:").iter().map(|on| &on[..1]).collect()
}

/// Refusals while only slot 0 holds a key.
fn refusals(both: &Both, first: &str, prefix: &str) {
    lines(
        both,
        first,
        prefix,
        &[
            "-o @new-secret=w",
            "-o @keyslot=1",
            "-o @cipher-alg=aes-128",
            "-o @state=foo",
            "-o @state=active",
            "-o @state=active,@new-secret=nn",
            "-o @state=active,@new-secret=w,@old-secret=s",
            "-o @state=active,@new-secret=w,@keyslot=8",
            "-o @state=active,@new-secret=w,@keyslot=-1",
            "-o @state=active,@new-secret=w,@keyslot=x",
            "-o @state=active,@new-secret=w,@keyslot=0",
            "-o @state=inactive",
            "-o @state=inactive,@new-secret=w,@keyslot=0",
            "-o @state=inactive,@iter-time=10,@keyslot=0",
            "-o @state=inactive,@keyslot=9",
            "-o @state=inactive,@keyslot=3",
            "-o @state=inactive,@keyslot=0",
            "-o @state=inactive,@keyslot=8589934592",
            "-o @state=inactive,@old-secret=s",
            "-o @state=inactive,@old-secret=nn",
            "-o @state=inactive,@old-secret=w",
            "--force -o @state=inactive,@old-secret=w",
            "-o @state=inactive,@old-secret=w,@keyslot=0",
            "-o @state=inactive,@old-secret=s,@keyslot=0",
        ],
    );
}

fn check(start: &str, file: &str, prefix: &str, name: impl Fn(&str, &str) -> String) {
    let Some(both) = Both::new(&[start]) else { return };
    let (first, second) = (name("s", file), name("w", file));
    refusals(&both, &first, prefix);
    assert_eq!(slots(&both, file), "tfffffff");
    lines(
        &both,
        &first,
        prefix,
        &[
            "-o @state=active,@new-secret=w,@iter-time=1",
            "-o @state=active,@new-secret=w,@iter-time=1,@keyslot=6",
            "-o @state=active,@new-secret=w,@iter-time=1,@keyslot=6",
            "-o @state=inactive,@old-secret=s,@keyslot=6",
            "-o @state=inactive,@old-secret=s,@keyslot=4",
        ],
    );
    assert_eq!(slots(&both, file), "ttfffftf");
    lines(
        &both,
        &first,
        prefix,
        &["-o @state=inactive,@old-secret=w,@keyslot=6", "-o @state=inactive,@keyslot=0"],
    );
    assert_eq!(slots(&both, file), "ftffffff");
    // The old password no longer opens it in either program.
    lines(&both, &first, prefix, &["-o @state=inactive,@keyslot=1"]);
    lines(
        &both,
        &second,
        prefix,
        &["--force -o @state=active,@new-secret=s,@iter-time=1,@keyslot=1", "-o @state=inactive,@keyslot=1"],
    );
    assert_eq!(slots(&both, file), "ftffffff");
    // Filling all slots takes qemu-img half a minute.
    if !super::all() {
        return;
    }
    for _ in 0..7 {
        lines(&both, &first, prefix, &["-o @state=active,@new-secret=s,@iter-time=1"]);
    }
    assert_eq!(slots(&both, file), "tttttttt");
    lines(
        &both,
        &first,
        prefix,
        &[
            "-o @state=active,@new-secret=w",
            "-o @state=inactive,@old-secret=s",
            "--force -o @state=active,@new-secret=w,@iter-time=1,@keyslot=7",
            "-o @state=inactive,@old-secret=s",
        ],
    );
    assert_eq!(slots(&both, file), "ffffffft");
    lines(&both, &second, prefix, &["--force -o @state=inactive,@old-secret=w"]);
    assert_eq!(slots(&both, file), "ffffffff");
}

#[test]
fn key_slots_of_an_image() {
    check(QCOW2, "a.qcow2", "encrypt.", image);
}

#[test]
fn key_slots_of_a_container() {
    check(LUKS, "a.luks", "", container);
}

#[test]
fn key_slots_together_with_other_options() {
    let start = [
        QCOW2,
        LUKS,
        "create -q -f qcow2 p.qcow2 1M",
        "create -q -f qcow2 -o encryption=on,encrypt.key-secret=s x.qcow2 1M",
    ];
    let Some(both) = Both::new(&start) else { return };
    lines(
        &both,
        &image("s", "a.qcow2"),
        "encrypt.",
        &[
            "-o @state=active,@new-secret=w,@iter-time=1,lazy_refcounts=on,size=2M",
            "-o @state=active,@new-secret=w,@iter-time=1,compat=0.10",
            "-o @state=active,compat=x",
            "-o @state=active,refcount_bits=3",
            "-o @state=inactive,@old-secret=w,compat=1.1",
            "-o size=1M",
        ],
    );
    both.same("driver=qcow2,encrypt.key-secret=s", "a.qcow2");
    for key in ["compat:", "lazy refcounts:", "refcount bits:", "virtual size:", "active:"] {
        both.told("a.qcow2", key);
    }
    both.line("amend -o encrypt.state=active,encrypt.new-secret=w a.qcow2");
    both.line("amend -f luks -o state=active,new-secret=w a.luks");
    both.line("amend -o state=active,new-secret=w a.luks");
    both.line("amend -f qcow2 -o encrypt.state=active p.qcow2");
    both.line("amend -f raw -o encrypt.state=active p.qcow2");
    lines(&both, &image("s", "x.qcow2"), "encrypt.", &["-o @state=active,@new-secret=w"]);
    lines(&both, &container("s", "a.luks"), "", &["-o size=2M", "-o encrypt.state=active"]);
}

/// Passwords that we added and replaced, checked with cryptsetup: on the first sectors of a container, and on
/// the volume inside an image.
#[test]
fn cryptsetup_opens_our_key_slots() {
    let Some(cryptsetup) = Tool::find_any(&["cryptsetup", "/usr/sbin/cryptsetup"]) else { return };
    let root = tempfile::tempdir().unwrap();
    let folder = root.path();
    for (id, password) in [("s", "xyzzy"), ("w", "plugh")] {
        fs::write(folder.join(id), password).unwrap();
    }
    ours(folder, LUKS).expect_code(0);
    ours(folder, QCOW2).expect_code(0);
    for (file, name, prefix) in
        [("a.luks", container("s", "a.luks"), ""), ("a.qcow2", image("s", "a.qcow2"), "encrypt.")]
    {
        // Whether these passwords open a slot, by cryptsetup.
        let opens = |slot: usize| {
            let luks = match prefix {
                "" => file.to_owned(),
                // The LUKS header is at the offset in the header extension; cryptsetup opens it without a
                // payload.
                _ => {
                    let bytes = fs::read(folder.join(file)).unwrap();
                    let start =
                        bytes.chunks(512).position(|sector| sector.starts_with(b"LUKS\xba\xbe")).unwrap();
                    let mut volume = bytes[start * 512..].to_vec();
                    volume.resize(8 << 20, 0);
                    fs::write(folder.join("inside.luks"), volume).unwrap();
                    "inside.luks".to_owned()
                }
            };
            let slot = slot.to_string();
            ["s", "w"].map(|id| {
                let words = [
                    "open",
                    "--test-passphrase",
                    "--type",
                    "luks1",
                    "--key-slot",
                    &slot,
                    "--key-file",
                    id,
                    &luks,
                ];
                cryptsetup.run_in(folder, &words).code == Some(0)
            })
        };
        let amend = |line: &str| {
            let line = line.replace('@', prefix);
            ours(folder, &format!("amend --image-opts {name} {line}")).expect_code(0);
        };
        assert_eq!(opens(0), [true, false], "{file}");
        amend("-o @state=active,@new-secret=w,@iter-time=1");
        amend("-o @state=active,@new-secret=w,@iter-time=1,@keyslot=6");
        assert_eq!([0, 1, 6].map(opens), [[true, false], [false, true], [false, true]], "{file}");
        amend("--force -o @state=active,@new-secret=s,@iter-time=1,@keyslot=6");
        amend("-o @state=inactive,@keyslot=1");
        assert_eq!([0, 1, 6].map(opens), [[true, false], [false, false], [true, false]], "{file}");
    }
    let dump = cryptsetup.run_in(folder, &["luksDump", "a.luks"]).expect_code(0).stdout;
    let slots: Vec<_> = dump.lines().filter_map(|line| line.strip_prefix("Key Slot ")).collect();
    assert_eq!(
        slots.iter().filter(|slot| slot.ends_with(": ENABLED")).collect::<Vec<_>>(),
        [&"0: ENABLED", &"6: ENABLED"]
    );
}
