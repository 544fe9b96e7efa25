//! The disk that is left: read-only, with zeroes where nothing can be read.

use super::entry::Leads;
use super::job::Known;
use super::place::{Placement, Slot};
use super::report::{L1Source, MAX_RANGES, Ranges, Reason};
use qcow2_core::{
    CIPHER_SECTOR, ClusterCipher, Codecs, DiskExtent, Error, ErrorKind, ExtentState, GuestDisk, GuestOffset,
    GuestRange, HostOffset, Result, SectorNumbering, Storage, StorageExtent, ZeroMode,
};
use qcow2_format::l2::{CompressedCluster, L2Entry, SubclusterState};
use qcow2_format::{CompressionType, L2Index};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

/// Memory for L2 tables. Origin: ours.
const CACHE_SIZE: u64 = 32 << 20;
/// What is read at a time where the device cannot read more.
const RETRY: usize = 4096;
/// Ranges without a table that are one run. Origin: ours; so long a run costs nothing any more.
const MAX_SLOTS: usize = 1 << 12;
/// Streams that are remembered not to expand. Origin: ours; 4 MiB of memory.
const MAX_DAMAGED: usize = 1 << 16;
/// How a stream of zstd begins.
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// The same of a frame that is passed over; its first byte is 0x50 to 0x5f.
const SKIPPABLE: [u8; 3] = [0x2a, 0x4d, 0x18];

/// Where a run of guest bytes is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Zero,
    Below,
    Data(HostOffset),
    Stream(CompressedCluster),
    Lost(Reason),
}

/// What is read, beside the tables.
pub(super) struct Files {
    pub(super) image: Arc<dyn Storage>,
    /// `None`: the image file itself, unless the data is external.
    pub(super) data: Option<Arc<dyn Storage>>,
    pub(super) backing: Option<Arc<dyn GuestDisk>>,
    /// Whether there should be a backing file.
    pub(super) is_overlay: bool,
    pub(super) codecs: Codecs,
    /// `None`: what each stream looks like.
    pub(super) compression: Option<CompressionType>,
    pub(super) cipher: Option<Arc<dyn ClusterCipher>>,
    pub(super) encrypted: bool,
}

/// A slot of the table cache.
type Cached = Mutex<Option<(u64, Arc<Vec<u8>>)>>;

/// The disk of a damaged image, as far as it can be read. Reading never fails: it gives zeroes, and the loss
/// is remembered.
pub struct RescuedDisk {
    files: Files,
    known: Known,
    size: u64,
    slots: Vec<Slot>,
    l1: L1Source,
    /// Clusters are in use that no table maps.
    pub(super) leaky: bool,
    /// Something is past the end of the file, so that its last cluster may be cut too.
    pub(super) cut: bool,
    cache: Vec<Cached>,
    /// Streams that did not expand.
    damaged: Mutex<BTreeSet<(HostOffset, u64)>>,
    /// What reads did not get: length and reason by guest offset.
    losses: Mutex<BTreeMap<u64, (u64, Reason)>>,
}

impl RescuedDisk {
    pub(super) fn new(files: Files, known: Known, size: u64, placement: Placement) -> Self {
        let tables = (CACHE_SIZE / known.format.geometry.cluster_size()).clamp(4, 1024);
        Self {
            files,
            known,
            size,
            slots: placement.slots,
            l1: placement.l1,
            leaky: false,
            cut: false,
            cache: (0..tables).map(|_| Mutex::default()).collect(),
            damaged: Mutex::default(),
            losses: Mutex::default(),
        }
    }

    pub(super) fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// What tables tell to be lost, in order. `go_on` is asked now and then.
    pub(super) fn lost(&self, go_on: &dyn Fn() -> crate::Result<()>) -> crate::Result<Ranges<Reason>> {
        let (mut ranges, mut at, mut steps) = (Ranges::default(), 0, 0u64);
        while at < self.size {
            steps += 1;
            if steps.is_multiple_of(1 << 16) {
                go_on()?;
            }
            let (place, len) = self.run_at(at, self.size - at);
            if let Place::Lost(reason) = place {
                ranges.push(at, len, reason);
            }
            at += len;
        }
        Ok(ranges)
    }

    /// The same with what reads found out since.
    pub(super) fn with_losses(&self, known: &Ranges<Reason>) -> Ranges<Reason> {
        let losses = self.losses.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<_> = known.listed.iter().map(|range| (range.start, range.len, range.what)).collect();
        all.extend(losses.iter().map(|(&start, &(len, reason))| (start, len, reason)));
        all.sort_unstable();
        let mut ranges = Ranges::default();
        all.into_iter().for_each(|(start, len, reason)| ranges.push(start, len, reason));
        let listed: u64 = known.listed.iter().map(|range| range.len).sum();
        ranges.omitted += known.omitted;
        ranges.bytes = ranges.bytes.saturating_add(known.bytes - listed);
        ranges
    }

