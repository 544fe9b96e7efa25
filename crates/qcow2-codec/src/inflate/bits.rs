//! Bits of a stream, lowest first, eight bytes at a time where there are so many.

/// The unread rest of a stream.
///
/// Above its lowest `count` bits the buffer may hold bits of the bytes that come next: whoever fills it puts
/// the same ones there again.
#[derive(Clone, Copy)]
pub(super) struct Bits<'a> {
    stream: &'a [u8],
    /// The next byte that is not counted in the buffer.
    at: usize,
    buffer: u64,
    /// The lowest six bits count; what is above them may be anything.
    count: u32,
    /// Zero bytes that were taken for what is past the end.
    past_end: u32,
}

impl<'a> Bits<'a> {
    pub(super) fn new(stream: &'a [u8]) -> Self {
        Self { stream, at: 0, buffer: 0, count: 0, past_end: 0 }
    }

    /// Fills the buffer to at least 56 bits, unless fewer than eight bytes are left.
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

    /// Fills the buffer to at least 56 bits, past the end with zeroes, which [`is_cut`](Self::is_cut) tells
    /// once they are used.
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

    /// Whether bits were used that are not there.
    pub(super) fn is_cut(&self) -> bool {
        self.past_end * 8 > (self.count & 63)
    }

    /// What comes next; bits that were not filled in may have any value.
    #[inline(always)]
    pub(super) fn peek(&self) -> u64 {
        self.buffer
    }

    /// Uses as many bits as the lowest six bits of `count` say, which were filled in.
    #[inline(always)]
    pub(super) fn skip(&mut self, count: u32) {
        self.buffer >>= count & 63;
        self.count = self.count.wrapping_sub(count);
    }

    /// Uses `count` bits, at most 32, as a number.
    #[inline(always)]
    pub(super) fn take(&mut self, count: u32) -> u32 {
        let value = self.buffer & ((1 << (count & 63)) - 1);
        self.skip(count);
        value as u32
    }

    /// Goes on at the next whole byte, with `len` bytes as they are; `None` where there are fewer.
    pub(super) fn take_bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let unused = ((self.count & 63) / 8).checked_sub(self.past_end)? as usize;
        let start = self.at - unused;
        let bytes = self.stream.get(start..start.checked_add(len)?)?;
        *self = Self { at: start + len, ..Self::new(self.stream) };
        Some(bytes)
    }
}
