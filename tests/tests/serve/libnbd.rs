//! More clients written by others: libnbd's calls one by one, nbdkit in front of our server, and fio.

use super::{OURS, Server, folder, ours, wait_for};
use qcow2_testkit::oracle::{self, Qemu, Tool};
use std::fs;
use std::process::{Command, Stdio};

/// Every call that the server answers. Arguments: the URI, and what of the protocol is asked for.
const CALLS: &str = r#"
import errno, nbd, sys

h = nbd.NBD()
uri, wanted = sys.argv[1:]
if wanted == "simple":
    h.set_request_structured_replies(False)
if hasattr(h, "set_request_extended_headers"):
    h.set_request_extended_headers(wanted == "extended")
h.add_meta_context("base:allocation")
h.add_meta_context("qemu:allocation-depth")
# The bounds are to be checked by the server.
h.set_strict_mode(0)
h.connect_uri(uri)
size = 64 << 20
assert h.get_size() == size
for can in [h.can_fua, h.can_flush, h.can_trim, h.can_zero, h.can_fast_zero, h.can_cache, h.can_multi_conn]:
    assert can(), can
assert not h.is_read_only() and not h.is_rotational()

h.pwrite(b"a" * 700, 512)
h.pwrite(b"b" * 512, 1 << 20, nbd.CMD_FLAG_FUA)
h.pwrite(bytes(range(256)) * (5 << 12), 2 << 20)
assert h.pread(1400, 0) == bytes(512) + b"a" * 700 + bytes(188)
assert h.pread(5 << 20, 2 << 20) == bytes(range(256)) * (5 << 12)
h.zero(300, 600)
h.zero(64 << 10, 2 << 20, nbd.CMD_FLAG_NO_HOLE)
h.zero(1 << 20, 3 << 20, nbd.CMD_FLAG_FAST_ZERO)
h.trim(1 << 20, 5 << 20, nbd.CMD_FLAG_FUA)
h.cache(1 << 20, 0)
assert h.pread(700, 512) == b"a" * 88 + bytes(300) + b"a" * 312
assert h.pread(64 << 10, 2 << 20) == bytes(64 << 10)
assert h.pread(1 << 20, 3 << 20) == bytes(1 << 20)

if wanted != "simple":
    chunks = []
    keep = lambda data, at, status, error: chunks.append((at, len(data), status))
    h.pread_structured(1 << 20, 2 << 20, keep)
    assert sum(len for at, len, status in chunks if status == nbd.READ_DATA) == (1 << 20) - (64 << 10), chunks
    one = []
    h.pread_structured(1 << 20, 2 << 20, lambda data, at, status, error: one.append(at), nbd.CMD_FLAG_DF)
    assert one == [2 << 20]
    told = {}
    def tell(context, at, entries, error):
        told.setdefault(context, []).append((at, list(entries)))
    h.block_status(size, 0, tell)
    assert sorted(told) == ["base:allocation", "qemu:allocation-depth"]
    [(at, entries)] = told["base:allocation"]
    assert at == 0 and sum(entries[::2]) == size, entries
    # A cluster with data, a hole up to the next one.
    assert entries[:4] == [64 << 10, 0, 960 << 10, 3], entries
    one = []
    keep = lambda context, at, entries, error: one.append(list(entries))
    h.block_status(1 << 20, 64 << 10, keep, nbd.CMD_FLAG_REQ_ONE)
    assert [960 << 10, 3] in one and all(len(entries) == 2 for entries in one), one

def refused(code, call, *args):
    try:
        call(*args)
    except nbd.Error as error:
        assert error.errno == errno.errorcode[code], (call, error)
    else:
        raise AssertionError(call)

refused(errno.EINVAL, h.pread, 512, size)
refused(errno.ENOSPC, h.pwrite, b"a" * 512, size - 511)
refused(errno.ENOSPC, h.zero, 512, size)
refused(errno.EINVAL, h.trim, 512, size)
h.flush()
h.shutdown()
"#;

/// The system's Python, which has the module `nbd` of libnbd.
fn python() -> Option<Tool> {
    let python = Tool::find("/usr/bin/python3")?;
    let has_module = Command::new(python.path()).args(["-c", "import nbd"]).stderr(Stdio::null()).status();
    if !has_module.unwrap().success() {
        assert!(!oracle::required(), "python3-libnbd is missing");
        oracle::skip("python3-libnbd not found");
        return None;
    }
    Some(python)
}

