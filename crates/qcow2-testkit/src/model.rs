//! The disk as a flat array of bytes with its history: what every guest disk must read as (invariant I8).

use crate::arbitrary::Operation;
use crate::pattern;
use qcow2_core::{GuestDisk, GuestOffset, GuestRange};
use std::fmt::Write;

/// Effect of a discard on the content; the rest of its range is unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiscardRule {
    /// Nothing changes (version 2 with a backing file).
    Ignored,
    /// Whole units of `unit` bytes read as zeroes; the last unit of the disk counts as whole even if it is
    /// cut short. Raw disks: 1.
    Zeroes {
        /// Bytes in a unit.
        unit: u64,
    },
}

/// A flat disk and the operations made on it.
#[derive(Clone, Debug)]
pub struct Model {
    bytes: Vec<u8>,
    discard: DiscardRule,
    history: Vec<Operation>,
}

impl Model {
    /// A disk with the content `bytes`.
    pub fn new(bytes: Vec<u8>, discard: DiscardRule) -> Self {
        Self { bytes, discard, history: Vec::new() }
    }

    /// The disk's content.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The operations made so far, oldest first.
    pub fn history(&self) -> &[Operation] {
        &self.history
    }

    /// Applies `operation` to the array.
    pub fn apply(&mut self, operation: &Operation) {
        self.history.push(*operation);
        match *operation {
            Operation::Write { range, seed } => pattern::fill(seed, range.start().value(), self.slice(range)),
            Operation::Zero { range, .. } => self.slice(range).fill(0),
            Operation::Discard(range) => {
                if let DiscardRule::Zeroes { unit } = self.discard {
                    self.discard_units(range, unit);
                }
            }
            Operation::Read(_) | Operation::Flush | Operation::Reopen => {}
        }
    }

    /// Grows the disk with zeroes, or truncates it.
    pub fn resize(&mut self, size: u64) {
        self.bytes.resize(size as usize, 0);
    }

    /// Compares bytes read at `offset` with the array. The error names the first wrong byte and the
    /// operations that touched it, oldest first.
    pub fn check(&self, offset: GuestOffset, seen: &[u8]) -> Result<(), String> {
        let start = offset.value() as usize;
        let expected = self.bytes.get(start..start + seen.len()).ok_or("read past the end of the model")?;
        // Compare whole slices first: byte by byte is slow in unoptimized builds.
        let wrong = || expected.iter().zip(seen).position(|(a, b)| a != b);
        match (expected != seen).then(wrong).flatten() {
            None => Ok(()),
            Some(at) => Err(self.describe(start + at, expected[at], seen[at])),
        }
    }

    /// Compares the whole content of `disk` with the array.
    pub fn check_disk(&self, disk: &dyn GuestDisk) -> Result<(), String> {
        if disk.size() != self.bytes.len() as u64 {
            return Err(format!("size is {}, expected {}", disk.size(), self.bytes.len()));
        }
        let mut seen = pattern::unread(self.bytes.len());
        disk.read_at(GuestOffset::new(0), &mut seen).map_err(|e| format!("reading everything: {e}"))?;
        self.check(GuestOffset::new(0), &seen)
    }

    /// Runs `operation` on `disk` and on the array, and compares the data of a read.
    pub fn step(&mut self, disk: &dyn GuestDisk, operation: &Operation) -> Result<(), String> {
        let seen = operation.run(disk).map_err(|e| format!("{operation:?}: {}", chain(&e)))?;
        self.apply(operation);
        seen.map_or(Ok(()), |bytes| self.check(operation.range().start(), &bytes))
    }

    fn slice(&mut self, range: GuestRange) -> &mut [u8] {
        &mut self.bytes[range.start().value() as usize..range.end().value() as usize]
    }

    fn discard_units(&mut self, range: GuestRange, unit: u64) {
        let size = self.bytes.len() as u64;
        let start = range.start().value().next_multiple_of(unit);
        let end = if range.end().value() == size { size } else { range.end().value() / unit * unit };
        if start < end {
            self.bytes[start as usize..end as usize].fill(0);
        }
    }

    fn describe(&self, at: usize, expected: u8, seen: u8) -> String {
        let mut text = format!("byte {at:#x} is {seen:#04x}, expected {expected:#04x}; it was touched by");
        for (step, operation) in self.history.iter().enumerate() {
            let range = operation.range();
            if (range.start().value()..range.end().value()).contains(&(at as u64)) {
                let _ = write!(text, "\n  step {step}: {operation:?}");
            }
        }
        text
    }
}

/// An error and its sources in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut at = error.source();
    while let Some(cause) = at {
        let _ = write!(text, ": {cause}");
        at = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use qcow2_core::ZeroMode;

    fn range(start: u64, end: u64) -> GuestRange {
        GuestRange::between(GuestOffset::new(start), GuestOffset::new(end))
    }

    fn check_discard(rule: DiscardRule, discarded: GuestRange, zeroes: std::ops::Range<usize>) {
        let mut model = Model::new(vec![1; 1300], rule);
        model.apply(&Operation::Discard(discarded));
        let seen: Vec<_> = (0..1300).filter(|&at| model.bytes()[at] == 0).collect();
        assert_eq!(seen, zeroes.collect::<Vec<_>>(), "{rule:?} {discarded:?}");
    }

    #[test]
    fn a_discard_zeroes_whole_units_only() {
        let rule = DiscardRule::Zeroes { unit: 512 };
        check_discard(rule, range(0, 512), 0..512);
        check_discard(rule, range(1, 1030), 512..1024);
        check_discard(rule, range(1, 511), 0..0);
        check_discard(rule, range(1000, 1300), 1024..1300);
        check_discard(rule, range(1100, 1300), 0..0);
        check_discard(DiscardRule::Zeroes { unit: 1 }, range(7, 9), 7..9);
        check_discard(DiscardRule::Ignored, range(0, 1300), 0..0);
    }

    #[test]
    fn a_wrong_byte_is_reported_with_its_operations() {
        let mut model = Model::new(vec![0; 2048], DiscardRule::Ignored);
        model.apply(&Operation::Write { range: range(0, 1024), seed: 9 });
        model.apply(&Operation::Zero { range: range(512, 600), mode: ZeroMode::MayUnmap });
        model.apply(&Operation::Write { range: range(1024, 1030), seed: 9 });
        let mut seen = model.bytes().to_vec();
        assert_eq!(model.check(GuestOffset::new(0), &seen), Ok(()));
        seen[513] = 7;
        let error = model.check(GuestOffset::new(0), &seen).unwrap_err();
        assert!(error.starts_with("byte 0x201 is 0x07, expected 0x00"), "{error}");
        assert!(error.contains("step 0") && error.contains("step 1") && !error.contains("step 2"), "{error}");
    }
}
