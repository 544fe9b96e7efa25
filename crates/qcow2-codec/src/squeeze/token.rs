//! The tokens of a block (literals and matches) and the frequency of each symbol.

/// Literal/length symbols: 256 literals, end of block, 29 lengths, and two that have a fixed code but are
/// unused.
pub(super) const LITLEN_SYMBOLS: usize = 288;
/// Distance symbols. A 4 KiB window uses 24 of the 30.
pub(super) const DISTANCE_SYMBOLS: usize = 30;
/// The end-of-block symbol.
pub(super) const END_OF_BLOCK: usize = 256;
/// The shortest and the longest match in bytes.
pub(super) const MIN_MATCH: usize = 3;
pub(super) const MAX_MATCH: usize = 258;

/// The most matches in a block.
const MAX_MATCHES: usize = 8 << 10;
/// The most matches between two checks whether the block is full.
const STRETCH_MATCHES: usize = super::split::WATCH / MIN_MATCH + 1;
/// A block ends after this many literals in a row: `Step::literals` is 16 bits.
const MAX_RUN: u32 = 0xf000;

/// First length and extra bits of each length symbol from 257 on. RFC 1951, 3.2.5.
const LENGTHS: [(u16, u8); 29] = [
    (3, 0),
    (4, 0),
    (5, 0),
    (6, 0),
    (7, 0),
    (8, 0),
    (9, 0),
    (10, 0),
    (11, 1),
    (13, 1),
    (15, 1),
    (17, 1),
    (19, 2),
    (23, 2),
    (27, 2),
    (31, 2),
    (35, 3),
    (43, 3),
    (51, 3),
    (59, 3),
    (67, 4),
    (83, 4),
    (99, 4),
    (115, 4),
    (131, 5),
    (163, 5),
    (195, 5),
    (227, 5),
    (258, 0),
];

/// Length symbol, minus 257, for each length.
static LENGTH_SYMBOL: [u8; 512] = length_symbols();

const fn length_symbols() -> [u8; 512] {
    let mut table = [0; 512];
    let mut symbol = 0;
    while symbol < 28 {
        let (first, extra) = LENGTHS[symbol];
        let mut len = first as usize;
        while len < first as usize + (1 << extra) && len < MAX_MATCH {
            table[len] = symbol as u8;
            len += 1;
        }
        symbol += 1;
    }
    table[MAX_MATCH] = 28;
    table
}

/// Extra bits of each distance symbol. RFC 1951, 3.2.5.
#[inline]
pub(super) const fn distance_extra_bits(symbol: usize) -> u32 {
    if symbol < 4 { 0 } else { symbol as u32 / 2 - 1 }
}

/// Extra bits of each length symbol. `index`: the symbol minus 257.
pub(super) fn length_extra_bits(index: usize) -> u32 {
    LENGTHS.get(index).map_or(0, |&(_, bits)| bits.into())
}

/// The length symbol minus 257, its extra bits, and their value. `len`: 3 to 258.
pub(super) fn length_code(len: usize) -> (usize, u32, u32) {
    let index = usize::from(LENGTH_SYMBOL[len]);
    let (first, bits) = LENGTHS[index];
    (index, bits.into(), (len - usize::from(first)) as u32)
}

/// The symbols of distances 1..=256, then of larger ones in steps of 128.
static DISTANCE_SYMBOL: [u8; 512] = distance_symbols();

const fn distance_symbols() -> [u8; 512] {
    let mut table = [0; 512];
    let mut index = 0;
    while index < 512 {
        let d = if index < 256 { index } else { (index - 256) << 7 };
        table[index] = if d < 4 {
            d as u8
        } else {
            let bits = d.ilog2() - 1;
            (2 * (bits + 1)) as u8 + (d >> bits & 1) as u8
        };
        index += 1;
    }
    table
}

/// The symbol of a distance of 1 to 32768.
#[inline(always)]
pub(super) fn distance_symbol(distance: u16) -> usize {
    let d = usize::from(distance.wrapping_sub(1));
    let index = if d < 256 { d } else { 256 + (d >> 7) };
    usize::from(DISTANCE_SYMBOL[index & 511])
}

/// A run of literals, then a match. The literals themselves are read from the cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) literals: u16,
    /// 0 in the last step of a block: no match.
    pub(super) len: u16,
    pub(super) distance: u16,
}

/// The tokens of one block and the frequency of each symbol.
pub(super) struct Tokens {
    steps: Box<[Step; MAX_MATCHES]>,
    count: usize,
    run: u32,
    pub(super) literals: [u32; 256],
    pub(super) lengths: [u32; 32],
    pub(super) distances: [u32; 32],
}

impl Tokens {
    pub(super) fn new() -> Self {
        let steps = Box::new([Step::default(); MAX_MATCHES]);
        Self { steps, count: 0, run: 0, literals: [0; 256], lengths: [0; 32], distances: [0; 32] }
    }

    pub(super) fn clear(&mut self) {
        self.count = 0;
        self.run = 0;
        self.literals.fill(0);
        self.lengths.fill(0);
        self.distances.fill(0);
    }

    /// True if the block has to end, because the matches of another stretch might not fit.
    #[inline(always)]
    pub(super) fn is_full(&self) -> bool {
        self.count + STRETCH_MATCHES >= MAX_MATCHES || self.run >= MAX_RUN
    }

    #[inline(always)]
    pub(super) fn literal(&mut self, byte: u8) {
        self.run += 1;
        self.literals[usize::from(byte)] += 1;
    }

    /// Adds a match of 3 to 258 bytes, 1 to 4095 bytes back.
    #[inline(always)]
    pub(super) fn matched(&mut self, len: usize, distance: usize) {
        let (len, distance) = (len as u16, distance as u16);
        self.steps[self.count % MAX_MATCHES] = Step { literals: self.run as u16, len, distance };
        self.count += 1;
        self.run = 0;
        self.lengths[usize::from(LENGTH_SYMBOL[usize::from(len) & 511]) & 31] += 1;
        self.distances[distance_symbol(distance) & 31] += 1;
    }

    /// The runs and matches, in order; the literals after the last match are [`rest`](Self::rest).
    pub(super) fn steps(&self) -> &[Step] {
        &self.steps[..self.count]
    }

    /// Number of literals after the last match.
    pub(super) fn rest(&self) -> usize {
        self.run as usize
    }
}
