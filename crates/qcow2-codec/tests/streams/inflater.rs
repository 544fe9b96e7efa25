//! An independent, slow and strict deflate reader, written from RFC 1951 alone.

/// The result of inflating a stream.
#[derive(Debug)]
pub(crate) struct Inflated {
    pub(crate) plain: Vec<u8>,
    window: usize,
    /// The largest match distance.
    pub(crate) max_distance: usize,
    /// Bytes of input up to the end of the last block.
    pub(crate) read: usize,
}

/// Inflates one raw stream. Errors: any violation of the RFC, and a match distance above `window`, which a
/// reader that keeps only that much output must refuse.
pub(crate) fn inflate(stream: &[u8], window: usize) -> Result<Inflated, String> {
    let mut bits = Bits { stream, at: 0 };
    let mut out = Inflated { plain: Vec::new(), window, max_distance: 0, read: 0 };
    loop {
        let last = bits.take(1)? == 1;
        match bits.take(2)? {
            0 => stored(&mut bits, &mut out)?,
            1 => coded(&mut bits, &mut out, &Code::new(&fixed_lengths()), &Code::new(&[5; 30]))?,
            2 => {
                let (literals, distances) = dynamic_lengths(&mut bits)?;
                coded(&mut bits, &mut out, &Code::new(&literals), &Code::new(&distances))?;
            }
            _ => return Err("block type 3".into()),
        }
        if last {
            out.read = bits.at.div_ceil(8);
            return Ok(out);
        }
    }
}

struct Bits<'a> {
    stream: &'a [u8],
    at: usize,
}

impl Bits<'_> {
    fn take(&mut self, count: u32) -> Result<usize, String> {
        let mut value = 0;
        for i in 0..count {
            let byte = self.stream.get(self.at / 8).ok_or("input ends")?;
            value |= usize::from((byte >> (self.at % 8)) & 1) << i;
            self.at += 1;
        }
        Ok(value)
    }
}

fn stored(bits: &mut Bits<'_>, out: &mut Inflated) -> Result<(), String> {
    bits.at = bits.at.next_multiple_of(8);
    let (len, check) = (bits.take(16)?, bits.take(16)?);
    if len != !check & 0xffff {
        return Err("stored length is damaged".into());
    }
    for _ in 0..len {
        out.plain.push(bits.take(8)? as u8);
    }
    Ok(())
}

fn fixed_lengths() -> Vec<u8> {
    [vec![8; 144], vec![9; 112], vec![7; 24], vec![8; 8]].concat()
}

fn dynamic_lengths(bits: &mut Bits<'_>) -> Result<(Vec<u8>, Vec<u8>), String> {
    const ORDER: [usize; 19] = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];
    let (literals, distances, codes) = (bits.take(5)? + 257, bits.take(5)? + 1, bits.take(4)? + 4);
    let mut code_lengths = [0; 19];
    for &place in &ORDER[..codes] {
        code_lengths[place] = bits.take(3)? as u8;
    }
    let code = Code::new(&code_lengths);
    let mut lengths = Vec::new();
    while lengths.len() < literals + distances {
        let (value, count) = match code.symbol(bits)? {
            16 => (*lengths.last().ok_or("nothing to repeat")?, bits.take(2)? + 3),
            17 => (0, bits.take(3)? + 3),
            18 => (0, bits.take(7)? + 11),
            length => (length as u8, 1),
        };
        lengths.extend(std::iter::repeat_n(value, count));
    }
    if lengths.len() > literals + distances {
        return Err("too many code lengths".into());
    }
    let distances = lengths.split_off(literals);
    Ok((lengths, distances))
}

/// A canonical code: number of symbols per length, and the symbols in code order.
struct Code {
    counts: [usize; 16],
    symbols: Vec<usize>,
}

impl Code {
    fn new(lengths: &[u8]) -> Self {
        let mut counts = [0; 16];
        let mut symbols = Vec::new();
        for length in 1..16 {
            symbols.extend((0..lengths.len()).filter(|&s| usize::from(lengths[s]) == length));
            counts[length] = symbols.len() - counts[..length].iter().sum::<usize>();
        }
        Self { counts, symbols }
    }

    fn symbol(&self, bits: &mut Bits<'_>) -> Result<usize, String> {
        let (mut code, mut first, mut before) = (0, 0, 0);
        for count in &self.counts[1..] {
            code = (code << 1) | bits.take(1)?;
            if code < first + count {
                return Ok(self.symbols[before + code - first]);
            }
            before += count;
            first = (first + count) << 1;
        }
        Err("no such code".into())
    }
}

fn coded(bits: &mut Bits<'_>, out: &mut Inflated, literals: &Code, distances: &Code) -> Result<(), String> {
    loop {
        match literals.symbol(bits)? {
            256 => return Ok(()),
            literal @ 0..256 => out.plain.push(literal as u8),
            length => {
                let length = match length - 257 {
                    index @ 0..8 => index + 3,
                    28 => 258,
                    index @ 8..28 => stepped(bits, index, 2)? + 3,
                    _ => return Err("length symbol past 285".into()),
                };
                let distance = match distances.symbol(bits)? {
                    index @ 0..4 => index + 1,
                    index @ 4..30 => stepped(bits, index, 1)? + 1,
                    _ => return Err("distance symbol past 29".into()),
                };
                if distance > out.plain.len().min(out.window) {
                    return Err(format!("distance {distance} is too far back"));
                }
                out.max_distance = out.max_distance.max(distance);
                for _ in 0..length {
                    out.plain.push(out.plain[out.plain.len() - distance]);
                }
            }
        }
    }
}

/// Base value plus extra bits of a length or distance symbol. Every `1 << shift` symbols have the same number
/// of extra bits.
fn stepped(bits: &mut Bits<'_>, index: usize, shift: u32) -> Result<usize, String> {
    let extra = (index >> shift) - 1;
    let base = ((1 << shift) + index % (1 << shift)) << extra;
    Ok(base + bits.take(extra as u32)?)
}
