//! A deflate reader for whole clusters: the stream and the room for what it gives lie in memory, so nothing
//! is ever kept between two calls, and matches are copied inside the cluster itself. RFC 1951.

mod bits;
mod codes;
mod copy;
mod table;

use bits::Bits;
use codes::Codes;
use copy::copy_match;
use std::fmt;
use table::Entry;

/// What is wrong with a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It ends in the middle; so many bytes came out before.
    Cut(usize),
    /// Block type 3.
    BlockType,
    /// A stored block's length and its complement do not agree.
    StoredLength,
    /// More symbols than there are.
    Symbols,
    /// Code lengths that are no code, or that repeat what is not there.
    Lengths,
    /// A code without a symbol.
    Code,
    /// A match from before the cluster's start.
    Distance,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cut(_) => "it has no end",
            Self::BlockType => "unknown block type",
            Self::StoredLength => "length of a stored block is damaged",
            Self::Symbols => "too many length or distance symbols",
            Self::Lengths => "code lengths make no code",
            Self::Code => "code without a symbol",
            Self::Distance => "match from before the start",
        })
    }
}

/// Why the quick loop stopped.
enum Stop {
    /// The block is at its end.
    BlockEnd,
    /// Input or room near their end: the next symbol needs a closer look.
    Near,
    /// There is more output than room.
    Full,
}

/// Reusable state of one reader at a time.
pub(crate) struct Inflater {
    codes: Codes,
}

impl Inflater {
    pub(crate) fn new() -> Self {
        Self { codes: Codes::new() }
    }

    /// Expands `stream` into the front of `out`; returns how many bytes it gave: fewer than `out.len()` where
    /// it ends early. Of a stream that would give more it reads up to the first byte that has no room. What
    /// follows the stream is ignored.
    pub(crate) fn inflate(&mut self, stream: &[u8], out: &mut [u8]) -> Result<usize, Fault> {
        let mut bits = Bits::new(stream);
        let mut at = 0;
        loop {
            bits.refill_carefully();
            let last = bits.take(1) == 1;
            let kind = bits.take(2);
            if bits.is_cut() {
                return Err(Fault::Cut(at));
            }
            let stop = match kind {
                0 => stored(&mut bits, out, &mut at)?,
                1 => {
                    self.codes.set_fixed()?;
                    self.coded(&mut bits, out, &mut at)?
                }
                2 => {
                    self.codes.read(&mut bits, at)?;
                    self.coded(&mut bits, out, &mut at)?
                }
                _ => return Err(Fault::BlockType),
            };
            if last || matches!(stop, Stop::Full) {
                return Ok(at);
            }
        }
    }

    /// The symbols of a block, up to its end or the first byte without room.
    fn coded(&self, bits: &mut Bits<'_>, out: &mut [u8], at: &mut usize) -> Result<Stop, Fault> {
        loop {
            match self.quick(bits, out, at)? {
                Stop::Near => {}
                stop => return Ok(stop),
            }
            match self.one(bits, out, at)? {
                Stop::Near => {}
                stop => return Ok(stop),
            }
        }
    }

    /// Symbols as long as eight bytes of input and four of room are there.
    fn quick(&self, from: &mut Bits<'_>, out: &mut [u8], reached: &mut usize) -> Result<Stop, Fault> {
        let (mut bits, mut at) = (*from, *reached);
        if !bits.refill() {
            return Ok(Stop::Near);
        }
        // Always looked up before the last match is copied, and its first literal written: neither waits for
        // the other.
        let mut entry = self.codes.litlen.first(bits.peek());
        let stop = loop {
            let before = (bits, at);
            if !bits.refill() {
                break Stop::Near;
            }
            let Some(room) = out.get_mut(at..).and_then(|rest| rest.first_chunk_mut::<4>()) else {
                break Stop::Near;
            };
            // Three short codes and a long one are at most 48 of 56 bits.
            if entry.is_literal() {
                bits.skip(entry.bits());
                room[0] = entry.byte();
                at += 1;
                entry = self.codes.litlen.first(bits.peek());
                if entry.is_literal() {
                    bits.skip(entry.bits());
                    room[1] = entry.byte();
                    at += 1;
                    entry = self.codes.litlen.first(bits.peek());
                    if entry.is_literal() {
                        bits.skip(entry.bits());
                        room[2] = entry.byte();
                        at += 1;
                        entry = self.codes.litlen.first(bits.peek());
                        continue;
                    }
                }
            }
            if entry.is_special() {
                let Some(rest) = self.rest_of_code(&mut bits, entry)? else { break Stop::BlockEnd };
                entry = rest;
                if entry.is_literal() {
                    bits.skip(entry.bits());
                    out[at] = entry.byte();
                    at += 1;
                    entry = self.codes.litlen.first(bits.peek());
                    continue;
                }
            }
            let len = entry.value_of(bits.peek());
            bits.skip(entry.bits());
            if !bits.refill() {
                // The whole step once more, with care; the literals before it come out the same.
                (bits, at) = before;
                break Stop::Near;
            }
            let distance = self.distance(&mut bits)?;
            if distance > at {
                return Err(Fault::Distance);
            }
            entry = self.codes.litlen.first(bits.peek());
            let copied = copy_match(out, at, distance, len);
            at += copied;
            if copied < len {
                break Stop::Full;
            }
        };
        (*from, *reached) = (bits, at);
        Ok(stop)
    }

