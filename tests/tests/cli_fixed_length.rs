//! Images on what has a length and a space of its own: block devices, servers' exports, file systems that are
//! full or cannot reserve. Each line is run with both programs on a target of their own.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "helpers of a test")]

use qcow2_testkit::oracle::{Qemu, Tool, skip};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-under-test");

/// What `$L` is: set up and taken away by the shell, with 64 MiB of old content from byte 1 MiB on.
#[derive(Clone, Copy)]
enum Target {
    Device,
    Export,
}

impl Target {
    fn around(self, line: &str) -> String {
        let content = "truncate -s 64M disk; printf old | dd of=disk bs=1M seek=1 conv=notrunc status=none";
        match self {
            Self::Device => format!(
                "{content}; L=$(losetup -f --show disk 2>/dev/null) || exit 77; trap 'losetup -d $L' EXIT; \
                 {line}"
            ),
            Self::Export => format!(
                "{content}; $SERVER -t -k $PWD/s -f raw -e 5 --fork --pid-file=pid disk; \
                 L=\"nbd+unix:///?socket=$PWD/s\"; trap 'kill $(cat pid)' EXIT; {line}"
            ),
        }
    }
}

/// What both programs say to `line`, the target's name as `TARGET`, each with the lines of `then` after it.
/// `None` where this user may make no loop devices.
fn said(qemu: &Qemu, target: Target, line: &str) -> Option<[String; 2]> {
    let root = tempfile::tempdir().unwrap();
    let mut said = Vec::new();
    for who in ["ours", "theirs"] {
        let bin = root.path().join(format!("{who}-bin"));
        let folder = root.path().join(who);
        fs::create_dir(&bin).unwrap();
        fs::create_dir(&folder).unwrap();
        for (name, reference) in [("qemu-img", qemu.img.path()), ("qemu-io", qemu.io.path())] {
            symlink(if who == "ours" { Path::new(OURS) } else { reference }, bin.join(name)).unwrap();
        }
        let server = Tool::find("qemu-nbd")?;
        let script = format!(
            "export PATH={}:$PATH SERVER={}; {}",
            bin.display(),
            server.path().display(),
            target.around(&format!(
                "{{ {line}\n}} 2>&1 | sed \"s#$L#TARGET#g; s#nbd+unix:[^ ]*/s#TARGET#; /^Image end/d\""
            ))
        );
        let outcome = Tool::find("bash")?.run_in(&folder, &["-c", &script]);
        if outcome.code == Some(77) {
            skip("loop devices are not allowed here");
            return None;
        }
        assert_eq!((outcome.code, &*outcome.stderr), (Some(0), ""), "{line}");
        said.push(outcome.stdout);
    }
    Some([said.remove(0), said.remove(0)])
}

#[track_caller]
fn check_same(qemu: &Qemu, target: Target, line: &str) -> bool {
    let Some([ours, theirs]) = said(qemu, target, line) else { return false };
    assert_eq!(ours, theirs, "{line}");
    true
}

#[test]
fn new_images_on_what_is_there() {
    let Some(qemu) = Qemu::find() else { return };
    for target in [Target::Device, Target::Export] {
        let modes = "for mode in off metadata falloc full";
        for line in [
            format!(
                "{modes}; do for format in raw qcow2; do for size in 32M 65M; do \
                 qemu-img create -q -f $format -o preallocation=$mode $L $size && \
                 {{ qemu-img info $L | head -3; qemu-img check $L; }}; \
                 echo $mode $format $size $?; done; done; done"
            ),
            format!(
                "{modes}; do qemu-img create -q --object secret,id=s,data=abc -f luks \
                 -o key-secret=s,iter-time=10,preallocation=$mode $L 32M && qemu-img info $L | head -3; \
                 echo $mode $?; done"
            ),
        ] {
            if !check_same(&qemu, target, &line) {
                return;
            }
        }
    }
}

/// The reference shows what was there before; a new disk has zeroes.
#[test]
fn a_preallocated_disk_shows_nothing_of_before() {
    let Some(qemu) = Qemu::find() else { return };
    for target in [Target::Device, Target::Export] {
        for compat in ["v2", "v3"] {
            let line = format!(
                "tr '\\0' A < /dev/zero | head -c 64M | dd of=disk conv=notrunc status=none; \
                 qemu-img create -q -f qcow2 -o compat={compat},preallocation=metadata \"$L\" 32M; \
                 qemu-io -c 'read -q -P 0 0 32M' \"$L\"; qemu-img check -q \"$L\"; echo $?"
            );
            let Some([ours, _]) = said(&qemu, target, &line) else { return };
            assert_eq!(ours, "0\n", "{line}");
        }
    }
}

/// A copy has the zeroes of its source, and an image that was there is gone.
#[test]
fn a_copy_shows_nothing_of_before() {
    let Some(qemu) = Qemu::find() else { return };
    for (target, formats) in [(Target::Device, "raw host_device"), (Target::Export, "raw nbd")] {
        let line = format!(
            "qemu-img create -q -f qcow2 c 64M; qemu-io -c 'write -q -P 5 1M 64k' c; for format in {formats}; do \
             for verb in \"convert -O $format c $L\" \"dd -O $format if=c of=$L\"; do \
             tr '\\0' A < /dev/zero | head -c 2M | dd of=disk conv=notrunc status=none; \
             qemu-img $verb; echo $? $(qemu-img compare -f qcow2 -F raw c \"$L\"); done; \
             tr '\\0' A < /dev/zero | head -c 2M | dd of=disk conv=notrunc status=none; \
             qemu-img create -q -f $format $L 1M; qemu-io -r -f raw -c 'read -P 0 0 512' \
             -c 'read -P 65 512 1M' \"$L\" | grep -v ops; done"
        );
        let Some([ours, theirs]) = said(&qemu, target, &line) else { return };
        assert_eq!(ours, theirs, "{line}");
        assert_eq!(ours.matches("0 Images are identical.").count(), 4, "{ours}");
        assert!(!ours.contains("failed"), "{ours}");
    }
}

