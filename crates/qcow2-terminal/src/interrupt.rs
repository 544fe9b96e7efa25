//! Ctrl-C and its kin: work stops at the next good place, what is half made is taken away, and the program
//! dies of the signal, so that its caller sees what happened.

use qcow2_blockdev::Unfinished;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

/// What signals ask for, and what must go when one ends the program.
#[derive(Clone, Debug, Default)]
pub struct Interrupts {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    /// The signal that asked to stop; 0: none.
    signal: AtomicI32,
    /// Whether someone looks at `signal` and stops by itself.
    watched: AtomicBool,
    /// Whether progress was asked for.
    progress: AtomicBool,
    /// Files that are not whole yet.
    unfinished: Unfinished,
}

/// Has the first signal that asks to stop call `stop`, on a thread of its own; further ones call it again.
/// Where the system refuses, signals keep their usual effect.
pub fn on_stop(stop: impl Fn() + Send + 'static) {
    system::on_stop(stop);
}

/// Has two signals not end the program, as in QEMU's tools: SIGUSR1, which asks for progress, where there is
/// none to show, and SIGXFSZ, so that a write past the limit of a file's size fails and is told of.
pub fn outlive_harmless_signals() {
    system::outlive_harmless_signals();
}

impl Interrupts {
    /// Takes the signals over, but for those that are ignored. Where the system refuses, they keep their
    /// usual effect.
    pub fn install() -> Self {
        let interrupts = Self::default();
        system::listen(&interrupts.shared);
        interrupts
    }

    /// Whether to stop. Asking promises to go on asking and to stop when told so.
    pub fn should_stop(&self) -> bool {
        self.shared.watched.store(true, Ordering::Relaxed);
        self.shared.signal.load(Ordering::Relaxed) != 0
    }

    /// What is begun is short and comes to its end; a second signal ends the program at once.
    pub fn hold(&self) {
        self.shared.watched.store(true, Ordering::Relaxed);
    }

    /// From now on nobody asks: a signal ends the program at once.
    pub fn stop_watching(&self) {
        self.shared.watched.store(false, Ordering::Relaxed);
        self.die_if_asked();
    }

    /// Waits with `wait` for somebody else, who may take for ever: a signal ends the program at once
    /// meanwhile.
    pub fn while_waiting<T>(&self, wait: impl FnOnce() -> T) -> T {
        self.stop_watching();
        let done = wait();
        // What a signal just now takes away must not be written again: one of both sides sees the other.
        self.shared.watched.store(true, Ordering::SeqCst);
        self.die_if_asked();
        done
    }

    /// Whether progress was asked for since the last call.
    pub fn take_progress_request(&self) -> bool {
        self.shared.progress.swap(false, Ordering::Relaxed)
    }

    /// The files that are taken away if the program ends before [`end_files`](Self::end_files).
    pub fn unfinished(&self) -> &Unfinished {
        &self.shared.unfinished
    }

    /// The files are whole and stay, or go.
    pub fn end_files(&self, whole: bool) {
        let files = &self.shared.unfinished;
        if whole { files.finish() } else { files.discard() }
    }

    /// Dies of the signal that asked to stop, if one did.
    pub fn die_if_asked(&self) {
        self.shared.die_if_asked();
    }
}

impl Shared {
    #[cfg(unix)]
    fn take(&self, signal: i32) {
        let again = self.signal.swap(signal, Ordering::SeqCst) != 0;
        if again || !self.watched.load(Ordering::SeqCst) {
            self.die_if_asked();
        }
    }

    fn die_if_asked(&self) {
        let signal = self.signal.load(Ordering::SeqCst);
        if signal != 0 {
            self.unfinished.discard();
            system::die(signal);
        }
    }
}

#[cfg(unix)]
mod system {
    use super::{Arc, Ordering, Shared};
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGXFSZ};
    use signal_hook::iterator::Signals;
    use std::fs;
    use std::sync::atomic::AtomicBool;
    use std::thread;

    pub(super) fn outlive_harmless_signals() {
        for signal in [SIGUSR1, SIGXFSZ] {
            // Where the system refuses, the signal keeps its usual effect.
            let _ = signal_hook::flag::register(signal, Arc::new(AtomicBool::new(false)));
        }
    }

    pub(super) fn on_stop(stop: impl Fn() + Send + 'static) {
        let Ok(mut signals) = Signals::new(heard()) else { return };
        thread::spawn(move || signals.forever().for_each(|_| stop()));
    }

    pub(super) fn listen(shared: &Arc<Shared>) {
        let Ok(mut signals) = Signals::new(heard().chain([SIGUSR1])) else {
            return;
        };
        let shared = Arc::clone(shared);
        thread::spawn(move || {
            for signal in signals.forever() {
                match signal {
                    SIGUSR1 => shared.progress.store(true, Ordering::Relaxed),
                    _ => shared.take(signal),
                }
            }
        });
    }

    /// The signals that ask to stop, but for those that are ignored.
    fn heard() -> impl Iterator<Item = i32> {
        let ignored = ignored();
        [SIGINT, SIGTERM, SIGHUP].into_iter().filter(move |signal| ignored >> (signal - 1) & 1 == 0)
    }

    /// The signals that whoever started the program had it ignore (`nohup`, a shell's `&`), a bit each: they
    /// stay ignored. None where the system does not tell.
    fn ignored() -> u64 {
        let text = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let bits = text.lines().find_map(|line| line.strip_prefix("SigIgn:"));
        bits.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or(0)
    }

    pub(super) fn die(signal: i32) {
        let _ = signal_hook::low_level::emulate_default_handler(signal);
    }
}

#[cfg(not(unix))]
mod system {
    use super::{Arc, Shared};

    pub(super) fn outlive_harmless_signals() {}

    pub(super) fn on_stop(_stop: impl Fn() + Send + 'static) {}

    pub(super) fn listen(_shared: &Arc<Shared>) {}

    pub(super) fn die(_signal: i32) {}
}
