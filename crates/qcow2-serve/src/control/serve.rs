//! A control socket for the exports of a server.

use super::{Control, Controlled, ControlledOptions, Pauses, Record};
use crate::export::Export;
use crate::local::LocalListener;
use qcow2_blockdev::OpenOptions;
use qcow2_core::{GuestDisk, LiveDisk};
use std::io;
use std::path::Path;
use std::sync::Arc;

/// An export, the file of its top, and its pauses.
pub type Seen<'a> = (&'a Export, (String, Arc<Pauses>));

/// A disk whose layers can be changed; `pauses` sees how long that takes.
pub fn live(disk: Arc<dyn GuestDisk>, pauses: &Arc<Pauses>) -> Arc<dyn GuestDisk> {
    Arc::new(LiveDisk::observed(disk, pauses.clone()))
}

/// Serves clients that change `exports` until `is_over` says true. `open`: how layers are opened. `record`:
/// where the top is recorded, if anywhere. Errors: of the listener.
pub fn serve(
    listener: &LocalListener,
    exports: &[Seen<'_>],
    open: &OpenOptions,
    record: Option<&Path>,
    is_over: &(dyn Fn() -> bool + Sync),
) -> io::Result<()> {
    let disks = exports.iter().map(|(export, (file, pauses))| {
        let mut options = ControlledOptions::new(file, open.clone().with_exchangeable(true));
        options.record = record.map(Record::new);
        options.pauses = Some(Arc::clone(pauses));
        (*export, options)
    });
    let controlled = Controlled::new(disks, is_over);
    Control::new(&controlled, is_over).serve(listener)
}
