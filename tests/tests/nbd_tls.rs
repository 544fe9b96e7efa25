//! Encrypted connections: to qemu-nbd as qemu-img makes them, and to nbdkit.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a test may stop")]

use qcow2_testkit::oracle::{Qemu, Tool};
use qcow2_tests::nbd_server::NbdServer;
use qcow2_tests::side_by_side::{Comparison, SideBySide, words};
use std::fs;
use std::path::Path;

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-under-test");

/// Folders of certificates as QEMU looks for them: the files of each, without `.pem`, and where from.
const FOLDERS: [(&str, &[(&str, &str)]); 10] = [
    ("srv", &[("ca-cert", "ca-cert"), ("server-cert", "server-cert"), ("server-key", "server-key")]),
    ("old", &[("ca-cert", "ca-cert"), ("server-cert", "old-server-cert"), ("server-key", "old-server-key")]),
    ("cli", &[("ca-cert", "ca-cert"), ("client-cert", "client-cert"), ("client-key", "client-key")]),
    ("anybody", &[("ca-cert", "ca-cert")]),
    ("nokey", &[("ca-cert", "ca-cert"), ("client-cert", "client-cert")]),
    ("other", &[("ca-cert", "other-ca-cert")]),
    ("mixed", &[("ca-cert", "ca-cert"), ("client-cert", "client-cert"), ("client-key", "server-key")]),
    ("badkey", &[("ca-cert", "ca-cert"), ("client-cert", "client-cert"), ("client-key", "make")]),
    ("badcert", &[("ca-cert", "ca-cert"), ("client-cert", "make"), ("client-key", "client-key")]),
    ("badca", &[("ca-cert", "make")]),
];

fn certificates(folder: &Path) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/qcow2-nbd/tests/tls");
    for (name, files) in FOLDERS {
        fs::create_dir(folder.join(name)).unwrap();
        for (to, from) in files {
            // The script that has made them stands for a file which is no certificate.
            let from = format!("{from}.{}", if *from == "make" { "sh" } else { "pem" });
            fs::copy(source.join(from), folder.join(name).join(format!("{to}.pem"))).unwrap();
        }
    }
}

fn make(qemu_img: &Tool, folder: &Path) {
    certificates(folder);
    qemu_img.run_in(folder, &words("create -q -f qcow2 s.qcow2 8M")).success();
    let io = Qemu::find().unwrap().io;
    io.run_in(folder, &words("-c 'write -q -P 5 1M 100k' -c 'write -q -P 6 7M 1M' s.qcow2")).success();
    qemu_img.run_in(folder, &words("create -q -f raw plain.raw 1M")).success();
}

fn check(both: &SideBySide, lines: &[String]) {
    let runs = lines.iter().map(|line| both.run(line));
    let wrong: Vec<Comparison> = runs.filter(|run| !run.differences.is_empty()).collect();
    let text: Vec<String> = wrong.iter().map(|run| format!("{}\n{}", run.line, run.differences)).collect();
    assert!(wrong.is_empty(), "{}", text.join("\n"));
}

/// The options of an encrypted export on the socket `name`.
fn export(root: &Path, name: &str, more: &str) -> String {
    let socket = root.join(name);
    format!("--image-opts driver=nbd,path={},export=one,tls-creds=t{more}", socket.display())
}

fn object(more: &str) -> String {
    format!("--object tls-creds-x509,id=t,{more}")
}

const HOST: &str = ",tls-hostname=localhost";

/// Serves `s.qcow2` with the certificates in `folder`.
fn serve(root: &Path, name: &str, folder: &str, verify: &str) -> Option<NbdServer> {
    let options = format!(
        "--object tls-creds-x509,id=t,dir={folder},endpoint=server,verify-peer={verify},sanity-check=off \
         --tls-creds t -r -x one -f qcow2 s.qcow2"
    );
    NbdServer::qemu_nbd(&root.join("start"), &root.join(name), &options)
}

