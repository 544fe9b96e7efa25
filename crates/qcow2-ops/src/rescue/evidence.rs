//! The header, or what the rest of the file tells of it: cluster size, kind of L2 entries, refcounts.
//!
//! | evidence | what it proves |
//! |---|---|
//! | a refcount table in cluster 1 that counts the header, itself and its blocks | cluster size, refcounts |
//! | entries one after the other whose host offsets differ by one cluster | cluster size, width of an entry |
//! | compressed streams that begin where those before them end | cluster size |
//! | offsets that all have the same alignment | cluster size, at most |

use super::RescueOptions;
use super::counts::certified;
use super::job::{Bytes, go_on};
use super::report::HeaderSource;
use crate::error::{Error, ErrorKind, Result};
use crate::progress::Progress;
use qcow2_core::HostOffset;
use qcow2_format::feature::IncompatibleFeatures;
use qcow2_format::l2::{L2Entry, L2Format};
use qcow2_format::limit::{MAX_CLUSTER_BITS, MIN_CLUSTER_BITS, MIN_CLUSTER_BITS_EXTENDED};
use qcow2_format::{Geometry, GeometryFields, Header, Version, bytes};

/// The header of the image: its own, or what can be derived. Disk: reads until the evidence is enough.
///
/// Errors: `Metadata` if nothing tells the cluster size; `InvalidOption`; `Stopped`.
pub(super) fn header(
    bytes: Bytes<'_>,
    options: &RescueOptions,
    progress: &dyn Progress,
) -> Result<(Header, HeaderSource)> {
    let wanted = options.cluster_bits()?;
    if let Ok(header) = qcow2_core::walk::read_header(bytes.storage)
        && wanted.is_none_or(|bits| bits == header.cluster_bits)
    {
        return Ok((header, HeaderSource::Found));
    }
    for bits in wanted.map_or(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS, |bits| bits..=bits) {
        if let Some(header) = certified(bytes, bits, HostOffset::new(1 << bits))? {
            let extended = Statistics::collect(bytes, Some(bits), progress)?.extended(bits);
            return Ok((with_entries(header, extended), HeaderSource::Derived));
        }
    }
    let statistics = Statistics::collect(bytes, wanted, progress)?;
    let Some(bits) = wanted.or(statistics.cluster_bits()) else {
        let text = "nothing in the file tells its cluster size, which has to be given";
        return Err(Error::new(ErrorKind::Metadata, text));
    };
    let header = Header::new(Version::V3, bits);
    Ok((with_entries(header, statistics.extended(bits)), HeaderSource::Derived))
}

fn with_entries(mut header: Header, extended: bool) -> Header {
    header.features.incompatible.set(IncompatibleFeatures::EXTENDED_L2, extended);
    header
}

/// Sectors of tables that are enough. Origin: ours; 32,000 entries.
const ENOUGH_SECTORS: u64 = 512;
/// Entries that go on from one another, below which other evidence is asked.
const MIN_PAIRS: u64 = 4;
const SECTOR: usize = 512;
const PIECE: u64 = 1 << 20;
const SIZES: usize = MAX_CLUSTER_BITS as usize + 1;

/// What sectors that look like parts of tables have in common. Index: log2 of a cluster size.
#[derive(Default)]
struct Statistics {
    /// Pairs of neighbours whose offsets differ by that much: entries of 8 bytes, and of 16.
    plain: [u64; SIZES],
    extended: [u64; SIZES],
    /// Pairs of streams that follow one another, if that is the cluster size.
    streams: [u64; SIZES],
    /// Offsets with exactly that alignment (the last: or more).
    aligned: [u64; SIZES],
    sectors: u64,
}

impl Statistics {
    fn collect(bytes: Bytes<'_>, bits: Option<u32>, progress: &dyn Progress) -> Result<Self> {
        let mut found = Self::default();
        let mut buffer = vec![0; PIECE as usize];
        let bits = bits.map_or(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS, |bits| bits..=bits);
        let formats: Vec<L2Format> = bits.filter_map(format_of).collect();
        bytes.data_runs(|run| {
            let mut at = run.start;
            while at < run.end && found.sectors < ENOUGH_SECTORS {
                go_on(progress)?;
                let piece = (run.end - at).min(PIECE) as usize;
                bytes.read(HostOffset::new(at), &mut buffer[..piece])?;
                buffer[..piece].chunks_exact(SECTOR).for_each(|sector| {
                    found.sector(sector, bytes.len, &formats);
                });
                at += piece as u64;
            }
            Ok(found.sectors < ENOUGH_SECTORS)
        })?;
        Ok(found)
    }