#[test]
fn libnbds_calls_are_answered() {
    let Some(python) = python() else { return };
    // A libnbd without extended headers asks for structured replies then.
    for wanted in ["simple", "structured", "extended"] {
        let folder = folder();
        let root = folder.path();
        fs::write(root.join("calls.py"), CALLS).unwrap();
        let server = Server::start(root, &["-A", "disk"]);
        python.run_in(root, &["calls.py", &*server.uri(), wanted]).success();
        assert!(server.end("-TERM").success());
        let reads =
            ["-c", "read -q -P 0x62 1M 512", "-c", "read -q -P 0 3M 1M", "-c", "read -q -P 0x61 512 88"];
        ours(root, &[&["io", "-r"][..], &reads, &["disk"]].concat());
        ours(root, &["check", "-q", "disk"]);
    }
}

/// Clients of a proxy, which is a client with many requests under way.
#[test]
fn nbdkit_stands_between() {
    let (Some(qemu), Some(nbdkit)) = (Qemu::find(), Tool::find("nbdkit")) else { return };
    let folder = folder();
    let root = folder.path();
    let bytes: Vec<u8> = (0..6_000_000u32).map(|at| (at / 3 % 251) as u8).collect();
    fs::write(root.join("source"), &bytes).unwrap();
    let server = Server::start(root, &["disk"]);
    let socket = root.join("p");
    let mut command = Command::new(nbdkit.path());
    command
        .args(["-f", "-U"])
        .arg(&socket)
        .arg("nbd")
        .arg(format!("uri={}", server.uri()))
        .arg("shared=true");
    let mut proxy = command.current_dir(root).stdin(Stdio::null()).spawn().unwrap();
    wait_for(&socket, &mut proxy);
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    qemu.img.run_in(root, &["convert", "-n", "-f", "raw", "-O", "raw", "source", &uri]).success();
    let commands = ["-c", "write -q -f -P 5 50M 99999", "-c", "discard -q 51M 1M", "-c", "write -q -z 8M 1M"];
    qemu.io.run_in(root, &[&["-f", "raw"][..], &commands, &[&uri]].concat()).success();
    Tool::at(OURS).run_in(root, &["convert", "-f", "raw", "-O", "raw", &uri, "back"]).success();
    proxy.kill().unwrap();
    proxy.wait().unwrap();
    assert!(server.end("-TERM").success());
    let back = fs::read(root.join("back")).unwrap();
    assert!(back.starts_with(&bytes) && back[50 << 20..][..99999].iter().all(|byte| *byte == 5));
    qemu.img.run_in(root, &["compare", "-f", "raw", "-F", "qcow2", "back", "disk"]).success();
    qemu.img.run_in(root, &["check", "-q", "disk"]).success();
}

/// Random writes of several connections into an overlay, each block with a checksum that is read back.
#[test]
fn fio_finds_every_checksum() {
    let (Some(fio), Some(qemu)) = (Tool::find("fio"), Qemu::find()) else { return };
    let folder = folder();
    let root = folder.path();
    ours(root, &["io", "-c", "write -q -P 7 0 64M", "disk"]);
    ours(root, &["create", "-q", "-f", "qcow2", "-b", "disk", "-F", "qcow2", "top"]);
    let server = Server::start(root, &["top"]);
    let uri = format!("--uri={}", server.uri());
    let args = "--name=v --ioengine=nbd --rw=randwrite --bsrange=512-16k --bs_unaligned --iodepth=8 --numjobs=4 \
                --size=4m --offset_increment=5m --verify=crc32c --verify_backlog=64 --verify_fatal=1 --thread \
                --randrepeat=1 --group_reporting";
    let args: Vec<&str> = args.split_whitespace().chain([&*uri]).collect();
    let said = fio.run_in(root, &args).success();
    assert!(said.stdout.contains("err= 0"), "{said}");
    assert!(server.end("-TERM").success());
    ours(root, &["check", "-q", "top"]);
    qemu.img.run_in(root, &["check", "-q", "top"]).success();
    // Between the jobs' ranges the base shows through.
    ours(root, &["io", "-r", "-c", "read -q -P 7 4M 1M", "-c", "read -q -P 7 19M 45M", "top"]);
}
