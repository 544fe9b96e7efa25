#!/usr/bin/env python3
"""Writes the seeds, from images that qemu-img makes. Usage: fuzz/seeds/make.py"""

import pathlib
import random
import socket
import struct
import subprocess
import tempfile
import threading
import time
import zlib

HERE = pathlib.Path(__file__).parent
OPTIONS = {
    "plain": "",
    "v2": "-o compat=0.10",
    "cluster512": "-o cluster_size=512",
    "extended": "-o extended_l2=on",
    "zstd": "-o compression_type=zstd",
    "lazy": "-o lazy_refcounts=on,refcount_bits=1",
    "backing": "-b base.raw -F raw",
    "data_file": "-o data_file=data.raw,data_file_raw=on",
    "luks": "--object secret,id=s,data=abc -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
}


def run(folder, command):
    subprocess.run(command, shell=True, cwd=folder, check=True, stdout=subprocess.DEVNULL)


def word(image, at):
    return struct.unpack_from(">Q", image, at)[0]


def save(target, name, data):
    folder = HERE / target
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(data)


def tables(image, name):
    """The tables of an image, each behind the two bytes that choose a geometry."""
    bits = struct.unpack_from(">I", image, 20)[0]
    extended = word(image, 72) >> 4 & 1 if image[7] == 3 else 0
    order = struct.unpack_from(">I", image, 96)[0] if image[7] == 3 else 4
    shape = bytes([bits - 9, extended | order << 5])
    l1 = word(image, 40)
    l2 = word(image, l1) & 0xFFFFFFFFFFFE00
    save("parse_tables", name + "_l1", shape + image[l1 : l1 + 8])
    save("parse_tables", name + "_l2", shape + image[l2 : l2 + 128])
    block = word(image, word(image, 48))
    save("parse_tables", name + "_refcounts", shape + image[block : block + 32])
    return shape


IMAGES = {
    "plain": ("", []),
    "v2": ("compat=0.10", []),
    "zstd": ("compression_type=zstd", []),
    "one_bit": ("refcount_bits=1", None),
    "wide": ("refcount_bits=64,lazy_refcounts=on", []),
    "snapshots": ("", ["snapshot -c a"]),
    "bitmaps": ("", ["bitmap --add -g 512 i.qcow2 b"]),
    "extended": ("extended_l2=on", []),
}


def whole_images(folder):
    """Small images as wholes: data, zeroes, compressed clusters."""
    for name, (options, commands) in IMAGES.items():
        size = "cluster_size=16k" if name == "extended" else "cluster_size=512"
        (folder / "i.qcow2").unlink(missing_ok=True)
        run(folder, f"qemu-img create -q -f qcow2 -o {size} {'-o ' + options if options else ''} i.qcow2 60k")
        unit = 16 if name == "extended" else 0.5
        at = lambda n: f"{int(n * unit * 1024)} {int(unit * 1024)}"
        io = [f"write -P 1 {at(0)}", f"write -c -P 2 {at(1)}", f"write -z {at(2)}"]
        run(folder, "qemu-io " + " ".join(f"-c '{c}'" for c in io) + " i.qcow2")
        for command in commands or []:
            run(folder, f"qemu-img {command}" + ("" if "i.qcow2" in command else " i.qcow2"))
        if name == "snapshots":
            run(folder, f"qemu-io -c 'write -P 3 {at(0)}' i.qcow2")
        data = (folder / "i.qcow2").read_bytes()
        save("images", name, data)


