//! What other programs run: the command lines that libvirt, OpenStack, oVirt, KubeVirt, Proxmox VE and others
//! are known to give, as jobs in `cli/programs.txt`, with qemu-img and with our program in its place.

#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "helpers of a test")]

use qcow2_testkit::oracle::Tool;
use qcow2_tests::copies::copy_folder;
use qcow2_tests::side_by_side::{SideBySide, made_once, words};
use qcow2_tests::start::make_start;
use serde_json::Value;
use std::path::Path;

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-under-test");
const PROGRAMS: &str = include_str!("cli/programs.txt");

/// Both programs; each job starts from a copy of the folder that `cli.rs` uses.
fn both_programs(root: &Path) -> Option<SideBySide> {
    let made =
        made_once(Path::new(env!("CARGO_TARGET_TMPDIR")), include_str!("../src/start.rs"), make_start)?;
    Tool::find("qemu-nbd")?;
    SideBySide::new(Path::new(OURS), root, |_, start| copy_folder(&made.join("."), start))
}

/// One test per program, so that they run in parallel. The names are the first words of comments in the list.
macro_rules! tests_by_program {
    ($($test:ident $name:literal)*) => {
        const NAMES: &[&str] = &[$($name),*];

        mod same_from_both {
            $(#[test]
            fn $test() {
                super::check($name);
            })*
        }
    };
}

tests_by_program! {
    libvirt "libvirt" virt_install "virt-install" openstack "OpenStack" ovirt "oVirt" kubevirt "KubeVirt"
    proxmox "Proxmox" packer "Packer" lima "Lima" virt_v2v "virt-v2v" osbuild "osbuild" incus "Incus"
    scripts "Ansible"
}

/// The jobs below comments that begin with `name`; `QCOW2_LINES=resize` selects those with a line that starts
/// with that word.
fn jobs(name: &str) -> Vec<Vec<&'static str>> {
    let (mut jobs, mut wanted): (Vec<Vec<&str>>, bool) = Default::default();
    for line in PROGRAMS.lines().filter(|line| !line.is_empty()) {
        if let Some(comment) = line.strip_prefix("# ") {
            wanted = comment.starts_with(name);
            continue;
        }
        match line.strip_prefix("  ") {
            _ if !wanted => {}
            Some(next) => jobs.last_mut().unwrap().push(next),
            None => jobs.push(vec![line]),
        }
    }
    let begin = std::env::var("QCOW2_LINES").unwrap_or_default();
    assert!(!jobs.is_empty(), "a program without jobs");
    jobs.retain(|job| job.iter().any(|line| line.starts_with(&begin)));
    jobs
}

#[test]
fn every_job_belongs_to_a_test() {
    let tested: usize = NAMES.iter().map(|name| jobs(name).len()).sum();
    assert_eq!(tested, jobs("").len());
}

fn check(name: &str) {
    let root = tempfile::tempdir().unwrap();
    let Some(both) = both_programs(root.path()) else { return };
    let (jobs, mut wrong) = (jobs(name), Vec::new());
    for job in &jobs {
        let run = both.run_job(job);
        if !run.differences.is_empty() {
            wrong.push(format!("{}\n{}", run.line, run.differences));
        }
        let last = job.last().unwrap();
        if run.reference.code == Some(0) && (last.contains("--output json") || last.contains("--output=json"))
        {
            let parsed = serde_json::from_str::<Value>(&run.ours.stdout);
            assert!(parsed.is_ok_and(|value| value.is_object() || value.is_array()), "{}", run.line);
        }
    }
    assert!(wrong.is_empty(), "{} of {} jobs:\n\n{}", wrong.len(), jobs.len(), wrong.join("\n"));
}

/// Programs show the progress of a copy by looking for `(12.34/100%)` between carriage returns, and vdsm
/// fails if anything else is there.
#[test]
fn progress_is_what_programs_look_for() {
    let root = tempfile::tempdir().unwrap();
    let Some(both) = both_programs(root.path()) else { return };
    for line in [
        "convert -p -t none -T none -f qcow2 -O raw s.qcow2 x",
        "convert -t writeback -p -O raw o.qcow2 x",
        "compare -p -f qcow2 -F qcow2 s.qcow2 s.qcow2",
        "commit -p -t none -d -f qcow2 top.qcow2",
        "rebase -p -b s.qcow2 -F qcow2 top.qcow2",
    ] {
        for (tool, who) in [(both.reference(), "theirs"), (both.ours(), "ours")] {
            let folder = root.path().join("progress");
            copy_folder(&both.start().join("."), &folder);
            let text = tool.run_in(&folder, &words(line)).success().stdout;
            std::fs::remove_dir_all(&folder).unwrap();
            check_progress(&text, &format!("{who}: {line}"));
        }
    }
}

/// What counts is the data to be copied, in pieces of 2 MiB.
#[test]
fn progress_of_a_conversion_is_that_of_qemu_img() {
    let root = tempfile::tempdir().unwrap();
    let Some(both) = both_programs(root.path()) else { return };
    let io = |line: &str| Tool::at(OURS).run_in(&both.start(), &words(line)).success();
    io("create -q -f qcow2 runs.qcow2 64M");
    io(
        "io -c 'write -q 0 2M' -c 'write -q 10M 5M' -c 'write -q 41920k 100k' -c 'write -q -z 50M 3M' runs.qcow2",
    );
    for line in [
        "convert -p -O qcow2 runs.qcow2 x",
        "convert -p -O raw runs.qcow2 x",
        "convert -p -O qcow2 top.qcow2 x",
        "convert -p -O qcow2 x8 x",
    ] {
        let [theirs, own] = [both.reference(), both.ours()].map(|tool| {
            let folder = root.path().join("shown");
            copy_folder(&both.start().join("."), &folder);
            let text = tool.run_in(&folder, &words(line)).success().stdout;
            std::fs::remove_dir_all(&folder).unwrap();
            text
        });
        assert_eq!(own, theirs, "{line}");
    }
}

/// Several threads copy, and each reports what it has done.
#[test]
fn progress_never_goes_back() {
    let root = tempfile::tempdir().unwrap();
    let img = |line: &str| Tool::at(OURS).run_in(root.path(), &words(line)).success().stdout;
    img("create -q -f qcow2 disk.qcow2 4M");
    img("io -c 'write -q -P 3 0 4M' disk.qcow2");
    std::os::unix::fs::symlink(OURS, root.path().join("qemu-img")).unwrap();
    let ours = Tool::at(root.path().join("qemu-img"));
    for _ in 0..40 {
        let line = "convert -p -W -O raw disk.qcow2 x";
        check_progress(&ours.run_in(root.path(), &words(line)).success().stdout, line);
    }
}

/// `text` must be rising percentages up to 100, and the end of a line.
fn check_progress(text: &str, line: &str) {
    let (shown, rest) = text.rsplit_once('\r').unwrap();
    let mut last = 0.0;
    for piece in shown.split('\r') {
        let percent = piece.trim().strip_prefix('(').and_then(|text| text.strip_suffix("/100%)")).unwrap();
        let (whole, part) = percent.split_once('.').unwrap();
        assert!(part.len() == 2 && (1..=3).contains(&whole.len()), "{line}: {piece}");
        let percent: f64 = percent.parse().unwrap();
        assert!(percent >= last, "{line}: {text:?}");
        last = percent;
    }
    assert_eq!(last, 100.0, "{line}");
    assert!(rest.ends_with('\n'), "{line}: {text:?}");
}
