//! QEMU's drivers by name, most of which are not built in here: a new image may record any of them as the
//! format of its backing file.

/// A driver of QEMU.
struct Known {
    name: &'static str,
    /// Whether a new image may record it as the format of a backing file; an image that is there already may
    /// record all of them.
    recorded: bool,
    /// Whether QEMU makes no images of it.
    makes_none: bool,
}

const fn driver(name: &'static str, recorded: bool, makes_none: bool) -> Known {
    Known { name, recorded, makes_none }
}

const DRIVERS: [Known; 38] = [
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

/// Whether QEMU has a driver called `name`, built in here or not.
pub fn is_known_driver(name: &str) -> bool {
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

fn find(name: &str) -> Option<&'static Known> {
    DRIVERS.iter().find(|driver| driver.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_order_and_ours_among_them() {
        assert!(DRIVERS.is_sorted_by_key(|driver| driver.name));
        assert!(crate::Driver::NAMES.iter().all(|name| is_known_driver(name)));
        assert!(may_be_recorded("vmdk") && !may_be_recorded("throttle") && !may_be_recorded("ext4"));
        assert!(makes_no_images("quorum") && !makes_no_images("vmdk"));
    }
}
