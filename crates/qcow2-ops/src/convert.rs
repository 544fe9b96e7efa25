//! Converts any disks to a target: skips holes, leaves out zeroes, compresses clusters, on several workers.

use crate::copy::{CopyPlan, CopyReport, copy};
use crate::error::{Error, ErrorKind, Result};
use crate::executor::Executor;
use crate::pipeline::Order;
use crate::progress::Progress;
use crate::source::{Below, Source, total_size};
use crate::whole::copied_anyway;
use qcow2_core::format::CryptMethod;
use qcow2_core::{ClusterCodec, GuestDisk, Image, Length};
use std::sync::Arc;

/// The largest [`ConvertOptions::sparse_size`]. Origin: qemu-img.
pub const MAX_SPARSE_SIZE: u64 = 16 << 20;

/// Options of a conversion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConvertOptions {
    /// Shortest run of zeroes between data that is left out, in bytes: a multiple of 512, at most 16 MiB;
    /// default 4,096. 0 writes everything, zeroes too. Only whole units are left out: clusters of a qcow2
    /// target (subclusters if it has them), 4 KiB pages of a raw target.
    pub sparse_size: u64,
    /// The target is known to read as zeroes except where its backing file shows through. Otherwise the
    /// source's zeroes are written to the target.
    pub target_is_zero: bool,
    /// The target was made for this, so it reads as zeroes where nothing was written, unless it is the bytes
    /// of a device or a server, which are still those from before.
    pub target_is_new: bool,
    /// Do not write ranges that the top layer of the (single) source does not allocate, so that the target's
    /// backing file shows through there. Compressed clusters are written whole: one that is only partly such
    /// a range, or in which the target's backing file or the disk ends, is written.
    pub keep_backing: bool,
    /// Store clusters compressed if that makes them smaller.
    pub compress: bool,
    /// Allow writing clusters in any order, which is faster with many workers. Otherwise the bytes of the
    /// target do not depend on the number of workers, except for an encrypted image.
    pub out_of_order: bool,
    /// Replace unreadable sectors by zeroes and report them, those of damaged tables too.
    pub salvage: bool,
    /// Copy offload: let the storages copy data directly (`Storage::copy_from`) where they can, for
    /// uncompressed clusters and raw disks on both sides. Such data is not searched for zeroes. Once a
    /// storage refuses, the rest is copied the usual way. Excludes `compress`, `salvage` and a `sparse_size`
    /// of 0.
    pub offload: bool,
}

impl Default for ConvertOptions {
    fn default() -> Self {
        Self {
            sparse_size: 4096,
            target_is_zero: false,
            target_is_new: false,
            keep_backing: false,
            compress: false,
            out_of_order: false,
            salvage: false,
            offload: false,
        }
    }
}

impl ConvertOptions {
    /// With runs of zeroes left out from this many bytes on; 0: none.
    #[must_use]
    pub fn with_sparse_size(self, sparse_size: u64) -> Self {
        Self { sparse_size, ..self }
    }

    /// With a target that reads as zeroes, or not.
    #[must_use]
    pub fn with_target_is_zero(self, target_is_zero: bool) -> Self {
        Self { target_is_zero, ..self }
    }

    /// With a target that was made for this, or not.
    #[must_use]
    pub fn with_target_is_new(self, target_is_new: bool) -> Self {
        Self { target_is_new, ..self }
    }

    /// With the target's backing file showing through, or not.
    #[must_use]
    pub fn with_keep_backing(self, keep_backing: bool) -> Self {
        Self { keep_backing, ..self }
    }

    /// With compressed clusters, or without.
    #[must_use]
    pub fn with_compress(self, compress: bool) -> Self {
        Self { compress, ..self }
    }

    /// With clusters written in any order, or in theirs.
    #[must_use]
    pub fn with_out_of_order(self, out_of_order: bool) -> Self {
        Self { out_of_order, ..self }
    }

