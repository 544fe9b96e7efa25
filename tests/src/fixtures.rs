//! The committed images of `tests/data/`, opened from memory, without other programs or storage adapters.

use qcow2_codec::{Deflate, Zstd};
use qcow2_core::{
    Codecs, ImageFormat, NoResolver, Reference, ResolveError, ResolvedSource, Resolver, SourceId, Storage,
};
use qcow2_testkit::pages::PageBytes;
use qcow2_testkit::storage::PageStorage;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The folder with the tables and `images/`.
pub fn data_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data")
}

/// The folder with the valid images.
pub fn image_folder() -> PathBuf {
    data_folder().join("images")
}

/// A valid image, and what qemu-img reports about it.
#[derive(Clone, Debug)]
pub struct Fixture {
    /// File name in [`image_folder`].
    pub name: String,
    /// Size of the guest disk in bytes.
    pub size: u64,
    /// CRC-32 of the guest content; `None` for an encrypted image.
    pub crc: Option<u32>,
    /// Exit code of `qemu-img check`.
    pub check_code: i32,
}

/// Every valid image. Panics if the table is malformed.
pub fn images() -> Vec<Fixture> {
    rows("images.tsv")
        .into_iter()
        .map(|row| Fixture {
            name: row[0].clone(),
            size: number(&row[1]),
            crc: (row[2] != "-").then(|| checksum(&row[2])),
            check_code: number(&row[3]) as i32,
        })
        .collect()
}

/// What qemu-img gets when it reads all of a damaged image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// Content with this CRC-32.
    Content(u32),
    /// An error.
    Fails,
    /// It was stopped at a time limit.
    Endless,
}

/// A damaged image.
#[derive(Clone, Debug)]
pub struct Damaged {
    /// The kind of damage.
    pub name: String,
    /// Exit code of `qemu-img check`.
    pub check_code: i32,
    /// Result of `qemu-img convert`.
    pub reading: Reading,
    /// The bytes of the image file.
    pub bytes: Vec<u8>,
}

/// Every damaged image, made from a valid one. Panics if the table is malformed.
pub fn damaged() -> Vec<Damaged> {
    let made = |row: Vec<String>| {
        let mut bytes = load(&row[3])[..number(&row[4]) as usize].to_vec();
        for change in row[5].split(' ').filter(|change| *change != "-") {
            apply_change(&mut bytes, change);
        }
        let reading = match row[2].as_str() {
            "fails" => Reading::Fails,
            "endless" => Reading::Endless,
            crc => Reading::Content(checksum(crc)),
        };
        Damaged { name: row[0].clone(), check_code: number(&row[1]) as i32, reading, bytes }
    };
    rows("damaged.tsv").into_iter().map(made).collect()
}

/// `OFFSET:HEX`; bytes past the end make the file longer.
fn apply_change(bytes: &mut Vec<u8>, change: &str) {
    let (offset, hex) = change.split_once(':').unwrap_or_else(|| panic!("not OFFSET:HEX: {change}"));
    for (at, digits) in hex.as_bytes().chunks(2).enumerate() {
        let at = number(offset) as usize + at;
        let byte = std::str::from_utf8(digits).ok().and_then(|d| u8::from_str_radix(d, 16).ok());
        bytes.resize(bytes.len().max(at + 1), 0);
        bytes[at] = byte.unwrap_or_else(|| panic!("not hexadecimal: {change}"));
    }
}

fn rows(table: &str) -> Vec<Vec<String>> {
    let path = data_folder().join(table);
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text.lines().map(|line| line.split('\t').map(str::to_owned).collect()).collect()
}

fn number(text: &str) -> u64 {
    text.parse().unwrap_or_else(|e| panic!("'{text}': {e}"))
}

fn checksum(text: &str) -> u32 {
    u32::from_str_radix(text, 16).unwrap_or_else(|e| panic!("'{text}': {e}"))
}

/// The bytes of a file in [`image_folder`].
pub fn load(name: &str) -> Vec<u8> {
    let path = image_folder().join(name);
    fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Both compression methods.
pub fn codecs() -> Codecs {
    Codecs::new(Arc::new(Deflate::default()), Arc::new(Zstd::default()))
}

/// Bytes in memory as a storage.
pub fn storage(bytes: &[u8]) -> Arc<PageStorage> {
    let mut pages = PageBytes::default();
    pages.write(0, bytes);
    Arc::new(PageStorage::new(pages))
}

/// A storage as a source whose file names are not followed.
pub fn lone_source(storage: Arc<dyn Storage>) -> ResolvedSource {
    let name = "memory".to_owned();
    ResolvedSource { storage, format: ImageFormat::Qcow2, name, id: None, resolver: Arc::new(NoResolver) }
}

/// A valid image as a source whose file names resolve to fixtures.
pub fn source(name: &str) -> ResolvedSource {
    FixtureResolver.open(name, ImageFormat::Qcow2)
}

/// Resolves the names of fixtures, in memory.
#[derive(Clone, Copy, Debug)]
pub struct FixtureResolver;

impl FixtureResolver {
    fn open(self, name: &str, format: ImageFormat) -> ResolvedSource {
        let id = SourceId { device: 0, file: u64::from(crc32fast::hash(name.as_bytes())) };
        ResolvedSource {
            storage: storage(&load(name)),
            format,
            name: name.to_owned(),
            id: Some(id),
            resolver: Arc::new(self),
        }
    }
}

impl Resolver for FixtureResolver {
    fn resolve(&self, reference: Reference<'_>, _writable: bool) -> Result<ResolvedSource, ResolveError> {
        match reference {
            Reference::Backing { name, format: Some("qcow2") } => Ok(self.open(name, ImageFormat::Qcow2)),
            Reference::Backing { name, format: Some("raw") } | Reference::DataFile { name } => {
                Ok(self.open(name, ImageFormat::Raw))
            }
            _ => Err(ResolveError::failed("fixtures name a format that is known")),
        }
    }
}
