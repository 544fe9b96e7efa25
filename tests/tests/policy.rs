//! Which names inside images are opened, what opening may cost, and who is told why not.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "helpers of a test")]

use qcow2_testkit::oracle::{Outcome, Tool, skip};
use qcow2_tests::side_by_side::words;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-under-test");

fn run(folder: &Path, line: &str) -> Outcome {
    Tool::at(OURS).run_in(folder, &words(line))
}

/// Runs the program under another name with this policy in its environment.
fn run_as(name: &str, policy: &str, folder: &Path, line: &str) -> (Option<i32>, String) {
    let link = folder.join(name);
    if !link.exists() {
        std::os::unix::fs::symlink(OURS, &link).unwrap();
    }
    let mut command = Command::new(link);
    let output = command.current_dir(folder).args(words(line)).env("QCOW2_POLICY", policy).output().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// `top` on `middle` on `base`, all neighbours; `far` on `sub/base`; `json` on a description; `ext` with the
/// data file `data`; `plain`.
fn world() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path();
    fs::create_dir(folder.join("sub")).unwrap();
    for line in [
        "create -q base.raw 1M",
        "create -q sub/base.raw 1M",
        "create -q -f qcow2 -b base.raw -F raw middle",
        "create -q -f qcow2 -b middle -F qcow2 top",
        "create -q -f qcow2 -b sub/base.raw -F raw far",
        r#"create -q -f qcow2 -u -b 'json:{"driver":"raw","file":{"filename":"base.raw"}}' -F raw json 1M"#,
        "create -q -f qcow2 -o data_file=data ext 1M",
        "create -q -f qcow2 plain 1M",
    ] {
        run(folder, line).success();
    }
    root
}

/// Verbs that open the chain of `@`.
const VERBS: &[&str] = &[
    "map @",
    "convert -O raw @ new",
    "compare @ plain",
    "checksum @",
    "measure -O qcow2 @",
    "dd if=@ of=new",
    "bench -c 1 @",
    "snapshot -l @",
    "snapshot -c x @",
    "io -r -c 'read 0 512' @",
    "rebase -b @ -F qcow2 plain",
    "create -q -f qcow2 -b @ -F qcow2 new",
    "commit @",
    "resize @ 2M",
    "amend -o lazy_refcounts=on @",
];

#[test]
fn names_are_opened_as_far_as_the_policy_follows_them() {
    let root = world();
    let folder = root.path();
    for verb in VERBS {
        for (image, follow, name) in [
            ("top", "none", "middle"),
            ("far", "same-directory", "sub/base.raw"),
            ("json", "same-directory", "json:"),
        ] {
            let before = fs::read(folder.join(image)).unwrap();
            let line = format!("{} --follow {follow}", verb.replace('@', image));
            let refused = run(folder, &line);
            assert!(refused.code != Some(0), "{refused}");
            let said = &refused.stderr;
            let all =
                said.contains(image) && said.contains(name) && said.contains(&format!("follow={follow}"));
            assert!(all && said.lines().count() <= 2, "{refused}");
            assert!(before == fs::read(folder.join(image)).unwrap(), "{line}");
        }
    }
    for (image, follow) in
        [("top", "same-directory"), ("top", "all"), ("far", "all"), ("json", "all"), ("far", "")]
    {
        let follow = if follow.is_empty() { String::new() } else { format!("--follow={follow}") };
        run(folder, &format!("map {follow} {image}")).success();
    }
    // A name that the user gives leads somewhere under any policy.
    let own = "driver=qcow2,file.filename=far,backing.driver=raw,backing.file.filename=sub/base.raw";
    run(folder, &format!("map --follow none --image-opts {own}")).success();
    run(folder, "info --follow none far").success();
    run(folder, "map --follow some top").expect_code(1);
    // Looking at a whole chain is following it.
    std::os::unix::fs::symlink("sub/base.raw", folder.join("link")).unwrap();
    run(folder, "create -q -f qcow2 -u -b link -F raw linked 1M").success();
    for (options, image, part) in [
        ("--follow none", "top", "follow=none"),
        ("--follow same-directory", "far", "follow=same-directory"),
        ("--follow same-directory", "json", "follow=same-directory"),
        ("--follow same-directory", "linked", "follow=same-directory"),
        ("--policy depth=1", "top", "depth=1"),
    ] {
        let refused = run(folder, &format!("info --backing-chain {options} {image}")).expect_code(1);
        assert!(refused.stdout.is_empty() && refused.stderr.contains(part), "{refused}");
        run(folder, &format!("map {options} {image}")).expect_code(1);
    }
    let whole = run(folder, "info --backing-chain --follow same-directory top").success().stdout;
    assert_eq!(whole.matches("image: ").count(), 3, "{whole}");
}

