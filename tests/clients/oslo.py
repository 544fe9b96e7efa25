"""What OpenStack's imageutils makes of `qemu-img info`, in both outputs: two lines for each image named."""

import subprocess
import sys
import warnings

from oslo_utils import imageutils

FIELDS = [
    "image", "file_format", "virtual_size", "cluster_size", "backing_file", "backing_file_format", "encrypted",
    "snapshots", "format_specific",
]


def plain(value):
    return value if isinstance(value, (str, int, type(None))) else repr(value)


def parsed(text, output):
    try:
        return imageutils.QemuImgInfo(text, format=output)
    except ValueError as error:
        # Releases from 8 on no longer parse the human-readable output.
        assert output == "human", error
        return None


warnings.simplefilter("ignore")
for name in sys.argv[1:]:
    for output in ["json", "human"]:
        command = ["qemu-img", "info", "--output=" + output, name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        info = parsed(text, output)
        if info is None:
            print(name, output, "is not parsed by this release")
            continue
        # Disk usage depends on how the file was written, so check only that there is a number.
        assert info.disk_size is not None and int(info.disk_size) >= 0, text
        print(name, output, [plain(getattr(info, field)) for field in FIELDS])
