//! What stands beside the NBD server: the control socket, and a machine's monitor.

use super::serving::{Also, Served};
use crate::failure::Failure;
use crate::files::open_options;
use crate::session::Session;
use qcow2_core::{GuestDisk, LiveDisk};
use qcow2_serve::control::{Control, Controlled, ControlledOptions, Pauses, Record};
use qcow2_serve::export::Export;
use qcow2_serve::nbd::Stop;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Opens what was recorded as the top in place of what was named.
pub(super) fn follow_record(session: &Session, served: &mut Served, also: &Also) -> Result<(), Failure> {
    let Some(path) = &also.record else { return Ok(()) };
    let recorded = Record::new(path).read();
    let recorded = recorded.map_err(|error| Failure::new(format!("{}: {error}", path.display())))?;
    if let Some((format, name)) = recorded {
        if served.open.path.as_ref() != Some(&name) {
            session.warn(&format!("the top is '{name}', which is recorded in '{}'", path.display()));
        }
        (served.open.path, served.open.format) = (Some(name), Some(format));
    }
    Ok(())
}

/// An export, the file of its top, and its pauses.
pub(super) type Seen<'a> = (&'a Export, (String, Arc<Pauses>));

/// A disk whose layers can be changed; `pauses` sees how long that takes.
pub(super) fn live(disk: Arc<dyn GuestDisk>, pauses: &Arc<Pauses>) -> Arc<dyn GuestDisk> {
    Arc::new(LiveDisk::observed(disk, pauses.clone()))
}

/// Sockets that are there for as long as this is.
pub(super) struct Beside {
    control: Option<Socket>,
    machine: Option<Socket>,
}

struct Socket {
    listener: UnixListener,
    path: PathBuf,
}

impl Socket {
    fn bind(path: &Option<PathBuf>) -> Result<Option<Self>, Failure> {
        let Some(path) = path else { return Ok(None) };
        let failed = |error| Failure::new(format!("cannot listen on {}: {error}", path.display()));
        Ok(Some(Self { listener: UnixListener::bind(path).map_err(failed)?, path: path.clone() }))
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Whoever has removed it already is not to be told.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Beside {
    pub(super) fn bind(also: &Also) -> Result<Self, Failure> {
        Ok(Self { control: Socket::bind(&also.control)?, machine: Socket::bind(&also.machine)? })
    }

    /// The paths of the sockets.
    pub(super) fn paths(&self) -> impl Iterator<Item = &Path> {
        [&self.control, &self.machine].into_iter().flatten().map(|socket| &*socket.path)
    }

    /// Serves them while `work` runs; the first of them that fails stops `work`.
    pub(super) fn run<T>(
        &self,
        exports: &[Seen<'_>],
        also: &Also,
        (stopped, stop): (&Arc<AtomicBool>, &Stop),
        work: impl FnOnce() -> T,
    ) -> Result<T, Failure> {
        let is_over = || stopped.load(Ordering::Acquire);
        let guarded = |what: &str, done: Result<(), String>| {
            stopped.store(true, Ordering::Release);
            stop.stop();
            done.map_err(|error| Failure::new(format!("{what}: {error}")))
        };
        std::thread::scope(|scope| {
            let control = self.control.as_ref().map(|socket| {
                scope.spawn(|| guarded("control", serve_control(&socket.listener, exports, also, &is_over)))
            });
            let machine = self.machine.as_ref().map(|socket| {
                scope.spawn(|| guarded("vhost-user-blk", serve_machine(socket, exports, also, &is_over)))
            });
            let done = work();
            stopped.store(true, Ordering::Release);
            for thread in [control, machine].into_iter().flatten() {
                thread.join().unwrap_or(Ok(()))?;
            }
            Ok(done)
        })
    }
}

fn serve_control(
    listener: &UnixListener,
    exports: &[Seen<'_>],
    also: &Also,
    is_over: &(dyn Fn() -> bool + Sync),
) -> Result<(), String> {
    let disks = exports.iter().map(|(export, (file, pauses))| {
        let mut options = ControlledOptions::new(file, open_options().with_exchangeable(true));
        options.record = also.record.as_ref().map(Record::new);
        options.pauses = Some(Arc::clone(pauses));
        (*export, options)
    });
    let controlled = Controlled::new(disks, is_over);
    Control::new(&controlled, is_over).serve(listener).map_err(|error: io::Error| error.to_string())
}

#[cfg(target_os = "linux")]
fn serve_machine(
    socket: &Socket,
    exports: &[Seen<'_>],
    also: &Also,
    is_over: &(dyn Fn() -> bool + Sync),
) -> Result<(), String> {
    use qcow2_vhost_user::{Device, Settings, serve};
    let [(export, _)] = exports else { return Err("a device shows one image".to_owned()) };
    let settings = Settings {
        queues: also.queues,
        serial: also.serial.clone(),
        read_only: export.is_read_only(),
        ..Settings::default()
    };
    let device = Device::new(Arc::clone(export.disk()), settings).map_err(|error| error.to_string())?;
    let listener = socket.listener.try_clone().map_err(|error| error.to_string())?;
    serve(&Arc::new(device), listener, is_over).map_err(|error| error.to_string())
}

#[cfg(not(target_os = "linux"))]
fn serve_machine(_: &Socket, _: &[Seen<'_>], _: &Also, _: &(dyn Fn() -> bool + Sync)) -> Result<(), String> {
    Err("only Linux has it".to_owned())
}
