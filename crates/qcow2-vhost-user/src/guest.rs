//! What a guest sent, or waits for: the bytes of a descriptor chain, in order.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

/// The bytes of one side of a chain. Each is passed once.
pub(crate) struct GuestBytes<'a> {
    slices: VecDeque<VolatileSlice<'a>>,
    left: usize,
}

impl<'a> GuestBytes<'a> {
    /// The bytes of `descriptors`. `None`: some of them are not in the guest's memory, or there are more than
    /// a length has room for.
    pub(crate) fn new(
        memory: &'a GuestMemoryMmap,
        descriptors: impl Iterator<Item = Descriptor>,
    ) -> Option<Self> {
        let (mut slices, mut left) = (VecDeque::new(), 0_usize);
        for descriptor in descriptors {
            let len = descriptor.len() as usize;
            left = left.checked_add(len).filter(|&left| left <= u32::MAX as usize)?;
            for slice in memory.get_slices(descriptor.addr(), len) {
                slices.push_back(slice.ok()?);
            }
        }
        Some(Self { slices, left })
    }

    /// Of any memory.
    #[cfg(test)]
    pub(crate) fn of(slices: Vec<VolatileSlice<'a>>) -> Self {
        let left = slices.iter().map(VolatileSlice::len).sum();
        Self { slices: slices.into(), left }
    }

    /// Bytes that were not passed yet.
    pub(crate) fn left(&self) -> usize {
        self.left
    }

    /// Takes the last byte away. `None`: there is none.
    pub(crate) fn take_last(&mut self) -> Option<VolatileSlice<'a>> {
        let slice = self.slices.iter_mut().rev().find(|slice| !slice.is_empty())?;
        let (rest, last) = slice.split_at(slice.len() - 1).ok()?;
        *slice = rest;
        self.left -= 1;
        Some(last)
    }

    /// The next `len` bytes, or all that are left.
    pub(crate) fn peek(&self, len: usize) -> Vec<VolatileSlice<'a>> {
        let (mut found, mut left) = (Vec::with_capacity(self.slices.len()), len);
        for slice in &self.slices {
            let part = slice.len().min(left);
            if part > 0 {
                found.extend(slice.subslice(0, part));
            }
            left -= part;
        }
        found
    }

    /// Passes the next `len` bytes, or all that are left.
    pub(crate) fn skip(&mut self, len: usize) {
        let mut rest = len;
        while let Some(slice) = self.slices.front_mut() {
            let part = slice.len().min(rest);
            (rest, self.left) = (rest - part, self.left - part);
            match slice.offset(part) {
                Ok(behind) if !behind.is_empty() => {
                    *slice = behind;
                    return;
                }
                _ => self.slices.pop_front(),
            };
        }
    }

    /// Calls `with` for the next bytes, slice by slice, `len` in all, and passes them.
    fn each(&mut self, len: usize, mut with: impl FnMut(usize, &VolatileSlice<'a>)) -> usize {
        let mut done = 0;
        for slice in self.peek(len) {
            with(done, &slice);
            done += slice.len();
        }
        self.skip(done);
        done
    }
}

impl Read for GuestBytes<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        Ok(self.each(buf.len(), |done, slice| _ = slice.copy_to(&mut buf[done..])))
    }
}

impl Write for GuestBytes<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        Ok(self.each(buf.len(), |done, slice| slice.copy_from(&buf[done..])))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
