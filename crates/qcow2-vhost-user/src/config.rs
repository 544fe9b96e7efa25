//! The device's configuration space. Virtio specification 1.2, 5.2.4 "Device configuration layout".

use crate::device::Settings;
use crate::request::{MAX_SECTORS, MAX_SEGMENTS};

/// Bytes of the configuration space that have a meaning here.
pub(crate) const LEN: usize = 60;
/// Offset of the field by which the driver switches the write cache on and off.
pub(crate) const WRITEBACK: u32 = 32;
const SECTOR: u64 = 512;

/// What the space tells, besides the settings.
#[derive(Clone, Copy, Debug)]
pub(crate) struct State {
    /// Size of the disk in bytes.
    pub(crate) size: u64,
    /// Cluster size of the disk in bytes, 0 if it has none.
    pub(crate) cluster_size: u64,
    /// Whether writes may stay in a cache until the next flush.
    pub(crate) writeback: bool,
}

/// The whole space.
pub(crate) fn bytes(settings: &Settings, state: State) -> [u8; LEN] {
    let mut space = [0; LEN];
    let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
    // A preferred length that no field can hold is no preference.
    let preferred = u32::try_from(state.cluster_size / SECTOR).unwrap_or(0);
    put(0, &(state.size / SECTOR).to_le_bytes());
    // Longest descriptor chain without header and status.
    put(12, &(u32::from(settings.queue_size) - 2).to_le_bytes());
    put(20, &(SECTOR as u32).to_le_bytes());
    // 4 KiB pages: 2^3 sectors.
    put(24, &[3]);
    put(26, &1_u16.to_le_bytes());
    put(28, &preferred.to_le_bytes());
    put(32, &[u8::from(state.writeback)]);
    put(34, &settings.queues.to_le_bytes());
    put(36, &MAX_SECTORS.to_le_bytes());
    put(40, &MAX_SEGMENTS.to_le_bytes());
    put(44, &preferred.max(1).to_le_bytes());
    put(48, &MAX_SECTORS.to_le_bytes());
    put(52, &MAX_SEGMENTS.to_le_bytes());
    put(56, &[1]);
    space
}

/// `len` bytes of the space at `offset`; zeroes past its end, as far as any version of the space goes.
pub(crate) fn part(space: &[u8; LEN], offset: u32, len: u32) -> Vec<u8> {
    // Longest configuration space that vhost-user can transfer.
    const MAX: u32 = 256;
    let end = offset.saturating_add(len).min(MAX);
    (offset.min(end)..end).map(|at| space.get(at as usize).copied().unwrap_or(0)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_stand_where_the_specification_has_them() {
        let settings = Settings { queues: 3, queue_size: 128, ..Settings::default() };
        let state = State { size: 5 << 20, cluster_size: 65_536, writeback: true };
        let space = bytes(&settings, state);
        assert_eq!(part(&space, 0, 8), (10_240_u64).to_le_bytes());
        assert_eq!(part(&space, 12, 4), 126_u32.to_le_bytes());
        assert_eq!(part(&space, 28, 4), 128_u32.to_le_bytes());
        assert_eq!(part(&space, WRITEBACK, 1), [1]);
        assert_eq!(part(&space, 34, 2), 3_u16.to_le_bytes());
        assert_eq!(part(&space, 58, 4), [0; 4]);
        assert_eq!(part(&space, u32::MAX, u32::MAX), []);
        assert_eq!(part(&space, 200, 1000).len(), 56);
    }
}