#[test]
fn every_limit_refuses_what_is_over_it() {
    let root = world();
    let folder = root.path();
    run(folder, "create -q -f qcow2 -o cluster_size=4k big 1T").success();
    for (list, image, part) in [
        ("depth=1", "top", "depth=1"),
        ("depth=0", "middle", "depth=0"),
        ("virtual-size=64k", "plain", "virtual-size=65536"),
        ("virtual-size=64k", "base.raw", "virtual-size=65536"),
        ("memory=64k", "big", "memory=65536"),
        ("refuse=data-file", "ext", "refuse=data-file"),
        ("refuse=snapshots+backing-file", "middle", "refuse=backing-file"),
        ("untrusted", "top", "follow=none"),
        ("untrusted,follow=all", "ext", "refuse=data-file"),
    ] {
        let refused = run(folder, &format!("map --policy {list} {image}")).expect_code(1);
        assert!(refused.stderr.contains(part) && refused.stderr.contains(image), "{refused}");
    }
    for (list, image) in [
        ("depth=2", "top"),
        ("virtual-size=1M,memory=1M", "top"),
        ("untrusted", "plain"),
        ("untrusted,follow=same-directory", "top"),
        ("memory=64M", "big"),
    ] {
        run(folder, &format!("map --policy {list} {image}")).success();
    }
    run(folder, "map --untrusted plain").success();
    run(folder, "map --untrusted top").expect_code(1);
    run(folder, "map --untrusted --follow same-directory top").success();
    // Whoever looks at the image alone needs no size.
    run(folder, "info --untrusted top").success();
}

#[test]
fn the_variable_is_for_every_name_and_the_options_for_our_own() {
    let root = world();
    let folder = root.path();
    let cases = [
        ("qcow2", "map"),
        ("qemu-img", "map"),
        ("qemu-img", "info --backing-chain"),
        ("qemu-io", "-r -c 'read 0 1'"),
    ];
    for (name, line) in cases {
        let (code, said) = run_as(name, "follow=all", folder, &format!("{line} top"));
        assert_eq!(code, Some(0), "{name}: {said}");
        // No policy is no reason to do without, and nothing is opened to find that out.
        for policy in ["follow=some", "depth", "Untrusted", "memory=x"] {
            let (code, said) = run_as(name, policy, folder, &format!("{line} nothing"));
            assert!(code == Some(1) && said.contains("QCOW2_POLICY") && !said.contains("nothing"), "{said}");
            assert!(said.starts_with(&format!("{name}: ")), "{said}");
        }
    }
    for (name, line) in [("qcow2", "map"), ("qemu-img", "map"), ("qemu-io", "-r -c 'read 0 1'")] {
        let (code, said) = run_as(name, "untrusted", folder, &format!("{line} top"));
        assert!(code == Some(1) && said.contains("'top' names 'middle'"), "{name}: {said}");
    }
    // The option has the last word.
    assert_eq!(run_as("qcow2", "untrusted", folder, "map --follow all top").0, Some(0));
    for option in ["--follow=none", "--untrusted", "--policy=depth=1"] {
        let (code, said) = run_as("qemu-img", "", folder, &format!("map {option} top"));
        assert!(code == Some(1) && said.contains("unrecognized option"), "{said}");
    }
    let help = run(folder, "map --help").success().stdout;
    assert!(["--follow", "--untrusted", "--policy"].iter().all(|name| help.contains(name)), "{help}");
}

#[test]
fn a_check_opens_no_other_file() {
    let root = world();
    let folder = root.path();
    for gone in ["middle", "data"] {
        fs::remove_file(folder.join(gone)).unwrap();
    }
    for image in ["top", "ext"] {
        run(folder, &format!("check {image}")).success();
        // qemu-img opens the chain, and so does our program in its place.
        let (code, said) = run_as("qemu-img", "", folder, &format!("check {image}"));
        assert!(code == Some(1) && said.contains("No such file"), "{said}");
        let (code, said) = run_as("qemu-img", "follow=none", folder, &format!("check {image}"));
        assert_eq!(code, Some(0), "{said}");
    }
    run(folder, "check -r all top").success();
}