def streams():
    """Compressed clusters, behind the byte that chooses codec and cluster size."""
    for shape in (0, 2, 6):
        cluster = bytes(i // 5 % 11 + i % 3 for i in range(512 << (shape >> 1)))
        pack = zlib.compressobj(6, zlib.DEFLATED, -12)
        save("expand", f"deflate{shape}", bytes([shape]) + pack.compress(cluster) + pack.flush())
    pack = zlib.compressobj(0, zlib.DEFLATED, -12)
    save("expand", "deflate_stored", bytes([0]) + pack.compress(bytes(512)) + pack.flush())
    # A zstd frame of one run: single segment, 256 + 256 bytes.
    save("expand", "zstd_run", bytes.fromhex("01 28b52ffd 60 0001 03 10 00 5a".replace(" ", "")))
    raw = (1 | 512 << 3).to_bytes(3, "little")
    save("expand", "zstd_raw", bytes.fromhex("0128b52ffd600001") + raw + bytes(range(256)) * 2)


NAMES = [
    "disk.qcow2",
    "file:disk.raw",
    "nbd:unix:/s:exportname=e",
    "nbd://host:10809/e",
    "nbd+unix:///e?socket=/s",
    "blkdebug:/rules:disk.qcow2",
    "null-co://",
    'json:{"driver": "qcow2", "file": {"driver": "file", "filename": "a"}, "backing": null}',
    'json:{"file.driver": "nbd", "file.server.type": "inet", "file.server.host": "h", "file.server.port": "1"}',
    "driver=raw,offset=1M,size=64k,file.driver=file,file.filename=a,,b",
    "driver=qcow2,file.filename=a,backing.driver=null-co,backing.size=1G,encrypt.key-secret=s",
    "driver=qcow2,file.driver=blkdebug,file.image.filename=a,file.inject-error.0.event=l2_load",
    "size=1G,cluster_size=64k,refcount_bits=1,lazy_refcounts=on,preallocation=full,compat=1.1",
    "encrypt.format=luks,encrypt.key-secret=s,encrypt.cipher-alg=aes-256,encrypt.iter-time=10",
    "backing_file=b,backing_fmt=raw,extended_l2=on,data_file=d,data_file_raw=off,compression_type=zstd",
    "1.5k",
    "0x200",
]


def foreign():
    """Names and options, server conversations, and the bytes that decide how an image is made."""
    for index, text in enumerate(NAMES):
        save("names", f"n{index:02}", bytes([index % 5]) + text.encode())
    generator = random.Random(1)
    for index in range(12):
        save("decisions", f"d{index:02}", generator.randbytes(40 + 20 * index))
    for index in range(16):
        save("nbd_replies", f"r{index:02}", bytes([index]) + generator.randbytes(20 + 15 * index))
    greeting = b"NBDMAGICIHAVEOPT\0\x03" + bytes.fromhex("0003e889045565a9 00000008 80000001 00000000")
    save("nbd_replies", "greeting", b"\0" + greeting)


# What programs of others do with an export of 64 KiB.
CLIENTS = {
    "nbdinfo": "nbdinfo --map {uri}",
    "list": "nbdinfo --list nbd+unix:///?socket={socket}",
    "qemu_io": "qemu-io -f raw -c 'write -P 1 0 600' -c 'write -z 8k 4k' -c 'write -zu 16k 4k' -c 'discard 4k 4k'"
    " -c 'write -f -P 2 60k 700' -c flush -c 'read 0 20k' {uri}",
    "qemu_map": "qemu-img map -f raw {uri}",
    "nbdcopy": "dd if=/dev/zero bs=700 count=1 status=none | nbdcopy - {uri}",
    "structured": "nbdsh -c 'h.add_meta_context(\"base:allocation\")'"
    " -c 'h.connect_uri(\"{uri}\")' -c 'h.pwrite(b\"a\" * 700, 512, nbd.CMD_FLAG_FUA)' -c 'h.trim(512, 4096)'"
    " -c 'h.zero(512, 8192, nbd.CMD_FLAG_NO_HOLE)' -c 'h.cache(512, 0)' -c 'h.flush()' -c 'h.pread(700, 0)'"
    " -c 'h.block_status(65536, 0, lambda *a: 0)'",
    "plain": "nbdsh -c 'h.set_request_structured_replies(False)' -c 'h.set_handshake_flags(0)'"
    " -c 'h.connect_uri(\"{uri}\")' -c 'h.pwrite(b\"a\" * 700, 512)' -c 'h.pread(700, 0)'",
}


def pump(source, target, kept):
    try:
        while data := source.recv(1 << 16):
            kept.extend(data)
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # The other side has left first.


def conversations(folder):
    """What real clients send, recorded on its way to a server, and the bytes that decide how one is made."""
    generator = random.Random(2)
    for index in range(14):
        is_large = index == 5
        choice = 1 | (index % 4) << 3 | is_large << 1 | (index % 6 == 1) << 2 | (index % 3 > 0) << 5
        data = generator.randbytes(30 if is_large else 30 + 12 * index)
        save("nbd_requests", f"d{index:02}", bytes([choice]) + data)
    run(folder, "qemu-img create -q -f raw n.raw 64k")
    for name, command in CLIENTS.items():
        (folder / "p").unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(folder / "p"))
        listener.listen()
        server = subprocess.Popen(["qemu-nbd", "-t", "-f", "raw", "-x", "disk", "-k", str(folder / "n"), "n.raw"], cwd=folder)
        while not (folder / "n").exists():
            time.sleep(0.01)
        uri = f"nbd+unix:///disk?socket={folder}/p"
        client = subprocess.Popen(
            command.format(uri=uri, socket=folder / "p"), shell=True, cwd=folder, stdout=subprocess.DEVNULL
        )
        listener.settimeout(2)
        number = 0
        while True:
            try:
                ours = listener.accept()[0]
            except TimeoutError:
                break
            ours.settimeout(None)
            theirs = socket.socket(socket.AF_UNIX)
            theirs.connect(str(folder / "n"))
            sent = bytearray()
            back = threading.Thread(target=pump, args=(theirs, ours, bytearray()))
            back.start()
            pump(ours, theirs, sent)
            back.join()
            if number < 2:
                save("nbd_requests", f"{name}{number}", b"\x80" + sent)  # Even: as it is.
            number += 1
        client.wait()
        server.kill()
        server.wait()
        (folder / "n").unlink(missing_ok=True)


