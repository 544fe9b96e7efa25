//! Changes the backing file's name in the header.

use crate::create::BackingName;
use crate::error::Result;
use crate::image::Image;
use crate::sync::write;
use qcow2_format::text::bytes_of;

impl Image {
    /// Records another backing file, or none. Copies no data: unallocated clusters read from the new backing
    /// file afterwards, so a caller that wants to keep the guest data copies the differences first. The open
    /// image keeps reading from the old chain until it is reopened. Disk: flushes all changes, then writes
    /// the header in steps, the last of which is one sector.
    ///
    /// Errors: `Format` for a name that does not fit, before anything has changed; `ReadOnly`, `Poisoned`,
    /// `Storage`. Spec: "Header", "Header extensions".
    pub fn change_backing(&self, backing: Option<&BackingName>) -> Result<()> {
        self.flush()?;
        let _alone = write(&self.structure);
        self.file.check_writable()?;
        let mut header = self.header();
        header.backing_file = backing.map(|backing| bytes_of(&backing.name).into_owned());
        header.extensions.backing_format =
            backing.and_then(|backing| backing.format.as_deref()).map(|name| bytes_of(name).into_owned());
        self.header.switch_to(header)
    }
}