#[test]
fn references_are_listed_by_kind_under_our_own_name() {
    let root = world();
    let folder = root.path();
    for (name, backing) in [("net", "nbd://host/x"), ("device", "/dev/null")] {
        run(folder, &format!("create -q -f qcow2 -u -b {backing} -F raw {name} 1M")).success();
    }
    for (image, role, kind) in [
        ("top", "backing-file", "path"),
        ("json", "backing-file", "json"),
        ("net", "backing-file", "protocol"),
        ("device", "backing-file", "device"),
        ("ext", "data-file", "path"),
    ] {
        let json = run(folder, &format!("info --output=json {image}")).success().stdout;
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        let found = &json["references"][0];
        assert_eq!((&found["role"], &found["kind"]), (&role.into(), &kind.into()), "{json}");
    }
    let json = run(folder, "info --output=json plain").success().stdout;
    assert!(json.contains("\"references\": [\n"), "{json}");
    run_as("qemu-img", "", folder, "info plain");
    let theirs =
        Tool::at(folder.join("qemu-img")).run_in(folder, &["info", "--output=json", "top"]).success();
    assert!(!theirs.stdout.contains("references"), "{theirs}");
}

/// What a verb only reads is not opened for writing, which a device or a watcher might take for a change.
#[test]
fn reading_opens_nothing_for_writing() {
    let Some(strace) = Tool::find("strace") else { return };
    let root = world();
    let folder = root.path();
    if strace.run_in(folder, &["-o", "/dev/null", "true"]).code != Some(0) {
        return skip("tracing is not allowed here");
    }
    let verbs = ["info @", "map @", "check @", "checksum @", "compare @ @", "convert -O raw @ new", "vet @"];
    let others =
        ["measure -O qcow2 @", "dd if=@ of=new", "bench -c 1 @", "snapshot -l @", "io -r -c 'read 0 1' @"];
    for verb in verbs.iter().chain(&others) {
        for image in ["top", "ext"] {
            let mut args: Vec<String> = words("-f -e trace=open,openat -o trace");
            args.push(OURS.to_owned());
            args.extend(words(&verb.replace('@', image)));
            strace.run_in(folder, &args);
            let trace = fs::read_to_string(folder.join("trace")).unwrap();
            assert!(trace.contains(&format!("\"{image}\"")), "{verb}: {trace}");
            let written = trace.lines().find(|line| {
                let named = ["top", "middle", "base.raw", "ext", "data"];
                named.iter().any(|name| line.contains(&format!("{name}\""))) && line.contains("O_RDWR")
            });
            assert_eq!(written, None, "{verb} {image}");
        }
    }
    // Changing an image changes nothing below it.
    for verb in ["snapshot -c s @", "resize @ 2M", "io -c 'write 0 1' @", "amend -o lazy_refcounts=on @"] {
        let mut args: Vec<String> = words("-f -e trace=open,openat -o trace");
        args.push(OURS.to_owned());
        args.extend(words(&verb.replace('@', "top")));
        strace.run_in(folder, &args);
        let trace = fs::read_to_string(folder.join("trace")).unwrap();
        let below = |line: &&str| line.contains("middle\"") || line.contains("base.raw\"");
        assert!(trace.lines().filter(below).all(|line| !line.contains("O_RDWR")), "{verb}: {trace}");
    }
}

#[test]
fn a_server_that_is_silent_or_endless_meets_a_timeout() {
    let folder = tempfile::tempdir().unwrap();
    // Says nothing; or greets, and then answers the first option a little at a time.
    let servers: [fn(&mut std::net::TcpStream); 2] = [
        |socket| {
            let _ = socket.read(&mut [0; 1]);
        },
        |socket| {
            let _ = socket.write_all(b"NBDMAGICIHAVEOPT\x00\x03");
            let _ = socket.read(&mut [0; 64]);
            while socket.write_all(&[0]).is_ok() {
                thread::sleep(Duration::from_millis(300));
            }
        },
    ];
    for server in servers {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let serving = thread::spawn(move || {
            let (mut socket, _) = listener.accept().unwrap();
            server(&mut socket);
        });
        let started = Instant::now();
        let (code, said) = run_as("qemu-img", "timeout=1", folder.path(), &format!("info nbd://{address}/x"));
        assert!(code == Some(1) && started.elapsed() < Duration::from_secs(20), "{said}");
        serving.join().unwrap();
        assert!(said.contains("did not answer within 1 seconds"), "{said}");
    }
}
