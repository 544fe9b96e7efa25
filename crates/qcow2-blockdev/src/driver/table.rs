//! The drivers, their names, and the options that each has.

use qcow2_core::ImageFormat;

/// The drivers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Driver {
    /// A qcow2 image.
    Qcow2,
    /// The format before qcow2. It is known by name and by its first bytes.
    Qcow,
    /// A raw disk, or a part of one.
    Raw,
    /// A LUKS container.
    Luks,
    /// A regular file.
    File,
    /// A device.
    HostDevice,
    /// The same, which a disc can be taken out of.
    HostCdrom,
    /// A disk that holds nothing.
    NullCo,
    /// The same under another name.
    NullAio,
    /// Faults at chosen steps.
    Blkdebug,
    /// The disk of a server.
    Nbd,
    /// A filter that compresses what is written.
    Compress,
    /// A filter that keeps what is read from backing files.
    CopyOnRead,
    /// A filter that reserves room behind the end.
    Preallocate,
    /// A filter that limits rates. It is known by name: it takes a group of limits, of which there are none.
    Throttle,
    /// A filter that copies old bytes elsewhere. It is known by name.
    CopyBeforeWrite,
}

impl Driver {
    /// The names of all that open a disk, in the order of letters.
    pub const NAMES: [&'static str; 13] = [
        "blkdebug",
        "compress",
        "copy-on-read",
        "file",
        "host_cdrom",
        "host_device",
        "luks",
        "nbd",
        "null-aio",
        "null-co",
        "preallocate",
        "qcow2",
        "raw",
    ];

    /// The driver called `name`.
    pub fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "qcow2" => Self::Qcow2,
            "qcow" => Self::Qcow,
            "raw" => Self::Raw,
            "luks" => Self::Luks,
            "file" => Self::File,
            "host_device" => Self::HostDevice,
            "host_cdrom" => Self::HostCdrom,
            "null-co" => Self::NullCo,
            "null-aio" => Self::NullAio,
            "blkdebug" => Self::Blkdebug,
            "nbd" => Self::Nbd,
            "compress" => Self::Compress,
            "copy-on-read" => Self::CopyOnRead,
            "preallocate" => Self::Preallocate,
            "throttle" => Self::Throttle,
            "copy-before-write" => Self::CopyBeforeWrite,
            _ => return None,
        })
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Qcow => "qcow",
            Self::Raw => "raw",
            Self::Luks => "luks",
            Self::File => "file",
            Self::HostDevice => "host_device",
            Self::HostCdrom => "host_cdrom",
            Self::NullCo => "null-co",
            Self::NullAio => "null-aio",
            Self::Blkdebug => "blkdebug",
            Self::Nbd => "nbd",
            Self::Compress => "compress",
            Self::CopyOnRead => "copy-on-read",
            Self::Preallocate => "preallocate",
            Self::Throttle => "throttle",
            Self::CopyBeforeWrite => "copy-before-write",
        }
    }

    /// The image format that it reads; `None` for a protocol and for a filter.
    pub fn format(self) -> Option<ImageFormat> {
        match self {
            Self::Qcow2 => Some(ImageFormat::Qcow2),
            Self::Qcow => Some(ImageFormat::Other("qcow".to_owned())),
            Self::Raw => Some(ImageFormat::Raw),
            Self::Luks => Some(ImageFormat::Luks),
            _ => None,
        }
    }

    /// The driver that reads images of `format`; `None` if no driver here does.
    pub fn of_format(format: &ImageFormat) -> Option<Self> {
        Self::parse(format.name()).filter(|driver| driver.format().is_some())
    }

    /// Whether it is about where bytes are, not about what they mean.
    pub fn is_protocol(self) -> bool {
        self.format().is_none() && !self.is_filter()
    }

    /// Whether it shows the disk below it.
    pub fn is_filter(self) -> bool {
        use Driver::{Compress, CopyBeforeWrite, CopyOnRead, Preallocate, Throttle};
        matches!(self, Compress | CopyOnRead | Preallocate | Throttle | CopyBeforeWrite)
    }

    /// Whether its bytes are those of a file or a device of this system.
    pub(crate) fn is_file(self) -> bool {
        matches!(self, Self::File | Self::HostDevice | Self::HostCdrom)
    }

    /// What it calls the node that it stands on.
    pub fn child(self) -> Option<&'static str> {
        match self {
            Self::Blkdebug => Some("image"),
            _ => (self.format().is_some() || self.is_filter()).then_some("file"),
        }
    }

    /// Options that change what is read, and so belong to the name.
    pub(crate) fn is_strong(self, key: &str) -> bool {
        match self {
            Self::Qcow2 => key.starts_with("encrypt."),
            Self::Raw => matches!(key, "offset" | "size"),
            Self::Luks => KEY_OPTIONS.contains(&key),
            Self::File | Self::HostDevice | Self::HostCdrom => key == "filename",
            Self::NullCo | Self::NullAio => matches!(key, "size" | "read-zeroes"),
            Self::Blkdebug => {
                key == "config" || key.starts_with("inject-error.") || key.starts_with("set-state.")
            }
            Self::Nbd => !GENERAL.contains(&key),
            Self::CopyOnRead => key == "bottom",
            Self::Throttle => key == "throttle-group",
            Self::Qcow | Self::Compress | Self::Preallocate | Self::CopyBeforeWrite => false,
        }
    }

    /// Whether option `key` of a node that is open can be given another value.
    pub fn may_change(self, key: &str) -> bool {
        let own: &[&str] = match self {
            Self::Qcow2 => &QCOW2,
            Self::Raw => &["offset", "size"],
            Self::File | Self::HostDevice => &["drop-cache", "x-check-cache-dropped"],
            _ => &[],
        };
        own.contains(&key)
            || CHANGEABLE.contains(&key)
            || (self == Self::Qcow2 && key.starts_with("encrypt."))
    }

    /// Whether it knows option `key`, which begins none of its children's.
    pub(crate) fn knows(self, key: &str) -> bool {
        let own: &[&str] = match self {
            Self::Qcow2 => &QCOW2,
            Self::Raw => &["offset", "size"],
            Self::Luks | Self::Qcow => &[],
            Self::File | Self::HostDevice | Self::HostCdrom => &FILE,
            Self::NullCo | Self::NullAio => &["size", "read-zeroes", "latency-ns"],
            Self::Blkdebug => &BLKDEBUG,
            Self::Nbd => &NBD,
            Self::Preallocate => &["prealloc-align", "prealloc-size"],
            Self::Compress | Self::CopyOnRead | Self::Throttle | Self::CopyBeforeWrite => &[],
        };
        GENERAL.contains(&key)
            || own.contains(&key)
            || (self != Self::Raw && self.is_strong(key) && self != Self::Nbd)
            || (self == Self::Nbd && key.starts_with("server."))
            || (self == Self::Blkdebug && key.contains("-child-perms."))
    }
}

