//! Match finder: hash chains over the last 4 KiB, in tables that fit into the L1 data cache.

use super::ring::Ring;
use super::token::{MAX_MATCH, MIN_MATCH};

/// Matches reach back less than this many bytes.
pub(super) const WINDOW: usize = 4096;
const HASH4_BITS: u32 = 12;
const HASH3_BITS: u32 = 11;

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Match {
    pub(super) len: usize,
    /// 0 if there is no match.
    pub(super) distance: usize,
}

/// A position to search at, and the effort.
#[derive(Clone, Copy)]
pub(super) struct Search {
    /// Position in the cluster.
    pub(super) at: usize,
    /// Bytes from there to the end of the cluster.
    pub(super) left: usize,
    /// Only longer matches are accepted.
    pub(super) floor: usize,
    /// How many candidates are examined.
    pub(super) depth: u32,
    /// A match of this length ends the search.
    pub(super) nice: usize,
}

/// The search tables. They hold positions modulo 64 KiB, so an entry can be stale. A stale entry still points
/// into the ring, and the comparison of the bytes decides whether it is a match.
pub(super) struct Tables {
    head4: Box<[u16; 1 << HASH4_BITS]>,
    head3: Box<[u16; 1 << HASH3_BITS]>,
    previous: Box<[u16; WINDOW]>,
}

#[inline(always)]
fn hash(value: u32, bits: u32) -> usize {
    (value.wrapping_mul(0x9e37_79b1) >> (32 - bits)) as usize
}

impl Tables {
    pub(super) fn new() -> Self {
        Self {
            head4: Box::new([0; 1 << HASH4_BITS]),
            head3: Box::new([0; 1 << HASH3_BITS]),
            previous: Box::new([0; WINDOW]),
        }
    }

    /// Clears the tables, so that the same cluster always gives the same matches.
    pub(super) fn reset(&mut self) {
        self.head4.fill(0);
        self.head3.fill(0);
        self.previous.fill(0);
    }

    /// Enters position `at`, where `word` was loaded. Returns the previous positions with the same hash of
    /// three and of four bytes.
    #[inline(always)]
    fn insert(&mut self, at: u16, word: u32) -> (u16, u16) {
        let head3 = &mut self.head3[hash(word << 8, HASH3_BITS)];
        let head4 = &mut self.head4[hash(word, HASH4_BITS)];
        let near = (*head3, *head4);
        *head3 = at;
        *head4 = at;
        self.previous[usize::from(at) % WINDOW] = near.1;
        near
    }

    /// Enters the positions `from..to`.
    #[inline(always)]
    pub(super) fn enter(&mut self, ring: &Ring, from: usize, to: usize) {
        for at in from..to {
            self.insert(at as u16, ring.load32(at as u16));
        }
    }

    /// The longest match at the search position; also enters the position.
    #[inline(always)]
    pub(super) fn find(&mut self, ring: &Ring, search: Search) -> Match {
        let at = search.at as u16;
        let here = ring.load32(at);
        let (near3, near4) = self.insert(at, here);
        let limit = search.left.min(MAX_MATCH);
        let mut best = Match { len: search.floor, distance: 0 };
        if limit <= search.floor.max(MIN_MATCH) {
            return best;
        }
        let reach = search.at.min(WINDOW - 1) as u16;
        if search.floor < MIN_MATCH {
            let distance = at.wrapping_sub(near3);
            if distance.wrapping_sub(1) < reach && (ring.load32(near3) ^ here) << 8 == 0 {
                best = Match { len: MIN_MATCH, distance: distance.into() };
            }
        }
        let mut candidate = near4;
        let mut offset = best.len.saturating_sub(3) as u16;
        let mut tail = ring.load32(at.wrapping_add(offset));
        for _ in 0..search.depth {
            let distance = at.wrapping_sub(candidate);
            if distance.wrapping_sub(1) >= reach {
                break;
            }
            if ring.load32(candidate.wrapping_add(offset)) == tail && ring.load32(candidate) == here {
                let len = ring.common(candidate, at, limit);
                if len > best.len {
                    best = Match { len, distance: distance.into() };
                    if len >= search.nice || len == limit {
                        break;
                    }
                    offset = (len - 3) as u16;
                    tail = ring.load32(at.wrapping_add(offset));
                }
            }
            candidate = self.previous[usize::from(candidate) % WINDOW];
        }
        best
    }
}