    /// With unreadable sectors replaced by zeroes, or not.
    #[must_use]
    pub fn with_salvage(self, salvage: bool) -> Self {
        Self { salvage, ..self }
    }

    /// With copy offload, or without.
    #[must_use]
    pub fn with_offload(self, offload: bool) -> Self {
        Self { offload, ..self }
    }
}

/// Total size of the sources in bytes, each rounded up to a multiple of 512. The target must be at least that
/// large. Errors: `InvalidOption` past 2^64 - 1.
pub fn converted_size(sources: &[Arc<dyn GuestDisk>]) -> Result<u64> {
    total_size(sources)
}

/// Writes the concatenated sources to `target`, which must be at least as large; bytes past them are left
/// alone. Does not flush. The caller flushes and closes the target, and removes a new target after an error.
///
/// Disk: reads tables first, then only data. Each range of the target is written at most once (twice if a
/// storage gives up copy offload). Memory: at most four chunks per worker; a chunk is 1 MiB, or a cluster if
/// that is larger.
///
/// Errors: `InvalidOption` for a target that is too small, an invalid sparse size, `keep_backing` with
/// several sources, and copy offload with an option that excludes it; `Unsupported` for compression to a
/// target without it; `Extents`, `Read`, `Write` with the first byte of the failed range; `Stopped`.
pub fn convert(
    sources: &[Arc<dyn GuestDisk>],
    target: &dyn GuestDisk,
    options: &ConvertOptions,
    executor: &dyn Executor,
    progress: &dyn Progress,
) -> Result<CopyReport> {
    check_sparse_size(options.sparse_size)?;
    if options.keep_backing && sources.len() != 1 {
        let message = "a target with a backing file takes a single source";
        return Err(Error::new(ErrorKind::InvalidOption, message));
    }
    if options.offload && (options.compress || options.salvage || options.sparse_size == 0) {
        let message = "copy offload cannot be combined with compression, salvage or a sparse size of 0";
        return Err(Error::new(ErrorKind::InvalidOption, message));
    }
    let source = Source::new(sources)?;
    if target.size() < source.size() {
        let message = format!(
            "output file is smaller than input file: {} bytes, needed are {}",
            target.size(),
            source.size()
        );
        return Err(Error::new(ErrorKind::InvalidOption, message));
    }
    let target_is_zero = options.target_is_zero || options.target_is_new && !has_old_bytes(target);
    let backing_end = target.backing().map_or(0, |backing| backing.size());
    let plan = CopyPlan {
        source: &source,
        target,
        sparse_size: options.sparse_size,
        zero_from: target_is_zero.then_some(backing_end),
        below: if options.keep_backing { Below::OtherLayers } else { Below::Nothing },
        copied_anyway: match options.keep_backing && options.compress {
            true => copied_anyway(&source, target),
            false => Vec::new(),
        },
        target_layers: None,
        compress: if options.compress { Some(compressed(target)?) } else { None },
        offload: options.offload,
        // One worker writes at a time: more of them would only contend for the file's lock instead of reading
        // and decompressing. An encrypted image is the exception: its bytes depend on their offset, so they
        // are encrypted while being written, and writing in parallel pays off.
        order: if options.out_of_order || is_encrypted(target) { Order::Any } else { Order::Claimed },
        salvage: options.salvage,
    };
    let report = copy(&plan, executor, progress)?;
    if let Some((image, _)) = plan.compress {
        // There was no data that would have been refused earlier.
        if image.header().has_data_file() {
            return Err(Error::new(ErrorKind::Unsupported, NO_STREAMS));
        }
        end_on_a_sector(image)?;
    }
    Ok(report)
}

