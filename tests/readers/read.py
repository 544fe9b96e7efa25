"""Reads whole disks with third-party readers: read.py READER, then lines IMAGE<tab>OUTPUT[<tab>BASE] on standard input.

READER is dissect (dissect.hypervisor) or libqcow (libqcow-python). BASE is a qcow2 backing file, which libqcow does
not open itself. Prints "ok" or a one-line error for each line. Exit code 3: the reader is not installed.
"""

import signal
import sys
from pathlib import Path

CHUNK = 1 << 20
SECONDS = 60  # per image: some readers loop for ever on some images


def open_dissect(image, _base):
    from dissect.hypervisor.disk.qcow2 import QCow2

    disk = QCow2(Path(image))
    return disk.open(), disk.size


def open_libqcow(image, base):
    import pyqcow

    disk = pyqcow.file()
    disk.open(image)
    if base:
        parent = pyqcow.file()
        parent.open(base)
        disk.set_parent(parent)
    return disk, disk.get_media_size()


READERS = {"dissect": ("dissect.hypervisor.disk.qcow2", open_dissect), "libqcow": ("pyqcow", open_libqcow)}


def copy(opener, image, output, base):
    disk, left = opener(image, base)
    with open(output, "wb") as out:
        while left > 0:
            piece = disk.read(min(left, CHUNK))
            if not piece:
                raise EOFError(f"{left} bytes are missing")
            out.write(piece)
            left -= len(piece)


def stop(_signal, _frame):
    raise TimeoutError(f"no end after {SECONDS} s")


def main():
    module, opener = READERS[sys.argv[1]]
    try:
        __import__(module)
    except ImportError as error:
        print(error, file=sys.stderr)
        return 3
    signal.signal(signal.SIGALRM, stop)
    for line in sys.stdin:
        image, output, base = (line.rstrip("\n").split("\t") + [""])[:3]
        signal.alarm(SECONDS)
        try:
            copy(opener, image, output, base)
            print("ok")
        except Exception as error:  # whatever a reader raises is its verdict
            print(f"{type(error).__name__}: {error}".replace("\n", " "))
    return 0


sys.exit(main())
