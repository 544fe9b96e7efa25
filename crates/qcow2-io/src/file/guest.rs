//! A file and the memory of a guest, without a copy in between.

use super::FileStorage;
use crate::error::{Call, MAX_LEN};
use crate::sys::guest;
use qcow2_core::{HostOffset, StorageError};
use vm_memory::VolatileSlice;

/// What a guest's monitor has mapped; these calls take the place of [`Storage::read_at`] and
/// [`Storage::write_at`](qcow2_core::Storage::write_at), which need slices of bytes.
///
/// [`Storage::read_at`]: qcow2_core::Storage::read_at
impl FileStorage {
    /// True if the memory of a guest can be moved to and from this file. Not with direct I/O: a guest's
    /// buffers may be aligned to less than the file's blocks.
    pub fn moves_guest_memory(&self) -> bool {
        self.direct.is_none()
    }

    /// Fills `into`, slice after slice, with the bytes from `offset` on, and returns how many there were:
    /// fewer only at the end of the file. Errors: of the system.
    pub fn read_to_guest(
        &self,
        offset: HostOffset,
        into: &[VolatileSlice<'_>],
    ) -> Result<usize, StorageError> {
        if offset.value() > MAX_LEN {
            return Ok(0);
        }
        let call = Call::new("read", offset, len_of(into));
        guest::read_full(&self.file, offset.value(), into).map_err(|error| call.failed(error))
    }

    /// Writes the bytes of `from`, slice after slice, from `offset` on; durable after the next flush. Each
    /// byte is read once: what the guest changes meanwhile may be written or not. Errors: `ReadOnly`,
    /// `NoSpace`; of the system.
    pub fn write_from_guest(
        &self,
        offset: HostOffset,
        from: &[VolatileSlice<'_>],
    ) -> Result<(), StorageError> {
        let call = Call::new("write", offset, len_of(from));
        let end = self.check(call)?;
        if end == offset.value() {
            return Ok(());
        }
        let _guard = self.guard(offset.value(), end);
        guest::write_full(&self.file, offset.value(), from).map_err(|error| call.failed(error))?;
        self.grown_to(end);
        Ok(())
    }
}

fn len_of(slices: &[VolatileSlice<'_>]) -> u64 {
    slices.iter().map(|slice| slice.len() as u64).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::OpenFile;
    use qcow2_core::Storage;

    /// More slices than one call takes, some of them empty.
    #[test]
    fn slices_are_moved_in_order_and_the_end_of_the_file_ends_a_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, [1; 100]).unwrap();
        let file = OpenFile::writable().open_file(&path).unwrap();
        let mut memory: Vec<u8> = (0..=255).collect();
        let all = VolatileSlice::from(&mut memory[..]);
        let slices: Vec<_> = (0..128).map(|n| all.subslice(2 * n, n % 3).unwrap()).collect();
        let wanted: Vec<u8> = (0..128).flat_map(|n| (0..n % 3).map(move |i| (2 * n + i) as u8)).collect();
        file.write_from_guest(HostOffset::new(90), &slices).unwrap();
        assert_eq!(file.len().unwrap(), 90 + wanted.len() as u64);
        let mut bytes = vec![0; wanted.len()];
        file.read_at(HostOffset::new(90), &mut bytes).unwrap();
        assert_eq!(bytes, wanted);
        all.copy_from(&[0_u8; 256]);
        let end = HostOffset::new(85);
        assert_eq!(file.read_to_guest(end, &slices).unwrap(), wanted.len());
        let mut read = Vec::new();
        for slice in &slices {
            let mut part = vec![0_u8; slice.len()];
            slice.copy_to(&mut part);
            read.extend(part);
        }
        assert_eq!((&read[..5], &read[5..]), (&[1; 5][..], &wanted[..wanted.len() - 5]));
        assert_eq!(file.read_to_guest(HostOffset::new(90 + wanted.len() as u64 - 3), &slices).unwrap(), 3);
        assert_eq!(file.read_to_guest(HostOffset::new(u64::MAX), &slices).unwrap(), 0);
    }
}
