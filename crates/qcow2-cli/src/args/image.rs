//! How images are named and opened, as the options of a verb say.

use super::{Objects, Opt};
use crate::failure::Failure;
use crate::files::open_options;
use qcow2_blockdev::{Naming, OpenOptions};

/// How image names on the command line are meant: the options `-f`, `--image-opts` and `-U`.
#[derive(Clone, Debug, Default)]
pub(crate) struct ImageArgs {
    /// The format, where it is given; otherwise it is probed.
    pub(crate) format: Option<String>,
    /// Whether names are option strings.
    pub(crate) image_opts: bool,
    /// Whether images are opened without locks.
    pub(crate) force_share: bool,
    /// The objects that names may speak of.
    pub(crate) objects: Objects,
}

impl ImageArgs {
    /// Takes an option that says how image names are meant; leaves any other.
    pub(crate) fn take(&mut self, opt: Opt, value: String) -> Result<(), Failure> {
        match opt {
            Opt::Format => self.format = Some(value),
            Opt::ImageOpts => self.image_opts = true,
            Opt::ForceShare => self.force_share = true,
            Opt::Object => self.objects.add(&value)?,
            _ => {}
        }
        Ok(())
    }

    /// How names are meant.
    pub(crate) fn naming(&self) -> Naming {
        Naming::new(self.objects.secrets()).with_format(self.format.clone()).as_list(self.image_opts)
    }

    /// How images are opened for reading: by the policy and among the files of this run.
    pub(crate) fn options(&self) -> OpenOptions {
        open_options().with_force_share(self.force_share)
    }

    /// Refuses a format beside an option string, which brings its own.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        if self.image_opts && self.format.is_some() {
            return Err(Failure::new("--image-opts and --format are mutually exclusive"));
        }
        Ok(())
    }
}
