//! The two Huffman codes of a block: fixed, or read from the block's header. RFC 1951, 3.2.5 to 3.2.7.

use super::Fault;
use super::bits::Bits;
use super::table::{Entry, Table};

/// Index bits of the first-level table for literals and lengths. Most codes are not longer, and the table
/// still fits into the L1 data cache.
const LITLEN_BITS: usize = 11;
/// Upper bound for 288 symbols is 2342 entries; rounded up to a power of two.
const LITLEN_SIZE: usize = 4096;
/// Index bits of the first-level table for distances.
const DISTANCE_BITS: usize = 8;
/// Upper bound for 32 symbols is 402 entries; rounded up to a power of two.
const DISTANCE_SIZE: usize = 512;
/// Index bits for code lengths: no code is longer.
const LENGTH_BITS: usize = 7;
const LENGTH_SIZE: usize = 128;

/// The most symbols a header may define.
const MAX_LITLEN: usize = 286;
const MAX_DISTANCE: usize = 30;
const END_OF_BLOCK: usize = 256;

/// The order in which a header sends the lengths of the code length code.
const ORDER: [usize; 19] = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];

static LITLEN: [Entry; 288] = litlen_entries();
static DISTANCE: [Entry; 32] = distance_entries();

const fn litlen_entries() -> [Entry; 288] {
    let mut entries = [Entry::INVALID; 288];
    let mut symbol = 0;
    while symbol < 256 {
        entries[symbol] = Entry::literal(symbol as u8);
        symbol += 1;
    }
    entries[END_OF_BLOCK] = Entry::end();
    let (mut index, mut base) = (0, 3);
    while index < 28 {
        let extra = if index < 8 { 0 } else { index as u8 / 4 - 1 };
        entries[257 + index] = Entry::value(base, extra);
        base += 1 << extra;
        index += 1;
    }
    entries[257 + 28] = Entry::value(258, 0);
    entries
}

const fn distance_entries() -> [Entry; 32] {
    let mut entries = [Entry::INVALID; 32];
    let (mut symbol, mut base) = (0, 1);
    while symbol < MAX_DISTANCE {
        let extra = if symbol < 4 { 0 } else { symbol as u8 / 2 - 1 };
        entries[symbol] = Entry::value(base, extra);
        base += 1 << extra;
        symbol += 1;
    }
    entries
}

/// The codes of the current block.
pub(super) struct Codes {
    pub(super) litlen: Table<LITLEN_BITS, LITLEN_SIZE>,
    pub(super) distance: Table<DISTANCE_BITS, DISTANCE_SIZE>,
    lengths: Table<LENGTH_BITS, LENGTH_SIZE>,
    fixed: bool,
}

impl Codes {
    pub(super) fn new() -> Self {
        Self { litlen: Table::new(), distance: Table::new(), lengths: Table::new(), fixed: false }
    }

    /// Sets the fixed codes. They survive until a header replaces them, so repeated fixed blocks cost
    /// nothing.
    pub(super) fn set_fixed(&mut self) -> Result<(), Fault> {
        if !self.fixed {
            let mut lengths = [8; 288];
            lengths[144..256].fill(9);
            lengths[256..280].fill(7);
            self.litlen.build(&lengths, |symbol| LITLEN[symbol])?;
            self.distance.build(&[5; 32], |symbol| DISTANCE[symbol])?;
            self.fixed = true;
        }
        Ok(())
    }

    /// Reads the codes from a block header. `at`: bytes of output so far, for the error of a truncated
    /// stream.
    pub(super) fn read(&mut self, bits: &mut Bits<'_>, at: usize) -> Result<(), Fault> {
        self.fixed = false;
        bits.refill_carefully();
        let litlen = bits.take(5) as usize + 257;
        let distance = bits.take(5) as usize + 1;
        let codes = bits.take(4) as usize + 4;
        if litlen > MAX_LITLEN || distance > MAX_DISTANCE {
            return Err(if bits.is_cut() { Fault::Cut(at) } else { Fault::Symbols });
        }
        let mut code_lengths = [0; 19];
        for &place in &ORDER[..codes] {
            bits.refill_carefully();
            code_lengths[place] = bits.take(3) as u8;
        }
        if bits.is_cut() {
            return Err(Fault::Cut(at));
        }
        self.lengths.build(&code_lengths, |symbol| Entry::value(symbol as u16, 0))?;
        let mut lengths = [0; MAX_LITLEN + MAX_DISTANCE];
        let lengths = &mut lengths[..litlen + distance];
        self.read_lengths(bits, lengths, at)?;
        if lengths[END_OF_BLOCK] == 0 {
            return Err(Fault::Lengths);
        }
        self.litlen.build(&lengths[..litlen], |symbol| LITLEN[symbol])?;
        self.distance.build(&lengths[litlen..], |symbol| DISTANCE[symbol])
    }

    fn read_lengths(&self, bits: &mut Bits<'_>, lengths: &mut [u8], at: usize) -> Result<(), Fault> {
        let mut done = 0;
        while done < lengths.len() {
            if !bits.refill() {
                bits.refill_carefully();
            }
            let entry = self.lengths.first(bits.peek());
            if entry.is_special() {
                return Err(if bits.is_cut() { Fault::Cut(at) } else { Fault::Code });
            }
            bits.skip(entry.bits());
            let (length, count) = match entry.value_of(0) {
                16 => (done.checked_sub(1).map(|last| lengths[last]), 3 + bits.take(2)),
                17 => (Some(0), 3 + bits.take(3)),
                18 => (Some(0), 11 + bits.take(7)),
                length => (Some(length as u8), 1),
            };
            if bits.is_cut() {
                return Err(Fault::Cut(at));
            }
            let run = lengths.get_mut(done..done + count as usize).ok_or(Fault::Lengths)?;
            run.fill(length.ok_or(Fault::Lengths)?);
            done += count as usize;
        }
        Ok(())
    }
}
