//! Large buffers that start on a page.
//!
//! What comes from the allocator in this size starts 16 bytes behind a page, and some processors (AMD's third
//! Zen) then copy between it and the page cache at a third of the speed.

use std::ops::{Deref, DerefMut};

/// Where a buffer starts: a multiple of this.
const PAGE: usize = 4096;

/// Bytes that are used again and again, the first of them on a page.
#[derive(Debug, Default)]
pub(crate) struct PageBuffer {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl PageBuffer {
    /// Makes it `len` bytes. They have any content.
    pub(crate) fn set_len(&mut self, len: usize) {
        if self.start + len > self.bytes.len() {
            // A new one rather than a longer one: there is nothing worth copying, and zero pages come for
            // free.
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
    fn starts_on_a_page_and_has_the_asked_length() {
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
