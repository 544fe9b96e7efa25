//! Opened, served, and closed when the server has ended.

use super::control::{Beside, follow_record};
use crate::args::Objects;
use crate::command::io;
use crate::exit;
use crate::failure::Failure;
use crate::files::open_options;
use crate::findings::tell_of_change;
use crate::open::close;
use crate::persona;
use crate::session::Session;
use qcow2_blockdev::{FailureKind, ImageName, Naming, OpenFailure, open_snapshot};
use qcow2_core::GuestDisk;
use qcow2_exerciser::{OpenRequest, open_files};
use qcow2_ops::snapshot::SnapshotName;
use qcow2_serve::control::{Pauses, live};
use qcow2_serve::export::{Export, ExportError, ExportOptions};
use qcow2_serve::nbd::{Address, ListenError, Listener, Security, Server, ServerOptions};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

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
    pub(super) security: Option<Security>,
    pub(super) addresses: Vec<Address>,
    pub(super) objects: Objects,
    pub(super) also: Also,
}

/// What stands beside the NBD server, if anything.
#[derive(Clone, Debug, Default)]
pub(super) struct Also {
    /// Path of the control socket.
    pub(super) control: Option<PathBuf>,
    /// File in which the top is recorded.
    pub(super) record: Option<PathBuf>,
    /// Path of the socket for a machine's monitor.
    pub(super) machine: Option<PathBuf>,
    pub(super) queues: u16,
    pub(super) serial: String,
}

/// Serves until a signal ends it, then closes the images. `words`: who speaks.
pub(super) fn serve(session: &Session, serving: Serving, words: &dyn Words) -> Result<u8, Failure> {
    let bound = serving.addresses.iter().map(Listener::bind).collect::<Result<Vec<_>, _>>();
    let listeners = bound.map_err(|error| words.not_bound(&error))?;
    let also = &serving.also;
    let beside = Beside::bind(also).map_err(|error| words.not_bound(&error))?;
    let (mut exports, mut files) = (Vec::new(), Vec::new());
    for mut served in serving.images {
        follow_record(session, &mut served, also)?;
        let (file, pauses) = (served.open.path.clone().unwrap_or_default(), Arc::default());
        exports.push(open(session, served, &serving.objects, (also, &pauses), words)?);
        files.push((file, pauses));
    }
    let server = Server::new(exports, serving.server).with_security(serving.security);
    let (stop, stopped) = (server.stop(), Arc::new(AtomicBool::new(false)));
    let (to_stop, signalled) = (server.stop(), Arc::clone(&stopped));
    qcow2_terminal::on_stop(move || {
        signalled.store(true, Ordering::Release);
        to_stop.stop();
    });
    words.ready(session, &listeners)?;
    beside.paths().try_for_each(|path| session.print(&format!("listening on {}\n", path.display())))?;
    let exports: Vec<_> = server.exports().iter().zip(files).collect();
    let ran = beside.run(&exports, also, (&stopped, &stop), || server.run(&listeners));
    drop((listeners, beside));
    // All of them, whatever the first one says.
    let closed: Vec<_> = server.exports().iter().map(close_export).collect();
    ran?.map_err(|error| Failure::new(persona::chain(&error)))?;
    closed.into_iter().collect::<Result<(), _>>()?;
    Ok(exit::SUCCESS)
}

/// Who speaks: the verb or the tool that is stood in for.
pub(super) trait Words {
    /// Nobody can connect.
    fn not_bound(&self, error: &ListenError) -> Failure {
        Failure::new(error.to_string())
    }

    /// `image` was not opened.
    fn not_opened(&self, _image: &str, failure: Failure) -> Failure {
        failure
    }

    /// The snapshot of `image` was not opened.
    fn not_loaded(&self, image: &str, failure: Failure, _missing: bool) -> Failure {
        self.not_opened(image, failure)
    }

    /// An export cannot be made of a disk.
    fn no_export(&self, error: ExportError) -> Failure {
        Failure::new(persona::chain(&error))
    }

    /// Clients can connect.
    fn ready(&self, session: &Session, listeners: &[Listener]) -> Result<(), Failure>;
}

fn close_export(export: &Export) -> Result<(), Failure> {
    match export.is_read_only() {
        true => Ok(()),
        false => match export.disk().as_live() {
            Some(live) => close(&*live.layer()).map_err(Failure::new),
            None => close(&**export.disk()).map_err(Failure::new),
        },
    }
}

/// Opens an image and makes an export of it.
fn open(
    session: &Session,
    mut served: Served,
    objects: &Objects,
    (also, pauses): (&Also, &Arc<Pauses>),
    words: &dyn Words,
) -> Result<Export, Failure> {
    served.export.durable_writes = served.open.cache.is_writethrough();
    served.export.read_only = served.open.read_only || served.snapshot.is_some();
    let image = served.open.path.clone().unwrap_or_default();
    let disk = match &served.snapshot {
        Some(snapshot) => open_as_it_was(&served.open, snapshot, objects).map_err(|failure| {
            let missing = matches!(failure.kind(), FailureKind::NoSuchSnapshot);
            words.not_loaded(&image, failure.into(), missing)
        })?,
        None => {
            let tell = |warning: &_, source: &_| tell_of_change(session, warning, source);
            let how = open_options().with_exchangeable(also.control.is_some());
            let opened = open_files(&served.open, objects.secrets(), how, &tell);
            let opened = opened.map_err(|error| words.not_opened(&image, io::failure(error)))?;
            opened.warnings.iter().flat_map(io::lines).for_each(|line| session.complain(&line));
            served.export.discards = opened.opened.discards;
            match also.control {
                Some(_) if !served.export.read_only => live(opened.opened.disk, pauses),
                _ => opened.opened.disk,
            }
        }
    };
    Export::new(disk, served.export).map_err(|error| words.no_export(error))
}

/// Opens the disk of a snapshot.
fn open_as_it_was(
    open: &OpenRequest,
    snapshot: &SnapshotName,
    objects: &Objects,
) -> Result<Arc<dyn GuestDisk>, OpenFailure> {
    let naming = Naming::new(objects.secrets()).with_format(open.format.clone()).as_list(open.image_opts);
    let name = ImageName::parse(open.path.as_deref().unwrap_or_default(), &naming)?;
    let how = open_options().with_force_share(open.force_share);
    Ok(open_snapshot(&name, &how, |snapshots| snapshot.position(snapshots))?.disk)
}
