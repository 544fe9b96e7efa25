//! `read`, `readv` and `aio_read`: read, verify and print data.

use super::{PIECE_LEN, Target, report};
use crate::grammar::{Check, Manner, Read};
use crate::outcome::Outcome;
use crate::reason::{OUT_OF_MEMORY, Reason};
use crate::report::dump;
use qcow2_core::GuestOffset;
use std::time::{Duration, Instant};

/// Content of a buffer before it is read into.
const FRESH_BYTE: u8 = 0xab;

impl Target {
    /// Runs `read`, `readv` or `aio_read`.
    pub(crate) fn read(&self, request: &Read) -> Outcome {
        let name = if request.manner == Manner::Plain { "read" } else { "readv" };
        // A dump is printed after the result of the verification, so its bytes are kept until all are read:
        // in one piece.
        let piece_len = if request.dump { request.range.len } else { PIECE_LEN };
        let mut bad = false;
        let mut bytes = Vec::new();
        let mut elapsed = Duration::ZERO;
        let mut done = 0;
        // A request without bytes is made once too: its offset may be past the end of the disk.
        while done < request.range.len || (done == 0 && request.range.len == 0) {
            let len = piece_len.min(request.range.len - done);
            let started = Instant::now();
            let result = self.read_piece(request, done, len, &mut bytes);
            elapsed += started.elapsed();
            if let Err(reason) = result {
                return Outcome::refused(name, reason);
            }
            bad |= request.check.is_some_and(|check| !check.holds(done, &bytes));
            done += len;
            if len == 0 {
                break;
            }
        }
        let mut outcome = Outcome { failed: bad, ..Outcome::default() };
        if let Some(check) = request.check.filter(|_| bad) {
            let offset = request.range.offset + check.skip;
            outcome.text = format!("Pattern verification failed at offset {offset}, {} bytes\n", check.len);
        }
        if request.dump && !request.style.quiet {
            outcome.text += &dump(request.range.offset, &bytes);
        }
        outcome.text += &report("read", request.range, elapsed, request.style);
        outcome
    }

    /// Sets `bytes` to `len` bytes of the request, starting `done` bytes into it.
    fn read_piece(&self, request: &Read, done: u64, len: u64, bytes: &mut Vec<u8>) -> Result<(), Reason> {
        let offset = request.range.offset + done;
        if !request.vm_state {
            // Check first, so that a wrong length allocates no memory.
            self.check_range(offset, len)?;
        }
        fresh_buffer(bytes, len)?;
        match request.vm_state {
            true => self.read_vm_state(offset, bytes),
            false => self.fill(offset, bytes),
        }
    }

    /// Reads into `buf`, which lies inside the disk rounded up to whole sectors. Bytes after the end of the
    /// disk are zeroes.
    fn fill(&self, offset: u64, buf: &mut [u8]) -> Result<(), Reason> {
        let there = self.disk.size().saturating_sub(offset).min(buf.len() as u64) as usize;
        let (there, beyond) = buf.split_at_mut(there);
        beyond.fill(0);
        Ok(self.disk.read_at(GuestOffset::new(offset), there)?)
    }
}

impl Check {
    /// True if `bytes`, which start `done` bytes into the request, match the pattern where the check applies.
    fn holds(&self, done: u64, bytes: &[u8]) -> bool {
        let inside = |position: u64| position.saturating_sub(done).min(bytes.len() as u64) as usize;
        bytes[inside(self.skip)..inside(self.skip + self.len)].iter().all(|byte| *byte == self.byte)
    }
}

fn fresh_buffer(bytes: &mut Vec<u8>, len: u64) -> Result<(), Reason> {
    bytes.clear();
    bytes.try_reserve_exact(len as usize).map_err(|_| Reason::System(OUT_OF_MEMORY))?;
    bytes.resize(len as usize, FRESH_BYTE);
    Ok(())
}
