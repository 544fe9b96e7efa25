//! Bytes that are cheap to clone: sparse 4 KiB pages, shared copy-on-write.
//!
//! Crash images of one moment differ in few sectors, so cloning costs one reference count per page.

use std::sync::Arc;

/// Bytes in a page.
const PAGE: u64 = 4096;

/// A growable byte array. Cloning shares every page; a write copies the pages it touches.
///
/// Meant for small images: the page list takes 8 bytes for every 4 KiB of length.
#[derive(Clone, Debug, Default)]
pub struct PageBytes {
    pages: Vec<Option<Arc<[u8; PAGE as usize]>>>,
    len: u64,
}

/// The longest simulated storage, 64 GiB: a wild offset then fails instead of exhausting memory.
pub const MAX_LEN: u64 = 1 << 36;

impl PageBytes {
    /// An empty array.
    pub fn new() -> Self {
        Self::default()
    }

    /// A copy of `bytes`.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let mut pages = Self::new();
        pages.write(0, bytes);
        pages
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True if the length is 0.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All bytes as one vector.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut all = vec![0; self.len as usize];
        self.read(0, &mut all);
        all
    }

    /// Fills `buf` from `offset` on and returns how many bytes exist there; the rest of `buf` is zeroed.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> usize {
        let available = self.len.saturating_sub(offset).min(buf.len() as u64) as usize;
        let mut done = 0;
        while done < available {
            let at = offset + done as u64;
            let from = (at % PAGE) as usize;
            let n = (PAGE as usize - from).min(available - done);
            match self.pages.get((at / PAGE) as usize) {
                Some(Some(page)) => buf[done..done + n].copy_from_slice(&page[from..from + n]),
                _ => buf[done..done + n].fill(0),
            }
            done += n;
        }
        buf[available..].fill(0);
        available
    }

    /// Writes `bytes` at `offset`; grows as needed. The end must not exceed [`MAX_LEN`].
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        self.grow(offset + bytes.len() as u64);
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let from = (at % PAGE) as usize;
            let n = (PAGE as usize - from).min(bytes.len() - done);
            self.page_mut(at)[from..from + n].copy_from_slice(&bytes[done..done + n]);
            done += n;
        }
    }

    /// Zeroes `len` bytes from `offset` on; grows as needed and drops whole pages.
    pub fn zero(&mut self, offset: u64, len: u64) {
        self.grow(offset + len);
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let n = (PAGE - at % PAGE).min(end - at);
            let slot = &mut self.pages[(at / PAGE) as usize];
            if n == PAGE {
                *slot = None;
            } else if let Some(page) = slot {
                let from = (at % PAGE) as usize;
                Arc::make_mut(page)[from..from + n as usize].fill(0);
            }
            at += n;
        }
    }

    /// Truncates or grows; new bytes are zero.
    pub fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.pages.truncate(len.div_ceil(PAGE) as usize);
            self.len = len;
            let tail = (len % PAGE) as usize;
            if let (1.., Some(Some(page))) = (tail, self.pages.last_mut()) {
                Arc::make_mut(page)[tail..].fill(0);
            }
        } else {
            self.grow(len);
        }
    }

    /// The length of the run from `offset` on, at most `len`, and whether it is data (pages that exist).
    pub fn run_at(&self, offset: u64, len: u64) -> (u64, bool) {
        let data = self.has_page(offset);
        let mut end = (offset / PAGE + 1) * PAGE;
        while end < offset + len && self.has_page(end) == data {
            end += PAGE;
        }
        ((end - offset).min(len), data)
    }

    /// Bytes in existing pages.
    pub fn used(&self) -> u64 {
        self.pages.iter().flatten().count() as u64 * PAGE
    }

    fn has_page(&self, offset: u64) -> bool {
        matches!(self.pages.get((offset / PAGE) as usize), Some(Some(_)))
    }

    fn grow(&mut self, len: u64) {
        assert!(len <= MAX_LEN, "simulated storage would grow to {len} bytes");
        if len > self.len {
            self.pages.resize(len.div_ceil(PAGE) as usize, None);
            self.len = len;
        }
    }

    fn page_mut(&mut self, offset: u64) -> &mut [u8; PAGE as usize] {
        let slot = &mut self.pages[(offset / PAGE) as usize];
        Arc::make_mut(slot.get_or_insert_with(|| Arc::new([0; PAGE as usize])))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    /// Random changes compared with a plain vector; clones taken in between must not change.
    #[test]
    fn behaves_like_a_vector() {
        let mut rng = Rng::new(3);
        let mut pages = PageBytes::new();
        let mut plain: Vec<u8> = Vec::new();
        let mut kept: Vec<(PageBytes, Vec<u8>)> = Vec::new();
        for _ in 0..2000 {
            let at = rng.below(40_000);
            let len = rng.below(9000);
            let end = (at + len) as usize;
            match rng.below(6) {
                0..=2 => {
                    let mut bytes = vec![0; len as usize];
                    rng.fill(&mut bytes);
                    pages.write(at, &bytes);
                    plain.resize(plain.len().max(end), 0);
                    plain[at as usize..end].copy_from_slice(&bytes);
                }
                3 => {
                    pages.zero(at, len);
                    plain.resize(plain.len().max(end), 0);
                    plain[at as usize..end].fill(0);
                }
                4 => {
                    pages.set_len(at);
                    plain.resize(at as usize, 0);
                }
                _ => kept.push((pages.clone(), plain.clone())),
            }
            assert!(pages.len() == plain.len() as u64);
        }
        kept.push((pages, plain));
        for (pages, plain) in kept {
            assert!(pages.to_vec() == plain);
            let mut buf = [9; 16];
            assert_eq!(pages.read(plain.len() as u64 + 5, &mut buf), 0);
            assert_eq!(buf, [0; 16]);
        }
    }

    #[test]
    fn runs_distinguish_data_and_holes() {
        let mut pages = PageBytes::new();
        pages.write(8192, &[1; 10]);
        pages.set_len(40_000);
        assert_eq!(pages.run_at(100, 40_000 - 100), (8092, false));
        assert_eq!(pages.run_at(8192, 20_000), (4096, true));
        assert_eq!(pages.run_at(12_288, 100), (100, false));
        assert_eq!(pages.used(), 4096);
    }
}
