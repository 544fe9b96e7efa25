//! Reads a disk from a stream of bytes.
//!
//! A qcow2 image can be read in one pass if each cluster comes after the table that refers to it, or only
//! shortly before it. Clusters that no table refers to yet are held in memory, up to a limit.

use crate::error::{Error, ErrorKind, Result};
use crate::progress::Progress;
use crate::zeroes::is_zero;
use qcow2_core::format::l1::L1Entry;
use qcow2_core::format::l2::{CompressedCluster, L2Entry, L2Format, SubclusterState};
use qcow2_core::format::refcount::decode_table_entry;
use qcow2_core::format::{CryptMethod, Geometry, GuestOffset, Header};
use qcow2_core::{ClusterCodec, GuestDisk};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::sync::Arc;

/// Memory limit for clusters and table entries that are held until they can be used, in bytes. Origin: ours;
/// an image written front to back needs a few megabytes.
pub const MAX_HELD: u64 = 256 << 20;

/// Copies a raw stream to `target`, which must be new: zeroes are not written. Resizes the target to the
/// length of the stream, rounded up to a multiple of 512. Returns the length of the stream in bytes. Errors:
/// `Read`, `Write`, `Stopped`.
pub fn stream_raw_in(input: &mut dyn Read, target: &dyn GuestDisk, progress: &dyn Progress) -> Result<u64> {
    let mut buf = vec![0; PIECE as usize];
    let (mut at, mut room) = (0u64, target.size());
    loop {
        let len = fill(input, &mut buf)?;
        if progress.should_stop() {
            return Err(Error::new(ErrorKind::Stopped, format!("stopped at byte {at}")));
        }
        let end = at + len as u64;
        if end > room {
            // Grow by doubling: each resize may relocate a table of the target.
            room = end.max(room.saturating_mul(2)).next_multiple_of(SECTOR);
            target.resize(room).map_err(|e| writing(at, e))?;
        }
        for (index, part) in buf[..len].chunks(GRAIN).enumerate().filter(|(_, part)| !is_zero(part)) {
            let offset = at + (index * GRAIN) as u64;
            target.write_at(GuestOffset::new(offset), part).map_err(|e| writing(offset, e))?;
        }
        at = end;
        progress.advance(len as u64);
        if len < buf.len() {
            let size = at.next_multiple_of(SECTOR);
            if size != room {
                target.resize(size).map_err(|e| writing(at, e))?;
            }
            return Ok(at);
        }
    }
}

/// A qcow2 image in a stream, of which the first cluster has been read.
pub struct StreamedImage<'a> {
    input: &'a mut dyn Read,
    header: Header,
    first: Vec<u8>,
}

