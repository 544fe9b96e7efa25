//! How a disk is opened.

use super::policy::{Follow, Policy};
use qcow2_codec::{Deflate, Zstd};
use qcow2_core::{Codecs, DamageObserver, Layers};
use qcow2_io::{CacheMode, MismatchObserver, OpenFiles};
use std::fmt;
use std::sync::Arc;

/// How a disk is opened; the names of what it consists of are not its business.
#[derive(Clone)]
#[non_exhaustive]
pub struct OpenOptions {
    /// Whether it is changed.
    pub writable: bool,
    /// How changes reach the medium.
    pub cache: CacheMode,
    /// Which of the files that it names are opened.
    pub layers: Layers,
    /// Which names inside images lead anywhere, and what opening may cost.
    pub policy: Policy,
    /// How many bytes a second are written at most.
    pub bytes_per_second: Option<u64>,
    /// How clusters are compressed; `None`: as is best by default.
    pub codecs: Option<Codecs>,
    /// Whether damaged images are opened for writing too.
    pub for_repair: bool,
    /// Who else may write to its files meanwhile.
    pub sharing: Sharing,
    /// Whether a raw disk's length is changed.
    pub resizes: bool,
    /// Whether other programs' locks are ignored: for reading only.
    pub force_share: bool,
    /// Whether the layers below an overlay can be exchanged while the disk is used.
    pub exchangeable: bool,
    /// The files that are open together with those of this disk, none of which is written to and opened a
    /// second time; `None`: nobody looks.
    pub open_files: Option<OpenFiles>,
    /// Is told of damage in the images; `None`: errors say it.
    pub damage_observer: Option<Arc<dyn DamageObserver>>,
    /// Is told where an image differs from the copy that it is compared with; `None`: errors say it.
    pub mismatch_observer: Option<Arc<dyn MismatchObserver>>,
}

/// Who else may write to the files of an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sharing {
    /// As QEMU has it for each format: others may write to raw disks, and keep the length of data files.
    #[default]
    ByFormat,
    /// Nobody to the image itself, whatever it is.
    TopAlone,
    /// Nobody to any of them.
    Alone,
    /// This program has the file open elsewhere, with locks that exclude other writers.
    Held,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for OpenOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenOptions")
            .field("writable", &self.writable)
            .field("cache", &self.cache)
            .field("layers", &self.layers)
            .field("policy", &self.policy)
            .finish_non_exhaustive()
    }
}

impl OpenOptions {
    /// For reading; follows no name inside images.
    pub fn new() -> Self {
        Self {
            writable: false,
            cache: CacheMode::Writeback,
            layers: Layers::Follow,
            policy: Policy::default(),
            bytes_per_second: None,
            codecs: None,
            for_repair: false,
            sharing: Sharing::ByFormat,
            resizes: false,
            force_share: false,
            exchangeable: false,
            open_files: None,
            damage_observer: None,
            mismatch_observer: None,
        }
    }

    /// For changes too.
    #[must_use]
    pub fn writable(self) -> Self {
        Self { writable: true, ..self }
    }

    /// For looking at it, and at nothing that it names.
    #[must_use]
    pub fn top_only(self) -> Self {
        self.with_layers(Layers::TopOnly)
    }

    /// With somebody who is told of damage in the images.
    #[must_use]
    pub fn with_damage_observer(self, observer: Arc<dyn DamageObserver>) -> Self {
        Self { damage_observer: Some(observer), ..self }
    }

    /// With somebody who is told where an image differs from the copy that it is compared with.
    #[must_use]
    pub fn with_mismatch_observer(self, observer: Arc<dyn MismatchObserver>) -> Self {
        Self { mismatch_observer: Some(observer), ..self }
    }

    /// With another cache mode.
    #[must_use]
    pub fn with_cache(self, cache: CacheMode) -> Self {
        Self { cache, ..self }
    }

    /// With other layers of the chain.
    #[must_use]
    pub fn with_layers(self, layers: Layers) -> Self {
        Self { layers, ..self }
    }

    /// With other names inside images followed.
    #[must_use]
    pub fn with_follow(self, follow: Follow) -> Self {
        let policy = self.policy.clone().with_follow(follow);
        self.with_policy(policy)
    }

    /// With another policy.
    #[must_use]
    pub fn with_policy(self, policy: Policy) -> Self {
        Self { policy, ..self }
    }

    /// With other company.
    #[must_use]
    pub fn with_sharing(self, sharing: Sharing) -> Self {
        Self { sharing, ..self }
    }

    /// With other programs' locks ignored, or not.
    #[must_use]
    pub fn with_force_share(self, force_share: bool) -> Self {
        Self { force_share, ..self }
    }

    /// With layers that can be exchanged while the disk is used, or not.
    #[must_use]
    pub fn with_exchangeable(self, exchangeable: bool) -> Self {
        Self { exchangeable, ..self }
    }

    /// With the files that are open together with those of this disk.
    #[must_use]
    pub fn among(self, open_files: &OpenFiles) -> Self {
        Self { open_files: Some(open_files.clone()), ..self }
    }

    /// The same for the backing file; a writable one is changed below other disks, which do not expect it.
    pub(crate) fn below(&self, writable: bool) -> Self {
        let sharing = match self.sharing {
            Sharing::Alone | Sharing::Held => self.sharing,
            _ if writable => Sharing::TopAlone,
            _ => Sharing::ByFormat,
        };
        Self { writable, sharing, resizes: false, ..self.clone() }
    }

    /// The compression methods: the given ones, or all.
    pub fn codecs(&self) -> Codecs {
        self.codecs.clone().unwrap_or_else(default_codecs)
    }

    /// Whether only the image itself is looked at.
    pub(crate) fn looks(&self) -> bool {
        self.layers == Layers::TopOnly
    }

    /// What files may be opened because an image names them.
    pub(crate) fn files(&self) -> qcow2_io::Policy {
        if self.looks() { qcow2_io::Policy::Deny } else { self.policy.follow.files() }
    }

    /// With another limit for writes; `None`: none.
    #[must_use]
    pub fn with_bytes_per_second(self, bytes_per_second: Option<u64>) -> Self {
        Self { bytes_per_second, ..self }
    }

    /// With other compression methods at hand.
    #[must_use]
    pub fn with_codecs(self, codecs: Codecs) -> Self {
        Self { codecs: Some(codecs), ..self }
    }

    /// For repair, or not.
    #[must_use]
    pub fn with_for_repair(self, for_repair: bool) -> Self {
        Self { for_repair, ..self }
    }

    /// With the length of the disk changed, or not.
    #[must_use]
    pub fn with_resizes(self, resizes: bool) -> Self {
        Self { resizes, ..self }
    }
}

/// Every compression method.
pub(crate) fn default_codecs() -> Codecs {
    Codecs::new(Arc::new(Deflate::default()), Arc::new(Zstd::default()))
}
