//! Decides which literals and matches a block is made of: lazily, a match gives way to a better one a byte or
//! two later.

use super::matcher::{Match, Search, Tables, WINDOW};
use super::ring::Ring;
use super::split::{Split, WATCH};
use super::token::{MAX_MATCH, MIN_MATCH, Tokens};

/// How hard to search.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Effort {
    /// How many earlier positions are looked at.
    pub(crate) depth: u32,
    /// A match of this length is taken without looking further.
    pub(crate) nice: usize,
    /// How many positions ahead a better match is looked for: 0, 1 or 2.
    pub(crate) lazy: u32,
}

/// After so many literals in a row one position is passed over for each that is searched, after twice as many
/// two.
const HOPELESS: usize = 80;
/// The most that are passed over.
const MAX_PASSED: usize = 7;

/// The ring is filled again when fewer bytes than this are ahead.
const AHEAD: usize = MAX_MATCH + 16;

pub(super) struct Parser {
    effort: Effort,
    ring: Ring,
    tables: Tables,
}

impl Parser {
    pub(super) fn new(effort: Effort) -> Self {
        Self { effort, ring: Ring::new(), tables: Tables::new() }
    }

    /// Starts with another cluster.
    pub(super) fn reset(&mut self) {
        self.ring.reset();
        self.tables.reset();
    }

    /// Fills `tokens` with one block of `plain` from `start` on; returns where the next begins.
    pub(super) fn fill(&mut self, plain: &[u8], start: usize, tokens: &mut Tokens) -> usize {
        let end = plain.len();
        let mut at = start;
        let mut split = Split::default();
        loop {
            if self.ring.filled() < end && self.ring.filled() - at <= AHEAD {
                self.ring.fill(plain, at.saturating_sub(WINDOW));
            }
            let stop = if self.ring.filled() < end { self.ring.filled() - AHEAD } else { end };
            at = self.run(Piece { at, stop: stop.min(at + WATCH), end }, tokens);
            if at >= end || tokens.is_full() || split.is_due(tokens, at - start, end - at) {
                return at;
            }
        }
    }
}

/// A part of a block.
struct Piece {
    at: usize,
    stop: usize,
    end: usize,
}

impl Parser {
    /// Adds to `tokens` up to `stop`; returns how far it got.
    fn run(&mut self, piece: Piece, tokens: &mut Tokens) -> usize {
        let Piece { mut at, stop, end } = piece;
        let Self { effort, ring, tables } = self;
        let Effort { depth, nice, lazy } = *effort;
        while at < stop {
            let left = end - at;
            let mut found = tables.find(ring, Search { at, left, floor: MIN_MATCH - 1, depth, nice });
            if found.distance == 0 {
                // Where nothing has been found for long, some positions are not even looked at.
                let passed = at + 1 + (tokens.rest() / HOPELESS).min(MAX_PASSED);
                for at in at..passed.min(stop) {
                    tokens.literal(ring.byte(at as u16));
                }
                at = passed.min(stop);
            } else {
                let mut tries = lazy;
                let mut entered = 1;
                while tries > 0 && found.len < nice && at + 1 < end {
                    let depth = if tries == lazy { depth / 2 } else { depth / 4 };
                    let search = Search { at: at + 1, left: end - at - 1, floor: found.len - 1, depth, nice };
                    let next = tables.find(ring, search);
                    if !better(next, found) {
                        entered = 2;
                        break;
                    }
                    let byte = ring.byte(at as u16);
                    tokens.literal(byte);
                    at += 1;
                    found = next;
                    tries = lazy;
                }
                tokens.matched(found.len, found.distance);
                let next = at + found.len;
                tables.enter(ring, at + entered, next);
                at = next;
            }
        }
        at
    }
}

/// Whether to give up `found` for the match one byte later: a longer one, unless it costs more than it saves.
#[inline(always)]
fn better(next: Match, found: Match) -> bool {
    if next.distance == 0 {
        return false;
    }
    let bits = |m: Match| i64::from(usize::BITS - m.distance.leading_zeros());
    4 * (next.len as i64 - found.len as i64) + bits(found) - bits(next) > 2
}
