//! A deflate writer for whole clusters with a 4 KiB window.
//!
//! The cluster is complete in memory and matches reach back less than 4 KiB. The search therefore works on
//! three small tables of 16-bit positions, which fit into the L1 data cache. Positions are modulo 65536. A
//! stale entry still points into the ring, and the comparison of the bytes decides whether it is a match. RFC
//! 1951.

mod bits;
mod block;
mod header;
mod huffman;
mod matcher;
mod parse;
mod ring;
mod split;
mod token;

use bits::BitWriter;
use block::BlockWriter;
pub(crate) use parse::Effort;
use parse::Parser;
use token::Tokens;

/// Reusable state of one compression at a time.
pub(crate) struct Squeezer {
    parser: Parser,
    tokens: Tokens,
    blocks: BlockWriter,
}

impl Squeezer {
    pub(crate) fn new(effort: Effort) -> Self {
        Self { parser: Parser::new(effort), tokens: Tokens::new(), blocks: BlockWriter::new() }
    }

    /// Compresses `plain` into the front of `out`. Returns the length of the stream, or `None` if it does not
    /// fit.
    pub(crate) fn compress(&mut self, plain: &[u8], out: &mut [u8]) -> Option<usize> {
        self.parser.reset();
        let mut writer = BitWriter::new(out);
        let mut at = 0;
        while at < plain.len() {
            let start = at;
            self.tokens.clear();
            at = self.parser.fill(plain, start, &mut self.tokens);
            self.blocks.write(&mut writer, &self.tokens, &plain[start..at], at == plain.len())?;
        }
        writer.finish()
    }
}

#[cfg(test)]
mod tests;