    /// Takes a sector into account if it looks like a part of a table.
    fn sector(&mut self, sector: &[u8], file_len: u64, formats: &[L2Format]) {
        let mut words = [0u64; SECTOR / 8];
        words.iter_mut().zip(bytes::words(sector)).for_each(|(word, read)| *word = read);
        let set = words.iter().filter(|&&word| word != 0).count();
        if set < 2 {
            return;
        }
        let before = self.pairs();
        let offsets: Vec<Option<u64>> = words.iter().map(|&word| offset_in(word, file_len)).collect();
        if offsets.iter().flatten().count() == set {
            steps(&offsets, 1, &mut self.plain);
            self.note_alignment(&offsets);
        } else if words.iter().all(|&word| word == 0 || word >> 62 == 1) {
            formats.iter().for_each(|format| self.note_streams(&words, file_len, format));
        } else if words.chunks(2).all(|entry| is_extended(entry, file_len)) {
            steps(&offsets, 2, &mut self.extended);
            self.note_alignment(&offsets.iter().step_by(2).copied().collect::<Vec<_>>());
        }
        self.sectors += u64::from(self.pairs() > before);
    }

    fn pairs(&self) -> u64 {
        [&self.plain, &self.extended, &self.streams].into_iter().flatten().sum()
    }

    fn note_alignment(&mut self, offsets: &[Option<u64>]) {
        for offset in offsets.iter().flatten() {
            self.aligned[(offset.trailing_zeros() as usize).min(SIZES - 1)] += 1;
        }
    }

    fn note_streams(&mut self, words: &[u64], file_len: u64, format: &L2Format) {
        let stream = |word: u64| match format.decode(word, 0) {
            Ok(L2Entry::Compressed(stream)) if stream.host.value() < file_len => Some(stream),
            _ => None,
        };
        for pair in words.windows(2) {
            let (Some(first), Some(second)) = (stream(pair[0]), stream(pair[1])) else { continue };
            // The length is rounded up to a sector, and the next stream begins where this one really ends.
            let end = first.host.value() + first.len;
            let gap = end.checked_sub(second.host.value());
            let follows = gap.is_some_and(|gap| gap < SECTOR as u64) && second.host > first.host;
            self.streams[format.geometry.cluster_bits() as usize] += u64::from(follows);
        }
    }

    /// The cluster size that most neighbours agree on, or the alignment of nearly all offsets.
    fn cluster_bits(&self) -> Option<u32> {
        let score = |bits: &usize| self.plain[*bits] + self.extended[*bits] + self.streams[*bits];
        let sizes = MIN_CLUSTER_BITS as usize..=MAX_CLUSTER_BITS as usize;
        // Where two agree the smaller one counts: a longer step may leave out clusters.
        let best = sizes.clone().rev().max_by_key(score).filter(|best| score(best) >= MIN_PAIRS);
        let all: u64 = self.aligned.iter().sum();
        let nearly_all = |bits: &usize| self.aligned[*bits..].iter().sum::<u64>() * 20 >= all * 19;
        let aligned = sizes.rev().find(nearly_all).filter(|_| all >= MIN_PAIRS);
        best.or(aligned).map(|bits| bits as u32)
    }

    fn extended(&self, bits: u32) -> bool {
        let pairs = |of: &[u64; SIZES]| of[bits as usize];
        bits >= MIN_CLUSTER_BITS_EXTENDED && pairs(&self.extended) > pairs(&self.plain) + pairs(&self.streams)
    }
}

/// Entries of 8 bytes in clusters of 2^`bits`.
fn format_of(bits: u32) -> Option<L2Format> {
    let fields = GeometryFields { cluster_bits: bits, refcount_order: 4, extended_l2: false };
    Some(L2Format { geometry: Geometry::new(fields).ok()?, zero_flag: true, external_data: false })
}

/// The offset in a word that can be an L1 entry, or the first word of an L2 entry.
fn offset_in(word: u64, file_len: u64) -> Option<u64> {
    let offset = qcow2_format::l1::without_copied(word);
    let possible = offset >= 512 && offset.is_multiple_of(512) && offset < file_len;
    possible.then_some(offset)
}

/// Whether two words can be an extended entry: nothing, or a cluster and a bitmap that is no offset.
fn is_extended(entry: &[u64], file_len: u64) -> bool {
    let (word, bitmap) = (entry[0], entry[1]);
    let (allocated, zero) = (bitmap as u32, (bitmap >> 32) as u32);
    match word {
        0 => allocated == 0,
        _ => offset_in(word, file_len).is_some() && allocated & zero == 0,
    }
}

/// Counts the pairs of neighbours, `stride` words apart, whose offsets differ by a possible cluster size.
fn steps(offsets: &[Option<u64>], stride: usize, found: &mut [u64; SIZES]) {
    for (first, second) in offsets.iter().zip(&offsets[stride..]).step_by(stride) {
        let step = first.zip(*second).and_then(|(first, second)| second.checked_sub(first));
        let bits = step.filter(|step| step.is_power_of_two()).map(|step| step.trailing_zeros());
        if let Some(bits) = bits.filter(|bits| (MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(bits)) {
            found[bits as usize] += 1;
        }
    }
}

impl RescueOptions {
    fn cluster_bits(&self) -> Result<Option<u32>> {
        let Some(size) = self.cluster_size else { return Ok(None) };
        let bits = size.is_power_of_two().then(|| size.trailing_zeros());
        match bits.filter(|bits| (MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(bits)) {
            Some(bits) => Ok(Some(bits)),
            None => {
                let text = format!("cluster size is {size}, allowed are powers of two from 512 to 2 MiB");
                Err(Error::new(ErrorKind::InvalidOption, text))
            }
        }
    }
}
