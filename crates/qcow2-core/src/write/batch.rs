//! Several writes at once: prepares all of them, then moves their bytes, neighbours in the file in one
//! call, then commits them.
//!
//! Invariant: a batch takes its claims in ascending order of guest clusters, so that two batches never wait
//! for each other.

use super::apply::move_data;
use super::prepare::{Edge, Prepared};
use crate::error::{Error, Result};
use crate::image::Image;
use ::alloc::vec::Vec;
use qcow2_format::GuestOffset;

/// Limits of one batch: prepared writes, and bytes of copy-on-write edges in memory.
const MAX_BATCH: usize = 128;
const MAX_BESIDE: usize = 4 << 20;

/// The parts that are still to be written.
struct Rest<'a> {
    parts: &'a [(GuestOffset, &'a [u8])],
    /// How many bytes of the first part are written.
    done: usize,
}

impl<'a> Rest<'a> {
    /// The next bytes and their guest offset.
    fn next(&mut self) -> Option<(GuestOffset, &'a [u8])> {
        loop {
            let &(offset, bytes) = self.parts.first()?;
            if self.done < bytes.len() {
                return Some((GuestOffset::new(offset.value() + self.done as u64), &bytes[self.done..]));
            }
            (self.parts, self.done) = (&self.parts[1..], 0);
        }
    }
}

impl Image {
    /// Writes the parts in order, in batches of ascending parts. The caller has checked the ranges and runs
    /// inside an operation. After an error the first parts may be written.
    pub(crate) fn write_batches(&self, parts: &[(GuestOffset, &[u8])]) -> Result<()> {
        let mut rest = Rest { parts, done: 0 };
        while rest.next().is_some() {
            let (batch, failed) = self.prepare_batch(&mut rest);
            move_data(&**self.file.data()?, &batch)?;
            for (prepared, _) in batch {
                prepared.commit()?;
            }
            failed.map_or(Ok(()), Err)?;
        }
        debug_assert!(rest.parts.is_empty(), "{} parts were not written", rest.parts.len());
        Ok(())
    }

    /// Prepares the next parts: up to the first one that touches a cluster of the batch or lies before it, or
    /// whose preparation fails. Returns the batch and that error.
    fn prepare_batch<'a, 'b>(
        &'a self,
        rest: &mut Rest<'b>,
    ) -> (Vec<(Prepared<'a>, &'b [u8])>, Option<Error>) {
        let cluster = |at: u64| self.file.geometry().guest_cluster(GuestOffset::new(at)).value();
        let (mut batch, mut free_from, mut beside) = (Vec::new(), 0, 0);
        while let Some((offset, bytes)) = rest.next() {
            if cluster(offset.value()) < free_from || batch.len() == MAX_BATCH || beside > MAX_BESIDE {
                break;
            }
            let prepared = match self.prepare(offset, bytes.len() as u64) {
                Ok(prepared) => prepared,
                Err(error) => return (batch, Some(error)),
            };
            beside += prepared.edges.iter().map(Edge::held).sum::<usize>();
            self.report_move(&prepared);
            assert!(prepared.len > 0 && prepared.len <= bytes.len() as u64, "prepared for a wrong length");
            free_from = cluster(offset.value() + prepared.len - 1) + 1;
            rest.done += prepared.len as usize;
            let (part, later) = bytes.split_at(prepared.len as usize);
            batch.push((prepared, part));
            if !later.is_empty() {
                // The rest may begin in the cluster in which this part ends, which is claimed.
                break;
            }
        }
        (batch, None)
    }
}
