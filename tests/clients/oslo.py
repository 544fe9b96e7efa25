"""What OpenStack's imageutils makes of `qemu-img info`: one line for each image named."""

import subprocess
import sys

from oslo_utils import imageutils

FIELDS = [
    "image", "file_format", "virtual_size", "cluster_size", "backing_file", "backing_file_format", "encrypted",
    "snapshots",
]


def plain(value):
    return value if isinstance(value, (str, int, type(None))) else repr(value)


for name in sys.argv[1:]:
    command = ["qemu-img", "info", "--output=json", name]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    info = imageutils.QemuImgInfo(text, format="json")
    # Space on the disk is a matter of how a file was written; that there is a number is not.
    assert info.disk_size is not None and int(info.disk_size) >= 0, text
    print(name, [plain(getattr(info, field)) for field in FIELDS])
