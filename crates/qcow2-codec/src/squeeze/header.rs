//! The header of a block with dynamic codes: encodes the code lengths. RFC 1951, 3.2.7.

use super::bits::BitWriter;
use super::block::Lens;
use super::huffman::{code_lengths, codes};
use super::token::{DISTANCE_SYMBOLS, LITLEN_SYMBOLS};

/// The order in which the lengths of the code length code are sent.
const ORDER: [usize; 19] = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];

/// A code length symbol with its extra bits.
struct Extra {
    symbol: usize,
    bits: u32,
    value: u32,
}

/// The code lengths in their encoded form: lengths and runs, with extra bits.
pub(super) struct Header {
    symbols: Vec<Extra>,
    lens: [u8; 19],
    codes: [u16; 19],
    litlen: usize,
    distance: usize,
    order: usize,
}

impl Header {
    pub(super) fn new() -> Self {
        Self { symbols: Vec::new(), lens: [0; 19], codes: [0; 19], litlen: 0, distance: 0, order: 0 }
    }

    /// Decides how to encode the code lengths: one by one, or as runs.
    pub(super) fn plan(&mut self, lens: &Lens) {
        let used = |lens: &[u8], least: usize| {
            lens.iter().rposition(|&len| len > 0).map_or(least, |i| (i + 1).max(least))
        };
        self.litlen = used(&lens.litlen, 257);
        self.distance = used(&lens.distance, 1);
        let mut all = [0u8; LITLEN_SYMBOLS + DISTANCE_SYMBOLS];
        all[..self.litlen].copy_from_slice(&lens.litlen[..self.litlen]);
        let end = self.litlen + self.distance;
        all[self.litlen..end].copy_from_slice(&lens.distance[..self.distance]);
        self.symbols.clear();
        let mut rest = &all[..end];
        while let Some(&len) = rest.first() {
            let run = rest.iter().take_while(|&&l| l == len).count();
            rest = &rest[run..];
            self.push_run(len, run);
        }
        let mut counts = [0u32; 19];
        for symbol in &self.symbols {
            counts[symbol.symbol] += 1;
        }
        code_lengths(&counts, 7, &mut self.lens);
        codes(&self.lens, &mut self.codes);
        self.order = ORDER.iter().rposition(|&symbol| self.lens[symbol] > 0).map_or(4, |i| (i + 1).max(4));
    }

    fn push_run(&mut self, len: u8, mut run: usize) {
        let mut push = |symbol: usize, bits: u32, value: usize| {
            self.symbols.push(Extra { symbol, bits, value: value as u32 });
        };
        if len > 0 {
            push(len.into(), 0, 0);
            run -= 1;
        }
        while run >= 3 {
            let (symbol, bits, least, most) = match (len, run) {
                (0, 11..) => (18, 7, 11, 138),
                (0, _) => (17, 3, 3, 10),
                _ => (16, 2, 3, 6),
            };
            let part = run.min(most);
            push(symbol, bits, part - least);
            run -= part;
        }
        for _ in 0..run {
            push(len.into(), 0, 0);
        }
    }

    /// The size of the header in bits.
    pub(super) fn cost(&self) -> usize {
        let symbols = self.symbols.iter().map(|s| usize::from(self.lens[s.symbol]) + s.bits as usize);
        14 + 3 * self.order + symbols.sum::<usize>()
    }

    pub(super) fn write(&self, out: &mut BitWriter<'_>) {
        out.put((self.litlen - 257) as u64, 5);
        out.put((self.distance - 1) as u64, 5);
        out.put((self.order - 4) as u64, 4);
        out.flush();
        for &symbol in &ORDER[..self.order] {
            out.put(self.lens[symbol].into(), 3);
            out.flush();
        }
        for symbol in &self.symbols {
            out.put(self.codes[symbol.symbol].into(), self.lens[symbol.symbol].into());
            out.put(symbol.value.into(), symbol.bits);
            out.flush();
        }
    }
}
