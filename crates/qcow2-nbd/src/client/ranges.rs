//! Which bytes of a read have arrived.

use std::collections::BTreeMap;

/// Disjoint ranges, joined where they touch: starts and ends.
#[derive(Debug, Default)]
pub(super) struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    /// Adds `start..start + len`. Returns false if some of it was there.
    pub(super) fn add(&mut self, start: u64, len: u64) -> bool {
        let (mut start, mut end) = (start, start + len);
        if let Some((&before, &before_end)) = self.0.range(..=start).next_back() {
            if before_end > start {
                return false;
            }
            if before_end == start {
                start = before;
            }
        }
        match self.0.range(start + 1..).next().map(|(&after, &after_end)| (after, after_end)) {
            Some((after, _)) if after < end => return false,
            Some((after, after_end)) if after == end => {
                self.0.remove(&after);
                end = after_end;
            }
            _ => {}
        }
        self.0.insert(start, end);
        true
    }

    /// True if the ranges are `0..len` and nothing else.
    pub(super) fn are(&self, len: u64) -> bool {
        match self.0.first_key_value() {
            None => len == 0,
            Some((&start, &end)) => self.0.len() == 1 && start == 0 && end == len,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_come_in_any_order_and_never_twice() {
        let mut ranges = Ranges::default();
        assert!(ranges.are(0));
        for (start, len, is_new) in [
            (4, 2, true),
            (0, 2, true),
            (1, 1, false),
            (3, 2, false),
            (2, 3, false),
            (2, 2, true),
            (0, 1, false),
        ] {
            assert_eq!(ranges.add(start, len), is_new, "{start} {len}");
        }
        assert!(ranges.are(6) && !ranges.are(5) && !ranges.are(7));
    }
}
