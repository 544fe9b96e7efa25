//! Every verb on encrypted images: qemu-img's output, and the same guest content afterwards.

use super::both::Both;
use super::{OURS, SECRETS, container, image};
use qcow2_testkit::oracle::Tool;
use std::fs;

const BASE: &str =
    "convert -f raw -O qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=1 d.raw e.qcow2";
const OVERLAY: &str = "create -q -f qcow2 -o encrypt.format=luks,encrypt.key-secret=w,encrypt.iter-time=1 -b e.qcow2 -F qcow2 -u top.qcow2 300032";
const OVER_PLAIN: &str = "create -q -f qcow2 -o encrypt.format=luks,encrypt.key-secret=w,encrypt.iter-time=1 -b p.qcow2 -F qcow2 over.qcow2";
const PLAIN: &str = "convert -f raw -O qcow2 d.raw p.qcow2";
const LUKS: &str = "convert -f raw -O luks -o key-secret=s,iter-time=1 d.raw e.luks";

const TOP: &str = "driver=qcow2,encrypt.key-secret=w,backing.encrypt.key-secret=s,file.filename=top.qcow2";

fn e() -> String {
    image("s", "e.qcow2")
}

#[test]
fn encrypted_images_resize_snapshot_and_keep_bitmaps_as_in_qemu_img() {
    let Some(both) = Both::new(&[BASE, LUKS]) else { return };
    let (e, luks) = (e(), container("s", "e.luks"));
    for file in ["e.qcow2", "e.luks"] {
        for verb in ["check", "map", "snapshot -l", "snapshot -c a", "convert -O raw", "dd"] {
            both.line(&match verb {
                "dd" => format!("dd if={file} of=o.raw"),
                "convert -O raw" => format!("{verb} {file} o.raw"),
                _ => format!("{verb} {file}"),
            });
        }
        both.line(&format!("resize {file} 2M"));
        both.line(&format!("compare {file} {file}"));
        both.line(&format!("bitmap --add {file} b"));
        both.line(&format!("rebase -u -b '' {file}"));
        both.line(&format!("commit {file}"));
        both.line(&format!("measure {file}"));
    }
    for line in ["check", "check -r all", "map", "map --output json"] {
        both.line(&format!("{line} --image-opts {e}"));
    }
    both.done(&format!("snapshot -c a --image-opts {e}"));
    both.io_as(&e, "write -P 9 60k 70000");
    both.done(&format!("convert -l a --image-opts {e} -O raw snap.raw"));
    assert_eq!(
        fs::read(both.folder("ours").join("snap.raw")).unwrap(),
        fs::read(both.folder("ours").join("d.raw")).unwrap()
    );
    both.line(&format!("resize --image-opts {e} 128k"));
    both.line(&format!("resize --shrink --image-opts {e} 128k"));
    both.done(&format!("resize --image-opts {e} 2M"));
    both.done(&format!("bitmap --add --image-opts {e} b"));
    both.line(&format!("bitmap --add --image-opts {e} b"));
    both.same("driver=qcow2,encrypt.key-secret=s", "e.qcow2");
    both.done(&format!("bitmap --remove --image-opts {e} b"));
    both.done(&format!("snapshot -a a --image-opts {e}"));
    both.same("driver=qcow2,encrypt.key-secret=s", "e.qcow2");
    both.done(&format!("snapshot -d a --image-opts {e}"));
    both.done(&format!("resize --shrink --image-opts {e} 128k"));
    both.done(&format!("resize --image-opts {e} 1M"));
    both.same("driver=qcow2,encrypt.key-secret=s", "e.qcow2");
    both.done(&format!("check -q --image-opts {e}"));
    for size in ["2M", "100k"] {
        both.done(&format!("resize --shrink --image-opts {luks} {size}"));
        let len = |who| fs::metadata(both.folder(who).join("e.luks")).unwrap().len();
        assert_eq!(len("theirs"), len("ours"));
    }
    both.same("driver=luks,key-secret=s", "e.luks");
}

#[test]
fn encrypted_images_are_copied_as_by_qemu_img() {
    let Some(both) = Both::new(&[BASE, PLAIN]) else { return };
    let e = e();
    for options in ["", "-O qcow2 ", "bs=64k count=2 skip=1 "] {
        both.done(&format!("dd --image-opts {options}if={e} of=o"));
        both.done("compare o o");
    }
    both.line(&format!("compare --image-opts {e} driver=qcow2,file.filename=p.qcow2"));
    both.line(&format!("compare --image-opts {e} {e}"));
    both.line(&format!("compare --image-opts {} {e}", image("w", "e.qcow2")));
    both.done(&format!("convert --image-opts {e} -O raw o.raw"));
    for who in ["ours", "theirs"] {
        let read = |name| fs::read(both.folder(who).join(name)).unwrap();
        assert!(read("o.raw") == read("d.raw"), "{who}");
    }
    // qemu-img's bench takes no secrets; ours does, and its reads must succeed.
    let words = [&["bench"], &SECRETS[..], &["-q", "-c", "8", "--image-opts", &e]].concat();
    Tool::at(OURS).run_in(&both.folder("ours"), &words).expect_code(0);
    // Writes of a snapshot-mode session (`-s`) go to a temporary overlay.
    let before = fs::read(both.folder("ours").join("e.qcow2")).unwrap();
    let io =
        ["-s", "--image-opts", &e, "-c", "write -P 5 0 64k", "-c", "read -P 5 0 64k", "-c", "read 64k 64k"];
    let words = [&["io"], &SECRETS[..], &io].concat();
    let said = Tool::at(OURS).run_in(&both.folder("ours"), &words).expect_code(0);
    assert!(!said.stdout.contains("failed"), "{said}");
    assert!(before == fs::read(both.folder("ours").join("e.qcow2")).unwrap());
}

#[test]
fn encrypted_chains_work_as_in_qemu_img() {
    let Some(both) = Both::new(&[BASE, OVERLAY, PLAIN, OVER_PLAIN]) else { return };
    let write = "write -P 9 60k 70000";
    both.io_as(TOP, write);
    both.io_as(&image("w", "over.qcow2"), write);
    both.line("commit top.qcow2");
    both.line(&format!("commit --image-opts {}", image("w", "top.qcow2")));
    both.line(&format!("rebase -b '' --image-opts {}", image("w", "top.qcow2")));
    both.line("rebase -b '' top.qcow2");
    both.line(&format!("map --output json --image-opts {TOP}"));
    both.line(&format!("check --image-opts {TOP}"));
    both.done(&format!("commit -d --image-opts {TOP}"));
    both.same("driver=qcow2,encrypt.key-secret=s", "e.qcow2");
    both.done(&format!("rebase -b '' --image-opts {TOP}"));
    both.same("driver=qcow2,encrypt.key-secret=w", "top.qcow2");
    both.done(&format!("check -q --image-opts {}", image("w", "top.qcow2")));
    both.done(&format!("commit --image-opts {}", image("w", "over.qcow2")));
    both.same("driver=qcow2", "p.qcow2");
    both.same("driver=qcow2,encrypt.key-secret=w", "over.qcow2");
    both.line("check p.qcow2");
}
