//! Bit reader, lowest bit first. Loads eight bytes at a time while that many are left.

/// The unread part of a stream.
///
/// Above its lowest `count` bits the buffer may already hold bits of the following bytes. That is harmless: a
/// refill ORs the same bits into the same positions again.
#[derive(Clone, Copy)]
pub(super) struct Bits<'a> {
    stream: &'a [u8],
    /// Index of the next byte that is not yet counted in the buffer.
    at: usize,
    buffer: u64,
    /// Valid bits in the buffer. Only the lowest six bits of this field count; the rest may be anything.
    count: u32,
    /// Number of zero bytes supplied in place of bytes past the end.
    past_end: u32,
}

impl<'a> Bits<'a> {
    pub(super) fn new(stream: &'a [u8]) -> Self {
        Self { stream, at: 0, buffer: 0, count: 0, past_end: 0 }
    }

    /// Refills the buffer to at least 56 bits. Returns false, unchanged, if fewer than eight bytes are left.
    #[inline(always)]
    pub(super) fn refill(&mut self) -> bool {
        let Some(bytes) = self.stream.get(self.at..).and_then(|rest| rest.first_chunk::<8>()) else {
            return false;
        };
        self.buffer |= u64::from_le_bytes(*bytes) << (self.count & 63);
        self.at += ((!self.count & 63) >> 3) as usize;
        self.count |= 56;
        true
    }

    /// Refills the buffer to at least 56 bits. Past the end it supplies zeroes; [`is_cut`](Self::is_cut)
    /// detects when they have been consumed.
    pub(super) fn refill_carefully(&mut self) {
        self.count &= 63;
        while self.count < 56 {
            match self.stream.get(self.at) {
                Some(&byte) => {
                    self.buffer |= u64::from(byte) << self.count;
                    self.at += 1;
                }
                None => self.past_end += 1,
            }
            self.count += 8;
        }
    }

    /// True if bits past the end of the stream have been consumed.
    pub(super) fn is_cut(&self) -> bool {
        self.past_end * 8 > (self.count & 63)
    }

    /// The next bits, lowest first. Bits beyond the refilled ones may have any value.
    #[inline(always)]
    pub(super) fn peek(&self) -> u64 {
        self.buffer
    }

    /// Consumes as many bits as the lowest six bits of `count` say. They must have been refilled before.
    #[inline(always)]
    pub(super) fn skip(&mut self, count: u32) {
        self.buffer >>= count & 63;
        self.count = self.count.wrapping_sub(count);
    }

    /// Consumes and returns `count` bits, at most 32.
    #[inline(always)]
    pub(super) fn take(&mut self, count: u32) -> u32 {
        let value = self.buffer & ((1 << (count & 63)) - 1);
        self.skip(count);
        value as u32
    }

    /// Skips to the next byte boundary and consumes `len` bytes. `None` if fewer are left.
    pub(super) fn take_bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let unused = ((self.count & 63) / 8).checked_sub(self.past_end)? as usize;
        let start = self.at - unused;
        let bytes = self.stream.get(start..start.checked_add(len)?)?;
        *self = Self { at: start + len, ..Self::new(self.stream) };
        Some(bytes)
    }
}
