//! Huffman decoding tables: the next bits of the stream are the index, the entry describes the symbol.
//!
//! Codes longer than the index are resolved in second-level tables stored behind the first. RFC 1951, 3.2.2.

use super::Fault;

/// The longest code, in bits.
pub(super) const MAX_LENGTH: usize = 15;
/// The largest alphabet.
const MAX_SYMBOLS: usize = 288;

/// One table entry:
///
/// | bits | literal | length or distance | link to a second table |
/// |---|---|---|---|
/// | 0 - 7 | bits to consume | bits to consume, extra bits included | bits of the first index |
/// | 8 - 13 | | bits of the code alone | bits of the second index |
/// | 16 - 30 | the byte | base value | start of the second table |
#[derive(Clone, Copy, Default)]
pub(super) struct Entry(u32);

const LITERAL: u32 = 1 << 31;
const SPECIAL: u32 = 1 << 15;
const SECOND: u32 = 1 << 14;

impl Entry {
    /// No symbol has this code.
    pub(super) const INVALID: Self = Self(SPECIAL);

    pub(super) const fn literal(byte: u8) -> Self {
        Self(LITERAL | (byte as u32) << 16)
    }

    /// A length or distance of at least `base`, with `extra` bits after the code.
    pub(super) const fn value(base: u16, extra: u8) -> Self {
        Self((base as u32) << 16 | extra as u32)
    }

    /// The end-of-block symbol.
    pub(super) const fn end() -> Self {
        Self(SPECIAL | 1 << 16)
    }

    const fn second(start: usize, bits: usize, first_bits: usize) -> Self {
        Self(SPECIAL | SECOND | (start as u32) << 16 | (bits as u32) << 8 | first_bits as u32)
    }

    /// This entry for a code with `length` bits left to consume.
    const fn with_code(self, length: usize) -> Self {
        Self(self.0 + (length as u32) + ((length as u32) << 8))
    }

    #[inline(always)]
    pub(super) fn is_literal(self) -> bool {
        self.0 & LITERAL != 0
    }

    /// True for entries that are neither a literal nor a value.
    #[inline(always)]
    pub(super) fn is_special(self) -> bool {
        self.0 & SPECIAL != 0
    }

    #[inline(always)]
    pub(super) fn is_second(self) -> bool {
        self.0 & SECOND != 0
    }

    /// For special entries: true for the end of a block.
    #[inline(always)]
    pub(super) fn is_end(self) -> bool {
        self.0 >> 16 != 0
    }

    #[inline(always)]
    pub(super) fn byte(self) -> u8 {
        (self.0 >> 16) as u8
    }

    /// Bits to consume, in the lowest six bits of the result; the rest is unrelated.
    #[inline(always)]
    pub(super) fn bits(self) -> u32 {
        self.0
    }

    /// Base value plus the extra bits from `ahead`, which starts with the code itself.
    #[inline(always)]
    pub(super) fn value_of(self, ahead: u64) -> usize {
        let extra = (ahead & ((1 << (self.bits() & 63)) - 1)) >> (self.0 >> 8 & 63);
        (self.0 >> 16) as usize + extra as usize
    }

    /// Index into the table for a linked entry. `ahead`: the bits after the first index.
    #[inline(always)]
    fn place_of(self, ahead: u64) -> usize {
        (self.0 >> 16 & 0x7fff) as usize + (ahead & ((1 << (self.0 >> 8 & 63)) - 1)) as usize
    }
}

/// The table of one code: `1 << BITS` entries, then the second-level tables. `SIZE` is a power of two.
pub(super) struct Table<const BITS: usize, const SIZE: usize> {
    entries: Box<[Entry; SIZE]>,
}

impl<const BITS: usize, const SIZE: usize> Table<BITS, SIZE> {
    pub(super) fn new() -> Self {
        Self { entries: Box::new([Entry::INVALID; SIZE]) }
    }

    /// First-level lookup for the next bits.
    #[inline(always)]
    pub(super) fn first(&self, ahead: u64) -> Entry {
        self.entries[ahead as usize & ((1 << BITS) - 1)]
    }

    /// Second-level lookup. The bits of the first index must have been consumed.
    #[inline(always)]
    pub(super) fn second(&self, entry: Entry, ahead: u64) -> Entry {
        self.entries[entry.place_of(ahead) & (SIZE - 1)]
    }

