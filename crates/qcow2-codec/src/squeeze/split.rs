//! Detects a change in the kind of content, where a new block with its own codes pays off.

use super::token::Tokens;

/// Token classes: literals by their top two bits and lowest bit, short matches, long matches.
const KINDS: usize = 10;
/// Bytes between two checks. Each check compares the tokens since the last one with those before.
pub(super) const WATCH: usize = 2048;
/// The shortest block, in bytes.
const MIN_BLOCK: usize = 5000;
/// With fewer tokens than this there is too little evidence; they count as recent in the next check too.
const LEAST_RECENT: u64 = 300;
/// Number of length symbols that stand for up to 8 bytes.
const SHORT_LENGTHS: usize = 6;

/// The tokens of the block by class, as of the last check.
#[derive(Default)]
pub(super) struct Split {
    total: [u32; KINDS],
}

impl Split {
    /// True if the block, `len` bytes so far, should end here, `left` bytes before the end of the cluster.
    pub(super) fn is_due(&mut self, tokens: &Tokens, len: usize, left: usize) -> bool {
        let mut now = [0; KINDS];
        for (kind, counts) in tokens.literals.chunks_exact(64).enumerate() {
            for pair in counts.chunks_exact(2) {
                now[2 * kind] += pair[0];
                now[2 * kind + 1] += pair[1];
            }
        }
        now[8] = tokens.lengths[..SHORT_LENGTHS].iter().sum();
        now[9] = tokens.lengths[SHORT_LENGTHS..].iter().sum();
        let count = |kinds: &[u32; KINDS]| u64::from(kinds.iter().sum::<u32>());
        let total = count(&self.total);
        let recent = count(&now) - total;
        if recent < LEAST_RECENT {
            return false;
        }
        let before = std::mem::replace(&mut self.total, now);
        if total == 0 || len < MIN_BLOCK || left < MIN_BLOCK {
            return false;
        }
        let mut distance = 0;
        for (&t, &n) in before.iter().zip(&now) {
            distance += (u64::from(t) * recent).abs_diff(u64::from(n - t) * total);
        }
        // The difference of the two distributions, scaled by the recent count, against a price for a new
        // header.
        distance + len as u64 / 4096 * total >= total * recent * 200 / 512
    }
}
