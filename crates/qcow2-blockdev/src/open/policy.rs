//! What images may lead to, and cost.

use crate::size::parse_size;
use qcow2_core::chain::MAX_CHAIN_LEN;
use qcow2_core::format::feature::IncompatibleFeatures;
use qcow2_core::format::{CompressionType, CryptMethod, Header};
use qcow2_core::walk::read_header;
use qcow2_core::{ImageFormat, ResolvedSource};
use qcow2_io::NbdStorage;
use std::fmt;
use std::time::Duration;

/// Which names inside images lead anywhere, and limits of what opening an image may cost. `Default` follows
/// no name and has no limits; [`untrusted`](Self::untrusted) is for images of unknown origin.
///
/// As text it is a list: `follow=none|same-directory|all`, `depth=LAYERS`, `virtual-size=SIZE`,
/// `memory=SIZE`, `timeout=SECONDS` and `refuse=FEATURE+FEATURE`, and the word `untrusted`, which sets all of
/// them; later items win.
///
/// ```
/// use qcow2_blockdev::{Follow, Policy};
///
/// let policy = Policy::default().with_text("untrusted,follow=same-directory,virtual-size=1T")?;
/// assert_eq!((policy.follow, policy.max_virtual_size), (Follow::SameDirectory, Some(1 << 40)));
/// assert!(Policy::default().with_text("follow=some").is_err());
/// # Ok::<(), qcow2_blockdev::PolicyError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Policy {
    /// Which names inside images lead anywhere. A name that the user gives always does.
    pub follow: Follow,
    /// The most layers below an image.
    pub max_depth: usize,
    /// The largest virtual size of a layer, in bytes.
    pub max_virtual_size: Option<u64>,
    /// The most bytes that the tables of a layer may have which opening it reads, and that each of its caches
    /// may take.
    pub max_memory: Option<u64>,
    /// How long a server may take for an answer; `None`: as long as it likes.
    pub timeout: Option<Duration>,
    /// Features that no layer may have.
    pub refused: Vec<Feature>,
}

/// Which names inside images lead anywhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Follow {
    /// None: an image that names another file does not open.
    #[default]
    Nothing,
    /// Regular files in the directory of the image that names them.
    SameDirectory,
    /// All: any file and device, servers, `json:` descriptions. For images whose makers are trusted.
    All,
}

impl Follow {
    /// Its name, as in `follow=`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nothing => "none",
            Self::SameDirectory => "same-directory",
            Self::All => "all",
        }
    }

    /// The files that [`qcow2_io`] opens then.
    pub(crate) fn files(self) -> qcow2_io::Policy {
        match self {
            Self::Nothing => qcow2_io::Policy::Deny,
            Self::SameDirectory => qcow2_io::Policy::SameDirectory,
            Self::All => qcow2_io::Policy::Allow,
        }
    }
}

/// A feature of qcow2 images that a policy can refuse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Feature {
    /// A backing file.
    BackingFile,
    /// An external data file.
    DataFile,
    /// Encryption by either method.
    Encryption,
    /// Snapshots inside the image.
    Snapshots,
    /// Bitmaps.
    Bitmaps,
    /// Compression with zstd.
    Zstd,
    /// Extended L2 entries.
    ExtendedL2,
}

impl Feature {
    const ALL: [Self; 7] = [
        Self::BackingFile,
        Self::DataFile,
        Self::Encryption,
        Self::Snapshots,
        Self::Bitmaps,
        Self::Zstd,
        Self::ExtendedL2,
    ];

    /// Its name, as in `refuse=`.
    pub fn name(self) -> &'static str {
        match self {
            Self::BackingFile => "backing-file",
            Self::DataFile => "data-file",
            Self::Encryption => "encryption",
            Self::Snapshots => "snapshots",
            Self::Bitmaps => "bitmaps",
            Self::Zstd => "zstd",
            Self::ExtendedL2 => "extended-l2",
        }
    }

    fn is_in(self, header: &Header) -> bool {
        match self {
            Self::BackingFile => header.backing_file.is_some(),
            Self::DataFile => header.has_data_file(),
            Self::Encryption => header.crypt_method != CryptMethod::None,
            Self::Snapshots => header.nb_snapshots > 0,
            Self::Bitmaps => header.trusted_bitmaps().is_some(),
            Self::Zstd => header.compression_type == CompressionType::Zstd,
            Self::ExtendedL2 => header.features.incompatible.contains(IncompatibleFeatures::EXTENDED_L2),
        }
    }
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            follow: Follow::Nothing,
            max_depth: MAX_CHAIN_LEN,
            max_virtual_size: None,
            max_memory: None,
            timeout: Some(NbdStorage::DEFAULT_TIMEOUT),
            refused: Vec::new(),
        }
    }
}