    /// Builds the table for a code with these lengths; `meaning` gives the entry of a symbol.
    ///
    /// Errors: lengths that form no complete code. As in zlib, two incomplete codes are accepted: no symbols
    /// at all, and a single symbol of one bit.
    pub(super) fn build(&mut self, lengths: &[u8], meaning: impl Fn(usize) -> Entry) -> Result<(), Fault> {
        let sorted = Sorted::new(lengths);
        if sorted.is_complete()? {
            self.fill(&sorted, meaning);
            return Ok(());
        }
        self.entries[..1 << BITS].fill(Entry::INVALID);
        if let Some(&symbol) = sorted.of_length(1).first() {
            let entry = meaning(symbol.into()).with_code(1);
            self.entries[..1 << BITS].iter_mut().step_by(2).for_each(|place| *place = entry);
        }
        Ok(())
    }

    /// Enters the codes in canonical order. Up to `BITS` the table doubles with each length by copying
    /// itself; longer codes go to second-level tables.
    fn fill(&mut self, sorted: &Sorted, meaning: impl Fn(usize) -> Entry) {
        let (mut code, mut size) = (0, 1);
        for length in 1..=BITS {
            self.entries.copy_within(..size, size);
            size *= 2;
            for &symbol in sorted.of_length(length) {
                self.entries[code & (SIZE - 1)] = meaning(symbol.into()).with_code(length);
                code = after(code, length);
            }
        }
        let (mut open, mut start, mut end) = (usize::MAX, 0, size);
        for length in BITS + 1..=MAX_LENGTH {
            let symbols = sorted.of_length(length);
            for (index, &symbol) in symbols.iter().enumerate() {
                let prefix = code % size;
                if prefix != open {
                    let bits = sorted.bits_of_second(BITS, length, symbols.len() - index);
                    (open, start, end) = (prefix, end, end + (1 << bits));
                    self.entries[prefix] = Entry::second(start, bits, BITS);
                }
                let entry = meaning(symbol.into()).with_code(length - BITS);
                let places = self.entries[start..end].iter_mut().skip(code >> BITS);
                places.step_by(1 << (length - BITS)).for_each(|place| *place = entry);
                code = after(code, length);
            }
        }
    }
}

/// The next canonical code of `length` bits, with codes stored first bit lowest. The first code of the next
/// length is the same number with one more bit.
#[inline(always)]
fn after(code: usize, length: usize) -> usize {
    match code ^ ((1 << length) - 1) {
        0 => code,
        zeroes => {
            let highest = 1 << zeroes.ilog2();
            code & (highest - 1) | highest
        }
    }
}

/// Symbols in canonical order: by length, then by number.
struct Sorted {
    counts: [u16; MAX_LENGTH + 1],
    /// Index of the first symbol of each length.
    starts: [u16; MAX_LENGTH + 2],
    symbols: [u16; MAX_SYMBOLS],
}

impl Sorted {
    /// `lengths`: at most 288, each at most 15.
    fn new(lengths: &[u8]) -> Self {
        let mut counts = [0; MAX_LENGTH + 1];
        for &length in lengths {
            counts[usize::from(length) & MAX_LENGTH] += 1;
        }
        counts[0] = 0;
        let mut starts = [0; MAX_LENGTH + 2];
        for length in 1..=MAX_LENGTH {
            starts[length + 1] = starts[length] + counts[length];
        }
        let (mut symbols, mut next) = ([0; MAX_SYMBOLS], starts);
        for (symbol, &length) in (0u16..).zip(lengths) {
            let length = usize::from(length) & MAX_LENGTH;
            if length > 0 {
                symbols[usize::from(next[length]) % MAX_SYMBOLS] = symbol;
                next[length] += 1;
            }
        }
        Self { counts, starts, symbols }
    }

    fn of_length(&self, length: usize) -> &[u16] {
        &self.symbols[self.starts[length].into()..self.starts[length + 1].into()]
    }

    /// True if the code is complete: every bit sequence starts with a code. Errors: an oversubscribed code,
    /// or an incomplete one other than those that `build` accepts.
    fn is_complete(&self) -> Result<bool, Fault> {
        let mut left = 1i32;
        for &count in &self.counts[1..] {
            left = 2 * left - i32::from(count);
            if left < 0 {
                return Err(Fault::Lengths);
            }
        }
        let symbols = self.starts[MAX_LENGTH + 1];
        match left {
            0 => Ok(true),
            _ if symbols == 0 || (symbols == 1 && self.counts[1] == 1) => Ok(false),
            _ => Err(Fault::Lengths),
        }
    }

    /// Index bits of the second table whose first code has `length` bits: enough for the longest code in it.
    /// Codes come in canonical order, so the `left` ones of this length fill it first, then the longer ones.
    fn bits_of_second(&self, first_bits: usize, length: usize, left: usize) -> usize {
        let (mut bits, mut used) = (length - first_bits, left);
        while used < 1 << bits && first_bits + bits < MAX_LENGTH {
            bits += 1;
            used = 2 * used + usize::from(self.counts[first_bits + bits]);
        }
        bits
    }
}
