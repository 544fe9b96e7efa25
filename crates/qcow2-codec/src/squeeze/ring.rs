//! The bytes that are searched for matches: the window behind and the bytes ahead, in a ring of 64 KiB.

/// Size of the ring in bytes; a `u16` indexes it.
const RING: usize = 1 << 16;
/// The first bytes of the ring, repeated behind its end, so that eight bytes can be loaded at any index.
const MIRROR: usize = 8;
/// Zeroes behind the last byte of the cluster, so that loads there do not depend on earlier clusters.
const ZEROES: usize = 16;

/// A part of the cluster; each byte is at its position modulo 64 KiB.
pub(super) struct Ring {
    bytes: Box<[u8; RING + MIRROR]>,
    filled: usize,
}

impl Ring {
    pub(super) fn new() -> Self {
        Self { bytes: Box::new([0; RING + MIRROR]), filled: 0 }
    }

    /// Drops the previous cluster.
    pub(super) fn reset(&mut self) {
        self.filled = 0;
    }

    /// Number of bytes of the cluster loaded so far.
    pub(super) fn filled(&self) -> usize {
        self.filled
    }

    /// Loads as much of `plain` as fits while keeping the bytes from `keep` on.
    pub(super) fn fill(&mut self, plain: &[u8], keep: usize) {
        let until = plain.len().min(keep + RING - ZEROES);
        let mut rest = plain.get(self.filled..until).unwrap_or_default();
        while !rest.is_empty() {
            let place = self.filled % RING;
            let (now, later) = rest.split_at(rest.len().min(RING - place));
            self.bytes[place..place + now.len()].copy_from_slice(now);
            self.filled += now.len();
            rest = later;
        }
        if self.filled == plain.len() {
            (self.filled..self.filled + ZEROES).for_each(|at| self.bytes[at % RING] = 0);
        }
        self.bytes.copy_within(..MIRROR, RING);
    }

    #[inline(always)]
    pub(super) fn byte(&self, at: u16) -> u8 {
        self.bytes[usize::from(at)]
    }

    #[inline(always)]
    pub(super) fn load32(&self, at: u16) -> u32 {
        let at = usize::from(at);
        self.bytes[at..at + 8].first_chunk().map_or(0, |b| u32::from_le_bytes(*b))
    }

    #[inline(always)]
    pub(super) fn load64(&self, at: u16) -> u64 {
        let at = usize::from(at);
        self.bytes[at..at + 8].first_chunk().map_or(0, |b| u64::from_le_bytes(*b))
    }

    /// Number of equal bytes at `a` and `b`, from 4 (already known) to `limit`.
    #[inline(always)]
    pub(super) fn common(&self, a: u16, b: u16, limit: usize) -> usize {
        let mut len = 4;
        while len < limit {
            let step = len as u16;
            let difference = self.load64(a.wrapping_add(step)) ^ self.load64(b.wrapping_add(step));
            if difference != 0 {
                return (len + (difference.trailing_zeros() / 8) as usize).min(limit);
            }
            len += 8;
        }
        limit
    }
}