    fn note(&self, at: u64, len: u64, reason: Reason) {
        let mut losses = self.losses.lock().unwrap_or_else(PoisonError::into_inner);
        if losses.len() < MAX_RANGES || losses.contains_key(&at) {
            let known = losses.entry(at).or_insert((len, reason));
            known.0 = known.0.max(len);
        }
    }

    fn table(&self, host: HostOffset) -> Arc<Vec<u8>> {
        let geometry = self.known.format.geometry;
        let cluster = geometry.host_cluster(host).value();
        let slot = &self.cache[(cluster % self.cache.len() as u64) as usize];
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, table)) = slot.as_ref().filter(|(at, _)| *at == host.value()) {
            return Arc::clone(table);
        }
        let mut content = vec![0; geometry.cluster_size() as usize];
        if self.files.image.read_padded(host, &mut content).is_err() {
            content.fill(0);
        }
        let table = Arc::new(content);
        *slot = Some((host.value(), Arc::clone(&table)));
        table
    }

    /// Where the bytes from `at` on are, and how many of them (at most `max`) are there in one run.
    fn run_at(&self, at: u64, max: u64) -> (Place, u64) {
        let geometry = self.known.format.geometry;
        let offset = GuestOffset::new(at);
        let index = geometry.l1_index(offset);
        let Some(slot) = usize::try_from(index.value()).ok().and_then(|index| self.slots.get(index)) else {
            let place = if self.l1 == L1Source::None { Place::Lost(Reason::NoTable) } else { self.below() };
            return (place, max);
        };
        let in_table = at % geometry.l2_coverage();
        let mut rest = (geometry.l2_coverage() - in_table).min(max);
        let table = match (slot, self.without_table(slot)) {
            (Slot::Table(table, _), None) => *table,
            (_, place) => {
                // Ranges without a table are short in small clusters, and there may be millions of them.
                let after = self.slots.iter().skip(index.value() as usize + 1).take(MAX_SLOTS);
                for _ in after.take_while(|slot| place == self.without_table(slot)) {
                    rest = rest.saturating_add(geometry.l2_coverage());
                }
                return (place.unwrap_or(Place::Zero), rest.min(max));
            }
        };
        let table = self.table(table);
        let (place, mut len) = self.entry_at(&table, at, rest);
        // Runs of the same kind are one: most of the work of a copy is done per run.
        while len < rest && !matches!(place, Place::Stream(_)) {
            let (next, more) = self.entry_at(&table, at + len, rest - len);
            let goes_on = match (place, next) {
                (Place::Data(host), Place::Data(next)) => host.checked_add(len) == Some(next),
                (place, next) => place == next,
            };
            if !goes_on {
                break;
            }
            len += more;
        }
        (place, len)
    }

    /// What a range without a table reads as; `None` if there is a table.
    fn without_table(&self, slot: &Slot) -> Option<Place> {
        match *slot {
            Slot::Table(..) => None,
            Slot::Empty(_) if self.leaky => Some(Place::Lost(Reason::TableEmpty)),
            Slot::None | Slot::Empty(_) => Some(self.below()),
            Slot::Lost(reason) => Some(Place::Lost(reason)),
        }
    }

    /// The same by the entry for `at`, up to the end of its cluster.
    fn entry_at(&self, table: &[u8], at: u64, max: u64) -> (Place, u64) {
        let geometry = self.known.format.geometry;
        let offset = GuestOffset::new(at);
        let inside = geometry.in_cluster(at);
        let rest = (geometry.cluster_size() - inside).min(max);
        let index = L2Index::new(geometry.l2_index(offset).value());
        let (raw, bitmap) = self.known.format.words_at(table, index).unwrap_or_default();
        match self.known.judge(raw, bitmap) {
            Leads::Lost(reason) => (Place::Lost(reason), rest),
            Leads::To(L2Entry::Compressed(_)) if self.is_locked() => (Place::Lost(Reason::Encrypted), rest),
            Leads::To(L2Entry::Compressed(stream)) => (Place::Stream(stream), rest),
            Leads::To(L2Entry::Standard(entry)) => {
                let first = geometry.subcluster_index(offset);
                let state = entry.state(first);
                let same = (first..geometry.subclusters()).take_while(|&index| entry.state(index) == state);
                let end = (first + same.count() as u32) as u64 * geometry.subcluster_size();
                let len = (end - inside).min(max);
                match (state, entry.host) {
                    (SubclusterState::Zero, _) => (Place::Zero, len),
                    (SubclusterState::Data, Some(host)) => self.data_at(host, inside, len),
                    _ => (self.below(), len),
                }
            }
        }
    }

    fn data_at(&self, host: HostOffset, inside: u64, len: u64) -> (Place, u64) {
        if self.is_locked() {
            return (Place::Lost(Reason::Encrypted), len);
        }
        if self.known.format.external_data && self.files.data.is_none() {
            return (Place::Lost(Reason::DataFile), len);
        }
        let start = host.value().saturating_add(inside);
        match self.known.data_len.checked_sub(start) {
            Some(left) if left == 0 && self.cut => (Place::Lost(Reason::PastEnd), len),
            None if self.cut => (Place::Lost(Reason::PastEnd), len),
            Some(left) if self.cut => (Place::Data(HostOffset::new(start)), len.min(left)),
            _ => (Place::Data(HostOffset::new(start)), len),
        }
    }

    /// A run of clusters, of which those that are holes of the file are zeroes: a preallocated disk of a
    /// terabyte is read in a moment.
    fn stored_at(&self, host: HostOffset, len: u64) -> DiskExtent {
        let data = self.files.data.as_ref().unwrap_or(&self.files.image);
        let left = self.known.data_len.saturating_sub(host.value()).min(len);
        let run = match left {
            _ if self.files.cipher.is_some() => StorageExtent { len, data: true },
            0 => StorageExtent { len, data: false },
            // A device that cannot tell is all data.
            left => data.extent_at(host, left).unwrap_or(StorageExtent { len: left, data: true }),
        };
        // Where it is is of no use to anybody: not even a copy may bypass this disk.
        let state =
            if run.data { ExtentState::Data { host: None } } else { ExtentState::Zero { host: None } };
        DiskExtent { len: run.len.clamp(1, len), state }
    }

    fn is_locked(&self) -> bool {
        self.files.encrypted && self.files.cipher.is_none()
    }

    fn below(&self) -> Place {
        match (&self.files.backing, self.files.is_overlay) {
            (Some(_), _) => Place::Below,
            (None, true) => Place::Lost(Reason::Backing),
            (None, false) => Place::Zero,
        }
    }

    fn read_below(&self, at: u64, buf: &mut [u8]) {
        let Some(backing) = &self.files.backing else { return buf.fill(0) };
        let inside = backing.size().saturating_sub(at).min(buf.len() as u64) as usize;
        let (head, tail) = buf.split_at_mut(inside);
        tail.fill(0);
        if !head.is_empty() && backing.read_at(GuestOffset::new(at), head).is_err() {
            head.fill(0);
            self.note(at, head.len() as u64, Reason::Unreadable);
        }
    }

    fn read_data(&self, at: u64, host: HostOffset, buf: &mut [u8]) {
        let Some(cipher) = &self.files.cipher else { return self.read_bytes(at, host, buf) };
        // Whole sectors are decrypted.
        let before = at % CIPHER_SECTOR;
        let whole = (before + buf.len() as u64).next_multiple_of(CIPHER_SECTOR);
        let mut sectors = vec![0; whole as usize];
        let (at, host) = (at - before, HostOffset::new(host.value().saturating_sub(before)));
        self.read_bytes(at, host, &mut sectors);
        let number = match cipher.numbering() {
            SectorNumbering::Guest => at / CIPHER_SECTOR,
            SectorNumbering::Host => host.value() / CIPHER_SECTOR,
        };
        cipher.decrypt(number, &mut sectors);
        buf.copy_from_slice(&sectors[before as usize..][..buf.len()]);
    }

    fn read_bytes(&self, at: u64, host: HostOffset, buf: &mut [u8]) {
        let data = self.files.data.as_ref().unwrap_or(&self.files.image);
        if data.read_padded(host, buf).is_ok() {
            return;
        }
        for (index, part) in buf.chunks_mut(RETRY).enumerate() {
            let done = (index * RETRY) as u64;
            let place = HostOffset::new(host.value().saturating_add(done));
            if data.read_padded(place, part).is_err() {
                part.fill(0);
                self.note(at + done, part.len() as u64, Reason::Unreadable);
            }
        }
    }

    fn read_stream(&self, at: u64, stream: CompressedCluster, buf: &mut [u8]) {
        let geometry = self.known.format.geometry;
        let left = self.known.image_len.saturating_sub(stream.host.value());
        if self.is_known_damaged(stream, left) {
            buf.fill(0);
            return self.note(at, buf.len() as u64, Reason::StreamDamaged);
        }
        let mut packed = vec![0; stream.len.min(left).min(2 * geometry.cluster_size()) as usize];
        let inside = geometry.in_cluster(at) as usize;
        let mut cluster = vec![0; geometry.cluster_size() as usize];
        let read = self.files.image.read_padded(stream.host, &mut packed).is_ok();
        if read && self.expand(&packed, &mut cluster) {
            buf.copy_from_slice(&cluster[inside..inside + buf.len()]);
            return;
        }
        buf.fill(0);
        let mut damaged = self.damaged.lock().unwrap_or_else(PoisonError::into_inner);
        if read && damaged.len() < MAX_DAMAGED {
            damaged.insert((stream.host, stream.len));
        }
        drop(damaged);
        let reason = if read { Reason::StreamDamaged } else { Reason::Unreadable };
        self.note(at, buf.len() as u64, reason);
    }

    /// Whether a stream, `left` bytes before the end of the file, did not expand before, or cannot because it
    /// is in a hole (no stream begins with zeroes) or is not zstd in an image that has no other. Any number
    /// of entries may lead to the same one, or to bytes of the same cluster.
    fn is_known_damaged(&self, stream: CompressedCluster, left: u64) -> bool {
        let damaged = self.damaged.lock().unwrap_or_else(PoisonError::into_inner);
        if damaged.contains(&(stream.host, stream.len)) {
            return true;
        }
        drop(damaged);
        let len = stream.len.min(left);
        let extent = (len > 0).then(|| self.files.image.extent_at(stream.host, len).ok()).flatten();
        if extent.is_some_and(|extent| !extent.data && extent.len >= len) {
            return true;
        }
        let mut magic = [0; 4];
        let is_zstd = |magic: [u8; 4]| magic == ZSTD_MAGIC || (magic[0] >> 4 == 5 && magic[1..] == SKIPPABLE);
        self.files.compression == Some(CompressionType::Zstd)
            && self.files.image.read_padded(stream.host, &mut magic).is_ok()
            && !is_zstd(magic)
    }

    fn expand(&self, packed: &[u8], cluster: &mut [u8]) -> bool {
        let Codecs { deflate, zstd, .. } = &self.files.codecs;
        let codec = match self.files.compression {
            Some(CompressionType::Zstd) => zstd,
            None if packed.starts_with(&ZSTD_MAGIC) => zstd,
            _ => deflate,
        };
        codec.as_ref().is_some_and(|codec| codec.expand(packed, cluster).is_ok())
    }
}

