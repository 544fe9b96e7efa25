//! File names, and names in images, that are not UTF-8: both programs say and do the same with them.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test may stop")]

use qcow2_testkit::oracle::Tool;
use qcow2_tests::side_by_side::words;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::process::Command;

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-under-test");

/// `@` is the name.
const LINES: &str = "
create -f qcow2 @ 1M
info @
info --output=json @
check --output=json @
map --output=json @
snapshot -c @ @
snapshot -l @
info --output=json @
convert -l snapshot.name=@ -O raw @ x
snapshot -a @ @
snapshot -d @ @
snapshot -d @ @
bitmap --add @ @
bitmap --add @ @
info @
bitmap --remove @ @
bitmap --remove @ @
convert -O qcow2 @ dir/@
create -f qcow2 -b @ -F qcow2 dir/o
info dir/o
info --output=json dir/o
map dir/o
info --backing-chain dir/o
commit dir/o
rebase -u -b no@ -F qcow2 dir/o
map dir/o
rebase -u -b @ -F @ dir/o
rebase -u -b @ -F qcow2 dir/o
rebase -b ../@ -F qcow2 dir/o
info dir/o
create -f qcow2 -o data_file=data@ main@ 1M
info --output=json main@
map main@
amend -o data_file=other@ main@
map main@
info no@
info @:x
info -f @ @
info --image-opts driver=qcow2,file.filename=@
info --image-opts driver=raw,offset=512,file.filename=@
info --image-opts driver=qcow2,file.filename=@,@=1
info json:{'\"driver\":\"qcow2\",\"file\":{\"filename\":\"@\"}'}
info blkdebug::@
dd if=@ of=copy@
compare @ copy@
resize @ 2M
measure -O qcow2 @
resize @ @
amend -o lazy_refcounts=@ @
";

/// What a program says to every line, but for sizes and times.
fn said(program: &Path, name: &[u8]) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("dir")).unwrap();
    let run = |line: &str| {
        let argument = |word: String| {
            let parts: Vec<&[u8]> = word.split('@').map(str::as_bytes).collect();
            OsString::from_vec(parts.join(name))
        };
        let args = words(line).into_iter().map(argument);
        let done = Command::new(program).args(args).current_dir(folder.path()).output().unwrap();
        let is_said = |line: &&[u8]| {
            let has = |text: &str| line.windows(text.len()).any(|part| part == text.as_bytes());
            !["size", "length", "date", "0000:00:00"].into_iter().any(has)
        };
        let text: Vec<u8> = [done.stdout, done.stderr].concat();
        let kept: Vec<&[u8]> = text.split(|byte| *byte == b'\n').filter(is_said).collect();
        format!("{line}: {:?} {}", done.status.code(), kept.join(&b'\n').escape_ascii())
    };
    LINES.lines().filter(|line| !line.is_empty()).map(run).collect()
}

#[test]
fn names_that_are_not_utf8() {
    let Some(theirs) = Tool::find("qemu-img") else { return };
    let folder = tempfile::tempdir().unwrap();
    let ours = folder.path().join("qemu-img");
    std::os::unix::fs::symlink(OURS, &ours).unwrap();
    // A letter of Latin-1; half of a character; what such bytes are inside of the program.
    for name in [&b"caf\xe9"[..], b"\xe2\xaax\xff", "m\u{10fee9}x".as_bytes()] {
        for (ours, theirs) in said(&ours, name).iter().zip(said(theirs.path(), name)) {
            // What a terminal may take for a control character is escaped by ours, on purpose.
            assert_eq!(ours.replace(r"\\x8f", r"\x8f"), theirs);
        }
    }
}
