//! A storage that keeps changes in memory. A repair is planned and checked in it, and written only then.

use qcow2_core::{HostOffset, Limits, Storage, StorageError, StorageErrorKind, StorageExtent, ZeroMode};
use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Size of a page in bytes: the unit in which changes are kept.
pub(super) const PAGE: u64 = 4096;

/// Limit for the changed bytes of a draft. Origin: ours; a new refcount structure for 16 TiB with 64 KiB
/// clusters takes 512 MiB.
pub const MAX_CHANGED: u64 = 512 << 20;

type Page = Box<[u8; PAGE as usize]>;

/// A storage with changes on top. Nothing is written to the storage.
pub(crate) struct Draft<'a> {
    base: Base<'a>,
    base_len: u64,
    state: RwLock<State>,
}

/// What lies under a draft.
enum Base<'a> {
    Borrowed(&'a dyn Storage),
    Shared(Arc<dyn Storage>),
}

impl<'a> std::ops::Deref for Base<'a> {
    type Target = dyn Storage + 'a;

    fn deref(&self) -> &Self::Target {
        match self {
            Base::Borrowed(base) => *base,
            Base::Shared(base) => &**base,
        }
    }
}

struct State {
    pages: BTreeMap<u64, Page>,
    len: u64,
}

impl<'a> Draft<'a> {
    pub(super) fn new(base: &'a dyn Storage) -> Result<Self, StorageError> {
        Self::over(Base::Borrowed(base))
    }

    /// A draft that lives as long as it is needed.
    pub(crate) fn shared(base: Arc<dyn Storage>) -> Result<Self, StorageError> {
        Self::over(Base::Shared(base))
    }

    fn over(base: Base<'a>) -> Result<Self, StorageError> {
        let len = base.len()?;
        Ok(Self { base, base_len: len, state: RwLock::new(State { pages: BTreeMap::new(), len }) })
    }

    /// Calls `visit` with offset and bytes of each changed page from byte `start` up to `end`, in ascending
    /// order. The last page is cut at the end of the draft.
    pub(super) fn changed(
        &self,
        range: std::ops::Range<u64>,
        mut visit: impl FnMut(HostOffset, &[u8]) -> Result<(), StorageError>,
    ) -> Result<(), StorageError> {
        let state = self.read();
        for (&number, page) in state.pages.range(range.start / PAGE..range.end.div_ceil(PAGE)) {
            let start = number * PAGE;
            let (from, to) = (start.max(range.start), (start + PAGE).min(range.end).min(state.len));
            if from < to {
                let bytes = &page[(from - start) as usize..(to - start) as usize];
                visit(HostOffset::new(from), bytes)?;
            }
        }
        Ok(())
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads a page from the base.
    fn load(&self, number: u64) -> Result<Page, StorageError> {
        let mut page = Box::new([0; PAGE as usize]);
        if number * PAGE < self.base_len {
            self.base.read_padded(HostOffset::new(number * PAGE), &mut page[..])?;
        }
        Ok(page)
    }
}

impl Storage for Draft<'_> {
    fn len(&self) -> Result<u64, StorageError> {
        Ok(self.read().len)
    }

    fn read_at(&self, offset: HostOffset, buf: &mut [u8]) -> Result<usize, StorageError> {
        let state = self.read();
        let start = offset.value();
        let len = state.len.saturating_sub(start).min(buf.len() as u64);
        let buf = &mut buf[..len as usize];
        match start < self.base_len {
            true => self.base.read_padded(offset, buf)?,
            false => buf.fill(0),
        }
        let end = start + len;
        for (&number, page) in state.pages.range(start / PAGE..end.div_ceil(PAGE)) {
            let (from, to) = ((number * PAGE).max(start), ((number + 1) * PAGE).min(end));
            let bytes = &page[(from - number * PAGE) as usize..(to - number * PAGE) as usize];
            buf[(from - start) as usize..(to - start) as usize].copy_from_slice(bytes);
        }
        Ok(len as usize)
    }

    fn write_at(&self, offset: HostOffset, buf: &[u8]) -> Result<(), StorageError> {
        let mut state = self.write();
        let start = offset.value();
        let end = start
            .checked_add(buf.len() as u64)
            .ok_or_else(|| StorageError::new(StorageErrorKind::OutOfRange, "write past 2^64 - 1"))?;
        for number in start / PAGE..end.div_ceil(PAGE) {
            if !state.pages.contains_key(&number) {
                if state.pages.len() as u64 >= MAX_CHANGED / PAGE {
                    let text = format!("the repair changes more than {MAX_CHANGED} bytes of tables");
                    return Err(StorageError::new(StorageErrorKind::NoSpace, text));
                }
                let page = self.load(number)?;
                state.pages.insert(number, page);
            }
            let Some(page) = state.pages.get_mut(&number) else { continue };
            let (from, to) = ((number * PAGE).max(start), ((number + 1) * PAGE).min(end));
            page[(from - number * PAGE) as usize..(to - number * PAGE) as usize]
                .copy_from_slice(&buf[(from - start) as usize..(to - start) as usize]);
        }
        state.len = state.len.max(end);
        Ok(())
    }