impl GuestDisk for RescuedDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: GuestOffset, buf: &mut [u8]) -> Result<()> {
        let end = offset.value().checked_add(buf.len() as u64);
        if end.is_none_or(|end| end > self.size) {
            return Err(Error::new(ErrorKind::OutOfRange, "read past the end of the disk"));
        }
        let (mut at, mut rest) = (offset.value(), buf);
        while !rest.is_empty() {
            let (place, len) = self.run_at(at, rest.len() as u64);
            let (part, after) = rest.split_at_mut(len as usize);
            match place {
                Place::Zero | Place::Lost(_) => part.fill(0),
                Place::Below => self.read_below(at, part),
                Place::Data(host) => self.read_data(at, host, part),
                Place::Stream(stream) => self.read_stream(at, stream, part),
            }
            (at, rest) = (at + len, after);
        }
        Ok(())
    }

    fn write_at(&self, _: GuestOffset, _: &[u8]) -> Result<()> {
        Err(read_only())
    }

    fn write_zeroes(&self, _: GuestRange, _: ZeroMode) -> Result<()> {
        Err(read_only())
    }

    fn discard(&self, _: GuestRange) -> Result<()> {
        Err(read_only())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn extent_at(&self, range: GuestRange) -> Result<DiskExtent> {
        if range.end().value() > self.size || range.is_empty() {
            return Err(Error::new(ErrorKind::OutOfRange, "extent past the end of the disk"));
        }
        let (place, len) = self.run_at(range.start().value(), range.len());
        let state = match place {
            Place::Zero | Place::Lost(_) => ExtentState::Zero { host: None },
            Place::Below => ExtentState::Unallocated,
            Place::Data(host) => return Ok(self.stored_at(host, len)),
            Place::Stream(_) => ExtentState::Compressed,
        };
        Ok(DiskExtent { len, state })
    }

    fn backing(&self) -> Option<&Arc<dyn GuestDisk>> {
        self.files.backing.as_ref()
    }

    fn cluster_size(&self) -> u64 {
        self.known.format.geometry.cluster_size()
    }

    fn zero_granularity(&self) -> u64 {
        self.known.format.geometry.subcluster_size()
    }

    fn resize(&self, _: u64) -> Result<()> {
        Err(read_only())
    }
}

fn read_only() -> Error {
    Error::new(ErrorKind::ReadOnly, "a rescued disk is for reading only")
}
