//! Names in images that loop back to the image, or nest too deep: refused with one line, with a small stack
//! and little memory.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "helpers of a test")]

use qcow2_testkit::oracle::{Outcome, Tool};
use std::fs;
use std::path::Path;

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-under-test");

/// Kilobytes: 64 MiB of data, and 1 MiB of stack, the smallest main-thread stack of any supported system.
const LIMITS: &str = "ulimit -d 65536; ulimit -s 1024";

fn run(folder: &Path, line: &str) -> Outcome {
    let script = format!("{LIMITS}; exec {OURS} {line}");
    Tool::find("bash").expect("bash").run_in(folder, &["-c", &script])
}

fn file(name: &str) -> String {
    format!(r#""file":{{"driver":"file","filename":"{name}"}}"#)
}

/// A name that reads the guest disk of the image `name` as raw bytes.
fn nested(name: &str) -> String {
    format!(r#"json:{{"driver":"raw","file":{{"driver":"qcow2",{}}}}}"#, file(name))
}

/// A name of the image `name` itself.
fn direct(name: &str) -> String {
    format!(r#"json:{{"driver":"qcow2",{}}}"#, file(name))
}

/// Creates the image `name` with this backing file.
fn make(folder: &Path, name: &str, backing: &str, format: &str) {
    run(folder, &format!("create -q -f qcow2 {name} 1M")).success();
    run(folder, &format!("rebase -q -u -F {format} -b '{backing}' {name}")).success();
}

/// Verbs that follow the chain of `@`, and their exit code if it cannot be opened.
const READING: &[(&str, i32)] = &[
    ("map @", 1),
    ("map --output=json @", 1),
    ("convert -O raw @ new", 1),
    ("convert -U -O qcow2 @ new", 1),
    ("convert @ - | cat; exit ${PIPESTATUS[0]}", 1),
    ("compare @ clean", 2),
    ("compare clean @", 2),
    ("checksum @", 1),
    ("measure -O qcow2 @", 1),
    ("dd if=@ of=new", 1),
    ("bench -c 1 @", 1),
    ("snapshot -l @", 1),
    ("io -r -c 'read 0 512' @", 1),
    ("io -s -c 'read 0 512' @", 1),
    ("rebase -b @ -F qcow2 clean", 1),
    ("create -q -f qcow2 -b @ -F qcow2 new", 1),
    ("convert -O qcow2 -B @ -F qcow2 clean new", 1),
    ("snapshot --external new @", 1),
];

/// Verbs that change it: a lock conflict may be reported before the loop.
const CHANGING: &[&str] = &[
    "bench -w -c 1 @",
    "commit @",
    "commit -b nosuch @",
    "rebase -b clean -F qcow2 @",
    "snapshot -c s @",
    "resize @ 2M",
    "amend -o lazy_refcounts=on @",
    "convert -n -O qcow2 clean @",
    "io -c 'write 0 512' @",
];

#[test]
fn loops_are_found_with_every_kind_of_name() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    run(folder, "create -q -f qcow2 clean 1M").success();
    make(folder, "self", &nested("self"), "raw");
    make(folder, "self-direct", &direct("self-direct"), "qcow2");
    make(folder, "in-itself", &nested("in-itself").replacen("raw", "qcow2", 1), "qcow2");
    make(folder, "window", &nested("window").replacen("raw\"", "raw\",\"size\":512", 1), "raw");
    let filtered = r#"json:{"driver":"raw","file":{"driver":"blkdebug","image":{"driver":"qcow2",FILE}}}"#;
    make(folder, "filtered", &filtered.replace("FILE", &file("filtered")), "raw");
    make(folder, "two", &nested("two-b"), "raw");
    make(folder, "two-b", &nested("two"), "raw");
    make(folder, "mixed", "mixed-b", "qcow2");
    make(folder, "mixed-b", &nested("mixed-c"), "raw");
    make(folder, "mixed-c", &direct("mixed"), "qcow2");
    make(folder, "plain", "plain-b", "qcow2");
    make(folder, "plain-b", "plain", "qcow2");
    // The loop is below the top, and inside another image.
    make(folder, "below", "plain", "qcow2");
    make(folder, "inside", &nested("plain"), "raw");
    make(folder, "deep-inside", &nested("self"), "raw");
    for name in [
        "self",
        "self-direct",
        "in-itself",
        "window",
        "filtered",
        "two",
        "two-b",
        "mixed",
        "mixed-b",
        "mixed-c",
        "plain",
        "below",
        "inside",
        "deep-inside",
    ] {
        for (line, code) in READING {
            let outcome = run(folder, &line.replace('@', name)).expect_code(*code);
            let sentence = outcome.stderr.lines().next().unwrap_or_default();
            assert!(sentence.ends_with("creates an infinite loop"), "{outcome}");
            assert!(outcome.stderr.lines().count() <= 2, "{outcome}");
            let _ = fs::remove_file(folder.join("new"));
        }
        for line in CHANGING {
            let before = fs::read(folder.join(name)).unwrap();
            let outcome = run(folder, &line.replace('@', name)).expect_code(1);
            assert!((1..=2).contains(&outcome.stderr.lines().count()), "{outcome}");
            assert!(before == fs::read(folder.join(name)).unwrap(), "{line}: {name} has changed");
        }
        // Verbs that look at one image only still work.
        run(folder, &format!("info {name}")).success();
        run(folder, &format!("check {name}")).success();
        let before = fs::read(folder.join(name)).unwrap();
        run(folder, &format!("check -r all {name}")).success();
        assert!(before == fs::read(folder.join(name)).unwrap(), "{name} has changed");
    }
}

/// A data file has no backing file, so it cannot loop even if its name is that of the image.
#[test]
fn a_data_file_named_like_the_image_is_no_loop() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    run(folder, "create -q -f qcow2 -o data_file=data ext 1M").success();
    make(folder, "top", &nested("ext"), "raw");
    run(folder, "io -c 'write -P 5 0 64k' ext").success();
    run(folder, "io -r -c 'read -P 5 0 64k' top").success();
    // The name becomes that of the image when the image is renamed.
    run(folder, "create -q -f qcow2 -o data_file=./same same.qcow2 1M").success();
    fs::rename(folder.join("same.qcow2"), folder.join("same")).unwrap();
    run(folder, "map same").success();
    run(folder, "checksum same").success();
    let before = fs::read(folder.join("same")).unwrap();
    for line in ["io -c 'write 0 512' same", "resize same 2M", "bench -w -c 1 same", "check -r all same"] {
        run(folder, line).expect_code(1);
        assert!(before == fs::read(folder.join("same")).unwrap(), "{line}");
    }
    // A data file given by the user may be an image whose names loop.
    make(folder, "self", &nested("self"), "raw");
    let named = "driver=qcow2,file.filename=ext,data-file.driver=raw,data-file.file.driver=qcow2,\
                 data-file.file.file.filename=self";
    let outcome = run(folder, &format!("map --image-opts {named}")).expect_code(1);
    assert!(outcome.stderr.trim_end().ends_with("creates an infinite loop"), "{outcome}");
}

/// Images nested in one another are opened recursively, up to a limit. Images that only follow each other in
/// a chain do not count.
#[test]
fn nested_images_are_limited_to_32() {
    const DEEPEST: usize = 31;
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    run(folder, "create -q -f qcow2 clean 1M").success();
    run(folder, "create -q -f qcow2 in0 1M").success();
    run(folder, "io -c 'write -P 9 0 1M' in0").success();
    for number in 1..=DEEPEST + 1 {
        make(folder, &format!("in{number}"), &nested(&format!("in{}", number - 1)), "raw");
    }
    make(folder, "after0", &direct("in0"), "qcow2");
    for number in 1..=DEEPEST + 1 {
        make(folder, &format!("after{number}"), &direct(&format!("after{}", number - 1)), "qcow2");
    }
    for name in [format!("in{DEEPEST}"), format!("after{}", DEEPEST + 1)] {
        for line in
            ["io -r -c 'read -P 9 0 1M' @", "compare -q @ in0", "convert -O raw @ new", "map @", "check -q @"]
        {
            let outcome = run(folder, &line.replace('@', &name)).success();
            assert!(!outcome.stdout.contains("Pattern verification failed"), "{outcome}");
        }
    }
    fs::remove_file(folder.join("new")).unwrap();
    let name = format!("in{}", DEEPEST + 1);
    for (line, code) in READING {
        let outcome = run(folder, &line.replace('@', &name)).expect_code(*code);
        let sentence = outcome.stderr.lines().next().unwrap_or_default();
        assert!(sentence.ends_with("More than 32 images and filters stand inside one another"), "{outcome}");
        let _ = fs::remove_file(folder.join("new"));
    }
}

/// Machine-made names of extreme depth.
#[test]
fn nested_names_are_limited() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    fs::write(folder.join("y"), vec![1; 4096]).unwrap();
    run(folder, "create -q -f qcow2 image 1M").success();
    let json = |depth: usize| {
        let (open, close) = (r#"{"driver":"raw","file":"#.repeat(depth), "}".repeat(depth));
        format!(r#"'json:{open}{{"driver":"file","filename":"y"}}{close}'"#)
    };
    let dots = |depth: usize| {
        let drivers: String = (1..depth).map(|n| format!("{}driver=raw,", "file.".repeat(n))).collect();
        format!("--image-opts driver=raw,{drivers}{}filename=y", "file.".repeat(depth))
    };
    let filters = |depth: usize| format!("{}y", "blkdebug::".repeat(depth));
    let layers = |depth: usize| {
        format!("--image-opts file.filename=image,{}file.filename=y", "backing.".repeat(depth))
    };
    let chain = |depth: usize| {
        let layer = |n: usize| {
            fs::copy(folder.join("image"), folder.join(format!("image-{n}"))).unwrap();
            format!("{}file.filename=image-{n},", "backing.".repeat(n))
        };
        let above: String = (0..depth).map(layer).collect();
        format!("--image-opts {above}{}file.filename=y", "backing.".repeat(depth))
    };
    let forms: [&dyn Fn(usize) -> String; 4] = [&json, &dots, &filters, &chain];
    for form in forms {
        run(folder, &format!("map {}", form(30))).success();
    }
    let bare = format!("'json:{}1{}'", r#"{"file":"#.repeat(10_000), "}".repeat(10_000));
    let names = [bare, json(1000), json(40), dots(200), filters(10_000), layers(10_000)];
    for name in names {
        for line in ["map", "info", "convert -O raw", "check"] {
            let target = if line.starts_with("convert") { "new" } else { "" };
            let outcome = run(folder, &format!("{line} {name} {target}")).expect_code(1);
            let sentence = outcome.stderr.trim_end();
            let short = sentence.rsplit("': ").next().unwrap_or_default();
            assert!(
                short == "More than 32 images and filters stand inside one another"
                    || short == "More than 256 images and filters stand below one another"
                    || short.ends_with("JSON nesting depth limit exceeded"),
                "{short}"
            );
            assert_eq!(sentence.lines().count(), 1);
        }
    }
}
