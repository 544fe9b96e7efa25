//! `open`, `close` and `reopen`.

use super::{Exerciser, Failed, Open};
use crate::grammar;
use crate::reason::Reason;
use crate::reopening::{Now, changed};
use crate::request::{OpenRequest, request_of};
use crate::target::Target;
use qcow2_core::ErrorKind;
use std::sync::Arc;

impl Exerciser<'_> {
    pub(super) fn open_command(&mut self, open: grammar::Open) -> Result<(), Failed> {
        let request = request_of(open).map_err(|error| self.complain_named(&error.to_string()))?;
        self.open_as(request, false)
    }

    /// Opens a disk. With `reopened` an error is printed without `can't open device NAME: `.
    pub(super) fn open_as(&mut self, request: OpenRequest, reopened: bool) -> Result<(), Failed> {
        if self.open.is_some() {
            return Err(self.complain_named("file open already, try 'help close'"));
        }
        match self.ports.opener.open(&request) {
            Ok(disk) => {
                // Opened again, it has told them.
                for line in disk.warnings.iter().filter(|_| !reopened) {
                    self.ports.console.complain(line);
                }
                let target = Target {
                    disk: Arc::clone(&disk.disk),
                    durable_writes: disk.durable_writes,
                    discards: disk.discards,
                    goes_when_corrupt: disk.writable && self.ports.words.corrupt_images_go(),
                };
                self.open = Some(Open { disk, target, request });
                Ok(())
            }
            Err(refusal) => {
                let device = request.path.as_ref().filter(|_| !request.image_opts);
                let what = match (reopened, device) {
                    (true, _) => String::new(),
                    (false, Some(path)) => format!("can't open device {path}: "),
                    (false, None) => "can't open: ".to_owned(),
                };
                self.ports.console.complain_named(&format!("{what}{}", refusal.reason));
                for line in &refusal.hints {
                    self.ports.console.complain(line);
                }
                Err(Failed)
            }
        }
    }

    pub(super) fn close(&mut self) {
        let finished = self.background.wait();
        self.print_background(finished);
        let Some(Open { disk, target, .. }) = self.open.take() else {
            return;
        };
        let closed = match target.disk.as_image().filter(|_| disk.writable) {
            Some(image) => image.close(),
            None => Ok(()),
        };
        if let Err(error) = closed {
            self.complain_of_close(error);
        }
    }

    /// As in qemu-io, a close that fails is told and fails no command. An image that takes no changes any
    /// more has failed one before.
    fn complain_of_close(&self, error: qcow2_core::Error) {
        if error.kind() == ErrorKind::Poisoned {
            return;
        }
        if let Some(name) = error.lost_bitmap().map(str::to_owned) {
            let reason = self.reason(&Reason::from(error));
            self.complain_named(&format!("{LOST}: Failed to write bitmap '{name}' to file: {reason}"));
            return;
        }
        // Nothing was changed but refcounts, where no write is allowed.
        let l2 = (error.kind() != ErrorKind::InvalidOption).then_some("L2 table");
        let reason = self.reason(&Reason::from(error));
        for cache in l2.into_iter().chain(["refcount block"]) {
            self.complain_named(&format!("Failed to flush the {cache} cache: {reason}"));
        }
    }

    /// Closes the disk and opens it with changed options. If that fails, opens it again with the old ones.
    pub(super) fn reopen(&mut self, reopen: grammar::Reopen) -> Result<(), Failed> {
        let open = self.open.as_ref().ok_or(Failed)?;
        let old = open.request.clone();
        let new =
            changed(&Now::new(&old, &*open.disk.disk), reopen).map_err(|text| self.complain_named(&text))?;
        self.close();
        self.open_as(new, true).map_err(|Failed| {
            let _ = self.open_as(old, false);
            Failed
        })
    }
}

/// The number of a node is another one each time.
const LOST: &str = "Lost persistent bitmaps during inactivation of node '#block100'";