#[test]
fn other_sizes_for_what_is_there() {
    let Some(qemu) = Qemu::find() else { return };
    for target in [Target::Device, Target::Export] {
        let modes = "for mode in off metadata falloc full";
        let line = format!(
            "{modes}; do qemu-img create -q -f qcow2 $L 32M; qemu-img resize --preallocation=$mode $L 48M; \
             echo $mode $?; qemu-img info $L | head -3; qemu-img check $L; for size in 48M 64M 70M; do \
             qemu-img resize --shrink -f raw --preallocation=$mode $L $size; echo $size $?; done; done"
        );
        if !check_same(&qemu, target, &line) {
            return;
        }
        for line in [
            "qemu-img create -q -f qcow2 $L 32M; qemu-img resize --shrink $L 16M; qemu-img resize $L 1G; \
             qemu-img check $L",
            "qemu-img create -q -f qcow2 $L 32M; qemu-img amend -o compat=v2 $L; qemu-img amend -o compat=v3 $L; \
             qemu-img amend -o refcount_bits=64 $L; echo $?; qemu-img check $L; \
             qemu-img info $L | grep refcount",
        ] {
            check_same(&qemu, target, line);
        }
    }
}

#[test]
fn the_exerciser_resizes_nothing_that_is_there() {
    let Some(qemu) = Qemu::find() else { return };
    for target in [Target::Device, Target::Export] {
        let line = "for mode in off falloc full metadata; do for size in 512 32M 64M 65M; do \
                    qemu-io -f raw -c \"truncate -m $mode $size\" -c length $L; echo $mode $size $?; done; done; \
                    truncate -s 1M w; for size in 512 1024 2048; do for mode in off falloc full metadata; do \
                    qemu-io -c \"truncate -m $mode $size\" -c length \
                    'json:{\"driver\":\"raw\",\"offset\":512,\"size\":1024,\"file.filename\":\"w\"}'; \
                    echo $mode $size $?; done; done";
        if !check_same(&qemu, target, line) {
            return;
        }
    }
}

#[test]
fn a_full_device_is_told_as_such() {
    let Some(qemu) = Qemu::find() else { return };
    for (target, text) in [(Target::Device, "No space left on device"), (Target::Export, "Invalid argument")]
    {
        for line in [
            "qemu-img create -q -f qcow2 $L 1G; qemu-io -c 'write -q 0 70M' $L; echo $?; \
             qemu-img check -q $L; echo $?",
            "qemu-img create -q -f qcow2 $L 1G; qemu-io -c 'write -q 0 10M' -c 'write -q 64M 60M' $L; echo $?",
        ] {
            if !check_same(&qemu, target, line) {
                return;
            }
        }
        // Which byte is the first without room depends on the layout.
        let line = "head -c 70M /dev/urandom > s.raw; \
                    qemu-img convert -O qcow2 s.raw $L 2>&1 | sed 's/ [0-9]\\+:/:/'";
        let Some([ours, theirs]) = said(&qemu, target, line) else { return };
        assert_eq!(ours, theirs);
        assert_eq!(ours, format!("qemu-img: error while writing at byte: {text}\n"));
    }
}

#[test]
fn a_data_file_that_is_a_device() {
    let Some(qemu) = Qemu::find() else { return };
    for options in ["data_file=$L", "data_file=$L,data_file_raw=on", "data_file=$L,preallocation=falloc"] {
        for size in if options.contains("falloc") { &["32M"][..] } else { &["32M", "80M"] } {
            let line = format!(
                "qemu-img create -q -f qcow2 -o {options} x.qcow2 {size}; echo $?; test {size} = 80M || \
                 {{ qemu-io -c 'write -q -P 7 9M 1M' -c 'read -q -P 7 9M 1M' x.qcow2; \
                 qemu-img check -q x.qcow2; \
                 qemu-img info x.qcow2 | grep data; qemu-img resize x.qcow2 48M; \
                 qemu-img resize x.qcow2 80M; echo $?; }}"
            );
            if !check_same(&qemu, Target::Device, &line) {
                return;
            }
        }
    }
}

/// ext2 has no way to reserve space: it has to be written.
#[test]
fn where_space_cannot_be_reserved() {
    let Some(qemu) = Qemu::find() else { return };
    if Tool::find("mkfs.ext2").is_none() {
        return;
    }
    for format in ["raw", "qcow2"] {
        for mode in ["falloc", "full"] {
            let line = format!(
                "truncate -s 100M fs; mkfs.ext2 -q fs; mkdir m; mount -o loop fs m || exit 77; cd m; \
                 qemu-img create -q -f {format} x 1M; \
                 qemu-img resize -f {format} --preallocation={mode} x 20M; echo $?; \
                 test $(du -k x | cut -f1) -gt 19000; echo $?; \
                 qemu-img resize -f {format} --preallocation={mode} x 200M; echo $?; qemu-img info x | head -3; \
                 cd ..; umount m"
            );
            if !check_same(&qemu, Target::Device, &line) {
                return;
            }
        }
    }
}
