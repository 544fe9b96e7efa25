//! What is accepted.

use qcow2_core::format::signature::Container;
use qcow2_core::{Codecs, ImageFormat};
use std::fmt;

/// Limits and accepted formats. Sizes are bytes.
#[derive(Clone)]
#[non_exhaustive]
pub struct VetOptions {
    /// The format that whoever hands the image over states, which its bytes must then have; `None`: any
    /// accepted one.
    pub format: Option<ImageFormat>,
    /// Accepted containers besides raw disks.
    pub accepted: Vec<Container>,
    /// The largest virtual size.
    pub max_virtual_size: u64,
    /// The most bytes that L1 table, refcount table, bitmap directory and snapshot table may have together.
    pub max_table_size: u64,
    /// The most bytes of L2 tables that are read to count what the image holds.
    pub max_l2_size: u64,
    /// How many bytes a guest may find for each byte of the file, in an image that holds more than 1 GiB.
    pub max_ratio: u64,
    /// The most snapshots inside the image.
    pub max_snapshots: u32,
    /// The most iterations that a password may cost.
    pub max_iterations: u64,
    /// Compression methods, to look at the beginning of the disk inside.
    pub codecs: Codecs,
}

impl Default for VetOptions {
    fn default() -> Self {
        Self {
            format: None,
            accepted: vec![
                Container::Qcow2,
                Container::Vmdk,
                Container::Vhd,
                Container::Vhdx,
                Container::Vdi,
                Container::Luks,
                Container::Iso,
                Container::Partitions,
            ],
            max_virtual_size: 16 << 40,
            max_table_size: 64 << 20,
            max_l2_size: 256 << 20,
            max_ratio: 200,
            max_snapshots: 0,
            max_iterations: 100_000_000,
            codecs: Codecs::default(),
        }
    }
}

impl VetOptions {
    /// With the format that the image is said to have.
    #[must_use]
    pub fn with_format(self, format: Option<ImageFormat>) -> Self {
        Self { format, ..self }
    }

    /// With another limit for virtual sizes, in bytes.
    #[must_use]
    pub fn with_max_virtual_size(self, max_virtual_size: u64) -> Self {
        Self { max_virtual_size, ..self }
    }

    /// With another limit for tables, in bytes.
    #[must_use]
    pub fn with_max_table_size(self, max_table_size: u64) -> Self {
        Self { max_table_size, ..self }
    }

    /// With compression methods.
    #[must_use]
    pub fn with_codecs(self, codecs: Codecs) -> Self {
        Self { codecs, ..self }
    }
}

impl fmt::Debug for VetOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VetOptions")
            .field("format", &self.format)
            .field("max_virtual_size", &self.max_virtual_size)
            .field("max_table_size", &self.max_table_size)
            .finish_non_exhaustive()
    }
}
