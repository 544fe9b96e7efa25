//! Semantic damage: one field of a table or of the header gets another value, as a failing medium or a faulty
//! program leaves it. Everything else of the image stays whole, so that a check and a repair have something
//! to reason with.

use crate::rng::Rng;

/// Mask of the host offset in an L1 entry, an L2 entry and a bitmap table entry.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Type of the bitmaps extension.
const BITMAPS: [u8; 4] = 0x2385_2875_u32.to_be_bytes();

/// An image file in memory, with its fields read and written at their places in the file.
struct Fields<'a>(&'a mut [u8]);

impl Fields<'_> {
    fn u64(&self, at: u64) -> u64 {
        let bytes = self.0.get(at as usize..).and_then(|rest| rest.first_chunk::<8>());
        bytes.map_or(0, |bytes| u64::from_be_bytes(*bytes))
    }

    fn u32(&self, at: u64) -> u32 {
        (self.u64(at) >> 32) as u32
    }

    fn set(&mut self, at: u64, bytes: &[u8]) {
        if let Some(place) = self.0.get_mut(at as usize..(at as usize).saturating_add(bytes.len())) {
            place.copy_from_slice(bytes);
        }
    }

    fn set_u64(&mut self, at: u64, value: u64) {
        self.set(at, &value.to_be_bytes());
    }

    fn set_u32(&mut self, at: u64, value: u32) {
        self.set(at, &value.to_be_bytes());
    }

    fn cluster(&self) -> u64 {
        1 << self.u32(20).clamp(9, 21)
    }

    fn clusters(&self) -> u64 {
        (self.0.len() as u64 / self.cluster()).max(1)
    }

    fn version3(&self) -> bool {
        self.u32(4) >= 3
    }

    fn entry_size(&self) -> u64 {
        if self.version3() && self.u64(72) & 1 << 4 != 0 { 16 } else { 8 }
    }

    fn l1(&self) -> u64 {
        self.u64(40)
    }

    fn refcount_table(&self) -> u64 {
        self.u64(48)
    }

    /// The L2 tables of the active disk.
    fn l2_tables(&self) -> Vec<u64> {
        let entries = u64::from(self.u32(36)).min(64);
        (0..entries)
            .map(|index| self.u64(self.l1().wrapping_add(8 * index)) & OFFSET)
            .filter(|&table| table > 0)
            .collect()
    }

    /// A host offset that damage may well leave: another table, another cluster, past the end, misaligned.
    fn place(&self, rng: &mut Rng) -> u64 {
        let (cluster, clusters) = (self.cluster(), self.clusters());
        let some = rng.below(clusters) * cluster;
        let choices = [
            0,
            self.l1(),
            self.refcount_table(),
            self.u64(self.refcount_table()) & OFFSET,
            self.u64(self.l1()) & OFFSET,
            some,
            some,
            (clusters - 1) * cluster,
            clusters * cluster,
            (clusters + 5) * cluster,
            1 << 40,
            1 << 55,
            some + 512 * rng.between(1, 7),
        ];
        rng.pick(&choices)
    }

    /// Another value for an entry that is `old`.
    fn entry(&self, old: u64, rng: &mut Rng) -> u64 {
        match rng.below(9) {
            0 => 0,
            1 => old ^ 1 << rng.below(64),
            2 => self.place(rng),
            3 => self.place(rng) | 1 << 63,
            4 => old | 0x200,
            5 => rng.next_u64(),
            6 => old ^ 1 << 63,
            7 => old | 1,
            _ => old.wrapping_add(self.cluster()),
        }
    }

    fn change_entry(&mut self, at: u64, rng: &mut Rng) {
        let new = self.entry(self.u64(at), rng);
        self.set_u64(at, new);
    }

    fn l2_entry(&mut self, rng: &mut Rng) {
        let tables = self.l2_tables();
        if tables.is_empty() {
            return;
        }
        let (table, size) = (rng.pick(&tables), self.entry_size());
        let entries = self.cluster() / size;
        let used: Vec<u64> = (0..entries).filter(|index| self.u64(table + index * size) != 0).collect();
        let index = match used.is_empty() || rng.one_in(4) {
            true => rng.below(entries),
            false => rng.pick(&used),
        };
        let at = table + index * size;
        if size == 16 && rng.one_in(3) {
            let old = self.u64(at + 8);
            let new = [rng.next_u64(), old ^ 1 << rng.below(64), 0];
            self.set_u64(at + 8, rng.pick(&new));
        } else {
            self.change_entry(at, rng);
        }
    }

    fn refcount(&mut self, rng: &mut Rng) {
        let block = self.u64(self.refcount_table()) & OFFSET;
        let at = block + 8 * rng.below((self.clusters() / 4 + 1).min(self.cluster() / 8));
        let new = [0, rng.next_u64(), self.u64(at) ^ 1 << rng.below(64), u64::MAX];
        self.set_u64(at, rng.pick(&new));
    }

    fn header_field(&mut self, rng: &mut Rng) {
        match rng.pick(&[24u64, 36, 40, 48, 56, 60, 64]) {
            at @ (36 | 56 | 60) => {
                let old = self.u32(at);
                let new = [0, old.wrapping_add(1), old.wrapping_mul(2), 70_000, 1 << 31, 1];
                self.set_u32(at, rng.pick(&new));
            }
            at => {
                let old = self.u64(at);
                let place = self.place(rng);
                let new = [0, old.wrapping_add(self.cluster()), old.wrapping_add(512), place, old << 1];
                self.set_u64(at, rng.pick(&new));
            }
        }
    }

    fn snapshot_entry(&mut self, rng: &mut Rng) {
        let entry = self.u64(64);
        match rng.pick(&[0u64, 8, 12, 14, 32, 36, 40, 48]) {
            at @ (0 | 32 | 40 | 48) => {
                let (at, place) = (entry.wrapping_add(at), self.place(rng));
                let old = self.u64(at);
                let new = [0, old.wrapping_add(self.cluster()), old.wrapping_add(512), place, rng.next_u64()];
                self.set_u64(at, rng.pick(&new));
            }
            at => {
                let at = entry.wrapping_add(at + if matches!(at, 8 | 36) { 2 } else { 0 });
                let new = [0, 1, 100, u16::MAX, rng.next_u64() as u16];
                self.set(at, &rng.pick(&new).to_be_bytes());
            }
        }
    }

    /// Where the record of the bitmaps extension is.
    fn bitmaps(&self) -> Option<u64> {
        let header = self.0.get(..self.cluster().min(4096) as usize)?;
        let at = header.windows(4).skip(100).position(|bytes| bytes == BITMAPS)?;
        Some(at as u64 + 100)
    }
}

