//! Notices that the kind of content changes, where a new block with codes of its own pays.

/// Literals by their top bits and lowest bit, short and long matches.
const KINDS: usize = 10;
/// How often the recent tokens are compared with those before.
const WATCH: u32 = 512;
/// The shortest block, in bytes.
const MIN_BLOCK: usize = 5000;

#[derive(Default)]
pub(super) struct Split {
    total: [u32; 16],
    recent: [u32; 16],
    total_count: u32,
    recent_count: u32,
}

impl Split {
    #[inline(always)]
    pub(super) fn literal(&mut self, byte: u8) {
        self.recent[usize::from(byte >> 5 & 6 | byte & 1)] += 1;
        self.recent_count += 1;
    }

    #[inline(always)]
    pub(super) fn matched(&mut self, len: usize) {
        self.recent[8 + usize::from(len >= 9)] += 1;
        self.recent_count += 1;
    }

    /// Whether the block, `len` bytes so far, should end here, `left` bytes before the end of the cluster.
    #[inline(always)]
    pub(super) fn is_due(&mut self, len: usize, left: usize) -> bool {
        self.recent_count >= WATCH && self.compare(len, left)
    }

    fn compare(&mut self, len: usize, left: usize) -> bool {
        let mut due = false;
        if self.total_count > 0 {
            let (total, recent) = (u64::from(self.total_count), u64::from(self.recent_count));
            let mut distance = 0;
            for (&t, &r) in self.total.iter().zip(&self.recent).take(KINDS) {
                distance += (u64::from(t) * recent).abs_diff(u64::from(r) * total);
            }
            // The difference of the two distributions, in parts of the recent one, against a price for a new header.
            let cutoff = total * recent * 200 / 512;
            due = len >= MIN_BLOCK && left >= MIN_BLOCK && distance + len as u64 / 4096 * total >= cutoff;
        }
        for (t, r) in self.total.iter_mut().zip(&mut self.recent) {
            *t += *r;
            *r = 0;
        }
        self.total_count += self.recent_count;
        self.recent_count = 0;
        due
    }
}
