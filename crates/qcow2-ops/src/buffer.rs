//! Large page-aligned buffers.
//!
//! The allocator returns buffers of this size 16 bytes past a page boundary. Some processors (AMD Zen 3) copy
//! between such a buffer and the page cache at a third of the speed.

use std::ops::{Deref, DerefMut};

/// Alignment of a buffer in bytes.
const PAGE: usize = 4096;

/// A reusable buffer whose first byte is page-aligned.
#[derive(Debug, Default)]
pub(crate) struct PageBuffer {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl PageBuffer {
    /// Sets the length in bytes. The contents are unspecified.
    pub(crate) fn set_len(&mut self, len: usize) {
        if self.start + len > self.bytes.len() {
            // Allocate a new buffer instead of growing the old one: there is nothing worth copying, and fresh
            // zero pages are free.
            self.bytes = vec![0; len + PAGE];
            self.start = self.bytes.as_ptr().align_offset(PAGE).min(PAGE);
        }
        self.len = len;
    }
}

impl Deref for PageBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }
}

impl DerefMut for PageBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffer_is_page_aligned_with_the_requested_length() {
        let mut buffer = PageBuffer::default();
        assert!(buffer.is_empty());
        for len in [1, 4096, 100, 1 << 20, 0, (1 << 20) + 1] {
            buffer.set_len(len);
            assert_eq!(buffer.len(), len);
            assert!(buffer.as_ptr().addr().is_multiple_of(PAGE) || len == 0);
            buffer.fill(7);
            assert!(buffer.iter().all(|&byte| byte == 7));
        }
    }
}
