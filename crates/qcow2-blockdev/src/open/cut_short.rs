//! Images whose file ends before what is in it does.

use super::layers::OpenedDisk;
use crate::warning::Warning;
use qcow2_core::walk::{Walk, read_header};
use qcow2_core::{Image, Result};

impl OpenedDisk {
    /// The layers of a disk opened for reading that lack their end: what is missing reads as zeroes, and a
    /// copy of it looks like a disk. Disk: reads the tables of every layer.
    pub fn missing_ends(&self) -> Vec<Warning> {
        let mut warnings = Vec::new();
        let mut layer = Some(&self.disk);
        for files in &self.files {
            let Some(disk) = layer else { break };
            // What cannot be read now is told when it is needed.
            if let Some((len, end)) = disk.as_image().and_then(|image| missing_end(image).ok()?) {
                warnings.push(Warning::MissingEnd { file: files.image.clone(), len, end });
            }
            layer = disk.backing();
        }
        warnings
    }
}

/// The length of an image's file and the end of what should be in it, where at least one cluster is missing.
fn missing_end(image: &Image) -> Result<Option<(u64, u64)>> {
    let storage = &**image.storage();
    let header = read_header(storage)?;
    let walk = Walk::new(storage, &header)?;
    let (len, end) = (walk.file_len(), walk.used_end()?);
    Ok((end.saturating_sub(len) >= walk.geometry().cluster_size()).then_some((len, end)))
}