/// Pads the file to a multiple of 512 bytes. The last stream may end anywhere, and some readers (7-Zip)
/// report a truncated file if it ends inside the sectors that its tables name.
fn end_on_a_sector(image: &Image) -> Result<()> {
    let storage = image.storage();
    let pad = || {
        let len = storage.len()?;
        match len.checked_next_multiple_of(512) {
            Some(end) if end != len => storage.set_len(end),
            _ => Ok(()),
        }
    };
    pad().map_err(|e| Error::new(ErrorKind::Write, "error while writing the end of the file").with_source(e))
}

/// True if `target` is the bytes of a device, a server or a part of a file, which nobody zeroed for a new
/// disk.
pub(crate) fn has_old_bytes(target: &dyn GuestDisk) -> bool {
    target.as_raw().is_some_and(|raw| raw.storage().limits().length != Length::Grows)
}

fn is_encrypted(disk: &dyn GuestDisk) -> bool {
    disk.as_image().is_some_and(|image| image.header().crypt_method != CryptMethod::None)
}

fn check_sparse_size(size: u64) -> Result<()> {
    if size.is_multiple_of(512) && size <= MAX_SPARSE_SIZE {
        return Ok(());
    }
    let message = format!("sparse size is {size}, allowed are multiples of 512 up to {MAX_SPARSE_SIZE}");
    Err(Error::new(ErrorKind::InvalidOption, message))
}

const NO_STREAMS: &str = "compressed clusters are not possible with an external data file";

/// Clusters of a data file are where a guest sees them, so none is compressed.
pub(crate) fn no_streams() -> qcow2_core::Error {
    qcow2_core::Error::new(qcow2_core::ErrorKind::Unsupported, NO_STREAMS)
}

