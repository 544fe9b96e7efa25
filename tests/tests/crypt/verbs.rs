//! Every verb on encrypted images: the words of qemu-img, and the same disk afterwards.

use super::both::Both;
use super::{OURS, SECRETS, image};
use qcow2_testkit::oracle::Tool;
use std::fs;

const BASE: &str =
    "convert -f raw -O qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=1 d.raw e.qcow2";
const OVERLAY: &str = "create -q -f qcow2 -o encrypt.format=luks,encrypt.key-secret=w,encrypt.iter-time=1 -b e.qcow2 -F qcow2 -u top.qcow2 300032";
const OVER_PLAIN: &str = "create -q -f qcow2 -o encrypt.format=luks,encrypt.key-secret=w,encrypt.iter-time=1 -b p.qcow2 -F qcow2 over.qcow2";
const PLAIN: &str = "convert -f raw -O qcow2 d.raw p.qcow2";

const TOP: &str = "driver=qcow2,encrypt.key-secret=w,backing.encrypt.key-secret=s,file.filename=top.qcow2";

fn e() -> String {
    image("s", "e.qcow2")
}

#[test]
fn copies() {
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
    // qemu-img's bench takes no secrets: ours does, and reads the same.
    let words = [&["bench"], &SECRETS[..], &["-q", "-c", "8", "--image-opts", &e]].concat();
    Tool::at(OURS).run_in(&both.folder("ours"), &words).expect_code(0);
    // Writes of a session that is thrown away go to an overlay.
    let before = fs::read(both.folder("ours").join("e.qcow2")).unwrap();
    let io =
        ["-s", "--image-opts", &e, "-c", "write -P 5 0 64k", "-c", "read -P 5 0 64k", "-c", "read 64k 64k"];
    let words = [&["io"], &SECRETS[..], &io].concat();
    let said = Tool::at(OURS).run_in(&both.folder("ours"), &words).expect_code(0);
    assert!(!said.stdout.contains("failed"), "{said}");
    assert!(before == fs::read(both.folder("ours").join("e.qcow2")).unwrap());
}

#[test]
fn chains() {
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