/// Changes one field of the image in `bytes`. Returns what kind of field it was, or `None` if the image has
/// none of the kind that was drawn; then nothing changed.
pub fn damage(bytes: &mut [u8], rng: &mut Rng) -> Option<&'static str> {
    let mut fields = Fields(bytes);
    let snapshots = fields.u32(60) > 0;
    let kinds = [
        "l1",
        "l1",
        "l2",
        "l2",
        "l2",
        "l2",
        "refcount table",
        "refcount table",
        "refcounts",
        "refcounts",
        "header",
        "snapshot",
        "snapshot l1",
        "bitmap directory",
        "bitmap table",
        "features",
    ];
    let kind = rng.pick(&kinds);
    match kind {
        "l1" => {
            let entries = u64::from(fields.u32(36)).clamp(1, 4);
            let at = fields.l1().wrapping_add(8 * rng.below(entries));
            fields.change_entry(at, rng);
        }
        "l2" => fields.l2_entry(rng),
        "refcount table" => {
            let at = fields.refcount_table().wrapping_add(8 * rng.below(2));
            fields.change_entry(at, rng);
        }
        "refcounts" => fields.refcount(rng),
        "header" => fields.header_field(rng),
        "snapshot" if snapshots => fields.snapshot_entry(rng),
        "snapshot l1" if snapshots => {
            let at = fields.u64(fields.u64(64)).wrapping_add(8 * rng.below(2));
            fields.change_entry(at, rng);
        }
        "bitmap directory" | "bitmap table" => {
            let directory = fields.u64(fields.bitmaps()? + 24);
            let at = match kind {
                "bitmap directory" => directory.wrapping_add(8 * rng.below(3)),
                _ => fields.u64(directory),
            };
            fields.change_entry(at, rng);
        }
        "features" if fields.version3() => {
            let new = fields.u64(72) ^ rng.pick(&[1, 2, 3]);
            fields.set_u64(72, new);
        }
        _ => return None,
    }
    Some(kind)
}