impl<'a> StreamedImage<'a> {
    /// Reads the header. Errors: `Read`; `Open` if the bytes are no qcow2 image; `Unsupported` for images
    /// with a backing file, an external data file or encryption.
    pub fn open(input: &'a mut dyn Read) -> Result<Self> {
        let bad = |e| Error::new(ErrorKind::Open, "the stream is not a usable qcow2 image").with_source(e);
        let mut first = vec![0; Header::PROBE_LEN];
        let len = fill(input, &mut first)?;
        let wanted = Header::probe_len(&first[..len]).map_err(bad)?;
        let cluster = wanted.max(len).next_power_of_two();
        first.resize(cluster, 0);
        let more = fill(input, &mut first[len..])?;
        let header = Header::parse(&first[..len + more]).map_err(bad)?;
        let cluster_size = 1usize << header.cluster_bits;
        if first.len() < cluster_size {
            let len = first.len();
            first.resize(cluster_size, 0);
            fill(input, &mut first[len..])?;
        }
        let refused = [
            (header.backing_file.is_some(), "a backing file"),
            (header.has_data_file(), "an external data file"),
            (header.crypt_method != CryptMethod::None, "encryption"),
        ];
        if let Some((_, what)) = refused.iter().find(|(refused, _)| *refused) {
            let message = format!("an image with {what} cannot be read from a stream");
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        Ok(Self { input, header, first })
    }

    /// Virtual size in bytes.
    pub fn size(&self) -> u64 {
        self.header.disk_size()
    }

    /// The parsed header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Copies the disk to `target`, which must be new and at least as large. `codec`: for compressed
    /// clusters. Memory: [`MAX_HELD`], and what the target needs. Errors: `Read`, also for a truncated
    /// stream; `Metadata` for damaged tables; `Unsupported` if the order of the clusters would need more
    /// memory; `Write`, `Stopped`.
    pub fn copy_to(
        self,
        target: &dyn GuestDisk,
        codec: Option<&Arc<dyn ClusterCodec>>,
        progress: &dyn Progress,
    ) -> Result<()> {
        let format = self.header.l2_format().map_err(|e| damaged("header").with_source(e))?;
        let mut reader = Reader::new(&self.header, format, target, codec);
        let size = format.geometry.cluster_size() as usize;
        let mut number = 0;
        let mut first = self.first;
        for piece in first.chunks_mut(size) {
            reader.arrived(number, piece.to_vec())?;
            number += 1;
        }
        loop {
            if progress.should_stop() {
                return Err(Error::new(ErrorKind::Stopped, format!("stopped at host cluster {number}")));
            }
            let mut cluster = vec![0; size];
            let len = fill(self.input, &mut cluster)?;
            if len > 0 {
                reader.arrived(number, cluster)?;
                number += 1;
                progress.advance(len as u64);
            }
            if len < size {
                return reader.ended(number);
            }
        }
    }
}

/// What is known of the image so far.
struct Reader<'a> {
    format: L2Format,
    geometry: Geometry,
    size: u64,
    target: &'a dyn GuestDisk,
    codec: Option<&'a Arc<dyn ClusterCodec>>,
    /// The L1 table and the refcount table, as far as they have arrived.
    l1: Table,
    refcounts: Table,
    /// True if the L1 table is complete.
    mapped: bool,
    /// L2 tables that have not arrived yet: host cluster to L1 index.
    tables: BTreeMap<u64, u64>,
    /// Host clusters without guest data, to be dropped when they arrive.
    ignored: BTreeSet<u64>,
    /// Guest clusters that wait for host clusters, as runs keyed by their first host cluster.
    places: BTreeMap<u64, Run>,
    /// Compressed streams, keyed by the last host cluster they touch.
    streams: BTreeMap<u64, Vec<(u64, CompressedCluster)>>,
    /// Number of waiting streams that begin in each host cluster.
    begins: BTreeMap<u64, u64>,
    /// Length of the prefix of a held cluster that consists of expanded streams, in bytes.
    covered: BTreeMap<u64, u64>,
    held: BTreeMap<u64, Vec<u8>>,
}

/// A table that arrives in consecutive clusters.
struct Table {
    first: u64,
    bytes: Vec<u8>,
    missing: u64,
}

#[derive(Clone, Copy)]
struct Run {
    guest: u64,
    count: u64,
    /// Mask of the subclusters that hold data.
    data: u32,
}

impl Table {
    fn new(first: u64, clusters: u64) -> Self {
        Self { first, bytes: Vec::new(), missing: clusters }
    }

    /// Adds cluster `number` if it belongs to the table. Returns `true` when the table is complete.
    fn take(&mut self, number: u64, bytes: &[u8]) -> bool {
        if self.missing == 0 || number < self.first {
            return false;
        }
        self.bytes.extend_from_slice(bytes);
        self.first = number + 1;
        self.missing -= 1;
        self.missing == 0
    }

    fn words(&mut self) -> Vec<u64> {
        let word = |bytes: &[u8]| bytes.iter().fold(0, |word, &byte| word << 8 | u64::from(byte));
        std::mem::take(&mut self.bytes).chunks_exact(8).map(word).collect()
    }
}

impl<'a> Reader<'a> {
    fn new(
        header: &Header,
        format: L2Format,
        target: &'a dyn GuestDisk,
        codec: Option<&'a Arc<dyn ClusterCodec>>,
    ) -> Self {
        let geometry = format.geometry;
        let l1_clusters = geometry.clusters_for(u64::from(header.l1_size) * 8);
        let mut reader = Self {
            format,
            geometry,
            size: header.disk_size(),
            target,
            codec,
            l1: Table::new(geometry.host_cluster(header.l1_table_offset).value(), l1_clusters),
            refcounts: Table::new(
                geometry.host_cluster(header.refcount_table_offset).value(),
                u64::from(header.refcount_table_clusters),
            ),
            mapped: l1_clusters == 0,
            tables: BTreeMap::new(),
            // Cluster 0 is the header, which has been parsed already.
            ignored: BTreeSet::from([0]),
            places: BTreeMap::new(),
            streams: BTreeMap::new(),
            begins: BTreeMap::new(),
            covered: BTreeMap::new(),
            held: BTreeMap::new(),
        };
        if header.l1_size == 0 {
            reader.mapped = true;
        }
        reader
    }

