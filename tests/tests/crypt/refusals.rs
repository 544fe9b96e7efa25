//! Every way to pass a password, and the error of each verb without the right one: one line, and nothing
//! changes.

use super::{FAST, OURS, SECRETS, container, image, in_qcow2, ours, world};
use qcow2_testkit::oracle::{Outcome, Tool};
use qcow2_tests::side_by_side::words;
use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};

/// Every verb that opens an image (`@` is its name); the last ones support qcow2 only.
const VERBS: [&str; 18] = [
    "convert --image-opts @ -O raw out",
    "io --image-opts @ -c 'write 0 4k'",
    "io -s --image-opts @ -c 'write 0 4k'",
    "dd --image-opts if=@ of=out",
    "compare --image-opts @ driver=raw,file.filename=d.raw",
    "resize --image-opts @ 2M",
    "map --image-opts @",
    "bench -c 1 --image-opts @",
    "checksum --image-opts @",
    "measure --image-opts @",
    "check --image-opts @",
    "check -r all --image-opts @",
    "snapshot -c x --image-opts @",
    "snapshot -l --image-opts @",
    "rebase -u -b '' --image-opts @",
    "commit --image-opts @",
    "bitmap --add --image-opts @ b",
    "amend --image-opts @ -o size=2M,encrypt.state=inactive,encrypt.keyslot=0",
];
/// How many of them support containers.
const OF_CONTAINERS: usize = 10;

#[track_caller]
fn check(folder: &Path, file: &str, verbs: &[&str], name: &str) {
    let before = fs::read(folder.join(file)).unwrap();
    for verb in verbs {
        let mut words = words(&verb.replace('@', name));
        let rest = words.split_off(1);
        words.extend(SECRETS.iter().map(|&word| word.to_owned()).chain(rest));
        let outcome = Tool::at(OURS).run_in(folder, &words);
        let outcome = outcome.expect_code(if verb.starts_with("compare") { 2 } else { 1 });
        assert_eq!(outcome.stderr.lines().count(), 1, "{outcome}");
        assert_eq!(outcome.stdout, "", "{outcome}");
        shows_no_secret(&outcome);
        assert!(before == fs::read(folder.join(file)).unwrap(), "{verb}: the image has changed");
        assert!(!folder.join("out").exists(), "{verb}: something was made");
    }
}

#[track_caller]
fn shows_no_secret(outcome: &Outcome) {
    for secret in ["xyzzy", "plugh", "eHl6enk"] {
        let shown = outcome.stdout.contains(secret) || outcome.stderr.contains(secret);
        assert!(!shown, "a secret is shown: {outcome}");
    }
}

#[test]
fn every_verb_refuses_a_missing_or_wrong_password_in_one_line() {
    let folder = world();
    let folder = folder.path();
    let options = format!("key-secret=s,{FAST}");
    ours(folder, &format!("convert -O qcow2 -o {} d.raw a.qcow2", in_qcow2(&options))).expect_code(0);
    ours(folder, &format!("convert -O luks -o {options} d.raw a.luks")).expect_code(0);
    let containers = &VERBS[..OF_CONTAINERS];
    check(folder, "a.qcow2", &VERBS, &image("w", "a.qcow2"));
    check(folder, "a.qcow2", &VERBS, &image("nobody", "a.qcow2"));
    check(folder, "a.qcow2", &VERBS, "driver=qcow2,file.filename=a.qcow2");
    check(folder, "a.luks", containers, &container("w", "a.luks"));
    check(folder, "a.luks", containers, "driver=luks,file.filename=a.luks");
    let amend = "amend --image-opts @ -o state=inactive,keyslot=0";
    check(folder, "a.luks", &[amend], &container("w", "a.luks"));
    for (file, at) in [("a.qcow2", luks_at(&folder.join("a.qcow2"))), ("a.luks", 0)] {
        // Damages the magic, a cipher name, a slot's state, a slot's offset, and its key material.
        for damage in [0, 8, 208, 248, 4096] {
            let mut bytes = fs::read(folder.join(file)).unwrap();
            bytes[at + damage..][..64].fill(0xff);
            let damaged = format!("damaged-{file}");
            fs::write(folder.join(&damaged), bytes).unwrap();
            match file {
                "a.luks" => check(folder, &damaged, containers, &container("s", &damaged)),
                _ => check(folder, &damaged, &VERBS, &image("s", &damaged)),
            }
        }
    }
}

