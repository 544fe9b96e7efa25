//! Replies that wait for being sent, one behind the other, with the bytes of reads in place.

/// A buffer of replies. Memory that was used once is not zeroed again.
#[derive(Debug, Default)]
pub(super) struct Frame {
    bytes: Vec<u8>,
    used: usize,
    /// Where heads are encoded.
    head: Vec<u8>,
}

impl Frame {
    /// Appends what `encode` appends to its argument.
    pub(super) fn push(&mut self, encode: impl FnOnce(&mut Vec<u8>)) {
        let mut head = std::mem::take(&mut self.head);
        head.clear();
        encode(&mut head);
        self.space(head.len()).copy_from_slice(&head);
        self.head = head;
    }

    /// Appends `len` bytes, which the caller fills.
    pub(super) fn space(&mut self, len: usize) -> &mut [u8] {
        let end = self.used + len;
        if end > self.bytes.len() {
            self.bytes.resize(end.next_power_of_two().max(FIRST), 0);
        }
        let start = std::mem::replace(&mut self.used, end);
        &mut self.bytes[start..end]
    }

    /// What was appended, since [`clear`](Self::clear).
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.used]
    }

    pub(super) fn len(&self) -> usize {
        self.used
    }

    /// Takes back what was appended behind the first `len` bytes.
    pub(super) fn truncate(&mut self, len: usize) {
        self.used = self.used.min(len);
    }

    pub(super) fn clear(&mut self) {
        self.used = 0;
        // Block status makes heads of half a mebibyte.
        if self.head.capacity() > FIRST {
            self.head = Vec::new();
        }
    }
}

/// Bytes that a frame begins with.
const FIRST: usize = 64 << 10;