CIPHERS = [
    "cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256",
    "cipher-alg=aes-256,cipher-mode=cbc,ivgen-alg=plain64,hash-alg=sha1",
    "cipher-alg=serpent-256,cipher-mode=xts,hash-alg=sha512",
    "cipher-alg=twofish-256,cipher-mode=xts,ivgen-alg=plain",
    "cipher-alg=aes-256,cipher-mode=ecb,ivgen-alg=plain",
    "cipher-alg=cast5-128,cipher-mode=cbc,ivgen-alg=plain64",
]


def containers(folder):
    """LUKS headers with ciphers of every kind."""
    for index, cipher in enumerate(CIPHERS):
        (folder / "c.luks").unlink(missing_ok=True)
        secret = "--object secret,id=s,data=abc -o key-secret=s,iter-time=10"
        run(folder, f"qemu-img create -q -f luks {secret},{cipher} c.luks 1M")
        save("luks_header", f"c{index}", (folder / "c.luks").read_bytes()[:592])


with tempfile.TemporaryDirectory() as folder:
    foreign()
    conversations(pathlib.Path(folder))
    containers(pathlib.Path(folder))
    whole_images(pathlib.Path(folder))
    streams()
    path = pathlib.Path(folder) / "i.qcow2"
    run(folder, "qemu-img create -q -f raw base.raw 1M")
    for name, options in OPTIONS.items():
        path.unlink(missing_ok=True)
        run(folder, f"qemu-img create -q -f qcow2 {options} i.qcow2 1M")
        save("parse_header", name, path.read_bytes()[:4096].rstrip(b"\0")[:600])
        if name == "luks":
            image = path.read_bytes()
            area = image.index(b"LUKS\xba\xbe")
            save("parse_tables", "luks", bytes([7, 0x80]) + image[area : area + 592])
        if name in ("plain", "extended", "cluster512"):
            run(folder, "qemu-io -c 'write 0 64k' -c 'write -z 128k 64k' -c 'write 196k 2k' i.qcow2")
            run(folder, "qemu-io -c 'write -c 256k 64k' i.qcow2")
            tables(path.read_bytes(), name)
        if name == "plain":
            run(folder, "qemu-img snapshot -c first i.qcow2")
            run(folder, "qemu-img snapshot -c second i.qcow2")
            run(folder, "qemu-img bitmap --add i.qcow2 b0")
            run(folder, "qemu-img bitmap --add -g 512 i.qcow2 b1")
            image = path.read_bytes()
            save("parse_header", "bitmaps", image[:600])
            at = word(image, 64)
            save("parse_tables", "snapshots", bytes([7, 0x80]) + image[at : at + 152])
            at = image.index(struct.pack(">I", 0x23852875)) + 8
            size, at = word(image, at + 8), word(image, at + 16)
            save("parse_tables", "bitmaps", bytes([7, 0x80]) + image[at : at + size])
