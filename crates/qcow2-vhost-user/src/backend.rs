//! The device as rust-vmm's daemon wants it: features, rings, and a request for each descriptor chain.

use crate::config::{self, WRITEBACK};
use crate::device::Device;
use crate::guest::GuestBytes;
use crate::request::Transfer;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VringRwLock, VringT};
use virtio_queue::{DescriptorChain, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

/// Feature bits. Virtio specification 1.2, 5.2.3 "Feature bits" and 6 "Reserved Feature Bits".
mod feature {
    pub(super) const SEG_MAX: u64 = 1 << 2;
    pub(super) const READ_ONLY: u64 = 1 << 5;
    pub(super) const BLK_SIZE: u64 = 1 << 6;
    pub(super) const FLUSH: u64 = 1 << 9;
    pub(super) const TOPOLOGY: u64 = 1 << 10;
    pub(super) const CONFIG_WCE: u64 = 1 << 11;
    pub(super) const MQ: u64 = 1 << 12;
    pub(super) const DISCARD: u64 = 1 << 13;
    pub(super) const WRITE_ZEROES: u64 = 1 << 14;
    pub(super) const INDIRECT: u64 = 1 << 28;
    pub(super) const EVENT_IDX: u64 = 1 << 29;
    pub(super) const VERSION_1: u64 = 1 << 32;
}

type Memory = GuestMemoryLoadGuard<GuestMemoryMmap>;

/// One connection's view of the device.
pub(crate) struct Backend {
    device: Arc<Device>,
    memory: Mutex<Option<GuestMemoryAtomic<GuestMemoryMmap>>>,
    event_idx: AtomicBool,
    /// One buffer for each queue's thread.
    buffers: Box<[Mutex<Vec<u8>>]>,
}

impl Backend {
    pub(crate) fn new(device: Arc<Device>) -> Self {
        let buffers = (0..device.settings().queues).map(|_| Mutex::new(Vec::new())).collect();
        // What a driver before this one chose does not hold for the next.
        device.set_cache(true);
        Self { device, memory: Mutex::new(None), event_idx: AtomicBool::new(false), buffers }
    }

    /// Answers all requests that wait in `ring`.
    fn drain(&self, ring: &VringRwLock, memory: &Memory, buffer: &mut Vec<u8>) -> io::Result<()> {
        loop {
            let Some(chain) = ring.get_mut().get_queue_mut().pop_descriptor_chain(memory.clone()) else {
                return Ok(());
            };
            let head = chain.head_index();
            let written = self.answer_chain(memory, chain, buffer);
            ring.add_used(head, written).map_err(io::Error::other)?;
            if ring.needs_notification().map_err(io::Error::other)? {
                ring.signal_used_queue()?;
            }
        }
    }

    /// Answers what waits in `ring`, until nothing does.
    fn look(&self, ring: &VringRwLock, memory: &Memory, buffer: &mut Vec<u8>) -> io::Result<()> {
        if !self.event_idx.load(Ordering::Acquire) {
            return self.drain(ring, memory, buffer);
        }
        // The guest need not announce requests while this thread looks for them anyway. What comes between
        // the last look and the moment when announcements are on again is what the next look is for.
        loop {
            ring.disable_notification().map_err(io::Error::other)?;
            self.drain(ring, memory, buffer)?;
            if !ring.enable_notification().map_err(io::Error::other)? {
                return Ok(());
            }
        }
    }

    /// Answers one request; returns how many bytes were written for the guest. A chain that has no place for
    /// a status gets none.
    fn answer_chain(&self, memory: &Memory, chain: DescriptorChain<Memory>, buffer: &mut Vec<u8>) -> u32 {
        let from_guest = GuestBytes::new(memory, chain.clone().readable());
        let (Some(from_guest), Some(mut to_guest)) = (from_guest, GuestBytes::new(memory, chain.writable()))
        else {
            return 0;
        };
        let Some(status) = to_guest.take_last() else { return 0 };
        let (sent, wanted) = (from_guest.left(), to_guest.left());
        let transfer = Transfer { from_guest, sent, to_guest: &mut to_guest, wanted };
        let outcome = self.device.answer(transfer, buffer);
        status.copy_from(&[outcome as u8]);
        u32::try_from(wanted - to_guest.left()).unwrap_or(u32::MAX).saturating_add(1)
    }
}

impl VhostUserBackend for Backend {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        usize::from(self.device.settings().queues)
    }

    fn max_queue_size(&self) -> usize {
        usize::from(self.device.settings().queue_size)
    }

    fn features(&self) -> u64 {
        use feature::*;
        let always =
            SEG_MAX | BLK_SIZE | FLUSH | TOPOLOGY | CONFIG_WCE | MQ | INDIRECT | EVENT_IDX | VERSION_1;
        let changes = if self.device.settings().read_only { READ_ONLY } else { DISCARD | WRITE_ZEROES };
        always | changes | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn acked_features(&self, features: u64) {
        // A driver that never flushes must not lose what it was told is written.
        self.device.set_flushes(features & feature::FLUSH != 0);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn reset_device(&self) {
        self.device.set_cache(true);
        self.event_idx.store(false, Ordering::Release);
    }

    fn set_event_idx(&self, enabled: bool) {
        self.event_idx.store(enabled, Ordering::Release);
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        config::part(&self.device.config(), offset, size)
    }

    fn set_config(&self, offset: u32, buf: &[u8]) -> io::Result<()> {
        match (offset, buf) {
            (WRITEBACK, [on @ (0 | 1)]) => {
                self.device.set_cache(*on == 1);
                // What was written before the cache was switched off is as durable as what follows.
                if *on == 0 { self.device.disk().flush().map_err(io::Error::other) } else { Ok(()) }
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn update_memory(&self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        *self.memory.lock().unwrap_or_else(PoisonError::into_inner) = Some(memory);
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.device.settings().queues).map(|queue| 1 << queue).collect()
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()
    }

    fn handle_event(
        &self,
        _event: u16,
        _set: EventSet,
        rings: &[VringRwLock],
        thread: usize,
    ) -> io::Result<()> {
        // A thread has one queue, and the list that it is handed has only that one.
        let (Some(ring), Some(buffer)) = (rings.first(), self.buffers.get(thread)) else { return Ok(()) };
        let memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(memory) = memory.map(|memory| memory.memory()) else { return Ok(()) };
        let mut buffer = buffer.lock().unwrap_or_else(PoisonError::into_inner);
        // An error would end the queue's thread. A ring that is not as it should be is the guest's own doing;
        // its next driver finds the thread there.
        let _ = self.look(ring, &memory, &mut buffer);
        Ok(())
    }
}
