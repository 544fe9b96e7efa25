//! Codes as tables: the next bits of a stream are an index, and the entry says everything about the symbol
//! there.
//!
//! A code longer than the table's index leads to a second table behind the first. RFC 1951, 3.2.2.

use super::Fault;

/// The longest code.
pub(super) const MAX_LENGTH: usize = 15;
/// The most symbols of an alphabet.
const MAX_SYMBOLS: usize = 288;

/// What the bits at hand mean.
///
/// | bits | of a literal | of a length or distance | of a second table |
/// |---|---|---|---|
/// | 0 - 7 | bits to use | bits to use, those behind the code included | bits of the first index |
/// | 8 - 13 | | bits of the code alone | bits of the second index |
/// | 16 - 30 | the byte | smallest value | where the second table starts |
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

    /// A length or distance of at least `base`, with `extra` bits behind the code.
    pub(super) const fn value(base: u16, extra: u8) -> Self {
        Self((base as u32) << 16 | extra as u32)
    }

    /// The end of a block.
    pub(super) const fn end() -> Self {
        Self(SPECIAL | 1 << 16)
    }

    const fn second(start: usize, bits: usize, first_bits: usize) -> Self {
        Self(SPECIAL | SECOND | (start as u32) << 16 | (bits as u32) << 8 | first_bits as u32)
    }

    /// The symbol's entry where `length` bits of its code are left.
    const fn with_code(self, length: usize) -> Self {
        Self(self.0 + (length as u32) + ((length as u32) << 8))
    }

    #[inline(always)]
    pub(super) fn is_literal(self) -> bool {
        self.0 & LITERAL != 0
    }

    /// Neither a literal nor a value.
    #[inline(always)]
    pub(super) fn is_special(self) -> bool {
        self.0 & SPECIAL != 0
    }

    #[inline(always)]
    pub(super) fn is_second(self) -> bool {
        self.0 & SECOND != 0
    }

    /// Among special entries: whether the block ends.
    #[inline(always)]
    pub(super) fn is_end(self) -> bool {
        self.0 >> 16 != 0
    }

    #[inline(always)]
    pub(super) fn byte(self) -> u8 {
        (self.0 >> 16) as u8
    }

    /// Bits to use, in the lowest six bits; what is above them is something else.
    #[inline(always)]
    pub(super) fn bits(self) -> u32 {
        self.0
    }

    /// The value that the bits `ahead` give, the code's own first.
    #[inline(always)]
    pub(super) fn value_of(self, ahead: u64) -> usize {
        let extra = (ahead & ((1 << (self.bits() & 63)) - 1)) >> (self.0 >> 8 & 63);
        (self.0 >> 16) as usize + extra as usize
    }

    /// The place in the table that the bits `ahead`, after the first index, lead to.
    #[inline(always)]
    fn place_of(self, ahead: u64) -> usize {
        (self.0 >> 16 & 0x7fff) as usize + (ahead & ((1 << (self.0 >> 8 & 63)) - 1)) as usize
    }
}

/// The table of one code: `1 << BITS` entries, and second tables behind them. `SIZE` is a power of two.
pub(super) struct Table<const BITS: usize, const SIZE: usize> {
    entries: Box<[Entry; SIZE]>,
}

impl<const BITS: usize, const SIZE: usize> Table<BITS, SIZE> {
    pub(super) fn new() -> Self {
        Self { entries: Box::new([Entry::INVALID; SIZE]) }
    }

    /// The entry that the next bits lead to.
    #[inline(always)]
    pub(super) fn first(&self, ahead: u64) -> Entry {
        self.entries[ahead as usize & ((1 << BITS) - 1)]
    }

    /// The entry of the second table that `entry` leads to; the bits of the first index have been used.
    #[inline(always)]
    pub(super) fn second(&self, entry: Entry, ahead: u64) -> Entry {
        self.entries[entry.place_of(ahead) & (SIZE - 1)]
    }

    /// Makes the table of the code with these lengths; `meaning` gives the entry of a symbol.
    ///
    /// Errors: lengths that are no complete code. A code without symbols may be, and one of a single symbol
    /// and bit.
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

    /// Goes through the codes in order. Up to the length of the index the table is as large as the codes ask
    /// for, and grows by repeating itself; what is longer goes to second tables.
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

/// The next code of `length` bits, both with their first bit lowest. The code that follows with one bit more
/// is the same number.
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

/// The symbols of a code in order: by length, then by number.
struct Sorted {
    counts: [u16; MAX_LENGTH + 1],
    /// Where the symbols of each length start.
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

    /// Whether every sequence of bits begins with a code. Errors: too many codes; too few, other than none or
    /// one of a single bit.
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

    /// How many bits index the second table that begins with a code of `length` bits: as many as the longest
    /// code in it asks for. Codes come in order, so that the `left` ones of this length and then the longer
    /// ones fill it up.
    fn bits_of_second(&self, first_bits: usize, length: usize, left: usize) -> usize {
        let (mut bits, mut used) = (length - first_bits, left);
        while used < 1 << bits && first_bits + bits < MAX_LENGTH {
            bits += 1;
            used = 2 * used + usize::from(self.counts[first_bits + bits]);
        }
        bits
    }
}
