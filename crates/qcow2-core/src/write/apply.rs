//! Carries out a write: prepare, move the bytes, commit the mapping.
//!
//! No metadata lock is held while data moves; only the claim on the guest clusters holds back other writers.

use super::prepare::{Edge, Prepared};
use crate::error::Result;
use crate::image::Image;
use crate::port::event::Event;
use crate::port::storage::{Storage, ZeroMode};
use ::alloc::vec::Vec;
use qcow2_format::{GuestOffset, HostOffset};

impl Image {
    /// Writes `buf` at `offset`. The caller has checked the range and runs inside an operation.
    pub(crate) fn write_range(&self, offset: GuestOffset, buf: &[u8]) -> Result<()> {
        if !self.crypt.is_plain() {
            return self.write_encrypted(offset, buf);
        }
        let (mut at, mut rest) = (offset.value(), buf);
        while !rest.is_empty() {
            let prepared = self.prepare(GuestOffset::new(at), rest.len() as u64)?;
            let (part, next) = rest.split_at(prepared.len as usize);
            assert!(!part.is_empty(), "writing at {at:#x} makes no progress");
            self.report_move(&prepared);
            let batch = [(prepared, part)];
            move_data(&**self.file.data()?, &batch)?;
            let [(prepared, _)] = batch;
            prepared.commit()?;
            at += part.len() as u64;
            rest = next;
        }
        Ok(())
    }

    /// Reports that the bytes of `prepared` are written: together with edges that were read, if it has some.
    pub(crate) fn report_move(&self, prepared: &Prepared<'_>) {
        self.file.event(Event::WriteAio);
        if prepared.copies {
            self.file.event(Event::CowWrite);
        }
    }
}

/// Writes the bytes of prepared writes and their copy-on-write edges to `data`. Bytes that follow each other
/// go out in one vectored write.
pub(crate) fn move_data(data: &dyn Storage, batch: &[(Prepared<'_>, &[u8])]) -> Result<()> {
    if let [(prepared, buf)] = batch
        && prepared.edges.is_empty()
    {
        return Ok(data.write_at(prepared.host, buf)?);
    }
    let mut pieces: Vec<(HostOffset, &[u8])> = Vec::with_capacity(batch.len() * 2);
    for (prepared, buf) in batch {
        for edge in &prepared.edges {
            match edge {
                Edge::Bytes { host, bytes } => pieces.push((*host, bytes)),
                Edge::Zeroes { host, len } => data.write_zeroes(*host, *len, ZeroMode::KeepAllocated)?,
            }
        }
        pieces.push((prepared.host, buf));
    }
    pieces.sort_unstable_by_key(|(host, _)| *host);
    let mut rest = &pieces[..];
    while let Some(&(start, first)) = rest.first() {
        let mut end = start.value() + first.len() as u64;
        let mut count = 1;
        while rest.get(count).is_some_and(|(host, _)| host.value() == end) {
            end += rest[count].1.len() as u64;
            count += 1;
        }
        let bufs: Vec<&[u8]> = rest[..count].iter().map(|(_, bytes)| *bytes).collect();
        data.write_vectored_at(start, &bufs)?;
        rest = &rest[count..];
    }
    Ok(())
}