fn compressed(target: &dyn GuestDisk) -> Result<(&Image, &dyn ClusterCodec)> {
    let unsupported = || Error::new(ErrorKind::Unsupported, "compression not supported for this file format");
    let image = target.as_image().ok_or_else(unsupported)?;
    let codec = image.codec().map_err(|e| unsupported().with_source(e))?;
    Ok((image, &**codec))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::Inline;
    use crate::progress::Silent;
    use crate::testing::{Change, TestDisk, Threads};
    use std::sync::atomic::{AtomicU64, Ordering};

    const MIB: u64 = 1 << 20;

    fn options() -> ConvertOptions {
        ConvertOptions { target_is_zero: true, ..ConvertOptions::default() }
    }

    fn source(disk: TestDisk) -> Arc<dyn GuestDisk> {
        Arc::new(disk)
    }

    fn run(from: &Arc<dyn GuestDisk>, to: &TestDisk, options: &ConvertOptions) -> Result<CopyReport> {
        convert(std::slice::from_ref(from), to, options, &Threads(3), &Silent)
    }

    fn content(disk: &Arc<dyn GuestDisk>, size: u64) -> Vec<u8> {
        let mut bytes = qcow2_testkit::pattern::unread(disk.size() as usize);
        disk.read_at(qcow2_core::GuestOffset::new(0), &mut bytes).unwrap();
        bytes.resize(size as usize, 0);
        bytes
    }

    /// A target of `size` bytes, none of them zero.
    fn used(size: u64, cluster_size: u64) -> TestDisk {
        TestDisk {
            cluster_size,
            granularity: cluster_size.max(512),
            ..TestDisk::data(vec![0xa5; size as usize])
        }
    }

    #[test]
    fn disks_of_odd_sizes_are_copied_completely() {
        let sizes = [0, 1, 511, 512, 513, 4097, 65_537, 3 * MIB - 7, 5 * MIB + 513];
        for (seed, size) in (0..).zip(sizes) {
            let from = source(TestDisk::mixed(size, 300_000, seed));
            let rounded = size.next_multiple_of(512);
            for cluster_size in [0, 512, 65_536, 2 * MIB] {
                for sparse_size in [0, 512, 4096, 65_536] {
                    let clean = TestDisk::empty(rounded, cluster_size);
                    let wanted = ConvertOptions { sparse_size, ..options() };
                    run(&from, &clean, &wanted).unwrap();
                    assert!(clean.content() == content(&from, rounded), "{size} to {cluster_size}");
                    let dirty = used(rounded + 512, cluster_size);
                    let wanted = ConvertOptions { target_is_zero: false, ..wanted };
                    run(&from, &dirty, &wanted).unwrap();
                    let mut expected = content(&from, rounded);
                    expected.extend([0xa5; 512]);
                    assert!(dirty.content() == expected, "{size} over {cluster_size}");
                }
            }
        }
    }

    #[test]
    fn writes_do_not_depend_on_the_number_of_workers() {
        let from = source(TestDisk::mixed(9 * MIB + 1000, 700_000, 5));
        let changes = |workers| {
            let to = TestDisk::empty(10 * MIB, 65_536);
            convert(std::slice::from_ref(&from), &to, &options(), &Threads(workers), &Silent).unwrap();
            to.changes.into_inner().unwrap()
        };
        let alone = changes(1);
        let start = |change: &Change| match change {
            Change::Write(range) | Change::Zeroes(range) => range.start,
        };
        assert!(alone.is_sorted_by_key(start));
        for workers in [2, 3, 8] {
            assert_eq!(changes(workers), alone, "{workers} workers");
        }
    }

    #[test]
    fn out_of_order_gives_the_same_content() {
        let from = source(TestDisk::mixed(9 * MIB, 700_000, 6));
        let to = TestDisk::empty(9 * MIB, 65_536);
        run(&from, &to, &ConvertOptions { out_of_order: true, ..options() }).unwrap();
        assert!(to.content() == content(&from, 9 * MIB));
    }

    #[test]
    fn sparse_size_decides_which_zeroes_are_written() {
        let mut bytes = vec![0; 8 * MIB as usize];
        bytes[5 * MIB as usize + 70_000] = 1;
        let from = source(TestDisk::data(bytes));
        let to = TestDisk::empty(8 * MIB, 65_536);
        let report = run(&from, &to, &options()).unwrap();
        let cluster = 5 * MIB + 65_536;
        assert_eq!(*to.changes.lock().unwrap(), [Change::Write(cluster..cluster + 65_536)]);
        assert_eq!((report.data_bytes, report.zeroed_bytes), (65_536, 0));

        let raw = TestDisk::empty(8 * MIB, 0);
        run(&from, &raw, &options()).unwrap();
        let page = 5 * MIB + 69_632;
        assert_eq!(*raw.changes.lock().unwrap(), [Change::Write(page..page + 4096)]);

        let all = TestDisk::empty(8 * MIB, 65_536);
        let everything = ConvertOptions { sparse_size: 0, ..options() };
        assert_eq!(run(&from, &all, &everything).unwrap().data_bytes, 8 * MIB);
        let hole = source(TestDisk::empty(3 * MIB, 65_536));
        assert_eq!(run(&hole, &all, &everything).unwrap().data_bytes, 3 * MIB);
        assert_eq!(run(&hole, &all, &options()).unwrap(), CopyReport::default());

        let wiped = run(&hole, &used(8 * MIB, 65_536), &ConvertOptions::default()).unwrap();
        assert_eq!((wiped.data_bytes, wiped.zeroed_bytes), (0, 3 * MIB));
    }

    #[test]
    fn zero_runs_below_sparse_size_are_written() {
        let mut bytes = vec![1; 2 * MIB as usize];
        bytes[100_000..868_432].fill(0);
        let from = source(TestDisk::data(bytes));
        let wanted = ConvertOptions { sparse_size: MIB, ..options() };
        assert_eq!(run(&from, &TestDisk::empty(2 * MIB, 0), &wanted).unwrap().data_bytes, 2 * MIB);
        let report = run(&from, &TestDisk::empty(2 * MIB, 0), &options()).unwrap();
        assert_eq!(report.data_bytes, 2 * MIB - (868_352 - 102_400));
    }

    #[test]
    fn keep_backing_writes_only_the_top_layer() {
        let base = Arc::new(TestDisk::data(vec![7; 3 * MIB as usize / 2]));
        let top = TestDisk { cluster_size: 512, ..TestDisk::empty(4 * MIB, 512) }.with_backing(&base);
        let states = ["-", "d", "z", "-", "d", "-", "-", "z"].map(|s| s.repeat(1024)).concat();
        top.set_states(&states);
        top.bytes.lock().unwrap().fill(9);
        let expected = top.content();
        let from = source(top);
        let to = TestDisk::empty(4 * MIB, 512).with_backing(&base);
        let wanted = ConvertOptions { keep_backing: true, ..options() };
        let report = run(&from, &to, &wanted).unwrap();
        assert!(to.content() == expected);
        // Zeroes are written only where the backing file would show through.
        assert_eq!((report.data_bytes, report.zeroed_bytes), (MIB, MIB / 2));
        assert_eq!(to.states.lock().unwrap()[..1024], [b'-'; 1024]);
        let error = convert(&[from.clone(), from], &to, &wanted, &Inline, &Silent).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidOption);
    }

    /// Converts a disk with data, except for zeroes in sectors `zeroes`, over a backing file of `base` bytes.
    /// The copy over the same backing file must read the same.
    #[track_caller]
    fn check_zeroes_over_backing(base: u64, size: u64, zeroes: std::ops::Range<u64>) {
        let below = Arc::new(TestDisk::data(vec![7; base as usize]));
        let top =
            TestDisk { cluster_size: 512, ..TestDisk::data(vec![9; size as usize]) }.with_backing(&below);
        top.states.lock().unwrap()[zeroes.start as usize..zeroes.end as usize].fill(b'z');
        let expected = top.content();
        let to = TestDisk::empty(size, 512).with_backing(&below);
        let wanted = ConvertOptions { keep_backing: true, ..options() };
        run(&source(top), &to, &wanted).unwrap();
        assert!(to.content() == expected, "{base} bytes, zeroes in sectors {zeroes:?}");
    }

    #[test]
    fn zeroes_cover_the_end_of_an_unaligned_backing_file() {
        // The backing file ends inside a chunk that is read, and at the start of an all-zero chunk.
        for (base, size) in [(5 * 512, 8192), (MIB, MIB + 8192)] {
            let first = base / 512;
            for odd in [1, 511, 512, 513] {
                for zeroes in [first..first + 1, first..first + 2, first + 1..first + 3, first..size / 512] {
                    check_zeroes_over_backing(base + odd, size, zeroes);
                }
            }
        }
    }

    #[test]
    fn several_sources_are_concatenated() {
        let parts: Vec<_> = (0..5).map(|i| source(TestDisk::mixed(700_001 * i + 1, 90_000, i))).collect();
        let size = converted_size(&parts).unwrap();
        let to = TestDisk::empty(size, 65_536);
        convert(&parts, &to, &options(), &Threads(3), &Silent).unwrap();
        let expected: Vec<u8> =
            parts.iter().flat_map(|part| content(part, part.size().next_multiple_of(512))).collect();
        assert!(to.content() == expected);
    }

    #[test]
    fn errors_name_the_step_and_the_offset() {
        let bad = |disk: TestDisk, to: TestDisk| {
            let error = run(&source(disk), &to, &options()).unwrap_err();
            assert!(error.core_error().is_some(), "{error}");
            (error.kind(), error.to_string())
        };
        let data = || TestDisk::data(vec![1; 8 * MIB as usize]);
        let to = || TestDisk::empty(8 * MIB, 65_536);
        let unreadable = TestDisk { unreadable: Some(5 * MIB + 100..5 * MIB + 101), ..data() };
        let read = (ErrorKind::Read, format!("error while reading at byte {}", 5 * MIB));
        assert_eq!(bad(unreadable, to()), read);
        let unwritable = TestDisk { unwritable: Some(3 * MIB..3 * MIB + 1), ..to() };
        let written = (ErrorKind::Write, format!("error while writing at byte {}", 3 * MIB));
        assert_eq!(bad(data(), unwritable), written);
        let unknown = TestDisk { unknown: Some(2 * MIB..2 * MIB + 1), ..data() };
        assert_eq!(bad(unknown, to()).0, ErrorKind::Extents);
    }

    #[test]
    fn salvage_keeps_readable_sectors() {
        // In the middle, at the start and at the end of the disk, and across two chunks.
        for (lost, sectors) in [
            (5 * MIB + 600..5 * MIB + 2000, 3),
            (0..513, 2),
            (8 * MIB - 1..8 * MIB, 1),
            (MIB - 1..MIB + 1, 2),
        ] {
            let disk =
                TestDisk { unreadable: Some(lost.clone()), ..TestDisk::data(vec![1; 8 * MIB as usize]) };
            let to = TestDisk::empty(8 * MIB, 0);
            let wanted = ConvertOptions { salvage: true, ..options() };
            let report = run(&source(disk), &to, &wanted).unwrap();
            let mut expected = vec![1; 8 * MIB as usize];
            let start = lost.start / 512 * 512;
            expected[start as usize..][..sectors as usize * 512].fill(0);
            assert!(to.content() == expected, "{lost:?}");
            assert_eq!(report.unreadable_sectors, sectors, "{lost:?}");
            let named: u64 = report.unreadable.iter().map(|place| place.len).sum();
            assert_eq!((report.unreadable[0].offset, named), (start, sectors * 512), "{lost:?}");
            assert!(report.unreadable[0].reason.contains("are bad"));
        }
    }

    #[test]
    fn invalid_options_are_refused() {
        let from = source(TestDisk::data(vec![1; 1000]));
        let refused = |to: &TestDisk, options: &ConvertOptions| run(&from, to, options).unwrap_err().kind();
        assert_eq!(refused(&TestDisk::empty(1000, 0), &options()), ErrorKind::InvalidOption);
        let to = TestDisk::empty(1024, 0);
        for sparse_size in [1, 513, MAX_SPARSE_SIZE + 512] {
            assert_eq!(refused(&to, &ConvertOptions { sparse_size, ..options() }), ErrorKind::InvalidOption);
        }
        assert_eq!(refused(&to, &ConvertOptions { compress: true, ..options() }), ErrorKind::Unsupported);
        assert!(to.changes.lock().unwrap().is_empty());
    }

    #[test]
    fn progress_reaches_the_total_and_can_stop() {
        #[derive(Default)]
        struct Counter {
            total: AtomicU64,
            done: AtomicU64,
            stop_at: Option<u64>,
        }
        impl Progress for Counter {
            fn set_total(&self, bytes: u64) {
                self.total.store(bytes, Ordering::SeqCst);
            }
            fn advance(&self, bytes: u64) {
                self.done.fetch_add(bytes, Ordering::SeqCst);
            }
            fn should_stop(&self) -> bool {
                self.stop_at.is_some_and(|at| self.done.load(Ordering::SeqCst) >= at)
            }
        }
        let from = source(TestDisk::mixed(80 * MIB, 4 * MIB, 3));
        let counter = Counter::default();
        let to = TestDisk::empty(80 * MIB, 65_536);
        convert(std::slice::from_ref(&from), &to, &options(), &Threads(3), &counter).unwrap();
        let total = counter.total.load(Ordering::SeqCst);
        assert!((MIB..80 * MIB).contains(&total), "data and holes: {total}");
        assert_eq!(counter.done.load(Ordering::SeqCst), total);
        let counter = Counter { stop_at: Some(2 * MIB), ..Counter::default() };
        let error = convert(&[from], &to, &options(), &Threads(3), &counter).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Stopped);
        assert!(counter.done.load(Ordering::SeqCst) < total);
    }
}
