//! Bit writer, lowest bit first, into a buffer that may turn out too short.

pub(super) struct BitWriter<'a> {
    out: &'a mut [u8],
    at: usize,
    bits: u64,
    count: u32,
    full: bool,
}

impl<'a> BitWriter<'a> {
    pub(super) fn new(out: &'a mut [u8]) -> Self {
        Self { out, at: 0, bits: 0, count: 0, full: false }
    }

    /// Appends `count` bits; at most 56 between two calls of [`flush`](Self::flush).
    #[inline(always)]
    pub(super) fn put(&mut self, value: u64, count: u32) {
        self.bits |= value << (self.count & 63);
        self.count += count;
    }

    /// Writes the complete bytes out; fewer than 8 bits remain.
    #[inline(always)]
    pub(super) fn flush(&mut self) {
        let bytes = (self.count / 8) as usize;
        if let Some(place) = self.out.get_mut(self.at..).and_then(|rest| rest.first_chunk_mut::<8>()) {
            *place = self.bits.to_le_bytes();
        } else {
            self.flush_near_end(bytes);
        }
        self.at += bytes;
        self.bits >>= (bytes * 8) & 63;
        self.count &= 7;
    }

    #[cold]
    fn flush_near_end(&mut self, bytes: usize) {
        match self.out.get_mut(self.at..self.at + bytes) {
            Some(place) => place.copy_from_slice(&self.bits.to_le_bytes()[..bytes]),
            None => self.full = true,
        }
    }

    /// Pads with zero bits to the next byte boundary.
    pub(super) fn align(&mut self) {
        self.count = self.count.next_multiple_of(8);
        self.flush();
    }

    /// Appends whole bytes; only valid right after [`align`](Self::align).
    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        match self.out.get_mut(self.at..self.at + bytes.len()) {
            Some(place) => place.copy_from_slice(bytes),
            None => self.full = true,
        }
        self.at += bytes.len();
    }

    /// True if `bits` more bits certainly do not fit.
    pub(super) fn is_short_of(&self, bits: usize) -> bool {
        self.full || self.at * 8 + self.count as usize + bits > self.out.len() * 8
    }

    /// The length of the stream in bytes, or `None` if the buffer was too short.
    pub(super) fn finish(mut self) -> Option<usize> {
        self.align();
        (!self.full).then_some(self.at)
    }
}
