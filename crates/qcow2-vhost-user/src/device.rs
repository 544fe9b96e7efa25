//! The disk, and what the guest is told of it.

use crate::config::{self, State};
use crate::observe::{Ended, Observer};
use qcow2_core::GuestDisk;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Limits of virtio and of the number of threads that a device may start.
const MAX_QUEUES: u16 = 64;
const MAX_QUEUE_SIZE: u16 = 1024;
/// Bytes of a serial number. Virtio specification 1.2, 5.2.6 "Device Operation".
pub(crate) const SERIAL: usize = 20;

/// How the device presents itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Number of queues, 1 to 64; each has a thread while a monitor is connected. A guest with several
    /// processors uses one queue per processor.
    pub queues: u16,
    /// Requests that fit into a queue: a power of two, 4 to 1024.
    pub queue_size: u16,
    /// The device's serial number, at most 20 bytes; empty for none.
    pub serial: String,
    /// Whether the guest is told that it may only read. Otherwise the disk must be open for writing.
    pub read_only: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self { queues: 1, queue_size: 128, serial: String::new(), read_only: false }
    }
}

/// A setting that is not allowed; the text says what was seen and what is allowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SettingsError(String);

impl fmt::Display for SettingsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for SettingsError {}

/// A disk with its settings. It outlives the connections of monitors.
pub struct Device {
    disk: Arc<dyn GuestDisk>,
    settings: Settings,
    serial: [u8; SERIAL],
    /// Whether the driver knows flushes.
    flushes: AtomicBool,
    /// Whether the driver left the write cache on.
    cache: AtomicBool,
    observer: Observer,
}

impl Device {
    /// A device that shows `disk`. Errors: a setting outside the range that its field names.
    pub fn new(disk: Arc<dyn GuestDisk>, settings: Settings) -> Result<Self, SettingsError> {
        let refuse = |text: String| Err(SettingsError(text));
        if !(1..=MAX_QUEUES).contains(&settings.queues) {
            return refuse(format!("{} queues: allowed are 1 to {MAX_QUEUES}", settings.queues));
        }
        let size = settings.queue_size;
        if !(4..=MAX_QUEUE_SIZE).contains(&size) || !size.is_power_of_two() {
            return refuse(format!("queues of {size}: allowed are powers of two from 4 to {MAX_QUEUE_SIZE}"));
        }
        let given = settings.serial.as_bytes();
        let mut serial = [0; SERIAL];
        match serial.get_mut(..given.len()) {
            Some(start) => start.copy_from_slice(given),
            None => return refuse(format!("a serial number of {} bytes: at most {SERIAL}", given.len())),
        }
        let (flushes, cache) = (AtomicBool::new(true), AtomicBool::new(true));
        Ok(Self { disk, settings, serial, flushes, cache, observer: Observer::default() })
    }

    /// The same with somebody who is told of each request that reached the disk. `observer` is called on the
    /// threads of all queues, before the guest gets its answer: it should not block.
    #[must_use]
    pub fn with_observer(mut self, observer: impl Fn(Ended) + Send + Sync + 'static) -> Self {
        self.observer = Observer::new(observer);
        self
    }

    pub(crate) fn observer(&self) -> &Observer {
        &self.observer
    }

    pub(crate) fn disk(&self) -> &dyn GuestDisk {
        &*self.disk
    }

    pub(crate) fn settings(&self) -> &Settings {
        &self.settings
    }

    pub(crate) fn serial(&self) -> &[u8; SERIAL] {
        &self.serial
    }

    /// Whether writes may wait for a flush.
    pub(crate) fn is_writeback(&self) -> bool {
        self.flushes.load(Ordering::Acquire) && self.cache.load(Ordering::Acquire)
    }

    /// What the driver says: whether it knows flushes, which firmware often does not.
    pub(crate) fn set_flushes(&self, known: bool) {
        self.flushes.store(known, Ordering::Release);
    }

    /// Switches the write cache on or off.
    pub(crate) fn set_cache(&self, on: bool) {
        self.cache.store(on, Ordering::Release);
    }

    /// The configuration space of this moment: a disk that was resized has its new size.
    pub(crate) fn config(&self) -> [u8; config::LEN] {
        let (size, cluster_size) = (self.disk.size(), self.disk.cluster_size());
        config::bytes(&self.settings, State { size, cluster_size, writeback: self.is_writeback() })
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device").field("settings", &self.settings).finish_non_exhaustive()
    }
}
