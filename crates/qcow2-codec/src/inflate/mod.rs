//! A deflate reader for whole clusters. Stream and output are complete in memory, so no state survives
//! between calls, and matches are copied within the cluster itself. RFC 1951.

mod bits;
mod codes;
mod copy;
mod table;

use bits::Bits;
use codes::Codes;
use copy::copy_match;
use std::fmt;
use table::Entry;

/// Why a stream is invalid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The stream is truncated; the number of bytes it gave.
    Cut(usize),
    /// Block type 3.
    BlockType,
    /// The length of a stored block does not match its complement.
    StoredLength,
    /// A header defines more symbols than the format has.
    Symbols,
    /// The code lengths of a header form no valid code, or repeat a length that does not exist.
    Lengths,
    /// Bits that are not a code of any symbol.
    Code,
    /// A match that starts before the cluster.
    Distance,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cut(_) => "it is truncated",
            Self::BlockType => "unknown block type",
            Self::StoredLength => "length of a stored block does not match its complement",
            Self::Symbols => "too many length or distance symbols",
            Self::Lengths => "code lengths form no valid code",
            Self::Code => "bits are not a code of any symbol",
            Self::Distance => "match starts before the cluster",
        })
    }
}

/// Why the fast loop stopped.
enum Stop {
    /// The block ended.
    BlockEnd,
    /// Input or output is nearly exhausted; decode the next symbol with bounds checks.
    Near,
    /// The output is full and the stream has more.
    Full,
}

/// Reusable decoder state, for one stream at a time.
pub(crate) struct Inflater {
    codes: Codes,
}

impl Inflater {
    pub(crate) fn new() -> Self {
        Self { codes: Codes::new() }
    }

    /// Expands `stream` into the front of `out`. Returns the number of bytes written, which is below
    /// `out.len()` if the stream ends early. Stops at the first byte that does not fit. Ignores input after
    /// the end of the stream.
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

    /// Decodes the symbols of a block, until it ends or the output is full.
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

    /// The fast loop: runs while at least eight bytes of input and four bytes of output are left.
    fn quick(&self, from: &mut Bits<'_>, out: &mut [u8], reached: &mut usize) -> Result<Stop, Fault> {
        let (mut bits, mut at) = (*from, *reached);
        if !bits.refill() {
            return Ok(Stop::Near);
        }
        // The next entry is looked up before the pending match is copied or the literal is written, so that
        // the lookup and the copy run in parallel.
        let mut entry = self.codes.litlen.first(bits.peek());
        let stop = loop {
            let before = (bits, at);
            if !bits.refill() {
                break Stop::Near;
            }
            let Some(room) = out.get_mut(at..).and_then(|rest| rest.first_chunk_mut::<4>()) else {
                break Stop::Near;
            };
            // Three short codes (11 bits each) and a long one (15) use at most 48 of the 56 bits.
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
                // Redo the whole step in the careful path. Literals it already wrote come out the same.
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

    /// Resolves a special entry, the first lookup of a literal or length code: follows it to the second
    /// table. `None` at the end of a block.
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

    /// Decodes a single symbol with bounds checks, near the end of the input or output.
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

/// Copies a stored (uncompressed) block.
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
    // Only one more byte of input shows that the stream continues past the full output.
    bits.take_bytes(1).ok_or(Fault::Cut(*at))?;
    Ok(Stop::Full)
}

#[cfg(test)]
mod tests;