impl Policy {
    /// For images of unknown origin: follows nothing and limits everything.
    pub fn untrusted() -> Self {
        Self {
            follow: Follow::Nothing,
            max_depth: 4,
            max_virtual_size: Some(16 << 40),
            max_memory: Some(64 << 20),
            timeout: Some(Duration::from_secs(30)),
            refused: vec![Feature::DataFile, Feature::Encryption],
        }
    }

    /// With other names followed.
    #[must_use]
    pub fn with_follow(self, follow: Follow) -> Self {
        Self { follow, ..self }
    }

    /// With what the list `text` sets. Errors: an item that is none.
    pub fn with_text(mut self, text: &str) -> Result<Self, PolicyError> {
        for item in text.split(',').filter(|item| !item.is_empty()) {
            self.set(item).map_err(|allowed| PolicyError { item: item.to_owned(), allowed })?;
        }
        Ok(self)
    }

    /// Sets what one item says. Errors: what is allowed instead.
    fn set(&mut self, item: &str) -> Result<(), &'static str> {
        let Some((key, value)) = item.split_once('=') else {
            *self = if item == "untrusted" { Self::untrusted() } else { return Err(ITEMS) };
            return Ok(());
        };
        let size = || parse_size(value).map(Some).map_err(|_| "a number of bytes, such as 64M");
        match key {
            "follow" => {
                let all = [Follow::Nothing, Follow::SameDirectory, Follow::All];
                let found = all.into_iter().find(|follow| follow.name() == value);
                self.follow = found.ok_or("none, same-directory and all")?;
            }
            "depth" => self.max_depth = value.parse().map_err(|_| "a number of layers")?,
            "virtual-size" => self.max_virtual_size = size()?,
            "memory" => self.max_memory = size()?,
            "timeout" => {
                let seconds: u32 = value.parse().map_err(|_| "whole seconds, 0 for no limit")?;
                self.timeout = (seconds > 0).then(|| Duration::from_secs(seconds.into()));
            }
            "refuse" => {
                let names = value.split('+').filter(|name| !name.is_empty());
                let found = names.map(|name| Feature::ALL.into_iter().find(|f| f.name() == name));
                self.refused = found.collect::<Option<_>>().ok_or(FEATURES)?;
            }
            _ => return Err(ITEMS),
        }
        Ok(())
    }

    /// Refuses the image in `source`, which is not opened yet, if it is over a limit. `looks`: whether only
    /// its metadata is read, which costs memory but neither space nor time. Disk: reads its header. One that
    /// cannot be read is left to whoever opens the image.
    pub(super) fn check(&self, source: &ResolvedSource, looks: bool) -> Result<(), Refusal> {
        if self.max_virtual_size.is_none() && self.max_memory.is_none() && self.refused.is_empty() {
            return Ok(());
        }
        let image = || source.name.clone();
        let header = match source.format {
            ImageFormat::Qcow2 => read_header(&*source.storage).ok(),
            _ => None,
        };
        if let (Some(header), Some(allowed)) = (&header, self.max_memory) {
            let seen = table_size(header);
            if seen > allowed {
                return Err(Refusal::Memory { image: image(), seen, allowed });
            }
        }
        if looks {
            return Ok(());
        }
        let size = match (&header, &source.format) {
            (Some(header), _) => header.disk_size(),
            (None, ImageFormat::Qcow2) => 0,
            (None, _) => source.storage.len().unwrap_or(0),
        };
        if let Some(allowed) = self.max_virtual_size.filter(|&allowed| size > allowed) {
            return Err(Refusal::VirtualSize { image: image(), seen: size, allowed });
        }
        let has = |feature: &&Feature| header.as_ref().is_some_and(|header| feature.is_in(header));
        match self.refused.iter().find(has) {
            Some(&feature) => Err(Refusal::Feature { image: image(), feature }),
            None => Ok(()),
        }
    }
}

