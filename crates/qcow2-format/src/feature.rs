//! The three feature words of a version 3 header, and the table that names their bits. Spec: "Header",
//! "Feature name table".
//!
//! A feature name table entry, 48 bytes:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 1 | word: 0 incompatible, 1 compatible, 2 autoclear |
//! | 1 | 1 | bit number, 0 to 63 |
//! | 2 | 46 | name, padded with zeroes; no terminator if it fills the field |

use alloc::string::String;
use alloc::vec::Vec;

/// Length of a feature name table entry in bytes.
const NAME_ENTRY_LEN: usize = 48;
/// Length of its name field in bytes.
const NAME_LEN: usize = 46;

/// The three feature words of a header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Features {
    /// Features that a program must know to open the image.
    pub incompatible: IncompatibleFeatures,
    /// Features that a program may ignore.
    pub compatible: CompatibleFeatures,
    /// Features that a program which does not know them must clear before it writes.
    pub autoclear: AutoclearFeatures,
}

macro_rules! feature_word {
    ($(#[$doc:meta])* $name:ident { $($(#[$bit_doc:meta])* $bit:ident = $number:literal;)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
        pub struct $name(u64);

        impl $name {
            $($(#[$bit_doc])* pub const $bit: Self = Self(1 << $number);)*
            /// All bits that this crate knows.
            pub const KNOWN: Self = Self(0 $(| 1 << $number)*);
            /// No bits.
            pub const NONE: Self = Self(0);

            /// A set from raw bits, known or unknown.
            pub const fn from_bits(bits: u64) -> Self {
                Self(bits)
            }

            /// The raw bits, as stored in the header.
            pub const fn bits(self) -> u64 {
                self.0
            }

            /// True if all bits of `other` are set.
            pub const fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            /// True if no bits are set.
            pub const fn is_empty(self) -> bool {
                self.0 == 0
            }

            /// A copy with the bits of `other` set (`on`) or cleared.
            #[must_use]
            pub const fn with(self, other: Self, on: bool) -> Self {
                if on { Self(self.0 | other.0) } else { Self(self.0 & !other.0) }
            }

            /// Sets (`on`) or clears the bits of `other`.
            pub fn set(&mut self, other: Self, on: bool) {
                *self = self.with(other, on);
            }

            /// The bits that this crate does not know.
            #[must_use]
            pub const fn unknown(self) -> Self {
                Self(self.0 & !Self::KNOWN.0)
            }
        }
    };
}

feature_word!(
    /// A program that does not know one of these bits must refuse to open the image.
    IncompatibleFeatures {
        /// Refcounts may be stale: a writer with lazy refcounts has the image open, or did not close it
        /// cleanly.
        DIRTY = 0;
        /// Metadata is damaged. Only a repair may write to the image.
        CORRUPT = 1;
        /// Guest data is stored in an external data file.
        DATA_FILE = 2;
        /// The compression type is not deflate.
        COMPRESSION_TYPE = 3;
        /// L2 entries are 16 bytes, with 32 subclusters per cluster.
        EXTENDED_L2 = 4;
    }
);

feature_word!(
    /// A program may ignore unknown bits here, but must preserve them.
    CompatibleFeatures {
        /// A writer may postpone refcount updates while the dirty bit is set.
        LAZY_REFCOUNTS = 0;
    }
);

feature_word!(
    /// A program that modifies the image must first clear the bits here that it does not know.
    AutoclearFeatures {
        /// The bitmaps extension is consistent with the image.
        BITMAPS = 0;
        /// The external data file is a raw image of the guest disk, byte for byte.
        RAW_DATA_FILE = 1;
    }
);

/// The feature word that a named bit belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeatureWord {
    /// The incompatible features.
    Incompatible,
    /// The compatible features.
    Compatible,
    /// The autoclear features.
    Autoclear,
    /// A word number that the specification does not define.
    Other(u8),
}

impl FeatureWord {
    fn from_number(number: u8) -> Self {
        match number {
            0 => Self::Incompatible,
            1 => Self::Compatible,
            2 => Self::Autoclear,
            other => Self::Other(other),
        }
    }

    fn number(self) -> u8 {
        match self {
            Self::Incompatible => 0,
            Self::Compatible => 1,
            Self::Autoclear => 2,
            Self::Other(other) => other,
        }
    }
}

/// One entry of the feature name table. Lets a program name a bit that it does not know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeatureName {
    /// The word that contains the bit.
    pub word: FeatureWord,
    /// The bit number; valid are 0 to 63.
    pub bit: u8,
    name: [u8; NAME_LEN],
}

impl FeatureName {
    /// Names a bit. `None` if `name` is longer than 46 bytes.
    pub fn new(word: FeatureWord, bit: u8, name: &str) -> Option<Self> {
        let mut field = [0; NAME_LEN];
        field.get_mut(..name.len())?.copy_from_slice(name.as_bytes());
        Some(Self { word, bit, name: field })
    }

    /// The name up to its first zero byte, with invalid UTF-8 replaced.
    pub fn name(&self) -> String {
        let len = self.name.iter().position(|&b| b == 0).unwrap_or(NAME_LEN);
        String::from_utf8_lossy(&self.name[..len]).into_owned()
    }

    /// The eight-entry table that QEMU writes into version 3 headers if clusters are larger than 4 KiB.
    pub fn standard() -> Vec<Self> {
        use FeatureWord::{Autoclear, Compatible, Incompatible};
        let table = [
            (Incompatible, 0, "dirty bit"),
            (Incompatible, 1, "corrupt bit"),
            (Incompatible, 2, "external data file"),
            (Incompatible, 3, "compression type"),
            (Incompatible, 4, "extended L2 entries"),
            (Compatible, 0, "lazy refcounts"),
            (Autoclear, 0, "bitmaps"),
            (Autoclear, 1, "raw external data"),
        ];
        table.iter().filter_map(|&(word, bit, name)| Self::new(word, bit, name)).collect()
    }

    /// Parses a table. Like QEMU, ignores a partial entry at the end.
    pub fn parse_table(bytes: &[u8]) -> Vec<Self> {
        let entry = |e: &[u8]| {
            let mut name = [0; NAME_LEN];
            name.copy_from_slice(&e[2..NAME_ENTRY_LEN]);
            Self { word: FeatureWord::from_number(e[0]), bit: e[1], name }
        };
        bytes.chunks_exact(NAME_ENTRY_LEN).map(entry).collect()
    }

    /// Encodes a table, 48 bytes per entry.
    pub fn encode_table(table: &[Self]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(table.len() * NAME_ENTRY_LEN);
        for entry in table {
            bytes.extend_from_slice(&[entry.word.number(), entry.bit]);
            bytes.extend_from_slice(&entry.name);
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_bits_are_preserved() {
        let mut word = IncompatibleFeatures::from_bits(1 << 63 | 1);
        assert!(word.contains(IncompatibleFeatures::DIRTY));
        assert_eq!(word.unknown().bits(), 1 << 63);
        word.set(IncompatibleFeatures::DIRTY, false);
        word.set(IncompatibleFeatures::EXTENDED_L2, true);
        assert_eq!(word.bits(), 1 << 63 | 1 << 4);
    }

    #[test]
    fn a_full_name_has_no_terminator() {
        let name = "n".repeat(46);
        let entry = FeatureName::new(FeatureWord::Other(9), 63, &name).unwrap();
        assert_eq!(entry.name(), name);
        assert_eq!(FeatureName::new(FeatureWord::Compatible, 0, &"n".repeat(47)), None);
        let bytes = FeatureName::encode_table(core::slice::from_ref(&entry));
        assert_eq!(FeatureName::parse_table(&bytes), [entry]);
    }

    #[test]
    fn partial_last_entry_is_ignored() {
        let mut bytes = FeatureName::encode_table(&FeatureName::standard());
        assert_eq!(bytes.len(), 384);
        bytes.push(1);
        assert_eq!(FeatureName::parse_table(&bytes), FeatureName::standard());
    }
}
