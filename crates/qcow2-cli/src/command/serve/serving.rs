//! Opened, served, and closed when the server has ended.

use crate::args::Objects;
use crate::command::io;
use crate::exit;
use crate::failure::Failure;
use crate::files::open_options;
use crate::findings::tell_of_change;
use crate::interrupt;
use crate::open::close;
use crate::persona;
use crate::session::Session;
use qcow2_blockdev::{ImageName, Naming, open_snapshot};
use qcow2_core::GuestDisk;
use qcow2_exerciser::{OpenRequest, open_files};
use qcow2_ops::snapshot::SnapshotName;
use qcow2_serve::export::{Export, ExportOptions};
use qcow2_serve::nbd::{Address, Listener, Server, ServerOptions};
use std::sync::Arc;

/// An image to serve.
pub(super) struct Served {
    pub(super) open: OpenRequest,
    pub(super) export: ExportOptions,
    pub(super) snapshot: Option<SnapshotName>,
}

/// What to serve, and where.
pub(super) struct Serving {
    pub(super) images: Vec<Served>,
    pub(super) server: ServerOptions,
    pub(super) addresses: Vec<Address>,
    pub(super) objects: Objects,
}

/// Serves until a signal ends it, then closes the images.
pub(super) fn serve(session: &Session, serving: Serving) -> Result<u8, Failure> {
    let mut exports = Vec::new();
    for served in serving.images {
        exports.push(open(session, served, &serving.objects)?);
    }
    let bound = serving.addresses.iter().map(Listener::bind).collect::<Result<Vec<_>, _>>();
    let listeners = bound.map_err(|error| Failure::new(error.to_string()))?;
    let server = Server::new(exports, serving.server);
    let stop = server.stop();
    interrupt::on_stop(move || stop.stop());
    for listener in &listeners {
        session.print(&format!("listening on {}\n", listener.uri()))?;
    }
    let ran = server.run(&listeners);
    drop(listeners);
    // All of them, whatever the first one says.
    let closed: Vec<_> = server.exports().iter().map(close_export).collect();
    ran.map_err(|error| Failure::new(persona::chain(&error)))?;
    closed.into_iter().collect::<Result<(), _>>()?;
    Ok(exit::SUCCESS)
}

fn close_export(export: &Export) -> Result<(), Failure> {
    match export.is_read_only() {
        true => Ok(()),
        false => close(&**export.disk()).map_err(Failure::new),
    }
}

/// Opens an image and makes an export of it.
fn open(session: &Session, mut served: Served, objects: &Objects) -> Result<Export, Failure> {
    served.export.durable_writes = served.open.cache.is_writethrough();
    served.export.read_only = served.open.read_only || served.snapshot.is_some();
    let disk = match &served.snapshot {
        Some(snapshot) => open_as_it_was(&served.open, snapshot, objects)?,
        None => {
            let tell = |warning: &_, source: &_| tell_of_change(session, warning, source);
            let opened = open_files(&served.open, objects.secrets(), open_options(), &tell);
            let opened = opened.map_err(io::failure)?;
            opened.warnings.iter().flat_map(io::lines).for_each(|line| session.complain(&line));
            served.export.discards = opened.opened.discards;
            opened.opened.disk
        }
    };
    Export::new(disk, served.export).map_err(|error| Failure::new(persona::chain(&error)))
}

/// Opens the disk of a snapshot.
fn open_as_it_was(
    open: &OpenRequest,
    snapshot: &SnapshotName,
    objects: &Objects,
) -> Result<Arc<dyn GuestDisk>, Failure> {
    let naming = Naming::new(objects.secrets()).with_format(open.format.clone()).as_list(open.image_opts);
    let name = ImageName::parse(open.path.as_deref().unwrap_or_default(), &naming)?;
    let how = open_options().with_force_share(open.force_share);
    Ok(open_snapshot(&name, &how, |snapshots| snapshot.position(snapshots))?.disk)
}