    /// Handles the next cluster of the stream.
    fn arrived(&mut self, number: u64, bytes: Vec<u8>) -> Result<()> {
        if self.refcounts.missing > 0 && number >= self.refcounts.first {
            if self.refcounts.take(number, &bytes) {
                let geometry = self.geometry;
                // A damaged entry is skipped: refcounts only tell which clusters hold no guest data.
                let block = |raw: u64| decode_table_entry(raw, &geometry).ok().flatten();
                let blocks: Vec<u64> = self
                    .refcounts
                    .words()
                    .into_iter()
                    .filter_map(block)
                    .map(|block| geometry.host_cluster(block).value())
                    .collect();
                for block in blocks {
                    self.held.remove(&block);
                    self.ignored.insert(block);
                }
            }
            return Ok(());
        }
        if self.l1.missing > 0 && number >= self.l1.first {
            if self.l1.take(number, &bytes) {
                self.take_l1()?;
            }
            return Ok(());
        }
        if self.ignored.remove(&number) {
            return Ok(());
        }
        self.held.insert(number, bytes);
        self.settle(number)?;
        self.check_memory()
    }

    fn take_l1(&mut self) -> Result<()> {
        self.mapped = true;
        let entries = self.geometry.l1_entries_for(self.size);
        for (index, raw) in (0..entries).zip(self.l1.words()) {
            let entry =
                L1Entry::decode(raw, &self.geometry).map_err(|e| damaged("l1 entry").with_source(e))?;
            let Some(table) = entry.l2_table else { continue };
            if self.tables.insert(self.geometry.host_cluster(table).value(), index).is_some() {
                return Err(damaged("two l1 entries refer to one l2 table"));
            }
        }
        let here: Vec<u64> = self.held.keys().copied().filter(|c| self.tables.contains_key(c)).collect();
        here.into_iter().try_for_each(|cluster| self.settle(cluster))?;
        self.drop_unreferenced();
        Ok(())
    }

    /// Does everything that is possible now that host cluster `number` has arrived.
    fn settle(&mut self, number: u64) -> Result<()> {
        if let Some(index) = self.tables.remove(&number) {
            let bytes = self.held.remove(&number).unwrap_or_default();
            self.take_l2(index, &bytes)?;
            if self.tables.is_empty() {
                self.drop_unreferenced();
            }
            return Ok(());
        }
        if let Some(run) = self.take_place(number) {
            let bytes = self.held.remove(&number).unwrap_or_default();
            return self.place(&run, &bytes);
        }
        for (guest, stream) in self.streams.remove(&number).unwrap_or_default() {
            self.expand(guest, stream)?;
        }
        if self.mapped && self.tables.is_empty() {
            self.drop_unreferenced();
        }
        Ok(())
    }

    /// Removes the guest cluster that waits for host cluster `number` from its run and returns it.
    fn take_place(&mut self, number: u64) -> Option<Run> {
        let (&first, &run) = self.places.range(..=number).next_back()?;
        let into = number - first;
        if into >= run.count {
            return None;
        }
        self.places.remove(&first);
        if into > 0 {
            self.places.insert(first, Run { count: into, ..run });
        }
        if into + 1 < run.count {
            let rest = Run { guest: run.guest + into + 1, count: run.count - into - 1, ..run };
            self.places.insert(number + 1, rest);
        }
        Some(Run { guest: run.guest + into, count: 1, ..run })
    }

