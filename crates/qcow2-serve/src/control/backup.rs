//! A backup on command: into a new file, or over a disk that is there already.

use super::answer::{keeps_no_secret, text, with_remark};
use qcow2_blockdev::{
    CreateHow, ImageName, KeyValues, Naming, NewOptions, NewTarget, OpenOptions, create, new_image_format,
    open,
};
use qcow2_core::{GuestDisk, LiveDisk};
use qcow2_io::path_of;
use qcow2_ops::Progress;
use qcow2_ops::live::{self, BackupOptions};
use serde_json::{Value, json};
use std::sync::Arc;

/// What is copied, and where to.
#[derive(Clone, Debug, PartialEq)]
pub struct Backup {
    /// The target: a file, or a server's export.
    pub file: String,
    /// Its format; `None`: qcow2 for a file, raw for an export.
    pub format: Option<String>,
    /// Only what this bitmap marks is copied, over an earlier backup.
    pub bitmap: Option<String>,
    /// Whether the bitmap is cleared at the moment of the backup.
    pub clear: bool,
}

impl Backup {
    /// Copies `live`. `how`: how its own files are opened. A file that is made for it does not stay if the
    /// backup fails.
    pub(super) fn run(
        &self,
        live: &LiveDisk,
        how: &OpenOptions,
        progress: &dyn Progress,
    ) -> Result<Value, String> {
        let file = &self.file;
        let target = NewTarget::parse(file).map_err(text)?;
        let path = match &target {
            NewTarget::File(path) => Some(path_of(path)),
            _ => None,
        };
        // Never guessed: a guest could write what looks like a header.
        let format = self.format.as_deref().unwrap_or(if path.is_some() { "qcow2" } else { "raw" });
        let made = path.filter(|path| !path.exists());
        match (&made, &target, &self.bitmap) {
            (Some(_), _, Some(_)) => {
                return Err(format!(
                    "{file}: what a bitmap marks goes into an earlier backup: there is none"
                ));
            }
            (Some(_), ..) => self.make(live, how, &target, format)?,
            (None, NewTarget::File(_), None) => return Err(format!("{file}: the file exists already")),
            _ => {}
        }
        let copied = self.copy(live, how, format, progress);
        if let (Some(made), Err(_)) = (&made, &copied) {
            // The error to tell is that of the backup.
            let _ = std::fs::remove_file(made);
        }
        copied
    }

    fn make(
        &self,
        live: &LiveDisk,
        how: &OpenOptions,
        target: &NewTarget,
        format: &str,
    ) -> Result<(), String> {
        keeps_no_secret(&*live.layer(), "its copy")?;
        let format =
            new_image_format(format).map_err(|_| format!("'{format}' is no format of new images"))?;
        let mut options = NewOptions::parse(&format, &KeyValues::default()).map_err(text)?;
        options.set_number("size", live.size());
        let mut making = CreateHow::new();
        if let Some(files) = &how.open_files {
            making = making.among(files);
        }
        create(target, &options, &making).map_err(text)
    }

    fn copy(
        &self,
        live: &LiveDisk,
        how: &OpenOptions,
        format: &str,
        progress: &dyn Progress,
    ) -> Result<Value, String> {
        let naming = Naming::default().with_format(Some(format.to_owned()));
        let name = ImageName::parse(&self.file, &naming).map_err(text)?;
        let mut opening = OpenOptions::new().writable().with_cache(how.cache);
        opening.open_files.clone_from(&how.open_files);
        let target: Arc<dyn GuestDisk> = open(&name, &opening).map_err(text)?.disk;
        let options = match &self.bitmap {
            Some(bitmap) => BackupOptions::marked(bitmap, self.clear),
            None => BackupOptions::default(),
        };
        let copied = live::backup(live, &target, &options, progress).map_err(text)?;
        // All of it is durable already.
        let unclean = target.as_image().and_then(|image| image.close().err());
        Ok(with_remark(json!({"file": self.file, "copied": copied}), unclean))
    }
}
