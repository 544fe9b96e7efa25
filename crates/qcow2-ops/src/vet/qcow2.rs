//! qcow2: what the header names and asks for, and what the file holds.

use super::bytes::{Bytes, big};
use super::disk;
use super::finding::{BitsOf, Doubt, Finding, NamedBy};
use super::options::VetOptions;
use super::report::VetReport;
use qcow2_core::format::bytes::words;
use qcow2_core::format::crypt::LuksHeader;
use qcow2_core::format::l1::L1Entry;
use qcow2_core::format::l2::{L2Format, L2Item};
use qcow2_core::format::signature::{Container, PROBE_LEN, probe};
use qcow2_core::format::{CryptMethod, FormatErrorKind, Header, IncompatibleFeatures};
use qcow2_core::walk::Walk;
use qcow2_core::{
    GuestOffset, Image, ImageFormat, Layers, OpenOptions, ResolvedSource, Storage, StorageError,
};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Judges a qcow2 image.
pub(super) fn vet(
    storage: &Arc<dyn Storage>,
    file: &Bytes<'_>,
    options: &VetOptions,
    report: &mut VetReport,
) -> Result<(), StorageError> {
    let Some(header) = read_header(file, report)? else { return Ok(()) };
    report.virtual_size = Some(header.disk_size());
    names(file, &header, report)?;
    features(file, &header, options, report)?;
    if header.nb_snapshots > options.max_snapshots {
        report.found(Finding::Snapshots { seen: header.nb_snapshots, allowed: options.max_snapshots });
    }
    let seen = table_size(&header);
    if seen > options.max_table_size {
        report.found(Finding::Tables { seen, allowed: options.max_table_size });
        return Ok(());
    }
    trailing(&**storage, file, &header, report)?;
    content(file, &header, options, report)?;
    nested(storage, &header, options, report);
    Ok(())
}

/// The header, with what is wrong in it reported. Incompatible bits that are not known are left out, so that
/// the rest is seen too.
fn read_header(file: &Bytes<'_>, report: &mut VetReport) -> Result<Option<Header>, StorageError> {
    let start = file.read(0, Header::PROBE_LEN as u64)?;
    let len = match Header::probe_len(&start) {
        Ok(len) => len,
        Err(error) => {
            report.found(Finding::malformed(Container::Qcow2, error.to_string()));
            return Ok(None);
        }
    };
    let mut bytes = file.read(0, len as u64)?;
    // A cluster of 2 MiB is two reads.
    let rest = file.read(bytes.len() as u64, len as u64 - bytes.len() as u64)?;
    bytes.extend_from_slice(&rest);
    let mut parsed = Header::parse(&bytes);
    if let Err(error) = &parsed
        && matches!(error.kind(), FormatErrorKind::UnknownIncompatible { .. })
    {
        let known = big(&bytes, 72, 8) & IncompatibleFeatures::KNOWN.bits();
        let bits = big(&bytes, 72, 8) & !known;
        report.found(Finding::UnknownBits { word: BitsOf::Incompatible, bits });
        if let Some(word) = bytes.get_mut(72..80) {
            word.copy_from_slice(&known.to_be_bytes());
        }
        parsed = Header::parse(&bytes);
    }
    match parsed {
        Ok(header) => Ok(Some(header)),
        Err(error) => {
            report.found(Finding::malformed(Container::Qcow2, error.to_string()));
            // A table that is damaged on purpose must not hide a name.
            if big(&bytes, 72, 8) & IncompatibleFeatures::DATA_FILE.bits() != 0 && big(&bytes, 4, 4) >= 3 {
                report.found(Finding::NoName { role: NamedBy::DataFile });
            }
            if big(&bytes, 8, 8) != 0 {
                report.found(Finding::NoName { role: NamedBy::BackingFile });
            }
            Ok(None)
        }
    }
}

fn names(file: &Bytes<'_>, header: &Header, report: &mut VetReport) -> Result<(), StorageError> {
    let at = big(&file.read(8, 8)?, 0, 8);
    match header.backing_file_name() {
        Some(name) => report.found(Finding::name(NamedBy::BackingFile, &name, Some(at))),
        None if at != 0 => report.found(Finding::NoName { role: NamedBy::BackingFile }),
        None => {}
    }
    match header.extensions.data_file_name() {
        Some(name) => report.found(Finding::name(NamedBy::DataFile, &name, None)),
        None if header.has_data_file() => report.found(Finding::NoName { role: NamedBy::DataFile }),
        None => {}
    }
    Ok(())
}

fn features(
    file: &Bytes<'_>,
    header: &Header,
    options: &VetOptions,
    report: &mut VetReport,
) -> Result<(), StorageError> {
    let words = [
        (BitsOf::Compatible, header.features.compatible.unknown().bits()),
        (BitsOf::Autoclear, header.features.autoclear.unknown().bits()),
    ];
    for (word, bits) in words.into_iter().filter(|&(_, bits)| bits != 0) {
        report.found(Finding::UnknownBits { word, bits });
    }
    for extension in &header.extensions.unknown {
        report.found(Finding::doubt(Doubt::Extension(extension.kind), None));
    }
    if header.is_corrupt() {
        report.found(Finding::doubt(Doubt::Corrupt, None));
    }
    match (header.crypt_method, header.extensions.luks) {
        (CryptMethod::None, _) => {}
        (CryptMethod::Luks, Some(luks)) => {
            let at = luks.offset.value();
            report.found(Finding::doubt(Doubt::Encrypted("luks"), Some(at)));
            match LuksHeader::parse(&file.read(at, 592)?) {
                Ok(luks) => disk::iterations(&luks, options, report),
                Err(error) => report.found(Finding::malformed(Container::Luks, error.to_string())),
            }
        }
        _ => report.found(Finding::doubt(Doubt::Encrypted("aes"), None)),
    }
    Ok(())
}

