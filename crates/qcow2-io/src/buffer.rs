//! Memory for requests.

use std::ops::{Deref, DerefMut};

/// The alignment of a buffer that is made here: what direct I/O asks for on every device that we know.
const ALIGNMENT: usize = 4096;

/// Bytes for a request, owned, at an address that does not change when the value is moved. One that is made
/// with [`zeroed`](Self::zeroed) is aligned for direct I/O; one made of a `Vec` is where the `Vec` was.
#[derive(Debug, Default)]
pub struct IoBuffer {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl IoBuffer {
    /// `len` zeroes, at a multiple of 4096 bytes.
    pub fn zeroed(len: usize) -> Self {
        Self::aligned(len, ALIGNMENT)
    }

    /// `len` zeroes, at a multiple of `alignment` bytes: more is allocated than is needed.
    pub(crate) fn aligned(len: usize, alignment: usize) -> Self {
        let memory = vec![0; len + alignment];
        let start = memory.as_ptr().addr().next_multiple_of(alignment) - memory.as_ptr().addr();
        Self { memory, start, len }
    }
}

impl From<Vec<u8>> for IoBuffer {
    fn from(memory: Vec<u8>) -> Self {
        let len = memory.len();
        Self { memory, start: 0, len }
    }
}

impl Deref for IoBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }
}

impl DerefMut for IoBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligned_buffers_keep_their_alignment_when_moved() {
        let mut buffer = IoBuffer::zeroed(10_000);
        buffer[9_999] = 7;
        let moved = Box::new(buffer);
        assert!(moved.as_ptr().addr().is_multiple_of(4096));
        assert_eq!((moved.len(), moved[9_999]), (10_000, 7));
        assert_eq!(*IoBuffer::from(vec![1, 2]), [1, 2]);
    }
}
