//! Enumerates or samples the images that a power cut at one moment could leave.

use crate::crash::{DiskState, Length, SECTOR, Version, WorldState};
use crate::pages::PageBytes;
use crate::rng::Rng;
use crate::storage::PageStorage;
use std::sync::Arc;

/// One moment of a [`CrashWorld`](crate::crash::CrashWorld), with the world locked.
pub struct Cut<'a> {
    state: &'a WorldState,
}

/// What one power cut leaves: the content of every storage, in the order they were added to the world.
#[derive(Clone, Debug)]
pub struct CrashImage {
    /// Content of each storage.
    pub disks: Vec<PageBytes>,
}

impl CrashImage {
    /// Storage `index` of the image, to be opened by the engine. Changes made through it do not affect the
    /// world.
    pub fn storage(&self, index: usize) -> Arc<PageStorage> {
        Arc::new(PageStorage::new(self.disks[index].clone()))
    }
}

impl<'a> Cut<'a> {
    pub(crate) fn new(state: &'a WorldState) -> Self {
        Self { state }
    }

    /// Number of the latest change in the world.
    pub fn change(&self) -> u64 {
        self.state.change
    }

    /// How many sectors over all storages have a version that is not durable.
    pub fn unflushed_sectors(&self) -> usize {
        self.state.disks.iter().map(|disk| disk.unflushed.len()).sum()
    }

    /// How many images the cut could leave (some may be equal), saturating at `u64::MAX`.
    pub fn combinations(&self) -> u64 {
        let radices = self.state.disks.iter().flat_map(radices);
        radices.fold(1u64, |product, radix| product.saturating_mul(radix))
    }

    /// The image in which every change so far arrived.
    pub fn everything(&self) -> CrashImage {
        CrashImage { disks: self.state.disks.iter().map(|disk| disk.live.clone()).collect() }
    }

    /// The image in which no unflushed change arrived.
    pub fn nothing(&self) -> CrashImage {
        CrashImage { disks: self.state.disks.iter().map(|disk| disk.durable.clone()).collect() }
    }

    /// Image `number` of [`combinations`](Self::combinations), counted from 0.
    pub fn image(&self, number: u64) -> CrashImage {
        let mut rest = number;
        let mut digit = |radix: u64| {
            let digit = rest % radix;
            rest /= radix;
            digit as usize
        };
        let build = |disk: &DiskState| {
            let length = disk.lengths[digit(disk.lengths.len() as u64)];
            build(disk, length, length.len, |versions| digit(versions.len() as u64 + 1))
        };
        CrashImage { disks: self.state.disks.iter().map(build).collect() }
    }

    /// A random image. Several ways of drawing are mixed: independent choices for every sector would hardly
    /// ever lose exactly one write of many, or keep exactly one.
    pub fn sample(&self, rng: &mut Rng) -> CrashImage {
        let oldest = self.state.disks.iter().filter_map(oldest_change).min().unwrap_or(0);
        let mut lot = Lot::draw(rng, oldest, self.state.change);
        let disks = self.state.disks.iter().map(|disk| {
            let length = lot.length(rng, disk);
            let len = lot.torn_len(rng, disk, length);
            build(disk, length, len, |versions| lot.version(rng, versions))
        });
        CrashImage { disks: disks.collect() }
    }
}

/// The number of choices for each part of a storage: its length, then every unflushed sector.
fn radices(disk: &DiskState) -> impl Iterator<Item = u64> + '_ {
    let sectors = disk.unflushed.values().map(|versions| versions.len() as u64 + 1);
    std::iter::once(disk.lengths.len() as u64).chain(sectors)
}

fn oldest_change(disk: &DiskState) -> Option<u64> {
    let sectors = disk.unflushed.values().filter_map(|versions| versions.first()).map(|v| v.change);
    let lengths = disk.lengths.iter().skip(1).map(|length| length.change);
    sectors.chain(lengths).min()
}

