//! Splits a block into literals and matches, with lazy matching: a match is given up for a better one that
//! starts one or two bytes later.

use super::matcher::{Match, Search, Tables, WINDOW};
use super::ring::Ring;
use super::split::{Split, WATCH};
use super::token::{MAX_MATCH, MIN_MATCH, Tokens};

/// Search effort.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Effort {
    /// How many candidates are examined.
    pub(crate) depth: u32,
    /// A match of this length ends the search.
    pub(crate) nice: usize,
    /// How many positions ahead to look for a better match: 0, 1 or 2.
    pub(crate) lazy: u32,
}

/// After this many literals in a row, the search skips one position for each it tries; after twice as many,
/// two.
const HOPELESS: usize = 80;
/// The most positions skipped at once.
const MAX_PASSED: usize = 7;

/// The ring is refilled when fewer bytes than this are ahead.
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

    /// Resets the state for another cluster.
    pub(super) fn reset(&mut self) {
        self.ring.reset();
        self.tables.reset();
    }

    /// Fills `tokens` with one block of `plain` from `start`. Returns the start of the next block.
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
    /// Adds tokens up to `stop`. Returns the position reached, which a match may carry past `stop`.
    fn run(&mut self, piece: Piece, tokens: &mut Tokens) -> usize {
        let Piece { mut at, stop, end } = piece;
        let Self { effort, ring, tables } = self;
        let Effort { depth, nice, lazy } = *effort;
        while at < stop {
            let left = end - at;
            let mut found = tables.find(ring, Search { at, left, floor: MIN_MATCH - 1, depth, nice });
            if found.distance == 0 {
                // Where nothing has matched for long, skip some positions: the data is probably
                // incompressible.
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

/// True if `found` should be given up for the match one byte later: it is longer, and not by so little that
/// its larger distance costs more bits than it saves.
#[inline(always)]
fn better(next: Match, found: Match) -> bool {
    if next.distance == 0 {
        return false;
    }
    let bits = |m: Match| i64::from(usize::BITS - m.distance.leading_zeros());
    4 * (next.len as i64 - found.len as i64) + bits(found) - bits(next) > 2
}
