//! The limits that a `blkdebug` node sets to the requests that reach it, and how larger or smaller ones are
//! cut. Pure.

use std::ops::Range;

/// Limits of requests, in bytes; 0: none. Lengths that are limited are cut to a multiple of what they are
/// aligned to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct DebugLimits {
    /// Requests begin and end at multiples of this, a power of two: others are widened, a write by what is
    /// read around it.
    pub align: u64,
    /// Bytes of a read or write at most.
    pub max_transfer: u64,
    /// What zeroes are aligned to: what is less is written as bytes.
    pub opt_write_zero: u64,
    /// Bytes of zeroes at most.
    pub max_write_zero: u64,
    /// What discards are aligned to: what is less is a request of its own.
    pub opt_discard: u64,
    /// Bytes of a discard at most.
    pub max_discard: u64,
}

/// How a write is widened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Padding {
    /// Bytes before it.
    pub(super) head: u64,
    /// Bytes behind it.
    pub(super) tail: u64,
    /// Whether the blocks at both ends are one read.
    pub(super) is_one_read: bool,
}

impl DebugLimits {
    /// The first limit that cannot be met, by the name of its option and its bytes.
    pub fn unmet(&self) -> Option<(&'static str, u64)> {
        let align = self.block();
        let fits = |value: u64, unit: u64| value < MAX_BYTES && value.is_multiple_of(unit);
        let meets = [
            ("align", self.align, self.align < MAX_BYTES && align.is_power_of_two()),
            ("max-transfer", self.max_transfer, fits(self.max_transfer, align)),
            ("opt-write-zero", self.opt_write_zero, fits(self.opt_write_zero, align)),
            (
                "max-write-zero",
                self.max_write_zero,
                fits(self.max_write_zero, align.max(self.opt_write_zero)),
            ),
            ("opt-discard", self.opt_discard, fits(self.opt_discard, align)),
            ("max-discard", self.max_discard, fits(self.max_discard, align.max(self.opt_discard))),
        ];
        meets.into_iter().find(|(.., met)| !met).map(|(option, value, _)| (option, value))
    }

    /// What requests are aligned to.
    pub(super) fn block(&self) -> u64 {
        self.align.max(1)
    }

    /// The blocks that `bytes` touch.
    pub(super) fn widened(&self, bytes: &Range<u64>) -> Range<u64> {
        let block = self.block();
        let end = bytes.end.checked_next_multiple_of(block).unwrap_or(bytes.end);
        bytes.start - bytes.start % block..end
    }

    /// How a write of `bytes` becomes one of `blocks`.
    pub(super) fn padding(&self, bytes: &Range<u64>, blocks: &Range<u64>) -> Padding {
        let (head, tail) = (bytes.start - blocks.start, blocks.end - bytes.end);
        let sum = blocks.end - blocks.start;
        let most = if head > 0 && tail > 0 { 2 * self.block() } else { self.block() };
        Padding { head, tail, is_one_read: sum <= most }
    }

    /// The pieces of a read or a write of `bytes`.
    pub(super) fn transfers(&self, bytes: Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
        let most = at_most(self.max_transfer, self.block(), MAX_BYTES);
        cut(bytes, move |left| left.end.min(left.start + most))
    }

    /// The pieces of `bytes` that are to become zeroes, which are whole blocks: those that are short of the
    /// alignment of zeroes are to be written.
    pub(super) fn zeroes(&self, bytes: Range<u64>) -> impl Iterator<Item = (Range<u64>, bool)> + use<> {
        let unit = self.opt_write_zero.max(self.block());
        let most = at_most(self.max_write_zero, unit, MAX_BYTES);
        let written = at_most(self.max_transfer, self.block(), MAX_WRITTEN_ZEROES);
        cut(bytes, move |left| {
            let len = left.end - left.start;
            let (head, tail) = (left.start % unit, left.end % unit);
            let len = match (head, tail) {
                (0, 0) => len,
                (0, tail) if len > tail => len - tail,
                (0, _) => len,
                (head, _) => len.min(unit - head),
            };
            let len = len.min(most);
            left.start + if len < unit { len.min(written) } else { len }
        })
        .map(move |piece| (piece.clone(), piece.end - piece.start < unit))
    }