    /// What a special entry, the first of a literal's or length's code, leads to; `None` at the end of a
    /// block.
    #[inline(always)]
    fn rest_of_code(&self, bits: &mut Bits<'_>, first: Entry) -> Result<Option<Entry>, Fault> {
        let mut entry = first;
        if entry.is_second() {
            bits.skip(entry.bits());
            entry = self.codes.litlen.second(entry, bits.peek());
        }
        if !entry.is_special() {
            return Ok(Some(entry));
        }
        bits.skip(entry.bits());
        if entry.is_end() { Ok(None) } else { Err(Fault::Code) }
    }

    #[inline(always)]
    fn distance(&self, bits: &mut Bits<'_>) -> Result<usize, Fault> {
        let mut entry = self.codes.distance.first(bits.peek());
        if entry.is_second() {
            bits.skip(entry.bits());
            entry = self.codes.distance.second(entry, bits.peek());
        }
        if entry.is_special() {
            return Err(Fault::Code);
        }
        let distance = entry.value_of(bits.peek());
        bits.skip(entry.bits());
        Ok(distance)
    }

    /// A single symbol, at the end of the input or the room.
    fn one(&self, bits: &mut Bits<'_>, out: &mut [u8], reached: &mut usize) -> Result<Stop, Fault> {
        bits.refill_carefully();
        let first = self.codes.litlen.first(bits.peek());
        let entry = self.rest_of_code(bits, first);
        let ahead = bits.peek();
        if let Ok(Some(entry)) = entry {
            bits.skip(entry.bits());
        }
        if bits.is_cut() {
            return Err(Fault::Cut(*reached));
        }
        let Some(entry) = entry? else { return Ok(Stop::BlockEnd) };
        if entry.is_literal() {
            let Some(place) = out.get_mut(*reached) else { return Ok(Stop::Full) };
            *place = entry.byte();
            *reached += 1;
            return Ok(Stop::Near);
        }
        let len = entry.value_of(ahead);
        bits.refill_carefully();
        let distance = self.distance(bits);
        if bits.is_cut() {
            return Err(Fault::Cut(*reached));
        }
        let distance = distance?;
        if distance > *reached {
            return Err(Fault::Distance);
        }
        let copied = copy_match(out, *reached, distance, len);
        *reached += copied;
        Ok(if copied < len { Stop::Full } else { Stop::Near })
    }
}

/// The bytes of a block that are not compressed.
fn stored(bits: &mut Bits<'_>, out: &mut [u8], at: &mut usize) -> Result<Stop, Fault> {
    let cut = Fault::Cut(*at);
    let header = bits.take_bytes(4).ok_or(cut)?;
    let len = u16::from_le_bytes([header[0], header[1]]);
    if len != !u16::from_le_bytes([header[2], header[3]]) {
        return Err(Fault::StoredLength);
    }
    let room = out.get_mut(*at..).unwrap_or_default();
    let taken = room.len().min(len.into());
    match bits.take_bytes(taken) {
        Some(bytes) => room[..taken].copy_from_slice(bytes),
        None => return Err(cut),
    }
    *at += taken;
    if taken == usize::from(len) {
        return Ok(Stop::BlockEnd);
    }
    // One byte more has to be there for the stream to count as longer.
    bits.take_bytes(1).ok_or(Fault::Cut(*at))?;
    Ok(Stop::Full)
}

#[cfg(test)]
mod tests;
