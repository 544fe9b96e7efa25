//! Another backing file's name in the header.

use crate::create::BackingName;
use crate::error::Result;
use crate::image::Image;
use crate::sync::write;
use ::alloc::string::String;

impl Image {
    /// Records another backing file, or none. What the guest sees where this layer has nothing changes with
    /// it: whoever wants the same disk has copied the difference before. The open image keeps showing the old
    /// chain; open it anew. Disk: all changes so far, then the header in steps of which the last is one
    /// sector.
    ///
    /// Errors: `Format` for a name that does not fit, nothing having changed; `ReadOnly`, `Poisoned`,
    /// `Storage`. Spec: "Header", "Header extensions".
    pub fn change_backing(&self, backing: Option<&BackingName>) -> Result<()> {
        self.flush()?;
        let _alone = write(&self.structure);
        self.file.check_writable()?;
        let mut header = self.header();
        header.backing_file = backing.map(|backing| backing.name.clone().into_bytes());
        header.extensions.backing_format =
            backing.and_then(|backing| backing.format.clone()).map(String::into_bytes);
        self.header.switch_to(header)
    }
}