#[test]
fn encrypted_exports_of_qemu_nbd() {
    let root = tempfile::tempdir().unwrap();
    let Some(both) = SideBySide::new(Path::new(OURS), root.path(), make) else { return };
    let Some(_any) = serve(root.path(), "any", "srv", "off") else { return };
    let _verify = serve(root.path(), "verify", "srv", "on");
    let _old = serve(root.path(), "old", "old", "off");
    let _plain = NbdServer::qemu_nbd(&both.start(), &root.path().join("plain"), "-r -f raw plain.raw");
    let at = |name: &str, more: &str| export(root.path(), name, more);
    let client = object("endpoint=client,dir=cli");
    let mut lines = vec![
        format!("info {client} {}", at("any", HOST)),
        format!("info --output=json {client} {}", at("any", HOST)),
        format!("map {client} {}", at("verify", HOST)),
        format!("map --output=json {client} {}", at("verify", HOST)),
        format!("convert {client} -O qcow2 {} x", at("verify", HOST)),
        format!("compare {client} {} driver=qcow2,file.filename=s.qcow2", at("verify", HOST)),
        format!("info {client},priority=NORMAL {}", at("any", HOST)),
        format!("info {client} {client} {}", at("any", HOST)),
        format!("info {client} {}", at("plain", HOST)),
        format!("info {client} {}", at("any", HOST).replace("export=one", "export=two")),
        format!("info {client} {}", at("any", HOST).replace("creds=t", "creds=u")),
        format!("info {}", at("any", HOST).replace(",tls-creds=t", "")),
        format!("info --object secret,id=t,data=x {}", at("any", HOST)),
        format!("info {client},verify-peer=off {}", at("any", "")),
        format!("info {client},verify-peer=off {}", at("any", ",tls-hostname=foo")),
        format!("info {} {}", object("dir=anybody"), at("old", HOST)),
        format!("info {},verify-peer=off {}", object("dir=anybody"), at("old", HOST)),
    ];
    lines.push(format!("info {client} {}", at("any", "")));
    for host in ["", "foo", "127.0.0.1", "127.0.0.2"] {
        lines.push(format!("info {client} {}", at("any", &format!(",tls-hostname={host}"))));
    }
    check(&both, &lines);
    // A server that wants a certificate: what the client hears depends on how fast it is cut off.
    let line = format!("info {} {}", object("dir=anybody"), at("verify", HOST));
    let run = both.ours().run_in(&both.start(), &words(&line)).expect_code(1);
    assert_eq!(run.stdout, "");
}

#[test]
fn credentials_that_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let Some(both) = SideBySide::new(Path::new(OURS), root.path(), make) else { return };
    let Some(_any) = serve(root.path(), "any", "srv", "off") else { return };
    let at = export(root.path(), "any", HOST);
    let mut lines: Vec<String> = FOLDERS
        .iter()
        .map(|(folder, _)| format!("dir={folder}"))
        .chain(
            [
                "endpoint=server,dir=srv",
                "endpoint=server,dir=cli",
                "endpoint=foo,dir=cli",
                "endpoint=client",
                "dir=cli",
                "dir=/nowhere",
                "dir=cli,verify-peer=maybe",
                "dir=cli,passwordid=none",
                "dir=anybody,passwordid=none",
                "dir=cli,foo=bar",
            ]
            .map(str::to_owned),
        )
        .map(|more| format!("info {} {at}", object(&more)))
        .collect();
    lines.extend(
        ["x509,dir=cli", "foo,id=t,dir=cli", "psk,id=t,dir=cli,foo=x", "psk,dir=cli"]
            .map(|creds| format!("info --object tls-creds-{creds} plain.raw")),
    );
    check(&both, &lines);
    for (creds, words_of_ours) in [
        ("psk,id=t,dir=cli", "tls-creds-psk is not supported"),
        ("anon,id=t,dir=cli", "tls-creds-anon is not supported"),
        ("x509,id=t,dir=cli,priority=SECURE256", "The TLS priority 'SECURE256' is not supported"),
    ] {
        let line = format!("info --object tls-creds-{creds} {at}");
        let run = both.ours().run_in(&both.start(), &words(&line)).expect_code(1);
        assert!(run.stderr.contains(words_of_ours), "{}", run.stderr);
    }
}

/// An encrypted export as a target, on TCP: the host is the name that the certificate must be for.
#[test]
fn encrypted_exports_are_targets() {
    let root = tempfile::tempdir().unwrap();
    let Some(both) = SideBySide::new(Path::new(OURS), root.path(), make) else { return };
    let (start, socket) = (both.start(), root.path().join("s"));
    fs::create_dir(start.join("kit")).unwrap();
    for (name, from) in [("ca-cert", "srv"), ("server-cert", "srv"), ("server-key", "srv")] {
        fs::copy(start.join(from).join(format!("{name}.pem")), start.join(format!("kit/{name}.pem")))
            .unwrap();
    }
    let options = "--tls=require --tls-certificates=kit --tls-verify-peer memory 8M";
    let Some(_server) = NbdServer::nbdkit(&start, &socket, options) else { return };
    let object = object("dir=cli");
    let export = format!("driver=raw,file.driver=nbd,file.path={}", socket.display());
    let secure = format!("{export},file.tls-creds=t,file.tls-hostname=localhost");
    for (line, code) in [
        (format!("convert -n {object} s.qcow2 --target-image-opts {secure}"), 0),
        (format!("compare {object} --image-opts driver=qcow2,file.filename=s.qcow2 {secure}"), 0),
        (format!("convert {object} -O raw --image-opts {secure} x.raw"), 0),
        ("compare -F raw s.qcow2 x.raw".to_owned(), 0),
        (format!("info --image-opts {export}"), 1),
    ] {
        both.ours().run_in(&start, &words(&line)).expect_code(code);
    }
    both.reference().run_in(&start, &words("compare -F raw s.qcow2 x.raw")).success();
}
