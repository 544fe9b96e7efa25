//! What QEMU calls its drivers, so far as its answers tell one from another: most of them are not built in
//! here.

/// A driver of QEMU.
struct Driver {
    name: &'static str,
    /// Whether `create` may record it as the format of a backing file. `rebase` records all of them.
    recorded: bool,
    /// Whether it is known and makes no images, which QEMU says; of others it says that they are unknown, or
    /// makes one.
    makes_none: bool,
}

const fn driver(name: &'static str, recorded: bool, makes_none: bool) -> Driver {
    Driver { name, recorded, makes_none }
}

const DRIVERS: [Driver; 38] = [
    driver("blkdebug", true, true),
    driver("blklogwrites", false, true),
    driver("blkverify", true, true),
    driver("bochs", true, true),
    driver("cloop", true, true),
    driver("compress", true, true),
    driver("copy-before-write", false, true),
    driver("copy-on-read", true, true),
    driver("dmg", true, true),
    driver("file", true, false),
    driver("ftp", true, false),
    driver("ftps", true, false),
    driver("host_cdrom", true, false),
    driver("host_device", true, false),
    driver("http", true, false),
    driver("https", true, false),
    driver("luks", true, false),
    driver("nbd", true, false),
    driver("null-aio", false, true),
    driver("null-co", false, true),
    driver("nvme", false, false),
    driver("parallels", true, false),
    driver("preallocate", false, true),
    driver("qcow", true, false),
    driver("qcow2", true, false),
    driver("qed", true, false),
    driver("quorum", true, true),
    driver("raw", true, false),
    driver("rbd", true, false),
    driver("replication", false, true),
    driver("snapshot-access", false, true),
    driver("ssh", true, false),
    driver("throttle", false, true),
    driver("vdi", true, false),
    driver("vhdx", true, false),
    driver("vmdk", true, false),
    driver("vpc", true, false),
    driver("vvfat", false, true),
];

/// Whether there is such a format, here or in QEMU.
pub(crate) fn is_known(name: &str) -> bool {
    find(name).is_some()
}

/// Whether a new image may name it as the format of its backing file.
pub(crate) fn may_be_recorded(name: &str) -> bool {
    find(name).is_some_and(|driver| driver.recorded)
}

/// Whether QEMU knows it and makes no images of it.
pub(crate) fn makes_no_images(name: &str) -> bool {
    find(name).is_some_and(|driver| driver.makes_none)
}

fn find(name: &str) -> Option<&'static Driver> {
    DRIVERS.iter().find(|driver| driver.name == name)
}