    fn write_zeroes(&self, offset: HostOffset, len: u64, _: ZeroMode) -> Result<(), StorageError> {
        let zeroes = [0; PAGE as usize];
        let mut done = 0;
        while done < len {
            let piece = (len - done).min(PAGE);
            self.write_at(HostOffset::new(offset.value().saturating_add(done)), &zeroes[..piece as usize])?;
            done += piece;
        }
        Ok(())
    }

    fn discard(&self, _: HostOffset, _: u64) -> Result<(), StorageError> {
        Ok(())
    }

    fn allocate(&self, _: HostOffset, _: u64) -> Result<(), StorageError> {
        Err(StorageError::new(StorageErrorKind::Unsupported, "a draft reserves no space"))
    }

    fn set_len(&self, len: u64) -> Result<(), StorageError> {
        // Only grows: a repair never truncates the base.
        let mut state = self.write();
        state.len = state.len.max(len);
        Ok(())
    }

    fn flush(&self) -> Result<(), StorageError> {
        Ok(())
    }

    fn extent_at(&self, offset: HostOffset, len: u64) -> Result<StorageExtent, StorageError> {
        let (state, at) = (self.read(), offset.value());
        let number = at / PAGE;
        if state.pages.contains_key(&number) {
            return Ok(StorageExtent { len: ((number + 1) * PAGE - at).min(len), data: true });
        }
        let changed = state.pages.range(number..).next();
        let len = changed.map_or(len, |(&next, _)| len.min(next * PAGE - at));
        match self.base_len.checked_sub(at) {
            None | Some(0) => Ok(StorageExtent { len, data: false }),
            Some(left) => self.base.extent_at(offset, len.min(left)),
        }
    }

    fn limits(&self) -> Limits {
        self.base.limits()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qcow2_testkit::rng::Rng;

    fn at(offset: u64) -> HostOffset {
        HostOffset::new(offset)
    }

    #[test]
    fn reads_what_was_written_and_leaves_the_base() {
        let base = qcow2_testkit::storage::PageStorage::default();
        let first: Vec<u8> = (0..20_000u32).map(|n| n as u8).collect();
        base.write_at(at(0), &first).unwrap();
        let draft = Draft::new(&base).unwrap();
        let (mut model, mut rng) = (first.clone(), Rng::new(7));
        for _ in 0..300 {
            let (start, len) = (rng.below(30_000) as usize, rng.below(9_000) as usize);
            let byte = rng.below(256) as u8;
            draft.write_at(at(start as u64), &vec![byte; len]).unwrap();
            if len > 0 {
                model.resize(model.len().max(start + len), 0);
                model[start..start + len].fill(byte);
            }
            let (start, len) = (rng.below(30_000) as usize, rng.below(9_000) as usize);
            let mut seen = vec![1; len];
            let read = draft.read_at(at(start as u64), &mut seen).unwrap();
            let expected = model.get(start..(start + len).min(model.len())).unwrap_or_default();
            assert_eq!(&seen[..read], expected);
        }
        let mut seen = vec![0; first.len()];
        base.read_padded(at(0), &mut seen).unwrap();
        assert!(seen == first && base.len().unwrap() == first.len() as u64);
        // All changes together turn the base into the model.
        let mut made = first;
        made.resize(model.len(), 0);
        draft
            .changed(0..u64::MAX / 2, |offset, bytes| {
                made[offset.value() as usize..][..bytes.len()].copy_from_slice(bytes);
                Ok(())
            })
            .unwrap();
        assert!(made == model);
    }

    #[test]
    fn holes_end_where_something_was_written() {
        let base = qcow2_testkit::storage::PageStorage::default();
        base.write_at(at(10 * PAGE), &[1; 10]).unwrap();
        base.set_len(20 * PAGE).unwrap();
        let draft = Draft::new(&base).unwrap();
        for place in [3 * PAGE + 5, 4 * PAGE, 15 * PAGE, 25 * PAGE] {
            draft.write_at(at(place), &[2; 20]).unwrap();
        }
        let (mut data, mut next) = (Vec::new(), 0);
        while next < draft.len().unwrap() {
            let extent = draft.extent_at(at(next), draft.len().unwrap() - next).unwrap();
            if extent.data {
                data.push(next / PAGE);
            }
            next += extent.len;
        }
        assert_eq!(data, [3, 4, 10, 15, 25]);
        assert_eq!(draft.extent_at(at(100), 7).unwrap(), StorageExtent { len: 7, data: false });
    }
}