/// The storage with `length` and the version of each sector that `pick` chooses: 0 is the durable content, n
/// is `versions[n - 1]`.
fn build(disk: &DiskState, length: Length, len: u64, mut pick: impl FnMut(&[Version]) -> usize) -> PageBytes {
    let mut bytes = disk.durable.clone();
    let cuts: Vec<&Length> = disk.lengths.iter().filter(|l| l.cut && l.change <= length.change).collect();
    for cut in &cuts {
        bytes.set_len(cut.len.min(bytes.len()));
    }
    bytes.set_len(len);
    for (&sector, versions) in &disk.unflushed {
        // If a truncation arrived, older content past it is gone.
        let floor = cuts.iter().filter(|cut| (sector + 1) * SECTOR > cut.len).map(|cut| cut.change).max();
        let forced = floor.map_or(0, |floor| versions.iter().filter(|v| v.change <= floor).count());
        let picked = pick(versions).max(forced);
        let at = sector * SECTOR;
        if picked == 0 || at >= len {
            continue;
        }
        let n = (len - at).min(SECTOR);
        match &versions[picked - 1].data {
            Some(data) => bytes.write(at, &data[..n as usize]),
            None => bytes.zero(at, n),
        }
    }
    bytes
}

/// A way of drawing an image.
#[derive(Clone, Copy, Debug)]
enum Lot {
    /// Each sector arrived independently, with `chance` in 16.
    Sectors { chance: u64 },
    /// Each change arrived as a whole or not, with `chance` in 16; the change `torn` is torn.
    Changes { salt: u64, chance: u64, torn: u64 },
    /// All changes up to `last` arrived; `last` itself is torn.
    Prefix { last: u64 },
    /// All changes arrived but `missing`, which is torn or lost.
    AllBut { missing: u64, torn: bool },
    /// Only `change` arrived, and each change after `from` with some probability.
    Only { change: u64, from: u64 },
}

impl Lot {
    fn draw(rng: &mut Rng, oldest: u64, latest: u64) -> Self {
        let any = rng.between(oldest, latest);
        match rng.below(8) {
            0 => Self::Sectors { chance: rng.pick(&[1, 4, 8, 12, 15]) },
            1 | 2 => Self::Changes { salt: rng.next_u64(), chance: rng.pick(&[2, 8, 14]), torn: any },
            3 | 4 => Self::Prefix { last: any },
            5 | 6 => Self::AllBut { missing: any, torn: rng.one_in(3) },
            _ => Self::Only { change: any, from: rng.between(any, latest + 1) },
        }
    }

    /// Decides whether this sector of the change arrived.
    fn arrived(&mut self, rng: &mut Rng, change: u64) -> bool {
        match *self {
            Self::Sectors { chance } => rng.below(16) < chance,
            Self::Changes { torn, .. } if change == torn => rng.one_in(2),
            Self::Changes { salt, chance, .. } => Rng::new(salt ^ change).below(16) < chance,
            Self::Prefix { last } => change < last || change == last && rng.one_in(2),
            Self::AllBut { missing, torn } => change != missing || torn && rng.one_in(2),
            Self::Only { change: only, from } => change == only || change >= from && rng.one_in(2),
        }
    }

    fn version(&mut self, rng: &mut Rng, versions: &[Version]) -> usize {
        let latest = versions.iter().rposition(|version| self.arrived(rng, version.change));
        latest.map_or(0, |index| index + 1)
    }

    fn length(&mut self, rng: &mut Rng, disk: &DiskState) -> Length {
        let later = disk.lengths.iter().skip(1).rposition(|length| self.arrived(rng, length.change));
        disk.lengths[later.map_or(0, |index| index + 1)]
    }

    /// A growth may arrive in part.
    fn torn_len(&mut self, rng: &mut Rng, disk: &DiskState, length: Length) -> u64 {
        let next = disk.lengths.iter().find(|l| l.change > length.change && !l.cut && l.len > length.len);
        match next {
            Some(next) if rng.one_in(4) => {
                let torn = rng.between(length.len, next.len) / SECTOR * SECTOR;
                torn.max(length.len)
            }
            _ => length.len,
        }
    }
}