    /// The pieces of a discard of `bytes` that are whole blocks.
    pub(super) fn discards(&self, bytes: Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
        let block = self.block();
        let unit = self.opt_discard.max(block);
        let most = at_most(self.max_discard, unit, MAX_DISCARD);
        let pieces = cut(bytes, move |left| {
            let (len, head, tail) = (left.end - left.start, left.start % unit, left.end % unit);
            let len = match (head, tail) {
                (0, 0) => len,
                (0, tail) if len > unit => len - tail,
                // The end of a block that is not whole is a piece of its own, and so is its start.
                (0, tail) if !tail.is_multiple_of(block) && tail > block => len - tail % block,
                (0, _) => len,
                (head, _) => match len.min(unit - head) {
                    len if len.is_multiple_of(block) => len,
                    len => len % block,
                },
            };
            left.start + len.min(most)
        });
        pieces.filter(move |piece| piece.end - piece.start >= block)
    }
}

/// The largest length up to `limit` (0: `most`) that is a multiple of `unit`.
fn at_most(limit: u64, unit: u64, most: u64) -> u64 {
    let limit = if limit == 0 { most } else { limit.min(most) };
    (limit - limit % unit).max(unit)
}

/// Cuts `bytes`: `end_of` says where the first piece of the rest ends, which is not empty.
fn cut(bytes: Range<u64>, end_of: impl Fn(&Range<u64>) -> u64) -> impl Iterator<Item = Range<u64>> {
    let mut left = bytes;
    std::iter::from_fn(move || {
        let start = left.start;
        let end = if left.is_empty() { return None } else { end_of(&left).clamp(start + 1, left.end) };
        left.start = end;
        Some(start..end)
    })
}

/// Bytes of a request, below 2 GiB as in QEMU.
const MAX_BYTES: u64 = (1 << 31) - 1;
/// Bytes of zeroes that are written at a time.
const MAX_WRITTEN_ZEROES: u64 = 16 << 20;
/// Bytes of a discard.
const MAX_DISCARD: u64 = i64::MAX as u64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_that_cannot_be_met() {
        let limits = |change: fn(&mut DebugLimits)| {
            let mut limits = DebugLimits { align: 4096, ..DebugLimits::default() };
            change(&mut limits);
            limits.unmet()
        };
        assert_eq!(limits(|_| ()), None);
        assert_eq!(limits(|l| l.align = 0), None);
        assert_eq!(limits(|l| l.align = 3072), Some(("align", 3072)));
        assert_eq!(limits(|l| l.align = 1 << 31), Some(("align", 1 << 31)));
        assert_eq!(limits(|l| l.max_transfer = 512), Some(("max-transfer", 512)));
        assert_eq!(limits(|l| (l.opt_discard, l.max_discard) = (8192, 12288)), Some(("max-discard", 12288)));
        assert_eq!(limits(|l| l.max_write_zero = 1 << 31), Some(("max-write-zero", 1 << 31)));
    }

    #[test]
    fn discards_are_cut_at_their_alignment() {
        let limits = |align, opt_discard, max_discard| DebugLimits {
            align,
            opt_discard,
            max_discard,
            ..DebugLimits::default()
        };
        let pieces = |limits: DebugLimits, bytes| limits.discards(bytes).collect::<Vec<_>>();
        let whole = std::iter::once(1000..5000);
        assert!(pieces(limits(0, 0, 0), 1000..5000).into_iter().eq(whole));
        assert_eq!(pieces(limits(0, 0, 1500), 1000..5000), [1000..2500, 2500..4000, 4000..5000]);
        // Less than a block is left alone.
        let blocks = std::iter::once(1024..4608);
        assert!(pieces(limits(512, 0, 0), 1000..5000).into_iter().eq(blocks));
        assert_eq!(pieces(limits(512, 2048, 0), 1000..5000), [1024..2048, 2048..4096, 4096..4608]);
        assert_eq!(
            pieces(limits(0, 3000, 3000), 10..10_000),
            [10..3000, 3000..6000, 6000..9000, 9000..10_000]
        );
    }

    #[test]
    fn zeroes_beside_their_alignment_are_written() {
        let limits = DebugLimits {
            align: 512,
            max_transfer: 1024,
            opt_write_zero: 4096,
            max_write_zero: 8192,
            ..DebugLimits::default()
        };
        let pieces: Vec<_> = limits.zeroes(2560..25_088).collect();
        let written = |start, end| (start..end, true);
        let zeroed = |start, end| (start..end, false);
        assert_eq!(
            pieces,
            [
                written(2560, 3584),
                written(3584, 4096),
                zeroed(4096, 12_288),
                zeroed(12_288, 20_480),
                zeroed(20_480, 24_576),
                written(24_576, 25_088)
            ]
        );
    }
}