/// Bytes of the tables that opening the image may read.
fn table_size(header: &Header) -> u64 {
    let directory = header.trusted_bitmaps().map_or(0, |bitmaps| bitmaps.directory_size);
    // A snapshot has 40 bytes at least, and more with its names.
    [
        u64::from(header.l1_size) * 8,
        u64::from(header.refcount_table_clusters) << header.cluster_bits.min(32),
        u64::from(header.nb_snapshots) * 40,
        directory,
    ]
    .into_iter()
    .fold(0, u64::saturating_add)
}

/// Reports content behind the last cluster in use.
fn trailing(
    storage: &dyn Storage,
    file: &Bytes<'_>,
    header: &Header,
    report: &mut VetReport,
) -> Result<(), StorageError> {
    let Ok(end) = Walk::new(storage, header).and_then(|walk| walk.used_end()) else { return Ok(()) };
    if let Some(at) = file.first_nonzero(end)? {
        report.found(Finding::doubt(Doubt::Trailing, Some(at)));
    }
    Ok(())
}

/// Counts what the image holds. Every L2 table is read once, however often the L1 table refers to it.
fn content(
    file: &Bytes<'_>,
    header: &Header,
    options: &VetOptions,
    report: &mut VetReport,
) -> Result<(), StorageError> {
    let Ok(format) = header.l2_format() else { return Ok(()) };
    let size = format.geometry.cluster_size();
    let (mut tables, mut at) = (BTreeMap::<u64, u64>::new(), header.l1_table_offset.value());
    let end = at.saturating_add(u64::from(header.l1_size) * 8);
    while at < end {
        let piece = file.read(at, end - at)?;
        let whole = piece.len() / 8 * 8;
        let entries = words(&piece[..whole]).filter_map(|raw| L1Entry::decode(raw, &format.geometry).ok());
        for place in entries.filter_map(|entry| entry.l2_table) {
            *tables.entry(place.value()).or_default() += 1;
        }
        if (tables.len() as u64).saturating_mul(size) > options.max_l2_size {
            report.found(Finding::doubt(Doubt::MoreTables, Some(header.l1_table_offset.value())));
            return Ok(());
        }
        if whole == 0 {
            break;
        }
        at += whole as u64;
    }
    let mut guest = 0u64;
    for (place, times) in tables {
        guest = guest.saturating_add(held(file, place, &format)?.saturating_mul(times));
    }
    let allowed = options.max_ratio;
    if guest > SMALL && guest / file.len().max(1) >= allowed && !header.has_data_file() {
        report.found(Finding::Ratio { guest, file: file.len(), allowed });
    }
    Ok(())
}

/// Guest bytes that the L2 table at `place` finds in the file.
fn held(file: &Bytes<'_>, place: u64, format: &L2Format) -> Result<u64, StorageError> {
    let (size, mut clusters, mut done) = (format.geometry.cluster_size(), 0u64, 0);
    while done < size {
        let piece = file.read(place.saturating_add(done), size - done)?;
        format.scan(&piece, |item| match item {
            L2Item::Clusters { count, .. } => clusters = clusters.saturating_add(count),
            L2Item::Compressed { .. } => clusters = clusters.saturating_add(1),
            L2Item::Fault { .. } => {}
        });
        if piece.is_empty() {
            break;
        }
        done += piece.len() as u64;
    }
    Ok(clusters.saturating_mul(size))
}

/// Reports a disk that begins like an image. One that cannot be read is left to whoever uses it.
fn nested(storage: &Arc<dyn Storage>, header: &Header, options: &VetOptions, report: &mut VetReport) {
    if header.has_data_file() || header.crypt_method != CryptMethod::None {
        return;
    }
    let mut opening = OpenOptions::default().with_codecs(options.codecs.clone());
    opening.layers = Layers::TopOnly;
    opening.l2_cache_size = Some(CACHE);
    opening.refcount_cache_size = Some(CACHE);
    let source = ResolvedSource::new(Arc::clone(storage), ImageFormat::Qcow2, "image");
    let Ok(image) = Image::open(source, &opening) else { return };
    let mut head = [0; PROBE_LEN];
    let len = image.size().min(PROBE_LEN as u64) as usize;
    if image.read_at(GuestOffset::new(0), &mut head[..len]).is_ok()
        && let Some(container) = probe(&head)
    {
        report.found(Finding::Nested { container });
    }
}

/// Content up to this size exhausts nothing, however well it is compressed.
const SMALL: u64 = 1 << 30;
/// Bytes of tables that are kept to read one sector.
const CACHE: u64 = 4 << 20;