    fn take_l2(&mut self, index: u64, bytes: &[u8]) -> Result<()> {
        let entry_size = self.geometry.l2_entry_size() as usize;
        let word = |bytes: &[u8]| bytes.iter().fold(0, |word, &byte| word << 8 | u64::from(byte));
        let first = index * self.geometry.l2_entries();
        let mut here = BTreeSet::new();
        for (guest, entry) in (first..).zip(bytes.chunks_exact(entry_size)) {
            if guest >= self.geometry.clusters_for(self.size) {
                break;
            }
            let (raw, bitmap) = (word(&entry[..8]), entry.get(8..).map_or(0, word));
            match self.format.decode(raw, bitmap).map_err(|e| damaged("l2 entry").with_source(e))? {
                L2Entry::Compressed(stream) => {
                    let (start, end) = self.clusters_of(&stream);
                    self.streams.entry(end).or_default().push((guest, stream));
                    *self.begins.entry(start).or_default() += 1;
                    if self.held.contains_key(&end) {
                        here.insert(end);
                    }
                }
                L2Entry::Standard(entry) => {
                    let data = (0..self.geometry.subclusters())
                        .filter(|&i| entry.state(i) == SubclusterState::Data)
                        .fold(0, |mask, i| mask | 1 << i);
                    let Some(host) = entry.host.filter(|_| data != 0) else { continue };
                    let host = self.geometry.host_cluster(host).value();
                    self.add_place(host, Run { guest, count: 1, data })?;
                    if self.held.contains_key(&host) {
                        here.insert(host);
                    }
                }
            }
        }
        here.into_iter().try_for_each(|cluster| self.settle(cluster))
    }

    fn add_place(&mut self, host: u64, run: Run) -> Result<()> {
        // Joined with the run before it if possible: an image whose clusters are in guest order then needs
        // one run instead of an entry per cluster.
        if let Some((&first, last)) = self.places.range_mut(..=host).next_back() {
            if first + last.count > host {
                return Err(damaged("a host cluster is referenced twice"));
            }
            if first + last.count == host && last.guest + last.count == run.guest && last.data == run.data {
                last.count += 1;
                return Ok(());
            }
        }
        self.places.insert(host, run);
        Ok(())
    }

    /// The first and the last host cluster of a compressed stream.
    fn clusters_of(&self, stream: &CompressedCluster) -> (u64, u64) {
        let last = stream.host.value().saturating_add(stream.len.saturating_sub(1));
        let start = self.geometry.host_cluster(stream.host).value();
        (start, last >> self.geometry.cluster_bits())
    }

    fn place(&self, run: &Run, bytes: &[u8]) -> Result<()> {
        let size = self.geometry.subcluster_size();
        let start = run.guest << self.geometry.cluster_bits();
        let mut index = 0;
        while index < self.geometry.subclusters() {
            let count =
                (index..self.geometry.subclusters()).take_while(|&i| run.data >> i & 1 == 1).count() as u32;
            if count > 0 {
                let from = u64::from(index) * size;
                self.put(start + from, &bytes[from as usize..(u64::from(index + count) * size) as usize])?;
            }
            index += count.max(1);
        }
        Ok(())
    }

    /// Writes guest bytes up to the end of the disk; skips zeroes.
    fn put(&self, start: u64, bytes: &[u8]) -> Result<()> {
        let inside = self.size.saturating_sub(start).min(bytes.len() as u64) as usize;
        if inside == 0 || is_zero(&bytes[..inside]) {
            return Ok(());
        }
        self.target.write_at(GuestOffset::new(start), &bytes[..inside]).map_err(|e| writing(start, e))
    }

