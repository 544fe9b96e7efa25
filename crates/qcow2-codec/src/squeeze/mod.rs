//! A deflate writer for whole clusters and a window of 4 KiB.
//!
//! A cluster lies in memory as a whole and matches reach back 4 KiB at most, so that everything the search
//! touches fits into the first-level cache: three small tables of 16-bit positions. Positions are kept modulo
//! 65536; one that is stale points somewhere into the window all the same, and the bytes there decide. RFC
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

    /// Compresses `plain` into the front of `out`; the stream's length, or `None` where it does not fit.
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