/// Offset of the LUKS header in a qcow2 image.
fn luks_at(path: &Path) -> usize {
    let bytes = fs::read(path).unwrap();
    (0..bytes.len()).step_by(512).find(|&at| bytes[at..].starts_with(b"LUKS\xba\xbe")).unwrap()
}

#[test]
fn passwords_are_read_from_descriptors_and_pipes() {
    let folder = world();
    let folder = folder.path();
    let options = in_qcow2(&format!("key-secret=s,{FAST}"));
    ours(folder, &format!("convert -O qcow2 -o {options} d.raw a.qcow2")).expect_code(0);
    fs::write(folder.join("word"), "xyzzy").unwrap();
    fs::write(folder.join("word64"), "eHl6enk=").unwrap();
    let compare = |secret: &str, redirect: &str| {
        let name = image("k", "a.qcow2");
        let raw = "driver=raw,file.filename=d.raw";
        let line =
            format!("{OURS} compare --object secret,id=k,{secret} --image-opts {name} {raw} {redirect}");
        let outcome = Tool::find("sh").unwrap().run_in(folder, &["-c", &line]);
        shows_no_secret(&outcome);
        outcome
    };
    compare("file=word", "").expect_code(0);
    compare("file=/dev/fd/3", "3<word").expect_code(0);
    compare("file=/dev/stdin", "<word").expect_code(0);
    compare("file=/dev/fd/3,format=base64", "3<word64").expect_code(0);
    compare("file=/dev/fd/3", "3<word64").expect_code(2);
    compare("file=/dev/fd/9", "").expect_code(2);
    fs::write(folder.join("line"), "xyzzy\n").unwrap();
    compare("file=line", "").expect_code(2);
    // Progress output must not show a secret either.
    let line = format!("convert --json --object secret,id=t,file=word -O qcow2 -o {options} d.raw b.qcow2");
    let told = ours(folder, &line).expect_code(0);
    shows_no_secret(&told);
}

/// Runs `line` on a terminal and types `answer` at the prompt. Returns all output of the terminal.
fn on_a_terminal(folder: &Path, line: &str, answer: &str) -> Option<(bool, String)> {
    let script = Tool::find("script")?;
    let mut child = Command::new(script.path())
        .args(["--quiet", "--return", "--echo", "always", "--command", line, "/dev/null"])
        .current_dir(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut stdin, mut stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let (mut shown, mut byte) = (Vec::new(), [0]);
    while !shown.ends_with(b"': ") && stdout.read(&mut byte).unwrap() == 1 {
        shown.push(byte[0]);
    }
    writeln!(stdin, "{answer}").unwrap();
    drop(stdin);
    stdout.read_to_end(&mut shown).unwrap();
    Some((child.wait().unwrap().success(), String::from_utf8(shown).unwrap()))
}

#[test]
fn passwords_are_read_from_a_terminal() {
    let folder = world();
    let folder = folder.path();
    let options = in_qcow2(&format!("key-secret=s,{FAST}"));
    ours(folder, &format!("convert -O qcow2 -o {options} d.raw a.qcow2")).expect_code(0);
    let line = format!(
        "{OURS} compare --image-opts driver=qcow2,file.filename=a.qcow2 driver=raw,file.filename=d.raw"
    );
    let Some((done, shown)) = on_a_terminal(folder, &line, "xyzzy") else { return };
    assert!(done && shown.contains("identical"), "{shown}");
    assert!(shown.contains("Password for 'a.qcow2'") && !shown.contains("xyzzy"), "{shown}");
    let (done, shown) = on_a_terminal(folder, &line, "plugh").unwrap();
    assert!(!done && shown.contains("Invalid password, cannot unlock any keyslot"), "{shown}");
    assert!(!shown.contains("plugh"), "{shown}");
    // The password is asked for once, although the image is opened and its key is used again later.
    fs::write(folder.join("word"), "new").unwrap();
    let line = format!(
        "{OURS} amend --object secret,id=n,file=word --image-opts -o encrypt.state=active,encrypt.new-secret=n,encrypt.iter-time=1,compat=1.1 driver=qcow2,file.filename=a.qcow2"
    );
    let (done, shown) = on_a_terminal(folder, &line, "xyzzy").unwrap();
    assert!(done && shown.matches("Password for").count() == 1, "{shown}");
}