    fn expand(&mut self, guest: u64, stream: CompressedCluster) -> Result<()> {
        let codec = self.codec.ok_or_else(|| {
            Error::new(ErrorKind::Unsupported, "the stream has compressed clusters, but there is no codec")
        })?;
        let (start, end) = self.clusters_of(&stream);
        let size = self.geometry.cluster_size();
        // `is_awaited` and `drop_unreferenced` rely on this limit.
        if end - start > 2 {
            return Err(damaged("a compressed cluster spans more than three host clusters"));
        }
        let mut packed = Vec::with_capacity(stream.len as usize);
        for number in start..=end {
            let bytes = self
                .held
                .get(&number)
                .ok_or_else(|| damaged("a compressed cluster lies in clusters that were not kept"))?;
            let base = number * size;
            let from = stream.host.value().max(base) - base;
            let to = (stream.host.value() + stream.len).min(base + size) - base;
            packed.extend_from_slice(&bytes[from as usize..to as usize]);
            let covered = self.covered.entry(number).or_default();
            if from <= *covered {
                *covered = (*covered).max(to);
            }
        }
        let mut plain = vec![0; size as usize];
        codec.expand(&packed, &mut plain).map_err(|e| {
            let message = format!("compressed cluster at guest byte {} does not expand", guest * size);
            Error::new(ErrorKind::Read, message).with_source(e)
        })?;
        self.put(guest * size, &plain)?;
        if let Some(count) = self.begins.get_mut(&start) {
            *count -= 1;
            if *count == 0 {
                self.begins.remove(&start);
            }
        }
        // Lengths are rounded up to sectors, so the end of a fully covered cluster may still belong to
        // another stream. Only if the next cluster is fully covered as well can it be dropped.
        for number in start.saturating_sub(1)..=end {
            let full = |number| self.covered.get(&number).is_some_and(|covered| *covered >= size);
            if full(number) && full(number + 1) && !self.is_awaited(number) {
                self.held.remove(&number);
            }
        }
        Ok(())
    }

    /// True if a waiting stream begins in host cluster `number` or in one of the two before it, from where it
    /// may extend into `number`.
    fn is_awaited(&self, number: u64) -> bool {
        self.begins.range(number.saturating_sub(2)..=number).next().is_some()
    }

    /// Drops held clusters that no entry refers to. Only possible once all tables are known.
    fn drop_unreferenced(&mut self) {
        if !self.mapped || !self.tables.is_empty() {
            return;
        }
        let begins = &self.begins;
        // Still needed: the clusters of streams whose last cluster has not arrived, at most two after the one
        // where the stream begins.
        self.held.retain(|&number, _| begins.range(number.saturating_sub(2)..=number).next().is_some());
        let first = self.held.keys().next().copied().unwrap_or(u64::MAX);
        self.covered = self.covered.split_off(&first);
    }

    fn check_memory(&self) -> Result<()> {
        let clusters = self.held.len() as u64 * self.geometry.cluster_size();
        let entries =
            (self.places.len() + self.streams.len() + self.begins.len() + self.covered.len()) as u64 * ENTRY;
        if clusters.saturating_add(entries) <= MAX_HELD {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "the stream's tables come too late: more than {MAX_HELD} bytes would have to be held in memory"
            ),
        ))
    }

    /// Handles the end of the stream after `clusters` clusters.
    fn ended(&mut self, clusters: u64) -> Result<()> {
        // The length of the last stream is rounded up to a sector, which may extend past the end of the file.
        if let Some(last) = self.streams.remove(&clusters) {
            self.held.insert(clusters, vec![0; self.geometry.cluster_size() as usize]);
            for (guest, stream) in last {
                self.expand(guest, stream)?;
            }
        }
        let complete =
            self.mapped && self.tables.is_empty() && self.places.is_empty() && self.streams.is_empty();
        if complete {
            return Ok(());
        }
        let message = format!("the stream ends too early, after {clusters} clusters");
        Err(Error::new(ErrorKind::Read, message))
    }
}

/// Reads until the buffer is full or the stream ends. Returns the number of bytes read.
pub(super) fn fill(input: &mut dyn Read, buf: &mut [u8]) -> Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match input.read(&mut buf[done..]) {
            Ok(0) => break,
            Ok(len) => done += len,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => {
                return Err(Error::new(ErrorKind::Read, "error while reading the stream").with_source(error));
            }
        }
    }
    Ok(done)
}

fn damaged(what: &str) -> Error {
    Error::new(ErrorKind::Metadata, format!("damaged: {what}"))
}

fn writing(at: u64, error: qcow2_core::Error) -> Error {
    Error::new(ErrorKind::Write, format!("error while writing at byte {at}")).with_source(error)
}

const SECTOR: u64 = 512;
/// Bytes of a raw stream read at once.
const PIECE: u64 = 1 << 20;
/// Unit in which zeroes of a raw stream are skipped, in bytes.
const GRAIN: usize = 64 << 10;
/// Approximate memory for a waiting guest cluster, in bytes.
const ENTRY: u64 = 64;
