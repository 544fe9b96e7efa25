//! A small seeded random number generator: the same seed gives the same run on every machine.

/// xoshiro256** seeded by splitmix64. Not cryptographically secure.
#[derive(Clone, Debug)]
pub struct Rng {
    state: [u64; 4],
    /// Bytes that numbers are taken from before the generator is; the next one is the last.
    tape: Vec<u8>,
}

impl Rng {
    /// A generator with this seed; neighbouring seeds give unrelated sequences.
    pub fn new(seed: u64) -> Self {
        let mut at = seed;
        let mut next = || {
            at = at.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = at;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        };
        Self { state: [next(), next(), next(), next()], tape: Vec::new() }
    }

    /// A generator whose numbers are decided by `bytes`, and by a fixed seed once they are used up. A small
    /// number takes one byte, so that a fuzzer that changes a byte changes one decision.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let mut tape = bytes.to_vec();
        tape.reverse();
        Self { tape, ..Self::new(0) }
    }

    /// 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        if !self.tape.is_empty() {
            return self.taped(8);
        }
        let [a, b, c, d] = self.state;
        let result = b.wrapping_mul(5).rotate_left(7).wrapping_mul(9);
        let (c, d) = (c ^ a, d ^ b);
        self.state = [a ^ d, b ^ c, c ^ (b << 17), d.rotate_left(45)];
        result
    }

    /// A number from 0 up to but not including `end`; 0 if `end` is 0.
    pub fn below(&mut self, end: u64) -> u64 {
        if !self.tape.is_empty() {
            let bytes = (64 - end.saturating_sub(1).leading_zeros()).div_ceil(8);
            return self.taped(bytes).checked_rem(end).unwrap_or(0);
        }
        ((u128::from(self.next_u64()) * u128::from(end)) >> 64) as u64
    }

    /// The number in the next `bytes` bytes of the tape; missing ones count as zeroes.
    fn taped(&mut self, bytes: u32) -> u64 {
        (0..bytes).fold(0, |number, _| number << 8 | u64::from(self.tape.pop().unwrap_or(0)))
    }

    /// A number from `first` to `last`, both included; `first` if `last` is smaller.
    pub fn between(&mut self, first: u64, last: u64) -> u64 {
        first + self.below(last.saturating_sub(first).saturating_add(1))
    }

    /// True in one of `n` calls on average.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// A random element of `choices`, which must not be empty.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    /// Fills `buf` with random bytes.
    pub fn fill(&mut self, buf: &mut [u8]) {
        for chunk in buf.chunks_mut(8) {
            chunk.copy_from_slice(&self.next_u64().to_le_bytes()[..chunk.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_repeat_and_differ() {
        let mut a = Rng::new(7);
        let mut b = Rng::new(7);
        let mut c = Rng::new(8);
        let run: Vec<u64> = (0..50).map(|_| a.next_u64()).collect();
        assert_eq!(run, (0..50).map(|_| b.next_u64()).collect::<Vec<_>>());
        assert_ne!(run, (0..50).map(|_| c.next_u64()).collect::<Vec<_>>());
    }

    #[test]
    fn bytes_decide_until_they_are_used_up() {
        let mut rng = Rng::from_bytes(&[7, 250, 1, 2, 3]);
        assert_eq!((rng.below(10), rng.below(1), rng.pick(&[5, 6, 7]), rng.below(300)), (7, 0, 6, 258));
        assert_eq!(rng.next_u64(), 3 << 56);
        let mut seeded = Rng::new(0);
        assert_eq!((rng.next_u64(), rng.below(9)), (seeded.next_u64(), seeded.below(9)));
    }

    #[test]
    fn numbers_stay_in_range_and_reach_both_ends() {
        let mut rng = Rng::new(1);
        let mut seen = [0u32; 5];
        for _ in 0..1000 {
            seen[rng.between(3, 7) as usize - 3] += 1;
            assert!(rng.below(1) == 0 && rng.below(0) == 0);
        }
        assert!(seen.iter().all(|&n| n > 120), "{seen:?}");
    }
}
