//! What stands beside the NBD server: the control socket, and a machine's monitor.

use super::serving::{Also, Served};
use crate::failure::Failure;
use crate::files::open_options;
use crate::session::Session;
use qcow2_serve::control::{self, Record, Seen};
use qcow2_serve::local::LocalListener;
use qcow2_serve::nbd::{ListenError, Stop};
use std::path::PathBuf;
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

/// Sockets that are there for as long as this is.
pub(super) struct Beside {
    control: Option<LocalListener>,
    machine: Option<LocalListener>,
}

impl Beside {
    pub(super) fn bind(also: &Also) -> Result<Self, ListenError> {
        let bind = |path: &Option<PathBuf>| path.as_deref().map(LocalListener::bind).transpose();
        Ok(Self { control: bind(&also.control)?, machine: bind(&also.machine)? })
    }

    /// The paths of the sockets.
    pub(super) fn paths(&self) -> impl Iterator<Item = PathBuf> {
        [&self.control, &self.machine].into_iter().flatten().map(LocalListener::path)
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
                scope.spawn(|| guarded("control", serve_control(socket, exports, also, &is_over)))
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
    listener: &LocalListener,
    exports: &[Seen<'_>],
    also: &Also,
    is_over: &(dyn Fn() -> bool + Sync),
) -> Result<(), String> {
    control::serve(listener, exports, &open_options(), also.record.as_deref(), is_over)
        .map_err(|error| error.to_string())
}

#[cfg(target_os = "linux")]
fn serve_machine(
    listener: &LocalListener,
    exports: &[Seen<'_>],
    also: &Also,
    is_over: &(dyn Fn() -> bool + Sync),
) -> Result<(), String> {
    use qcow2_vhost_user::{Device, Kind, Settings, serve};
    let [(export, _)] = exports else { return Err("a device shows one image".to_owned()) };
    let settings = Settings {
        queues: also.queues,
        serial: also.serial.clone(),
        read_only: export.is_read_only(),
        ..Settings::default()
    };
    let device = Device::new(Arc::clone(export.disk()), settings).map_err(|error| error.to_string())?;
    let statistics = Arc::clone(export.statistics());
    let device = device.with_observer(move |ended| {
        let counter = match ended.kind {
            Kind::Read => &statistics.reads,
            Kind::Write => &statistics.writes,
            Kind::Flush => &statistics.flushes,
            Kind::Discard => &statistics.trims,
            Kind::WriteZeroes => &statistics.zeroes,
        };
        counter.add(ended.bytes, ended.latency);
    });
    let listener = listener.socket().try_clone().map_err(|error| error.to_string())?;
    serve(&Arc::new(device), listener, is_over).map_err(|error| error.to_string())
}

#[cfg(not(target_os = "linux"))]
fn serve_machine(
    _: &LocalListener,
    _: &[Seen<'_>],
    _: &Also,
    _: &(dyn Fn() -> bool + Sync),
) -> Result<(), String> {
    Err("only Linux has it".to_owned())
}