/// The options that name the secret of an encrypted layer and limit the work that its header may ask for,
/// without `encrypt.`.
pub(crate) const KEY_OPTIONS: [&str; 2] = ["key-secret", "max-iterations"];

/// What every driver takes.
const GENERAL: [&str; 9] = [
    "node-name",
    "read-only",
    "auto-read-only",
    "discard",
    "detect-zeroes",
    "force-share",
    "cache.direct",
    "cache.no-flush",
    "cache.writeback",
];
/// What of that can be changed while a node is open.
const CHANGEABLE: [&str; 6] =
    ["read-only", "auto-read-only", "discard", "detect-zeroes", "cache.direct", "cache.no-flush"];
/// What a file takes; none of it but the name changes what is read.
const FILE: [&str; 7] =
    ["filename", "locking", "aio", "aio-max-batch", "drop-cache", "pr-manager", "x-check-cache-dropped"];
/// What a qcow2 image takes; none of it changes what is read.
const QCOW2: [&str; 21] = [
    "lazy-refcounts",
    "pass-discard-request",
    "pass-discard-snapshot",
    "pass-discard-other",
    "discard-no-unref",
    "overlap-check",
    "overlap-check.template",
    "overlap-check.main-header",
    "overlap-check.active-l1",
    "overlap-check.active-l2",
    "overlap-check.refcount-table",
    "overlap-check.refcount-block",
    "overlap-check.snapshot-table",
    "overlap-check.inactive-l1",
    "overlap-check.inactive-l2",
    "overlap-check.bitmap-directory",
    "cache-size",
    "l2-cache-size",
    "l2-cache-entry-size",
    "refcount-cache-size",
    "cache-clean-interval",
];
const BLKDEBUG: [&str; 7] =
    ["config", "align", "max-transfer", "opt-write-zero", "max-write-zero", "opt-discard", "max-discard"];
const NBD: [&str; 9] = [
    "host",
    "port",
    "path",
    "export",
    "tls-creds",
    "tls-hostname",
    "x-dirty-bitmap",
    "reconnect-delay",
    "open-timeout",
];
