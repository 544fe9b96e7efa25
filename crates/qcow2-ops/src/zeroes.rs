//! Finds zeroes in data, and decides which runs of them to leave out.

use crate::source::SECTOR;
use qcow2_core::GuestDisk;
use std::ops::Range;

/// The rules for leaving out zeroes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ZeroGrid {
    /// The smallest unit in bytes that the target can leave out; a power of two.
    pub(crate) target_unit: u64,
    /// Unit of detection in bytes, aligned on the disk; a power of two.
    pub(crate) unit: u64,
    /// Zero runs between data that are shorter than this count as data: leaving out a small gap costs more
    /// than it saves.
    pub(crate) shortest_run: u64,
}

impl ZeroGrid {
    /// The rules for a copy to `target` that leaves out runs of `sparse_size` bytes and more. They are found
    /// in units of the largest power of two in that, and of the target's own unit at least; compressed
    /// clusters are left out as wholes.
    pub(crate) fn of_target(target: &dyn GuestDisk, compress: bool, sparse_size: u64) -> Self {
        let wanted = floor_power(sparse_size.max(SECTOR));
        let target_unit = floor_power(match target.cluster_size() {
            0 => wanted.min(PAGE),
            cluster_size if compress => cluster_size,
            _ => target.zero_granularity(),
        });
        let unit = if compress { target_unit } else { target_unit.max(wanted) };
        Self { target_unit, unit, shortest_run: sparse_size }
    }

    /// The parts of `zeroes`, which are known without looking at bytes, that are whole units of the target;
    /// `end`: where the bytes end, with a unit that may be cut. They are left out however short they are, as
    /// in QEMU. With the target's own unit the bytes show the same, and nothing is returned.
    pub(crate) fn known(&self, zeroes: impl Iterator<Item = Range<u64>>, end: u64) -> Vec<Range<u64>> {
        if self.unit <= self.target_unit {
            return Vec::new();
        }
        let whole = zeroes.map(|run| {
            let last = if run.end == end { end } else { run.end - run.end % self.target_unit };
            run.start.next_multiple_of(self.target_unit)..last
        });
        whole.filter(|part| part.start < part.end).collect()
    }

    /// Splits `bytes`, which are at `start` on the disk, into runs of data and zeroes. Calls `emit` with
    /// start, length and "is zero" for each run, in order and without gaps. The first and the last run may be
    /// of any length, because they may continue outside.
    pub(crate) fn split(&self, start: u64, bytes: &[u8], emit: &mut dyn FnMut(u64, u64, bool)) {
        let end = start + bytes.len() as u64;
        let (mut data_start, mut zero_start) = (None, None);
        let mut at = start;
        while at < end {
            let next = end.min(at - at % self.unit + self.unit);
            if is_zero(&bytes[(at - start) as usize..(next - start) as usize]) {
                zero_start.get_or_insert(at);
            } else if let Some(zeroes) = zero_start.take() {
                match data_start {
                    Some(_) if at - zeroes < self.shortest_run => {}
                    _ => {
                        emit_data(data_start, zeroes, emit);
                        emit(zeroes, at - zeroes, true);
                        data_start = Some(at);
                    }
                }
            } else {
                data_start.get_or_insert(at);
            }
            at = next;
        }
        emit_data(data_start, zero_start.unwrap_or(end), emit);
        if let Some(zeroes) = zero_start {
            emit(zeroes, end - zeroes, true);
        }
    }
}

fn floor_power(value: u64) -> u64 {
    1 << value.max(1).ilog2()
}

/// The unit in which file systems leave holes.
const PAGE: u64 = 4096;

fn emit_data(start: Option<u64>, end: u64, emit: &mut dyn FnMut(u64, u64, bool)) {
    if let Some(start) = start {
        emit(start, end - start, false);
    }
}

/// True if all bytes are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // No early exit inside a block, so that the compiler can vectorise the loop.
    let mut blocks = bytes.chunks_exact(BLOCK_LEN);
    let all_zero = blocks.by_ref().all(|block| block.iter().fold(0, |any, byte| any | byte) == 0);
    all_zero && blocks.remainder().iter().all(|&byte| byte == 0)
}

/// Index of the first byte that is not zero.
pub(crate) fn first_nonzero(bytes: &[u8]) -> Option<usize> {
    let block = bytes.chunks(BLOCK_LEN).position(|block| !is_zero(block))?;
    let from = block * BLOCK_LEN;
    bytes[from..].iter().position(|&byte| byte != 0).map(|inside| from + inside)
}

const BLOCK_LEN: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nonzero_byte_is_found_at_any_index() {
        for len in [0, 1, 7, 255, 256, 257, 1000, 4096] {
            let mut bytes = vec![0; len];
            assert!(is_zero(&bytes), "{len}");
            assert_eq!(first_nonzero(&bytes), None);
            for at in 0..len {
                bytes[at] = 1 << (at % 8);
                assert!(!is_zero(&bytes), "{at} of {len}");
                assert_eq!(first_nonzero(&bytes), Some(at));
                bytes[at] = 0;
            }
        }
    }

    /// Units of 4 bytes: `.` is a zero byte, anything else data. In `expected`, `D` stands for data and `z`
    /// for zeroes.
    #[track_caller]
    fn check(start: u64, shortest_run: u64, text: &str, expected: &str) {
        let bytes: Vec<u8> = text.bytes().map(|b| if b == b'.' { 0 } else { b }).collect();
        let mut runs = Vec::new();
        let mut at = start;
        ZeroGrid { target_unit: 4, unit: 4, shortest_run }.split(start, &bytes, &mut |start, len, zero| {
            assert_eq!(start, at, "gap");
            at += len;
            runs.push(format!("{}{len}", if zero { "z" } else { "D" }));
        });
        assert_eq!(at, start + bytes.len() as u64);
        assert_eq!(runs.join(" "), expected, "{text}");
    }

    #[test]
    fn runs_are_aligned_on_the_disk() {
        check(0, 4, "", "");
        check(0, 4, "........", "z8");
        check(0, 4, "xxxxxxxx", "D8");
        check(0, 4, "...x....", "D4 z4");
        check(0, 4, "....xxxx....xxxx", "z4 D4 z4 D4");
        check(0, 4, "xx....xx", "D8");
        check(4, 4, "xxxx....x", "D4 z4 D1");
        // Units are aligned on the disk, not in the buffer.
        check(2, 4, "xx....xx", "D2 z4 D2");
        check(3, 4, ".xxxx.", "z1 D4 z1");
        check(3, 4, ".xxxx..x", "z1 D7");
        check(3, 4, ".xxxx", "z1 D4");
    }

    #[test]
    fn known_zeroes_are_cut_to_units_of_the_target() {
        let grid = ZeroGrid { target_unit: 4, unit: 16, shortest_run: 16 };
        let known = grid.known([1..9, 10..11, 12..16, 21..30].into_iter(), 30);
        assert_eq!(known, [4..8, 12..16, 24..30]);
        let same = ZeroGrid { target_unit: 16, ..grid };
        assert_eq!(same.known(std::iter::once(0..32), 32), []);
    }

    #[test]
    fn short_gaps_count_as_data_except_at_the_ends() {
        check(0, 8, "....xxxx....xxxx....", "z4 D12 z4");
        check(0, 8, "xxxx........xxxx", "D4 z8 D4");
        check(0, 9, "xxxx........xxxx", "D16");
        check(0, 8, "xxxx....xxxx........xxxx....", "D12 z8 D4 z4");
    }
}