/// Bytes of the tables that opening an image reads.
fn table_size(header: &Header) -> u64 {
    let refcounts = u64::from(header.refcount_table_clusters) << header.cluster_bits.min(32);
    let directory = header.trusted_bitmaps().map_or(0, |bitmaps| bitmaps.directory_size);
    let snapshots = u64::from(header.nb_snapshots) * 40;
    [refcounts, directory, snapshots].into_iter().fold(u64::from(header.l1_size) * 8, u64::saturating_add)
}

const ITEMS: &str = "untrusted, follow=, depth=, virtual-size=, memory=, timeout= and refuse=";
const FEATURES: &str =
    "backing-file, data-file, encryption, snapshots, bitmaps, zstd and extended-l2, joined by +";

/// A text that is no policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyError {
    item: String,
    allowed: &'static str,
}

impl fmt::Display for PolicyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "policy '{}' is not known, allowed are {}", self.item.escape_debug(), self.allowed)
    }
}

impl std::error::Error for PolicyError {}

/// What a [`Policy`] does not allow.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// A name inside an image.
    Name {
        /// The image that has the name.
        image: String,
        /// The name.
        name: String,
        /// What is followed.
        follow: Follow,
    },
    /// One layer more than allowed.
    Depth {
        /// The image that names it.
        image: String,
        /// Its name.
        name: String,
        /// The limit.
        allowed: usize,
    },
    /// A virtual size, in bytes.
    VirtualSize {
        /// The image.
        image: String,
        /// Its size.
        seen: u64,
        /// The limit.
        allowed: u64,
    },
    /// Tables, in bytes.
    Memory {
        /// The image.
        image: String,
        /// What they need.
        seen: u64,
        /// The limit.
        allowed: u64,
    },
    /// A feature.
    Feature {
        /// The image.
        image: String,
        /// What it has.
        feature: Feature,
    },
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name { image, name, follow } => {
                let (name, follow) = (name.escape_debug(), follow.name());
                write!(f, "'{image}' names '{name}', which is not opened with follow={follow}")
            }
            Self::Depth { image, name, allowed } => {
                let name = name.escape_debug();
                write!(f, "'{image}' names '{name}', which is one layer too many with depth={allowed}")
            }
            Self::VirtualSize { image, seen, allowed } => {
                write!(f, "'{image}' has a virtual size of {seen} bytes, allowed is virtual-size={allowed}")
            }
            Self::Memory { image, seen, allowed } => {
                write!(f, "'{image}' has tables of {seen} bytes, allowed is memory={allowed}")
            }
            Self::Feature { image, feature } => {
                write!(f, "'{image}' has a feature that refuse={} does not allow", feature.name())
            }
        }
    }
}

impl std::error::Error for Refusal {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_sets_what_it_names() {
        let text = "follow=all,depth=2,virtual-size=1G,memory=4k,timeout=7,refuse=snapshots+zstd";
        let policy = Policy::default().with_text(text).unwrap();
        let seconds = policy.timeout.map(|time| time.as_secs());
        assert_eq!((policy.follow, policy.max_depth, seconds), (Follow::All, 2, Some(7)));
        assert_eq!((policy.max_virtual_size, policy.max_memory), (Some(1 << 30), Some(4096)));
        assert_eq!(policy.refused, [Feature::Snapshots, Feature::Zstd]);
        let lifted = policy.with_text("timeout=0,refuse=").unwrap();
        assert!(lifted.timeout.is_none() && lifted.refused.is_empty());
        assert_eq!(Policy::default().with_text("depth=9,untrusted").unwrap(), Policy::untrusted());
        assert_eq!(Policy::default().with_text("").unwrap(), Policy::default());
    }

    #[test]
    fn other_items_are_refused() {
        for text in
            ["x", "trusted", "follow", "follow=", "depth=-1", "virtual-size=x", "timeout=1.5", "Follow=all"]
        {
            assert!(Policy::default().with_text(text).is_err(), "{text}");
        }
        let error = Policy::untrusted().with_text("refuse=zstd+lzma").unwrap_err().to_string();
        assert!(
            error.starts_with("policy 'refuse=zstd+lzma' is not known, allowed are backing-file,"),
            "{error}"
        );
    }
}
