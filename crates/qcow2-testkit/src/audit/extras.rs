//! Snapshots, bitmaps and the LUKS header as owners of clusters.

use super::{Owner, ProblemKind, Walk};

/// Bits 9-55: the host offset in a bitmap table entry.
const BITMAP_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

impl Walk<'_> {
    pub(super) fn extras(&mut self) {
        self.snapshots();
        if let Some((offset, size)) = self.header.bitmaps {
            self.bitmaps(offset, size);
        }
        if let Some((offset, len)) = self.header.crypt {
            let clusters = self.format().geometry.clusters_for(len);
            self.own(offset, clusters, Owner::Crypt);
        }
    }

    fn bytes(&self, offset: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.image.read(offset, &mut bytes);
        bytes
    }

    fn snapshots(&mut self) {
        let start = self.header.snapshots_offset;
        let mut at = start;
        for index in 0..self.header.snapshot_count {
            if at >= self.image.len() {
                self.audit
                    .problem(ProblemKind::Broken, format!("snapshot {index}: past the end of the file"));
                return;
            }
            let entry = self.bytes(at, 40);
            let (l1_offset, l1_entries) = (number(&entry[..8]), number(&entry[8..12]));
            let (id, name, extra) = (number(&entry[12..14]), number(&entry[14..16]), number(&entry[36..40]));
            self.l1(l1_offset, l1_entries, false);
            at += (40 + extra + id + name).next_multiple_of(8);
        }
        if at > start {
            let clusters = self.format().geometry.clusters_for(at - start);
            self.own(start, clusters, Owner::SnapshotTable);
        }
    }

    fn bitmaps(&mut self, offset: u64, size: u64) {
        let geometry = self.format().geometry;
        if !geometry.is_aligned(offset) || size > self.image.len() {
            self.audit.problem(ProblemKind::Broken, format!("bitmap directory: {size} bytes at {offset:#x}"));
            return;
        }
        self.own(offset, geometry.clusters_for(size), Owner::Bitmap);
        let directory = self.bytes(offset, size);
        let mut at = 0;
        while at + 24 <= directory.len() {
            let entry = &directory[at..];
            self.audit.bitmaps_in_use += u64::from(entry[15] & 1);
            self.bitmap_table(number(&entry[..8]), number(&entry[8..12]));
            let (name, extra) = (number(&entry[18..20]), number(&entry[20..24]));
            at += (24 + name + extra).next_multiple_of(8) as usize;
        }
    }

    fn bitmap_table(&mut self, offset: u64, entries: u64) {
        let geometry = self.format().geometry;
        if !geometry.is_aligned(offset) {
            self.audit.problem(ProblemKind::Broken, format!("bitmap table at {offset:#x} is not aligned"));
            return;
        }
        if !self.own(offset, geometry.clusters_for(entries * 8), Owner::Bitmap) {
            return;
        }
        for raw in self.words(offset, entries) {
            let host = raw & BITMAP_OFFSET;
            if raw & !BITMAP_OFFSET > 1 || (host != 0 && raw & 1 != 0) || !geometry.is_aligned(host) {
                self.audit.problem(ProblemKind::Broken, format!("bitmap table entry {raw:#x}"));
            } else if host != 0 {
                self.own(host, 1, Owner::Bitmap);
            }
        }
    }
}

/// Reads `bytes` (at most 8) as a big-endian number.
fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, &byte| number << 8 | u64::from(byte))
}
