//! Writes a block with dynamic codes, with the fixed codes, or stored, whichever is shortest.

use super::bits::BitWriter;
use super::header::Header;
use super::huffman::{code_lengths, codes};
use super::token::{
    DISTANCE_SYMBOLS, END_OF_BLOCK, LITLEN_SYMBOLS, MAX_MATCH, MIN_MATCH, Tokens, distance_extra_bits,
    distance_symbol, length_code, length_extra_bits,
};

const MAX_STORED: usize = 0xffff;

/// Code lengths of one block.
#[derive(Clone)]
pub(super) struct Lens {
    pub(super) litlen: [u8; LITLEN_SYMBOLS],
    pub(super) distance: [u8; DISTANCE_SYMBOLS],
}

/// A code with its extra bits, and the total number of bits.
#[derive(Clone, Copy, Default)]
struct Code(u32);

impl Code {
    fn new(bits: u32, count: u32) -> Self {
        Self(bits | count << 24)
    }

    #[inline(always)]
    fn bits(self) -> u64 {
        u64::from(self.0 & 0xff_ffff)
    }

    #[inline(always)]
    fn count(self) -> u32 {
        self.0 >> 24
    }
}

/// The codes of one block, in the form the writer needs.
struct Codes {
    literals: [Code; 256],
    end: Code,
    /// Indexed by match length, extra bits included.
    lengths: [Code; 512],
    /// Indexed by distance symbol.
    distances: [Code; 32],
}

pub(super) struct BlockWriter {
    counts: [u32; LITLEN_SYMBOLS],
    own: Lens,
    fixed: Lens,
    header: Header,
    codes: Codes,
}

impl BlockWriter {
    pub(super) fn new() -> Self {
        let own = Lens { litlen: [0; LITLEN_SYMBOLS], distance: [0; DISTANCE_SYMBOLS] };
        let mut fixed = Lens { litlen: [8; LITLEN_SYMBOLS], distance: [5; DISTANCE_SYMBOLS] };
        fixed.litlen[144..256].fill(9);
        fixed.litlen[256..280].fill(7);
        let none = Code::default();
        let codes = Codes { literals: [none; 256], end: none, lengths: [none; 512], distances: [none; 32] };
        Self { counts: [0; LITLEN_SYMBOLS], own, fixed, header: Header::new(), codes }
    }

    /// Writes `tokens`, which represent the bytes `plain`. Returns `None` as soon as the buffer is certain to
    /// be too short.
    pub(super) fn write(
        &mut self,
        out: &mut BitWriter<'_>,
        tokens: &Tokens,
        plain: &[u8],
        last: bool,
    ) -> Option<()> {
        self.counts[..256].copy_from_slice(&tokens.literals);
        self.counts[END_OF_BLOCK] = 1;
        self.counts[257..].copy_from_slice(&tokens.lengths[..LITLEN_SYMBOLS - 257]);
        let distances = &tokens.distances[..DISTANCE_SYMBOLS];
        code_lengths(&self.counts, 15, &mut self.own.litlen);
        code_lengths(distances, 15, &mut self.own.distance);
        self.header.plan(&self.own);
        let own = 3 + self.header.cost() + cost(&self.counts, distances, &self.own);
        let fixed = 3 + cost(&self.counts, distances, &self.fixed);
        let stored = (plain.len() + 5 * plain.len().div_ceil(MAX_STORED).max(1)) * 8;
        if stored < own.min(fixed) {
            write_stored(out, plain, last);
            return Some(());
        }
        if out.is_short_of(own.min(fixed)) {
            return None;
        }
        if fixed <= own {
            out.put(u64::from(last) | 1 << 1, 3);
            self.codes.set(&self.fixed);
        } else {
            out.put(u64::from(last) | 2 << 1, 3);
            self.header.write(out);
            self.codes.set(&self.own);
        }
        self.codes.write(out, tokens, plain);
        Some(())
    }
}

/// Size of the tokens in bits, with codes of these lengths.
fn cost(litlen: &[u32], distance: &[u32], lens: &Lens) -> usize {
    let mut bits = 0;
    for (symbol, (&count, &len)) in litlen.iter().zip(&lens.litlen).enumerate() {
        let extra = if symbol > END_OF_BLOCK { length_extra_bits(symbol - 257) } else { 0 };
        bits += count as usize * (usize::from(len) + extra as usize);
    }
    for (symbol, (&count, &len)) in distance.iter().zip(&lens.distance).enumerate() {
        bits += count as usize * (usize::from(len) + distance_extra_bits(symbol) as usize);
    }
    bits
}

fn write_stored(out: &mut BitWriter<'_>, plain: &[u8], last: bool) {
    let mut pieces = plain.chunks(MAX_STORED).peekable();
    while let Some(piece) = pieces.next() {
        out.put(u64::from(last && pieces.peek().is_none()), 3);
        out.align();
        let len = piece.len() as u16;
        out.bytes(&len.to_le_bytes());
        out.bytes(&(!len).to_le_bytes());
        out.bytes(piece);
    }
}

impl Codes {
    fn set(&mut self, lens: &Lens) {
        let mut litlen = [0u16; LITLEN_SYMBOLS];
        codes(&lens.litlen, &mut litlen);
        let code = |symbol: usize| Code::new(litlen[symbol].into(), lens.litlen[symbol].into());
        for (symbol, literal) in self.literals.iter_mut().enumerate() {
            *literal = code(symbol);
        }
        self.end = code(END_OF_BLOCK);
        for len in MIN_MATCH..=MAX_MATCH {
            let (index, bits, value) = length_code(len);
            let Code(plain) = code(257 + index);
            let (code, count) = (plain & 0xff_ffff, plain >> 24);
            self.lengths[len] = Code::new(code | value << count, count + bits);
        }
        let mut distance = [0u16; DISTANCE_SYMBOLS];
        codes(&lens.distance, &mut distance);
        for (place, (&code, &len)) in self.distances.iter_mut().zip(distance.iter().zip(&lens.distance)) {
            *place = Code::new(code.into(), len.into());
        }
    }

    fn write(&self, out: &mut BitWriter<'_>, tokens: &Tokens, plain: &[u8]) {
        let mut rest = plain;
        for step in tokens.steps() {
            let (literals, after) = rest.split_at(step.literals.into());
            self.write_literals(out, literals);
            rest = &after[usize::from(step.len)..];
            let len = self.lengths[usize::from(step.len) & 511];
            out.put(len.bits(), len.count());
            let symbol = distance_symbol(step.distance) & 31;
            let distance = self.distances[symbol];
            out.put(distance.bits(), distance.count());
            let bits = distance_extra_bits(symbol);
            out.put(u64::from(step.distance.wrapping_sub(1)) & ((1 << bits) - 1), bits);
            out.flush();
        }
        self.write_literals(out, &rest[..tokens.rest()]);
        out.put(self.end.bits(), self.end.count());
        out.flush();
    }

    #[inline(always)]
    fn write_literals(&self, out: &mut BitWriter<'_>, literals: &[u8]) {
        let mut threes = literals.chunks_exact(3);
        for three in &mut threes {
            for &byte in three {
                let code = self.literals[usize::from(byte)];
                out.put(code.bits(), code.count());
            }
            out.flush();
        }
        for &byte in threes.remainder() {
            let code = self.literals[usize::from(byte)];
            out.put(code.bits(), code.count());
        }
        out.flush();
    }
}
