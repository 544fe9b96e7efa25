//! Checked big-endian reads and writes. Every multi-byte number in the format is big-endian.
//!
//! Nothing here panics: an access outside the buffer returns `None`.

use alloc::vec::Vec;

/// `N` bytes from offset `at`, or `None` if they are not all inside `bytes`.
fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

/// The 16-bit number at offset `at`, or `None` past the end.
pub fn read_u16(bytes: &[u8], at: usize) -> Option<u16> {
    array(bytes, at).map(u16::from_be_bytes)
}

/// The 32-bit number at offset `at`, or `None` past the end.
pub fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    array(bytes, at).map(u32::from_be_bytes)
}

/// The 64-bit number at offset `at`, or `None` past the end.
pub fn read_u64(bytes: &[u8], at: usize) -> Option<u64> {
    array(bytes, at).map(u64::from_be_bytes)
}

/// The entries of a table of 64-bit words, in order. A partial entry at the end is ignored.
pub fn words(bytes: &[u8]) -> impl ExactSizeIterator<Item = u64> + '_ {
    bytes.chunks_exact(8).map(|chunk| read_u64(chunk, 0).unwrap_or_default())
}

/// Encodes a table of 64-bit words as it is stored on disk.
pub fn table_bytes(words: impl IntoIterator<Item = u64>) -> Vec<u8> {
    let words = words.into_iter();
    let mut bytes = Vec::with_capacity(words.size_hint().0.saturating_mul(8));
    push_words(&mut bytes, words);
    bytes
}

/// Appends 64-bit words to an encoded table.
pub fn push_words(bytes: &mut Vec<u8>, words: impl IntoIterator<Item = u64>) {
    for word in words {
        bytes.extend_from_slice(&word.to_be_bytes());
    }
}

/// Writes `value` at offset `at`. Returns `None` and changes nothing if it does not fit.
pub fn write_u64(bytes: &mut [u8], at: usize, value: u64) -> Option<()> {
    bytes.get_mut(at..at.checked_add(8)?)?.copy_from_slice(&value.to_be_bytes());
    Some(())
}

/// A cursor that reads consecutive fields.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    /// Starts at offset `at` of `bytes`.
    pub fn new(bytes: &'a [u8], at: usize) -> Self {
        Self { bytes, at }
    }

    /// Offset of the next field.
    pub fn position(&self) -> usize {
        self.at
    }

    /// The next `len` bytes. Returns `None` and does not advance if fewer are left.
    pub fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let end = self.at.checked_add(len)?;
        let taken = self.bytes.get(self.at..end)?;
        self.at = end;
        Some(taken)
    }

    /// The next byte.
    pub fn u8(&mut self) -> Option<u8> {
        self.take(1).map(|b| b[0])
    }

    /// The next 16-bit number.
    pub fn u16(&mut self) -> Option<u16> {
        self.take(2).and_then(|b| read_u16(b, 0))
    }

    /// The next 32-bit number.
    pub fn u32(&mut self) -> Option<u32> {
        self.take(4).and_then(|b| read_u32(b, 0))
    }

    /// The next 64-bit number.
    pub fn u64(&mut self) -> Option<u64> {
        self.take(8).and_then(|b| read_u64(b, 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_big_endian_and_stops_at_the_end() {
        let bytes = [1, 2, 3, 4, 5, 6, 7, 8, 9];
        assert_eq!(read_u16(&bytes, 7), Some(0x0809));
        assert_eq!(read_u16(&bytes, 8), None);
        assert_eq!(read_u32(&bytes, 1), Some(0x0203_0405));
        assert_eq!(read_u64(&bytes, 1), Some(0x0203_0405_0607_0809));
        assert_eq!(read_u64(&bytes, 2), None);
        assert_eq!(read_u64(&bytes, usize::MAX), None);
        assert_eq!(words(&bytes).collect::<Vec<_>>(), [0x0102_0304_0506_0708]);
        assert_eq!(table_bytes(words(&bytes)), bytes[..8]);
    }

    #[test]
    fn a_reader_does_not_move_past_the_end() {
        let bytes = [0, 0, 0, 7, 0xaa];
        let mut reader = Reader::new(&bytes, 0);
        assert_eq!(reader.u32(), Some(7));
        assert_eq!(reader.u16(), None);
        assert_eq!(reader.position(), 4);
        assert_eq!(reader.u8(), Some(0xaa));
        assert_eq!(reader.take(usize::MAX), None);
        assert_eq!(Reader::new(&bytes, 9).u8(), None);
    }

    #[test]
    fn writes_only_what_fits() {
        let mut bytes = [0u8; 9];
        assert_eq!(write_u64(&mut bytes, 1, 0x0102_0304_0506_0708), Some(()));
        assert_eq!(bytes, [0, 1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(write_u64(&mut bytes, 2, 0), None);
        assert_eq!(bytes[8], 8);
    }
}
